"""The scenes' comparison from the start to the page, for a few steps on things and words made here."""

import re
import runpy
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stamps import write_stamps
from transformers import LlamaConfig, LlamaForCausalLM

from aki.data.scenes.questions import SUMS
from aki.data.tokenizer import train_tokenizer
from aki.evaluation import compare
from aki.evaluation.compare import run_comparison
from aki.evaluation.plan import fast, row_recipe
from aki.models.adapters import adapter_of
from aki.models.explain import attention_weights
from aki.training.recipe import AdapterRecipe, load_recipe
from aki.training.stages import Job, run_stage
from aki.training.start import load_start, set_rule

ROOT = Path(__file__).parents[2]
START, ASKED, PAGE = (
    runpy.run_path(str(ROOT / path))
    for path in ("examples/scenes_start.py", "benchmarks/scenes_asked.py", "docs/evidence_page.py")
)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    return write_stamps(tmp_path_factory.mktemp("stamps"))


@pytest.fixture(scope="module")
def start(stamps, tmp_path_factory):
    """The start of a language model of two narrow layers."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer(["how many animals stand beside a vehicle?", "<|im_start|>user", "no yes 1 2"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "text")
    few = ["--steps", "1", "--connector-steps", "1", "--batch-size", "2"]
    with pytest.MonkeyPatch.context() as patch:
        arguments = [str(stamps), "--language-model", str(folder / "text"), "--output", str(folder / "start"), *few]
        small = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        patch.setitem(START["main"].__globals__, "ENCODER", small)
        patch.setattr(sys, "argv", ["scenes_start", *arguments])
        START["main"]()
    return folder / "start"


def test_a_start_is_gone_on_with_as_it_was_begun(start, stamps, monkeypatch, capsys):
    arguments = [str(stamps), "--language-model", str(start.parent / "text"), "--output", str(start), "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["scenes_start", *arguments])
    with pytest.raises(SystemExit):
        START["main"]()
    assert "begun with other settings" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["scenes_start", str(stamps / "nowhere"), *arguments[1:]])
    with pytest.raises(SystemExit):
        START["main"]()
    assert f"{stamps / 'nowhere'} is not there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def recipe(start, stamps):
    """The recipe over these, without the emoji font's drawings, which nothing here can draw."""
    found = load_recipe("scenes")
    found.model.pretrained = str(start)

    def here(sources):
        kept = [one for one in sources if not one.images]
        return tuple(replace(one, annotations=(str(stamps),)) for one in kept)

    found.data.held_out = here(found.data.held_out)
    found.sft.sources = here(found.sft.sources)
    for row in found.rows.values():
        if "model" in row:
            row["model"]["pretrained"] = str(start)
        for part, name in (("sft", "sources"), ("data", "held_out")):
            if name in row.get(part, {}):
                kept = [one for one in row[part][name] if "images" not in one]
                row[part][name] = [{**one, "annotations": [str(stamps)]} for one in kept]
    found = replace(fast(found), workers=0, bf16=False)
    # Each skill is to be asked, and a curve to be drawn.
    return replace(found, data=replace(found.data, test_size=56), sft=replace(found.sft, eval_every=2))


@pytest.fixture(scope="module")
def compared(recipe, tmp_path_factory):
    """Folder and comparison of all rows, trained in this process."""
    folder = tmp_path_factory.mktemp("compared")

    def run_cells(cells, output, parallel, finished):
        for cell in cells:
            start = output / cell.start_from if cell.start_from else None
            finished(cell, run_stage(Job(cell.recipe, cell.stage, output / cell.name, start)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_cells", run_cells)
        patch.setattr(compare, "time_missing", lambda *_: None)
        run_comparison(recipe, folder, list(recipe.rows), seeds=1, parallel=1)
        run_comparison(recipe, folder, ["causal", "mma"], seeds=2, parallel=1)
    return folder


def test_every_row_is_trained_and_asked_each_held_out_kind(recipe, compared):
    found = PAGE["measured"](recipe, compared)
    assert set(found.results) == set(recipe.rows) == set(PAGE["SEEDS"])
    for row, runs in found.results.items():
        assert len(runs) == (2 if row in ("causal", "mma") else 1)
        for run in runs:
            sums = ("below_count",) if row.startswith("words-") else SUMS
            assert run["test"]["sums"] == statistics.mean(run["test"][skill] for skill in sums)
            if sums == SUMS:
                assert {"things: others", "words: sums", "crowded: sums", "crowded: others"} <= set(run["test"])
            else:
                assert set(run["test"]) - {"accuracy", "sums", "others"} == {*sums, "place_word", "plate_beside"}


@pytest.mark.parametrize("row", ["causal", "mma", "words-dot", "words-concentric", "words-mma-image-bidirectional"])
def test_padding_changes_nothing(row, recipe, tmp_path):
    losses = []
    for padding_free in (False, True):
        own = row_recipe(recipe, recipe.rows[row], 0)
        own.bf16, own.sft = False, replace(own.sft, padding_free=padding_free, batch_size=5, eval_every=0)
        losses.append(dict(run_stage(Job(own, "sft", tmp_path / str(padding_free)))["losses"]))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_an_adapter_over_a_stage_with_an_adapter_belongs_to_that_stage(recipe, tmp_path):
    """Over the start alone it would be another model than the one that was measured. The captions are the start's."""
    captions = fast(load_recipe("scenes-start"))
    captions.pretrain.sources = (replace(recipe.sft.sources[0], options={"task": "caption"}),)
    both = replace(recipe, pretrain=captions.pretrain, adapter=AdapterRecipe(r=2))
    run_stage(Job(both, "pretrain", tmp_path / "captioned"))
    run_stage(Job(both, "sft", tmp_path / "asked", start_from=tmp_path / "captioned"))
    assert adapter_of(tmp_path / "asked") == str(tmp_path / "captioned")


def test_a_finished_cell_is_not_trained_again(recipe, compared, monkeypatch):
    def never(cells, *_):
        assert not cells

    monkeypatch.setattr(compare, "run_cells", never)
    monkeypatch.setattr(compare, "time_missing", lambda *_: None)
    run_comparison(recipe, compared, list(recipe.rows), seeds=1, parallel=1)


def test_models_are_asked_once_under_each_rule(recipe, compared, monkeypatch):
    monkeypatch.setitem(ASKED["measure"].__globals__, "LOOKED_AT", 2)
    ASKED["measure"](recipe, compared, ["causal", "mma", "words-mma", "words-echo"])
    found = PAGE["measured"](recipe, compared)
    for row in ("causal", "mma"):
        for run in found.results[row]:
            assert set(run["under"]) == {"causal", "mma", "mma, lower half", "mma, upper half"}
            # Asked under its own rule, it says what it said when it was trained.
            assert run["under"][row] == {measure: run["test"][measure] for measure in ("sums", "others")}
            assert set(run["nats"]) == {"sums", "others"}
            assert len(run["paid"]) == 2
            assert (max(run["paid"]) > 0) == (row == "mma")
    # In the order, and in the numbers, that it was trained in.
    for row, rule in (("words-mma", "mma"), ("words-echo", "causal")):
        (run,) = found.results[row]
        assert run["under"][rule] == {measure: run["test"][measure] for measure in ("sums", "others")}
    losses = {row: [run["nats"]["sums"] for run in found.results[row]] for row in ("causal", "mma")}
    more = statistics.mean(losses["mma"]) - statistics.mean(losses["causal"])
    pattern = (
        rf"\| MMA \| sums \| 2 \|.* \| {statistics.mean(losses['mma']):.3f} ± [\d.]+ \| {re.escape(f'{more:+.3f}')} ± "
    )
    assert re.search(pattern, PAGE["made"](found))
    for trained in ("causal", "mma"):
        shutil.rmtree(compared / trained)
    ASKED["measure"](recipe, compared, ["causal", "mma"])  # all there: no model is needed


def test_mma_in_no_layer_is_causal_and_in_all_it_is_mma(start):
    model, processor = load_start(start)
    model.eval()
    image = model.config.image_token_id
    size = model.config.image_seq_length
    batch = {
        "input_ids": torch.tensor([[5, *[image] * size, 7, 8, 9, 10]]),
        "prompt_block_ids": torch.zeros(1, size + 5, dtype=torch.long),
        "pixel_values": torch.rand(1, 3, 192, 192),
    }

    def logits(rule, layers=None):
        set_rule(model, processor, rule, "sdpa")
        with torch.no_grad():
            if layers is None:
                return model(**batch).logits
            with ASKED["opened_in"](model, layers):
                return model(**batch).logits

    torch.testing.assert_close(logits("mma", []), logits("causal"))
    torch.testing.assert_close(logits("mma", [0, 1]), logits("mma"))
    assert not torch.allclose(logits("mma", [0]), logits("mma"), atol=1e-6)
    paid = ASKED["paid_to_question"]
    set_rule(model, processor, "mma", "sdpa")
    labels = torch.full((1, size + 5), -100)
    weights = attention_weights(model, batch)[:, 1 : size + 1]
    expected = weights[..., size + 1 :].sum(-1).mean(-1)
    torch.testing.assert_close(paid(model, {**batch, "labels": labels}), expected)


def test_the_page_says_what_the_cells_hold(recipe, compared, tmp_path):
    found = PAGE["measured"](recipe, compared)
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{PAGE['BEGIN']}\nold\n{PAGE['END']}\nafter\n")
    PAGE["draw"](found, tmp_path / "evidence.png")
    PAGE["write"](page, PAGE["made"](found))
    text = page.read_text()
    assert "old" not in text
    assert text.endswith(f"{PAGE['END']}\nafter\n")
    assert "**Finished: 15 cells.** Still to run, seeds: causal" in text
    mean = 100 * statistics.mean(run["test"]["sums"] for run in found.results["mma"])
    assert re.search(rf"\| MMA \| 2 \| {mean:.1f} ± ", text)
    gain = statistics.mean(
        100 * (one["test"]["sums"] - other["test"]["sums"])
        for one, other in zip(found.results["mma"], found.results["causal"], strict=True)
    )
    assert f"MMA, sums: {gain:+.1f} ± " in text
    # Each pair is compared within itself.
    (one,), (other,) = (found.results[f"words-{row}"] for row in ("mma", "causal"))
    gain = 100 * (one["test"]["sums"] - other["test"]["sums"])
    assert re.search(rf"\| MMA, words \| 1 \| [\d.]+ \| {re.escape(f'{gain:+.1f}')} \|", text)
    assert (tmp_path / "evidence.png").stat().st_size > 10_000


def test_the_plan_of_the_page_is_what_make_runs():
    commands = re.findall(r"^\t\$\(COMPARE\)(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seeds = {}
    for command in commands:
        named = re.search(r"--rows ([\w -]+?)(?: --|$)", command)
        number = re.search(r"--seeds (\d+)", command)
        for row in named[1].split() if named else load_recipe("scenes").rows:
            seeds[row] = max(seeds.get(row, 1), int(number[1]) if number else 1)
    assert seeds == PAGE["SEEDS"]


def test_the_committed_page_is_made_from_the_committed_cells():
    text = PAGE["made"](PAGE["measured"](load_recipe("scenes"), PAGE["FOLDER"]))
    assert f"{PAGE['BEGIN']}\n{text}\n{PAGE['END']}" in PAGE["PAGE"].read_text(), "run docs/evidence_page.py"
