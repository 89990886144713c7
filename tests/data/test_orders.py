"""Image first, text first, both: what a model is shown, token by token."""

import pytest
import torch

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.orders import ORDERS, InEachOrder, template_in_order
from aki.data.schema import Sample, assistant
from aki.layout import IGNORE_INDEX
from aki.models.templates import AKI, CAPTION, SHORT, echo, text_first
from aki.training.recipe import RecipeError, StageRecipe, build
from aki.training.stages import build_model


@pytest.fixture
def processor(tiny_recipe):
    torch.manual_seed(0)
    return build_model(tiny_recipe)[1]


def collators(processor, name, order):
    return [ChatCollator(processor, 512, template_in_order(processor, name, one)) for one in ORDERS[order]]


def read(processor, batch, row=0) -> tuple[str, str]:
    """What stands in a row without padding, pictures shortened to one placeholder, and what of it is learned."""
    real = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
    picture = "<image>" * processor.image_seq_length
    return processor.tokenizer.decode(ids).replace(picture, "<image>"), processor.tokenizer.decode(
        labels[labels != IGNORE_INDEX]
    )


def test_a_question_in_either_order(processor):
    data = DigitScenes("train", "question", 2, 24)
    question, answer = data[0].question, data[0].answer
    for order, prompt in (
        ("image_first", f"<image> {question}"),
        ("text_first", f" {question}<image>"),
        ("echo", f" {question}<image> {question}"),
    ):
        (collate,) = collators(processor, "default", order)
        batch = collate([data[0]])
        whole, learned = read(processor, batch)
        assert whole == f"<|user|>{prompt}<|assistant|> {answer}<|endoftext|>"
        assert learned == f" {answer}<|endoftext|>"
        prompted = batch["prompt_block_ids"][0] == 0
        assert processor.tokenizer.decode(batch["input_ids"][0][prompted]).endswith("<|assistant|>")


def test_a_caption_in_either_order(processor):
    data = DigitScenes("train", "caption", 2, 24)
    said = f" {data[0].answer}<|endofchunk|><|endoftext|>"
    for order, wanted in (("image_first", f"<image>{said}"), ("text_first", f"{said}<image>")):
        (collate,) = collators(processor, "caption", order)
        assert read(processor, collate([data[0]])) == (wanted, said)


def test_both_is_each_sample_in_both_orders_in_one_batch(processor):
    data = DigitScenes("train", "question", 8, 24)
    samples = [data[i] for i in range(3)]
    first, second = collators(processor, "default", "both")
    batch = InEachOrder([first, second], processor.tokenizer.pad_token_id)(samples)
    assert batch["input_ids"].shape[0] == batch["pixel_values"].shape[0] == 6
    assert torch.equal(batch["pixel_values"][:3], batch["pixel_values"][3:])
    for row in range(3):
        assert read(processor, batch, row) == read(processor, first(samples), row)
        assert read(processor, batch, 3 + row) == read(processor, second(samples), row)
    assert (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == 2 * (first(samples)["labels"][:, 1:] != IGNORE_INDEX).sum()


def test_orders_of_unequal_length_are_padded(processor):
    data = DigitScenes("train", "question", 8, 24)
    short, long = collators(processor, "default", "image_first")[0], collators(processor, "caption", "image_first")[0]
    captions = DigitScenes("train", "caption", 8, 24)
    batch = InEachOrder([short, lambda _: long([captions[0]])], processor.tokenizer.pad_token_id)([data[0]])
    assert read(processor, batch, 0) == read(processor, short([data[0]]))
    assert read(processor, batch, 1) == read(processor, long([captions[0]]))
    assert (batch["labels"][0][batch["attention_mask"][0] == 0] == IGNORE_INDEX).all()
    assert (batch["prompt_block_ids"][0][batch["attention_mask"][0] == 0] == -1).all()


def test_an_echo_repeats_what_has_a_picture_and_nothing_else(processor):
    samples = [DigitScenes("train", task, 2, 24)[0] for task in ("question", "caption")]
    (question,), (caption,) = (collators(processor, name, "echo") for name in ("default", "caption"))
    assert read(processor, caption([samples[1]]))[0].count(samples[1].answer) == 1
    earlier = [{"role": "user", "content": [{"type": "text", "text": "ready?"}]}, assistant("yes")]
    chat = Sample([*earlier, *samples[0].messages], "digits", "0")
    whole = read(processor, question([chat]))[0]
    assert whole.count("ready") == 1
    assert whole.count(samples[0].question) == 2


def test_a_template_of_others_is_refused():
    assert text_first(SHORT) != SHORT
    assert text_first(AKI) != AKI
    assert text_first(CAPTION) != CAPTION
    for turn in (text_first, echo):
        with pytest.raises(ValueError, match="only AKI's own"):
            turn("{% for message in messages %}{{ message.content }}{% endfor %}")


def test_what_a_stage_cannot_do_is_a_sentence(tiny_recipe):
    values = {**vars(tiny_recipe.sft)}
    with pytest.raises(
        RecipeError, match="order 'both_ways' is not known; there are image_first, text_first, echo, both"
    ):
        build(StageRecipe, values | {"order": "both_ways"}, "sft")
    with pytest.raises(RecipeError, match="must fit a packed row 2 times"):
        build(StageRecipe, values | {"order": "both", "packing": True, "max_length": 512, "row_tokens": 1000}, "sft")


def test_text_first_captions_teach_the_connector_nothing_and_questions_do(tiny_recipe):
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    model.config.attention_rule = "causal"

    def gradient(task, name, order) -> float:
        data = DigitScenes("train", task, 4, 24)
        (collate,) = collators(processor, name, order)
        model.zero_grad()
        model(**collate([data[i] for i in range(4)])).loss.backward()
        return sum(float(p.grad.abs().sum()) for p in model.model.connector.parameters() if p.grad is not None)

    assert gradient("caption", "caption", "text_first") == 0
    assert gradient("caption", "caption", "image_first") > 0
    assert gradient("question", "default", "text_first") > 0
