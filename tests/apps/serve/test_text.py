"""Text as its tokens come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from aki.apps.serve.text import AnswerText, StopStrings
from aki.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["one two three four", "ein Ei, zwei Eier"], 300)


def llama_like():
    """A tokenizer of Llama's and Phi-3's kind: blanks are marks, and what is in no vocabulary is bytes."""
    words = ["▁", "o", "n", "e", "▁o", "ne", "▁one", "▁▁", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "o"), ("n", "e"), ("▁o", "ne"), ("▁", "▁")]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA_LIKE = llama_like()


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The oracle: read letter by letter, until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_however_the_text_is_cut(pieces, stops):
    strings, said = StopStrings(stops), ""
    wanted, found = cut("".join(pieces), stops)
    for piece in pieces:
        said += strings.push(piece)
        assert wanted.startswith(said), "something was said that has to be taken back"
    assert said + strings.end() == wanted
    assert strings.found == found


@pytest.mark.parametrize("tokenizer", [TOKENIZER, LLAMA_LIKE], ids=["bytes", "llama-like"])
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("one \né🦓"), max_size=20))
def test_pieces_are_the_decoded_text_without_blanks_before_it(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    answer = AnswerText(tokenizer, [])
    said = [answer.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in said) or "\ufffd" in text
    assert "".join(said) + answer.end() == tokenizer.decode(tokens, skip_special_tokens=True).lstrip()


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["<0x0A>", "<0xF0>", "▁one"], "\ufffd one"),
        (["ne", "<0xBD>", "é"], "ne\ufffdé"),
        (["<0x65>", "<0xF0>", "<0x9F>"], "e\ufffd\ufffd"),
        (["▁one", "<0x0A>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x93>", "▁one"], "one\n🦓 one"),
    ],
)
def test_bytes_between_words_of_a_llama_like_tokenizer(tokens, said):
    answer = AnswerText(LLAMA_LIKE, [])
    pieces = [answer.push(token) for token in LLAMA_LIKE.convert_tokens_to_ids(tokens)]
    assert "".join(pieces) + answer.end() == said


@given(st.lists(st.integers(3, len(LLAMA_LIKE) - 1), max_size=12))
def test_no_tokens_of_a_llama_like_tokenizer_are_lost(tokens):
    answer = AnswerText(LLAMA_LIKE, [])
    said = "".join([answer.push(token) for token in tokens]) + answer.end()
    for token in tokens:
        text = LLAMA_LIKE.convert_ids_to_tokens(token).replace("▁", "")
        if not text.startswith("<0x"):
            place = said.index(text)
            said = said[place + len(text) :]


@given(st.lists(st.integers(7, 262), max_size=12))
def test_bytes_that_are_no_text_are_shown_as_such_and_nothing_is_lost(tokens):
    answer = AnswerText(TOKENIZER, [])
    said = "".join([answer.push(token) for token in tokens]) + answer.end()
    assert said == TOKENIZER.decode(tokens, skip_special_tokens=True).lstrip()


def test_special_tokens_are_not_text():
    answer = AnswerText(TOKENIZER, [])
    ids = TOKENIZER("one<|assistant|> two")["input_ids"]
    assert "".join([answer.push(token) for token in ids]) + answer.end() == "one two"
