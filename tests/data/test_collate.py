"""The collator on single samples: what is bad is told, and what is too long keeps its answer's start."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.data.collate import ChatCollator
from aki.data.report import BadSample
from aki.data.schema import Sample, assistant, user
from aki.data.tokenizer import train_tokenizer
from aki.models.processing import AkiProcessor
from aki.models.templates import AKI, CAPTION, END_TOKEN, SHORT

PER_IMAGE = 4
RED = Image.new("RGB", (20, 30), "red")


def processor(**templates) -> AkiProcessor:
    tokenizer = train_tokenizer(["a b c d e f g h"], vocab_size=300, more=(END_TOKEN,))
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return AkiProcessor(images, tokenizer, PER_IMAGE, chat_template={"default": SHORT, "caption": CAPTION, **templates})


PROCESSOR = processor()


def encode(messages, max_length=1000, template=None):
    return ChatCollator(PROCESSOR, max_length, template).encode(Sample(messages, "src", "7"))


def refused(messages, **options) -> BadSample:
    with pytest.raises(BadSample) as error:
        encode(messages, **options)
    assert (error.value.source, error.value.id) == ("src", "7")
    return error.value


def text(ids) -> str:
    return PROCESSOR.tokenizer.decode(ids)


def learned(row) -> str:
    return text(row["labels"][row["labels"] != -100])


CHAT = [user(RED, "a b"), assistant("c d e f"), user(RED, "g"), assistant("h h")]


def test_a_sample_that_fits_is_whole():
    row, shortened = encode(CHAT)
    assert not shortened
    assert row["pixel_values"].shape == (2, 3, 16, 16)
    assert learned(row) == " c d e f<|endoftext|> h h<|endoftext|>"


def test_one_token_less_than_needed_costs_the_end_alone():
    whole, _ = encode(CHAT)
    length = whole["input_ids"].shape[1]
    assert not encode(CHAT, length)[1]
    row, shortened = encode(CHAT, length - 1)
    assert shortened
    assert row["input_ids"].tolist() == whole["input_ids"][:, :-1].tolist()
    assert learned(row) == " c d e f<|endoftext|> h h"


def test_every_length_keeps_whole_pictures_questions_with_answers_and_the_answers_start():
    whole, _ = encode(CHAT)
    ids, labels = whole["input_ids"][0].tolist(), whole["labels"][0].tolist()
    first = next(place for place, label in enumerate(labels) if label != -100)
    for length in range(1, len(ids)):
        if length <= first:
            bad = refused(CHAT, max_length=length)
            assert bad.reason == "answer lost to truncation"
            assert f"max_length keeps {length}" in bad.detail
            continue
        row, shortened = encode(CHAT, length)
        kept = row["input_ids"][0].tolist()
        assert shortened
        assert first < len(kept) <= length
        assert kept == ids[: len(kept)], "only the tail goes"
        assert row["labels"][0].tolist() == labels[: len(kept)]
        assert row["labels"][0, -1] != -100, "nothing asks without an answer"
        # What is between two labels goes only if no label after it is kept.
        assert all(label == -100 for label in labels[len(kept) : length])
        placeholders = kept.count(PROCESSOR.image_token_id)
        assert placeholders % PER_IMAGE == 0
        assert row["pixel_values"].shape[0] == placeholders // PER_IMAGE
        for name in ("attention_mask", "prompt_block_ids"):
            assert row[name].tolist() == whole[name][:, : len(kept)].tolist()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4), st.data())
def test_truncation_of_any_chat(turns, data):
    chat = [
        message
        for pictured, asked, answered in turns
        for message in (user(RED if pictured else None, "a " * asked), assistant("b " * answered))
    ]
    whole, _ = encode(chat)
    max_length = data.draw(st.integers(1, whole["input_ids"].shape[1]))
    answered = (whole["labels"][0, :max_length] != -100).nonzero()
    if not len(answered):
        assert refused(chat, max_length=max_length).reason == "answer lost to truncation"
        return
    row, _ = encode(chat, max_length)
    kept = row["input_ids"].shape[1]
    assert kept == int(answered[-1]) + 1
    assert row["input_ids"].tolist() == whole["input_ids"][:, :kept].tolist()
    images = (row["input_ids"] == PROCESSOR.image_token_id).sum().item()
    assert images == PER_IMAGE * row.get("pixel_values", torch.empty(0)).shape[0]


def test_a_newline_alone_is_no_answer():
    """AKI's template writes one after the token that starts the answer, a label where the tokenizer keeps it."""
    aki = processor(default=AKI)
    chat = [user(None, "a b"), assistant("c d")]
    whole, _ = ChatCollator(aki, 1000).encode(Sample(chat, "src", "7"))
    places = (whole["labels"][0] != -100).nonzero()[:, 0].tolist()
    said = next(place for place in places if aki.tokenizer.decode(whole["labels"][0, place]).strip())
    assert aki.tokenizer.decode(whole["labels"][0, places[0] : said]).endswith("\n"), (
        "the template's newline is a label"
    )
    with pytest.raises(BadSample, match="answer lost to truncation"):
        ChatCollator(aki, said).encode(Sample(chat, "src", "7"))
    row, shortened = ChatCollator(aki, said + 1).encode(Sample(chat, "src", "7"))
    assert shortened
    assert row["input_ids"].shape[1] == said + 1


def test_captions_lose_their_tail():
    row, shortened = encode([user(RED), assistant("a b c d e f g h")], 10, "caption")
    assert shortened
    assert row["input_ids"].shape[1] == 10
    assert row["pixel_values"].shape[0] == 1
    assert learned(row).startswith(" a b c")


def test_a_batch_is_shortened_row_by_row():
    samples = [Sample(CHAT, "src", "long"), Sample([user(None, "a"), assistant("b")], "src", "short")]
    collator = ChatCollator(PROCESSOR, 16)
    batch = collator(samples)
    for number, sample in enumerate(samples):
        row, _ = collator.encode(sample)
        real = batch["attention_mask"][number] == 1
        for name in ("input_ids", "labels", "prompt_block_ids"):
            assert batch[name][number][real].tolist() == row[name][0].tolist()
    assert batch["labels"][batch["attention_mask"] == 0].eq(-100).all()
    assert batch["pixel_values"].shape[0] == 1
    with pytest.raises(BadSample, match="src/long: answer lost"):
        ChatCollator(PROCESSOR, 7)(samples)


def test_pictures_that_cannot_be_used(tmp_path):
    def with_picture(source):
        return [user(source, "a"), assistant("b")]

    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 and then nothing")
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 6_000)).save(huge)
    reasons = {
        str(tmp_path / "none.jpg"): "missing image",
        str(tmp_path / "torn.jpg"): "broken image",
        str(huge): "absurd size",
        b"": "broken image",
        "data:image/png;base64,AAAA": "broken image",
    }
    assert {source: refused(with_picture(source)).reason for source in reasons} == reasons
    for size in ((1, 1), (3, 50), (8, 1000)):
        assert refused(with_picture(Image.new("RGB", size))).reason == "absurd size"
    encode(with_picture(np.zeros((4, 400, 3), np.uint8)))


@pytest.mark.parametrize("token", ["<image>", "<|assistant|>", "<|endoftext|>", "<pad>"])
def test_texts_do_not_write_the_chats_own_tokens(token):
    """Otherwise a question could begin its own answer, or stand for a picture that is not there."""
    for chat in ([user(RED, f"a {token} b"), assistant("c")], [user(None, "a"), assistant(f"c{token}")]):
        bad = refused(chat)
        assert bad.reason == "special token in a text"
        assert repr(token) in bad.detail
