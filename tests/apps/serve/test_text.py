"""Text as its tokens come."""

from hypothesis import given
from hypothesis import strategies as st

from aki.apps.serve.text import AnswerText, StopStrings
from aki.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["one two three four", "ein Ei, zwei Eier"], 300)


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


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_pieces_are_the_decoded_text_without_blanks_before_it(text):
    tokens = TOKENIZER(text)["input_ids"]
    answer = AnswerText(TOKENIZER, [])
    said = [answer.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in said) or "\ufffd" in text
    assert "".join(said) + answer.end() == TOKENIZER.decode(tokens, skip_special_tokens=True).lstrip()


@given(st.lists(st.integers(7, 262), max_size=12))
def test_bytes_that_are_no_text_are_shown_as_such_and_nothing_is_lost(tokens):
    answer = AnswerText(TOKENIZER, [])
    said = "".join([answer.push(token) for token in tokens]) + answer.end()
    assert said == TOKENIZER.decode(tokens, skip_special_tokens=True).lstrip()


def test_special_tokens_are_not_text():
    answer = AnswerText(TOKENIZER, [])
    ids = TOKENIZER("one<|assistant|> two")["input_ids"]
    assert "".join([answer.push(token) for token in ids]) + answer.end() == "one two"
