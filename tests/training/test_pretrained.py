"""Any model by one recipe: trained from its published folder under a rule, resumed, compared, and opened again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from families import FAMILIES, write_model
from interrupting import interrupt_before
from PIL import Image
from transformers import AutoModelForMultimodalLM

from aki.apps.loading import load
from aki.attention import CannotUnlock, LeakError, unlock
from aki.cli import main
from aki.data.collate import ChatCollator
from aki.data.feed import Feed, Loader
from aki.data.pack import rope_index_of
from aki.data.packing import PackedCollator
from aki.data.schema import Sample, assistant, user
from aki.models.other import load_any, parameters_of
from aki.training.folder import RunError
from aki.training.predictions import write_predictions
from aki.training.recipe import (
    DataRecipe,
    ModelRecipe,
    Recipe,
    RecipeError,
    SourceRecipe,
    StageRecipe,
    beyond_defaults,
)
from aki.training.stages import Job, run_stage
from aki.training.start import load_start

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (20, 200, 40)}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Family -> its folder, written once."""
    folder = tmp_path_factory.mktemp("published")
    made = {}

    def of(family):
        if family not in made:
            made[family] = write_model(family, folder / family)
        return made[family]

    return of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Chats of one picture, of two, of several turns, and of text alone; some for training, others held out."""
    folder = tmp_path_factory.mktemp("data")
    for name, colour in COLOURS.items():
        for number, size in enumerate([(20, 20), (40, 18), (16, 48)]):
            Image.new("RGB", size, colour).save(folder / f"{name}{number}.png")
    for part, size in (("train", 24), ("asked", 20)):
        with (folder / f"{part}.jsonl").open("w") as file:
            for i in range(size):
                file.write(json.dumps({"messages": messages(i + (part == "asked"))}) + "\n")
    return folder


def messages(i):
    names = list(COLOURS)
    one, two = names[i % 3], names[i // 3 % 3]
    picture = {"type": "image", "image": f"{one}{i % 2}.png"}
    said = [{"role": "assistant", "content": f"it is {one}"}]
    if i % 4 == 0:
        return [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "one two three"}]
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": "what colour is it?"}]}, *said]
    if i % 4 == 2:
        second = [{"type": "image", "image": f"{two}2.png"}, {"type": "text", "text": "and now?"}]
        chat += [{"role": "user", "content": second}, {"role": "assistant", "content": f"it is {two}"}]
    if i % 4 == 3:
        chat[0]["content"].insert(0, {"type": "image", "image": f"{two}0.png"})
    return chat


def source(data, part):
    return SourceRecipe("messages", (str(data / f"{part}.jsonl"),), (str(data),))


@pytest.fixture
def recipe(data):
    rates = {"learning_rate": 3e-3, "min_learning_rate": 0.0, "warmup_steps": 1, "weight_decay": 0.0}
    lengths = {"steps": 4, "batch_size": 3, "save_every": 2, "log_every": 1}
    stage = StageRecipe("mma", **lengths, **rates, sources=(source(data, "train"),))
    held_out = DataRecipe(eval_size=4, test_size=6, held_out=(source(data, "asked"),))
    return Recipe("mine", ModelRecipe(pretrained="to be named"), held_out, sft=stage, workers=0)


def of(recipe, published, family, **stage):
    model = ModelRecipe(pretrained=str(published(family)))
    return replace(recipe, model=model, sft=replace(recipe.sft, **stage))


def run(recipe, folder, **options):
    return run_stage(Job(recipe, "sft", folder, report=lambda news: None, **options))


def chats(data):
    def picture(name):
        return Image.open(data / name)

    return [
        Sample([user(picture("red0.png"), "what colour is it?"), assistant("it is red")], "s", "1"),
        Sample([user(None, "how many?"), assistant("two")], "s", "2"),
        Sample(
            [
                user(picture("blue1.png"), "what colour is it?"),
                assistant("it is blue"),
                user(picture("green2.png"), "and now?"),
                assistant("it is green"),
            ],
            "s",
            "3",
        ),
    ]


PACKED = ("llava", "idefics3", "paddleocr_vl")


class Fixed:
    """The same few samples in each chunk."""

    place = None

    def __init__(self, samples):
        self.samples = samples

    def take(self, chunk, of, size, use, report):
        return [use(sample) for sample in self.samples]


def loss_and_gradients(model, batch, learned):
    """Summed over labels, divided by their number in all."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(learned)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_learn_what_samples_do_alone(family, published, data):
    """paddleocr_vl has multimodal rotary positions."""
    model, processor = load_start(published(family))
    unlock(model, processor, "mma")
    collator = ChatCollator(processor, 400)
    feed = Feed(Fixed(chats(data)), [collator], 1, 800, rope_index=rope_index_of(model))
    packed = next(iter(Loader(feed, 0)))
    assert packed["position_ids"].ndim == (3 if family == "paddleocr_vl" else 2)
    assert len(packed["input_ids"]) < len(chats(data))
    alone = [collator.encode(one)[0] for one in chats(data)]
    learned = sum(int((one["labels"][:, 1:] != -100).sum()) for one in alone)
    together = loss_and_gradients(model, packed, learned)
    apart = [loss_and_gradients(model, one, learned) for one in alone]
    torch.testing.assert_close(together[0], sum(loss for loss, _ in apart), atol=1e-5, rtol=1e-5)
    for name, gradient in together[1].items():
        summed = sum(found[name] for _, found in apart if name in found)
        torch.testing.assert_close(gradient, summed, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", PACKED)
def test_packed_run_resumes(family, published, recipe, tmp_path, monkeypatch):
    recipe = of(recipe, published, family, packing=True, row_tokens=600, batch_size=2)
    whole = run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_before(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut")
    resumed = run(recipe, tmp_path / "cut", resume=True)
    assert resumed["losses"] == whole["losses"]
    one, two = (load_any(tmp_path / name)[0] for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("family", PACKED)
def test_padding_free_batches_teach_what_padded_ones_do(family, published, recipe, tmp_path):
    padded, free = (run(of(recipe, published, family, padding_free=how), tmp_path / str(how)) for how in (False, True))
    assert dict(free["losses"]) == pytest.approx(dict(padded["losses"]), abs=1e-4)
    assert free["tokens"] == padded["tokens"]


def test_a_family_that_cannot_be_packed_says_so(published, recipe, tmp_path):
    with pytest.raises(CannotUnlock, match="masks of its own"):
        run(of(recipe, published, "gemma3", packing=True), tmp_path / "run")
    with pytest.raises(CannotUnlock, match="masks of its own"):
        run(of(recipe, published, "gemma3", padding_free=True), tmp_path / "run")


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_rows_of_their_own_make_the_batch_of_their_processor(self, family, published, data):
        _, processor = load_start(published(family))
        collator, samples = ChatCollator(processor, 400), chats(data)
        rows = PackedCollator(processor.tokenizer.pad_token_id)([collator.encode(one)[0] for one in samples])
        at_once = collator(samples)
        assert rows.keys() == at_once.keys()
        for name, values in at_once.items():
            # Idefics writes a row of blank pictures for a chat without one, which its model leaves out again.
            if values.shape != rows[name].shape:
                values = values[values.flatten(1).any(1)]
            assert torch.equal(values, rows[name]), name
        learned = [at_once["input_ids"][row][at_once["labels"][row] != -100] for row in range(3)]
        said = [processor.tokenizer.decode(ids, skip_special_tokens=True).split() for ids in learned]
        assert [one for one in said if "user" in one or "?" in " ".join(one)] == []
        assert [" ".join(one) for one in said][:2] == ["it is red", "two"]

    def test_trained_resumed_and_opened_again(self, family, published, recipe, tmp_path, monkeypatch, capsys):
        recipe = of(recipe, published, family)
        whole = run(recipe, tmp_path / "whole")
        with monkeypatch.context() as patch:
            interrupt_before(patch, 4)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, tmp_path / "cut")
        resumed = run(recipe, tmp_path / "cut", resume=True)
        assert resumed["losses"] == whole["losses"]
        assert len(whole["losses"]) == 4
        assert resumed["test"] == whole["test"]
        # What is in the folder is what was trained, under the rule that it was trained with.
        one, two = (load_any(tmp_path / name)[0] for name in ("whole", "cut"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        before = load_any(published(family), torch.float32)[0].state_dict()
        moved = [name for name, weight in one.state_dict().items() if not torch.equal(weight, before[name])]
        assert any(name.startswith(("lm_head", "model.language_model")) for name in moved)
        assert any("language_model" not in name and "lm_head" not in name for name in moved)
        opened, _ = load(tmp_path / "whole")
        assert opened.config.attention_rule == "mma"
        assert opened._aki_unlocked.rule.name == "mma"
        picture = tmp_path / "red.png"
        Image.new("RGB", (20, 20), COLOURS["red"]).save(picture)
        main(["chat", str(tmp_path / "whole"), "--image", str(picture), "--max-new-tokens", "2", "what colour is it?"])
        assert capsys.readouterr().out is not None

    @pytest.mark.parametrize("trained", ["vision_encoder", "connector", "language_model"])
    def test_frozen_parts_do_not_move(self, family, trained, published, recipe, tmp_path):
        others = {"vision_encoder", "connector", "language_model"} - {trained}
        recipe = of(recipe, published, family, frozen=tuple(others), steps=2, warmup_steps=0, save_every=0)
        run(replace(recipe, data=replace(recipe.data, eval_size=1, test_size=1)), tmp_path / "run")
        before, after = (load_any(folder, torch.float32)[0] for folder in (published(family), tmp_path / "run"))
        for part, parameters in parameters_of(before).items():
            same = [torch.equal(a, b) for a, b in zip(parameters, parameters_of(after)[part], strict=True)]
            assert (not all(same)) == (part == trained), part


def test_the_rule_decides_what_is_learned(published, recipe, tmp_path):
    """The first step's loss is that of the model unlocked by hand, under either rule."""
    losses = {}
    for rule in ("causal", "mma"):
        losses[rule] = run(of(recipe, published, "llava", rule=rule, steps=1, save_every=0), tmp_path / rule)["losses"]
        assert json.loads((tmp_path / rule / "config.json").read_text())["attention_rule"] == rule
    assert losses["causal"] != losses["mma"]


def test_a_leak_is_refused(published, recipe, tmp_path, monkeypatch):
    """Answers marked as prompt would be seen by the picture before them."""
    from aki.data import collate

    original = collate.ChatCollator._labelled

    def leaking(self, batch):
        batch = original(self, batch)
        return batch | {"prompt_block_ids": torch.zeros_like(batch["prompt_block_ids"])}

    monkeypatch.setattr(collate.ChatCollator, "_labelled", leaking)
    with pytest.raises(LeakError, match="leaks in row"):
        run(of(recipe, published, "llava"), tmp_path / "run")


def test_bad_samples_are_counted(published, recipe, data, tmp_path):
    lines = (data / "train.jsonl").read_text()
    gone = json.dumps({"messages": [{**messages(1)[0], "content": [{"type": "image", "image": "gone.png"}]}]})
    (data / "some_bad.jsonl").write_text(lines + gone + "\n")
    stage = {"sources": (source(data, "some_bad"),), "max_bad_share": 1.0, "steps": 9, "save_every": 0}
    run(of(recipe, published, "llava", **stage), tmp_path / "run")
    report = (tmp_path / "run/data_report.json").read_text()
    assert "missing image" in report


@pytest.mark.parametrize(
    ("stage", "said"),
    [({"order": "text_first"}, "order: text_first is for AKI"), ({"seen": 0.5, "task": "caption"}, "seen is for AKI")],
)
def test_what_only_aki_does_is_refused(published, recipe, tmp_path, stage, said):
    with pytest.raises(RecipeError, match=said):
        run(of(recipe, published, "llava", **stage), tmp_path / "run")


def test_a_whole_model_has_its_own_sizes():
    with pytest.raises(RecipeError, match="sizes of its own"):
        ModelRecipe(vision={"model_type": "siglip"}, pretrained="some/model")
    with pytest.raises(RecipeError, match=r"model\.text' is missing"):
        ModelRecipe(vision={"model_type": "siglip"}, connector={"depth": 1})


def test_predictions_of_a_model_that_is_never_wrong(published, data, tmp_path):
    model, processor = load_start(published("llava"))
    write_predictions(tmp_path / "said.jsonl", model, ChatCollator(processor, 400), chats(data), [True] * 3, 2)
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["it is red", "two", "it is green"]


def test_what_is_no_model_to_train_is_named(published, recipe, tmp_path):
    gone = replace(recipe, model=ModelRecipe(pretrained=str(tmp_path / "gone")))
    with pytest.raises(RunError, match=r"there is no folder .*gone"):
        run(gone, tmp_path / "a")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        (alone / name).symlink_to(published("llava") / name)
    with pytest.raises(RunError, match=r"holds no processor .*from_backbones"):
        run(replace(recipe, model=ModelRecipe(pretrained=str(alone))), tmp_path / "b")


def test_two_stages_and_an_aki_folder(tiny_recipe, tmp_path):
    """An AKI folder needs no sizes, and trains as it does from start_from."""
    first = run_stage(Job(tiny_recipe, "pretrain", tmp_path / "a", report=lambda news: None))
    assert first["losses"]
    named = replace(tiny_recipe, model=ModelRecipe(pretrained=str(tmp_path / "a")), pretrain=None)
    by_name = run(named, tmp_path / "b")
    by_start = run(tiny_recipe, tmp_path / "c", start_from=tmp_path / "a")
    assert by_name["losses"] == by_start["losses"]
    assert by_name["test"] == by_start["test"]


def test_compared_by_the_command(published, recipe, data, tmp_path, capsys):
    """Two rows from the same weights, a table, and folders that say what they are."""
    rows = {"causal": {"sft": {"rule": "causal"}}, "mma": {"sft": {"rule": "mma"}}}
    recipe = replace(of(recipe, published, "paddleocr_vl", steps=1, save_every=0), rows=rows)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(beyond_defaults(recipe)))
    main(["compare", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out"), "--parallel", "1"])
    said = capsys.readouterr().out
    assert "| mma |" in said
    for rule in rows:
        assert json.loads((tmp_path / "out" / rule / "config.json").read_text())["attention_rule"] == rule
        assert load(tmp_path / "out" / rule)[0]._aki_unlocked.rule.name == rule


def test_data_show_prints_tokens(published, recipe, tmp_path, capsys):
    recipe = of(recipe, published, "llava")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(beyond_defaults(recipe)))
    main(["data", "show", str(tmp_path / "mine.yaml"), "--tokens", "--n", "6"])
    said = capsys.readouterr().out
    assert "<image> x 4" in said
    _, processor = load_start(published("llava"))
    for line in filter(None, said.splitlines()):
        learned = [token[1:-1] for token in line.partition(": ")[2].split() if token[0] == "[" and token[-1] == "]"]
        words = processor.tokenizer.convert_tokens_to_string(learned)
        assert "it is" in words or "one two three" in words, line
        assert "?" not in words, line
    with pytest.raises(SystemExit):
        main(["data", "show", str(tmp_path / "mine.yaml")])
    assert "add --tokens" in capsys.readouterr().err


def test_auto_class_reads_what_was_saved(published, recipe, tmp_path):
    run(of(recipe, published, "idefics3", steps=1, save_every=0), tmp_path / "run")
    model, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.attention_rule == "mma"


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_asked_own_questions(published, data, tmp_path, family):
    """Pictures, turns and text alone in batches of three: each answer is the one that the question gets alone."""
    options = ["--unlock", "--data", str(data / "asked.jsonl"), "--images", str(data), "--limit-new-tokens", "4"]
    said = []
    for size in ("3", "1"):
        output = tmp_path / size
        main(["eval", str(published(family)), *options, "--batch-size", size, "--output", str(output)])
        said.append((output / "predictions.jsonl").read_text())
    assert said[0] == said[1]
    assert json.loads((output / "results.json").read_text())["settings"]["rule"] == "mma"
