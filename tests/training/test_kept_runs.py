"""What a run leaves behind can be trusted: issue 12, entries 6, 9, 10, 25 and 26."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.make import write_sources
from interrupting import interrupt_before
from others import holding
from two_processes import on_two

from aki.cli import main
from aki.commands.eval import Eval
from aki.evaluation import compare
from aki.evaluation.plan import rows_by_rule
from aki.files import InUseError
from aki.models import AkiForConditionalGeneration
from aki.training import stages
from aki.training.checkpoint import last_whole_checkpoint, mark_whole
from aki.training.folder import RunError, first_process
from aki.training.recipe import SourceRecipe, beyond_defaults
from aki.training.stages import Job, run_stage


@pytest.fixture
def own_data(tiny_recipe, tmp_path):
    """SFT on VQAv2 in its released form; a checkpoint every two steps, a log every three."""
    write_sources(tmp_path / "data")
    tiny_recipe.model.text["max_position_embeddings"] = 512
    tiny_recipe.root, tiny_recipe.cache = str(tmp_path / "data"), str(tmp_path / "cache")
    vqav2 = SourceRecipe("vqav2", ("vqav2",), ("coco/train2014",))
    tiny_recipe.sft = replace(tiny_recipe.sft, steps=5, eval_every=0, log_every=3, sources=(vqav2,))
    return tiny_recipe


def run(recipe, folder, stage="sft", **options):
    return run_stage(Job(recipe, stage, folder, report=lambda news: None, **options))


def weights(folder):
    return AkiForConditionalGeneration.from_pretrained(folder).state_dict()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Killed(BaseException):
    pass


def killed(*args, **kwargs):
    raise Killed


@pytest.fixture
def cut(own_data, tmp_path, monkeypatch):
    """A run that ended before its last step, with the checkpoints of steps 2 and 4."""
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(own_data, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def whole(own_data, tmp_path):
    return run(own_data, tmp_path / "whole"), weights(tmp_path / "whole")


@pytest.mark.parametrize("window", ["_save", "sealed_weights", "write_json"])
def test_6_killed_after_the_last_step_it_takes_no_step_more(own_data, tmp_path, monkeypatch, whole, window):
    """Before the weights are saved, after it, and before the result is written."""
    with monkeypatch.context() as patch:
        patch.setattr(stages, window, killed)
        with pytest.raises(Killed):
            run(own_data, tmp_path / "run")
    resumed = run(own_data, tmp_path / "run", resume=True)
    assert resumed["losses"] == whole[0]["losses"]
    assert same(weights(tmp_path / "run"), whole[1])


def test_6_killed_while_scoring_packed_scenes(tiny_recipe, tmp_path, monkeypatch):
    tiny_recipe.sft = replace(tiny_recipe.sft, packing=True, row_tokens=600, batch_size=1, steps=3, eval_every=0)
    result = run(tiny_recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "_score", killed)
        with pytest.raises(Killed):
            run(tiny_recipe, tmp_path / "run")
    resumed = run(tiny_recipe, tmp_path / "run", resume=True)
    assert (resumed["losses"], resumed["test"]) == (result["losses"], result["test"])
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_6_a_loss_that_was_not_logged_yet_is_kept(own_data, cut, whole):
    """The log of step 3 lies between the checkpoints of steps 2 and 4."""
    assert [step for step, _ in whole[0]["losses"]] == [3]
    (cut / "training/checkpoint-4/WHOLE").unlink()
    assert run(own_data, cut, resume=True)["losses"] == whole[0]["losses"]


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def zero_tail(path):
    content = path.read_bytes()
    path.write_bytes(content[:-100] + bytes(100))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = [
    (flip_bit, "model.safetensors"),
    (zero_tail, "model.safetensors"),
    (truncate, "model.safetensors"),
    (flip_bit, "optimizer.pt"),
    (os.unlink, "optimizer.pt"),
    (os.unlink, "scheduler.pt"),
    (os.unlink, "data-0.json"),
    (lambda mark: mark.write_bytes(b""), "WHOLE"),
]


@pytest.mark.parametrize(("damage", "name"), DAMAGE)
def test_9_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, damage, name):
    for number in (9, 10):
        checkpoint = tmp_path / f"checkpoint-{number}"
        checkpoint.mkdir()
        for file in ("model.safetensors", "optimizer.pt", "scheduler.pt", "data-0.json"):
            (checkpoint / file).write_bytes(os.urandom(2000))
        mark_whole(checkpoint)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    damage(tmp_path / "checkpoint-10" / name)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert re.search(rf"checkpoint-10/{name} .*: going on from .*checkpoint-9, the checkpoint before it", caplog.text)


def test_9_what_goes_on_from_the_checkpoint_before_is_the_same(own_data, cut, whole, caplog):
    flip_bit(cut / "training/checkpoint-4/model.safetensors")
    assert run(own_data, cut, resume=True)["losses"] == whole[0]["losses"]
    assert same(weights(cut), whole[1])
    assert "checkpoint-4/model.safetensors is not what was written" in caplog.text


def test_9_with_no_whole_checkpoint_left_the_run_says_so(own_data, cut):
    for number in (2, 4):
        truncate(cut / f"training/checkpoint-{number}/model.safetensors")
    with pytest.raises(RunError, match=r"no checkpoint in .* can be resumed from: .*checkpoint-4.*checkpoint-2"):
        run(own_data, cut, resume=True)


def test_9_an_older_versions_mark_is_refused_with_what_to_do(own_data, cut):
    """It was empty, so nothing tells whether the checkpoint is whole."""
    for number in (2, 4):
        (cut / f"training/checkpoint-{number}/WHOLE").write_bytes(b"")
    with pytest.raises(RunError, match=r"WHOLE does not say .* an older version's.*Choose another --output, or delete"):
        run(own_data, cut, resume=True)


def test_9_all_is_synced_before_the_mark(own_data, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    run(own_data, tmp_path / "run")
    for checkpoint in (tmp_path / "run/training/checkpoint-4", tmp_path / "run/training/checkpoint-5"):
        names = {path.name for path in checkpoint.iterdir()} - {"WHOLE"}
        assert set(json.loads((checkpoint / "WHOLE").read_text())) == names
        mark = next(place for place, name in enumerate(synced) if re.search(rf"{checkpoint}/\.WHOLE\..*partial", name))
        assert {str(checkpoint / name) for name in names} | {str(checkpoint)} <= set(synced[:mark])
        assert str(checkpoint) in synced[mark:]
        assert str(checkpoint.parent) in synced[mark:]
    result = next(place for place, name in enumerate(synced) if ".result.json." in name)
    assert str(tmp_path / "run/model.safetensors") in synced[:result]


def test_10_a_folder_is_one_runs_as_long_as_its_process_lives(own_data, tmp_path):
    with (
        holding(tmp_path / "run/training/lock") as other,
        pytest.raises(InUseError, match=rf"output folder .*/run is in use by process {other} on"),
    ):
        run(own_data, tmp_path / "run", resume=True)
    assert run(own_data, tmp_path / "run")["losses"]


def test_10_all_processes_are_refused_as_the_first_is(own_data, tmp_path):
    def refused():
        with pytest.raises(InUseError) as refusal:
            run(replace(own_data, devices=2), tmp_path / "run")
        acted = []
        found = first_process(lambda: acted.append(None) or "by the first")
        return [found, len(acted), str(refusal.value)]

    with holding(tmp_path / "run/training/lock") as other:
        ranks = on_two(refused, tmp_path)
    assert [(found, acted) for found, acted, _ in ranks] == [("by the first", 1), ("by the first", 0)]
    assert all(f"is in use by process {other} on" in message for *_, message in ranks)


def test_10_so_is_a_comparisons(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_compare", lambda *_: "compared")
    tiny_recipe.rows = rows_by_rule(("causal", "mma"))
    arguments = (tiny_recipe, tmp_path / "out", ("causal", "mma"), 1, 1)
    with (
        holding(tmp_path / "out/cells/lock") as other,
        pytest.raises(InUseError, match=rf"output folder .*/out is in use by process {other} on"),
    ):
        compare.run_comparison(*arguments)
    assert compare.run_comparison(*arguments) == "compared"


def test_10_so_is_an_evaluations(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Eval, "_evaluate", lambda *_: print("evaluated"))
    command = ["eval", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    with holding(tmp_path / "out/lock") as other, pytest.raises(SystemExit):
        main(command)
    said = capsys.readouterr()
    assert (said.out, "out is in use by process " + str(other) in said.err) == ("", True)
    main(command)
    assert capsys.readouterr().out == "evaluated\n"


@pytest.mark.parametrize("finished", [True, False])
def test_10_another_start_is_refused(own_data, tmp_path, monkeypatch, finished):
    short = replace(own_data, sft=replace(own_data.sft, sources=(), steps=3), pretrain=None)
    one, other = tmp_path / "one", tmp_path / "other"
    run(short, one)
    run(replace(short, seed=1), other)
    with monkeypatch.context() as patch:
        if not finished:
            interrupt_before(patch, 3)
        result = None
        try:
            result = run(short, tmp_path / "run", start_from=one)
        except KeyboardInterrupt:
            assert not finished
    for start in (other, None):
        with pytest.raises(RunError, match=r"started from .*/one as it was then, now it is"):
            run(short, tmp_path / "run", start_from=start, resume=True)
    one.rename(tmp_path / "moved")
    again = run(short, tmp_path / "run", start_from=tmp_path / "moved", resume=True)
    assert result is None or again["losses"] == json.loads(json.dumps(result["losses"]))


def test_10_changed_data_are_refused(own_data, cut):
    questions = Path(own_data.root) / "vqav2/v2_OpenEnded_mscoco_train2014_questions.json"
    before = questions.read_text()
    questions.write_text(before.replace("What", "That", 1).replace("?", "!", 1))
    assert questions.stat().st_size == len(before.encode())
    with pytest.raises(RunError, match=rf"over other data: vqav2/{questions.name} changed since it began"):
        run(own_data, cut, resume=True)
    questions.write_text(before)
    assert run(own_data, cut, resume=True)["losses"]


def test_10_a_finished_run_whose_weights_are_gone_is_made_again(own_data, tmp_path, caplog):
    out = tmp_path / "run"
    result, before = run(own_data, out), weights(out)
    for damage in (os.unlink, flip_bit):
        damage(out / "model.safetensors")
        again = run(own_data, out, resume=True)
        assert again["losses"] == result["losses"]
        assert f"{out}/model.safetensors is" in caplog.text
        assert same(weights(out), before)
    for checkpoint in (out / "training").glob("checkpoint-*"):
        (checkpoint / "WHOLE").unlink()
    (out / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model.safetensors is gone, and there is no checkpoint to make it from"):
        run(own_data, out, resume=True)


@pytest.mark.parametrize(
    ("part", "sizes", "message"),
    [
        ("text", {"num_hidden_layers": 2}, "it has num_hidden_layers 1, model.text says 2"),
        ("connector", {"num_latents": 4}, "it has num_latents 144, model.connector says 4"),
        ("vision", {"patch_size": 4}, "it has patch_size 8, model.vision says 4"),
        ("text", {}, "lm_head|intermediate|layers"),
    ],
)
def test_25_a_start_of_other_sizes_is_named(tiny_recipe, tmp_path, capsys, part, sizes, message):
    tiny_recipe.pretrain = replace(tiny_recipe.pretrain, steps=1)
    run(tiny_recipe, tmp_path / "start", "pretrain")
    if sizes:
        getattr(tiny_recipe.model, part).update(sizes)
    else:
        del tiny_recipe.model.text["intermediate_size"]  # the default is another
    with pytest.raises(RunError, match=rf"another model than the recipe's: .*({message})"):
        run(tiny_recipe, tmp_path / "run", start_from=tmp_path / "start")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(beyond_defaults(tiny_recipe)))
    with pytest.raises(SystemExit):
        main(["train", str(recipe), "--stage", "sft", "--start-from", str(tmp_path / "start"), "--dry-run"])
    assert "another model than the recipe's" in capsys.readouterr().err


def test_25_a_start_that_is_no_whole_model_is_named(tiny_recipe, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    with pytest.raises(ValueError, match="holds an adapter alone, and its model, some/model, is not there"):
        run(tiny_recipe, tmp_path / "run", start_from=adapter)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "sealed_weights", killed)
        with pytest.raises(Killed):
            run(tiny_recipe, tmp_path / "start", "pretrain")
    with pytest.raises(RunError, match="holds a run that is not finished: go on with it first"):
        run(tiny_recipe, tmp_path / "run", start_from=tmp_path / "start")


def test_26_an_error_gets_a_line_of_its_own_and_speaks_of_the_recipe(tiny_recipe, tmp_path, capsys):
    tiny_recipe.pretrain = replace(tiny_recipe.pretrain, rule="mma")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(beyond_defaults(tiny_recipe)))
    with pytest.raises(SystemExit):
        main(["train", str(recipe), "--stage", "pretrain", "--output", str(tmp_path / "run")])
    *_, bar, said, rest = capsys.readouterr().err.split("\n")
    assert said.startswith("aki: the rule 'mma' opens nothing in this batch")
    assert "train with pretrain.rule: causal" in said
    assert "attention_rule" not in said
    assert "step" in bar
    assert rest == ""
