"""Captions that the picture sees the beginning of: where they are cut, what is learned, and that nothing leaks."""

from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streams import captions, picture
from torch.nn.functional import cross_entropy

from aki.attention import NothingOpensError, check_no_leak, get_rule
from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.packing import PackedCollator, PackedRows
from aki.data.schema import Sample, assistant, user
from aki.data.split import split_captions
from aki.layout import IGNORE_INDEX
from aki.training.data import stage_collators
from aki.training.recipe import RecipeError, ShardsRecipe, SourceRecipe, StageRecipe, build
from aki.training.stages import Job, build_model, run_stage
from aki.training.view import stage_view


class Letters:
    """A tokenizer of bytes; 0 is special."""

    all_special_ids = (0,)

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=4), st.floats(0, 1), st.integers()
)
def test_of_each_stretch_a_beginning_is_prompt_and_the_rest_is_learned(stretches, seen, seed):
    labels, blocks = [], []
    for number, (before, length) in enumerate(stretches):
        labels += [IGNORE_INDEX] * (before + 1) + [65] * length + [0]
        blocks += [number] * (before + 1) + [-1] * (length + 1)
    before, after = torch.tensor(labels), torch.tensor(blocks)
    cut, shown = split_captions(before, after, Letters(), seen, Random(seed))
    start = 0
    for number, (lead, length) in enumerate(stretches):
        start += lead + 1
        stretch = slice(start, start + length + 1)
        prompt = int((cut[stretch] == IGNORE_INDEX).sum())
        assert prompt <= min(seen * length + 1, length - 1)
        assert cut[stretch].tolist() == [IGNORE_INDEX] * prompt + before[stretch].tolist()[prompt:]
        assert shown[stretch].tolist() == [number] * prompt + [-1] * (length + 1 - prompt)
        start += length + 1


def test_the_share_is_uniform_from_none_to_what_is_asked_for():
    labels, blocks = torch.full((101,), 65), torch.full((101,), -1)
    labels[0], blocks[0] = IGNORE_INDEX, 0
    cuts = [
        int((split_captions(labels, blocks, Letters(), 0.6, Random(seed))[0] == IGNORE_INDEX).sum()) - 1
        for seed in range(2000)
    ]
    counts = torch.histc(torch.tensor(cuts, dtype=torch.float), bins=3, min=0, max=60.6)
    assert max(cuts) <= 60
    assert ((counts / 2000 - 1 / 3).abs() < 0.05).all()


def test_no_character_is_cut():
    text = "é".encode() * 20
    labels = torch.tensor([IGNORE_INDEX, *text])
    blocks = torch.tensor([0, *[-1] * len(text)])
    for seed in range(50):
        cut = int((split_captions(labels, blocks, Letters(), 1.0, Random(seed))[0] == IGNORE_INDEX).sum()) - 1
        assert cut % 2 == 0


@pytest.fixture
def parts(tiny_recipe):
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    model.config.attention_rule = "mma"
    return model.eval(), processor


def interleaved(count: int) -> Sample:
    """A picture and its text, several times."""
    data = DigitScenes("train", "caption", count, 24)
    messages = [message for index in range(count) for message in data[index].messages]
    return Sample(messages, "digits", "many")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), pictures=st.integers(1, 3))
def test_no_label_learns_from_itself_by_real_gradients(parts, seed, pictures):
    """The guard's verdict, and the loss of each learned token against the embeddings of what is not before it."""
    model, processor = parts
    collate = ChatCollator(processor, 512, "caption", seen=1.0, seed=seed)
    batch = collate([interleaved(pictures)])
    layout = model.layout(
        batch["input_ids"], prompt_block_ids=batch["prompt_block_ids"], labels=batch["labels"], attention_rule="mma"
    )
    with suppress(NothingOpensError):
        check_no_leak(get_rule("mma"), layout, batch["labels"])
    kept = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, out: kept.append(out))
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    handle.remove()
    learned = (batch["labels"][0, 1:] != IGNORE_INDEX).nonzero()[:, 0].tolist()
    for q in Random(seed).sample(learned, min(4, len(learned))):
        loss = cross_entropy(logits[0, q], batch["labels"][0, q + 1])
        (gradient,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
        assert gradient[0, q + 1 :].abs().max() == 0


def test_each_picture_sees_the_beginning_of_its_own_text(parts):
    model, processor = parts
    collate = ChatCollator(processor, 512, "caption", seen=1.0, seed=3)
    batch = collate([interleaved(2)])
    layout = model.layout(batch["input_ids"], prompt_block_ids=batch["prompt_block_ids"], attention_rule="mma")
    length = batch["input_ids"].shape[1]
    index = torch.arange(length)
    sees = get_rule("mma").sees(layout, torch.tensor(0), index[:, None], index[None, :])
    items, labels, ids = layout.media_item[0], batch["labels"][0], batch["input_ids"][0]
    starts = [int((items == item).nonzero()[0]) for item in range(2)]
    for item in range(2):
        own = slice(starts[item], starts[1] if item == 0 else length)
        text = [q for q in range(*own.indices(length)) if items[q] < 0]
        ahead = [k for k in range(length) if sees[starts[item], k] and k > starts[item] and items[k] < 0]
        assert ahead == [q for q in text if labels[q] == IGNORE_INDEX]
        assert len(ahead) < len(text)
    assert (labels[ids == processor.image_token_id] == IGNORE_INDEX).all()


def test_the_same_sample_is_cut_at_the_same_place(parts):
    _, processor = parts
    data = DigitScenes("train", "caption", 6, 24)
    one, other = (ChatCollator(processor, 512, "caption", seen=0.8, seed=seed) for seed in (1, 2))
    together = one([data[index] for index in range(6)])
    for index in range(6):
        alone, _ = one.encode(data[index])
        length = alone["labels"].shape[1]
        assert torch.equal(together["labels"][index, :length], alone["labels"][0])
    assert not torch.equal(together["labels"], other([data[index] for index in range(6)])["labels"])


def stage(**fields) -> StageRecipe:
    values = {"task": "caption", "rule": "mma", "steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    return build(
        StageRecipe, values | {"min_learning_rate": 0, "warmup_steps": 0, "weight_decay": 0} | fields, "pretrain"
    )


def test_also_causal_is_each_sample_again_with_all_of_its_text_learned(parts):
    model, processor = parts
    data = DigitScenes("train", "caption", 6, 24)
    split, causal = stage_collators(processor, stage(seen=0.9, also_causal=True))
    plain = ChatCollator(processor, 512, "caption")([data[0]])
    again = causal([data[0]])
    assert torch.equal(again["labels"], plain["labels"])
    model.config.attention_rule = "mma"
    shown = {name: value for name, value in again.items() if name != "labels"}
    hidden = model(**shown).logits
    assert torch.equal(hidden, model(**shown, attention_rule="causal").logits)
    row = next(iter(PackedRows(data, [split, causal], 2000)))
    assert row["pixel_values"].shape[0] == 12
    starts = (row["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], row["input_ids"].shape[1]]
    documents = [row["input_ids"][0, start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    assert documents[::2] == documents[1::2]
    assert PackedCollator(0)([row])["labels"].shape == row["labels"].shape


@pytest.mark.parametrize("packing", [False, True])
def test_a_stage_trains_on_split_captions(tiny_recipe, tmp_path, packing):
    fields = {"packing": True, "max_length": 200, "row_tokens": 500} if packing else {}
    recipe = replace(tiny_recipe, pretrain=stage(seen=0.7, also_causal=True, **fields), workers=0)
    result = run_stage(Job(recipe, "pretrain", tmp_path / "run"))
    assert len(result["losses"]) > 0 or result["tokens"] > 0


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_captions_of_files_are_split_as_well(tiny_recipe, tmp_path, kind):
    (tmp_path / "folder").mkdir()
    if kind == "shards":
        data = {"shards": (ShardsRecipe("kale", tuple(captions(tmp_path))),)}
    else:
        for number in range(8):
            (tmp_path / "folder" / f"{number}.png").write_bytes(picture())
            (tmp_path / "folder" / f"{number}.txt").write_text(f"the picture of number {number} in a folder")
        data = {"sources": (SourceRecipe("captions", (str(tmp_path / "folder"),)),)}
    recipe = replace(tiny_recipe, pretrain=replace(stage(seen=0.9), **data, steps=1), workers=0)
    view = stage_view(recipe, "pretrain")
    whole = replace(view.collator, seen=0.0)
    for split, plain in view.first(4, lambda sample: (view.collator.encode(sample)[0], whole.encode(sample)[0])):
        learned, all_of_it = (row["labels"][0] != IGNORE_INDEX for row in (split, plain))
        cut = int(all_of_it.sum() - learned.sum())
        assert (learned.nonzero()[:, 0] == all_of_it.nonzero()[cut:, 0]).all()
        assert int((split["prompt_block_ids"] >= 0).sum() - (plain["prompt_block_ids"] >= 0).sum()) == cut


def test_a_stage_that_never_opens_anything_is_refused(tiny_recipe, tmp_path):
    recipe = replace(tiny_recipe, pretrain=stage(), workers=0)
    with pytest.raises(NothingOpensError, match="opens nothing"):
        run_stage(Job(recipe, "pretrain", tmp_path / "run"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seen": 1.5}, "from 0 to 1"),
        ({"seen": 0.5, "task": "question"}, "set it to 0 for questions"),
        ({"seen": 0.5, "order": "text_first"}, "and other orders"),
        ({"also_causal": True}, "set seen to more than 0"),
    ],
)
def test_what_cannot_be_split_is_a_sentence(fields, said):
    with pytest.raises(RecipeError, match=said):
        stage(**fields)


def test_a_caption_of_one_word_is_all_learned(parts):
    _, processor = parts
    collate = ChatCollator(processor, 512, "caption", seen=1.0)
    picture = DigitScenes("train", "caption", 1, 24)[0].messages[0]["content"][0]["image"]
    batch = collate([Sample([user(picture), assistant("red")], "one", "0")])
    assert (batch["labels"] != IGNORE_INDEX).any()
