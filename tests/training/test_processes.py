"""Recipes on several processes: AKI and another family, whole or by an adapter, by DDP, FSDP2 and DeepSpeed's ZeRO.

accelerate shards models on accelerators alone. Here it is told that CPUs are some (`as_accelerators`): what shards,
gathers, saves and resumes is all theirs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import accelerate
import pytest
import torch
import transformers
import yaml
from families import WORDS, write_model
from packaging.version import Version
from safetensors.torch import load_file
from test_adapting import logits
from test_pretrained import data, recipe, run  # noqa: F401
from two_processes import as_accelerators, on_two

from aki.apps.loading import load
from aki.cli import main
from aki.data.feed import Position
from aki.layout import IGNORE_INDEX
from aki.models.other import base_of
from aki.training import stages
from aki.training.data import ResumeError
from aki.training.model import build_model, tiny
from aki.training.recipe import AdapterRecipe, DataRecipe, ModelRecipe, RecipeError, beyond_defaults, load_recipe
from aki.training.start import load_start

LAYERS = {"aki": ["Phi3DecoderLayer", "SiglipEncoderLayer"], "llava": ["LlamaDecoderLayer", "CLIPEncoderLayer"]}
AUTO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
ON_CPU_0 = "transformers before 5.23 asks torch to restore an optimizer on cpu:0, where processes are several"
IN_SHARDS = "accelerate 1.10 loads an adapter in shards on the first process alone"
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}


def before(library, release):
    return Version(library.__version__) < Version(release)


@pytest.fixture(params=["ddp", "fsdp", "zero2", "zero3"])
def way(request):
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model("llava", folder / "llava")
    torch.manual_seed(0)
    for part in build_model(tiny(load_recipe("aki-4b/sft")), WORDS * 5):
        part.save_pretrained(folder / "aki")
    return folder


@pytest.fixture
def of(recipe, models):  # noqa: F811
    """(family, whole or adapter) -> a recipe of four samples a step, on up to four processes.

    Rows are fed one by one, so that some processes have no picture where others have one.
    """

    def make(family, kind):
        stage = replace(recipe.sft, batch_size=1, gradient_accumulation_steps=2, steps=3)
        adapter = AdapterRecipe(r=2, alpha=4, modules_to_save=("connector",)) if kind == "adapter" else None
        model = ModelRecipe(pretrained=str(models / family))
        return replace(recipe, model=model, devices=2, data=DataRecipe(), sft=stage, adapter=adapter)

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Recipe -> the folder of its run on one process, which is run once."""
    folders = {}

    def of(recipe):  # noqa: F811
        name = json.dumps([recipe.model.pretrained, recipe.adapter is None])
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("alone") / "run"
            run(recipe, folders[name])
        return folders[name]

    return of


def shared(recipe, family, way):  # noqa: F811
    """The recipe with what it says of sharding."""
    if way == "fsdp":
        return replace(recipe, fsdp={"transformer_layer_cls_to_wrap": LAYERS[family]})
    if way.startswith("zero"):
        zero = {"zero_optimization": {"stage": int(way[-1])}}
        return replace(recipe, trainer={"use_cpu": False, "deepspeed": AUTO | zero})
    return recipe


def train(recipe, way, folder, scratch, ranks=2, resume=False, first=None):  # noqa: F811
    """Losses of a run on several processes, which has to be wrapped as `way` says.

    Args:
        first: called on each of them before anything else.
    """

    def on_rank():
        if first is not None:
            first()
        if way != "ddp":
            as_accelerators()
        save, wrappers = stages._save, []
        stages._save = lambda job, trainer, *rest: (
            wrappers.append(type(trainer.model_wrapped).__name__),
            save(job, trainer, *rest),
        )
        # Parsed apart: lmms-eval keeps every lock of a file, and one from before the fork is refused behind it.
        parsed = replace(recipe, cache=str(scratch / "parsed"))
        return run(parsed, folder, resume=resume)["losses"], wrappers

    ((losses, (wrapper,)), *others) = on_two(on_rank, scratch, ranks)
    assert wrapper.startswith(WRAPPERS[way])
    assert all(other == losses for other, _ in others)
    return losses


def cut(folder, copy):
    """A copy of a run that was killed after the checkpoint of its second step."""
    copy.mkdir()
    shutil.copytree(folder / "training", copy / "training")
    return copy


def losses_of(folder):
    return json.loads((folder / "result.json").read_text())["losses"]


def near(losses):
    return [[step, pytest.approx(loss, abs=2e-5)] for step, loss in losses]


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def shapes(folder):
    return {name: tensor.shape for name, tensor in weights(folder).items()}


@pytest.mark.parametrize("kind", ["whole", "adapter"])
@pytest.mark.parametrize("family", ["aki", "llava"])
def test_as_on_one_process(family, kind, way, of, alone, models, data, tmp_path):  # noqa: F811
    """Losses, whole weights under the rule, and both again, to the bit, of a run that was cut off."""
    recipe = of(family, kind)  # noqa: F811
    one, two = alone(recipe), tmp_path / "two"
    recipe = shared(recipe, family, way)
    found = train(recipe, way, two, tmp_path)
    assert found == near(losses_of(one))
    assert shapes(two) == shapes(one)
    opened, expected = load(two)[0], load(one)[0]
    assert base_of(opened).config.attention_rule == "mma"
    _, processor = load_start(models / family)
    torch.testing.assert_close(logits(opened, processor, data), logits(expected, processor, data), atol=1e-3, rtol=1e-3)
    if way == "ddp" and before(transformers, "5.23"):
        pytest.skip(ON_CPU_0)
    if way == "fsdp" and kind == "adapter" and before(accelerate, "1.15"):
        pytest.skip(IN_SHARDS)
    again = cut(two, tmp_path / "cut")
    assert train(recipe, way, again, tmp_path, resume=True) == found
    torch.testing.assert_close(weights(again), weights(two), atol=0, rtol=0)


def refused(recipe, way, folder, scratch, ranks):  # noqa: F811
    """The sentence that ends a resumed run on so many processes."""

    def on_rank():
        if way != "ddp":
            as_accelerators()
        with pytest.raises(ResumeError) as refusal:
            run(recipe, folder, resume=True)
        return str(refusal.value)

    return on_two(on_rank, scratch, ranks)[0]


@pytest.mark.skipif(before(transformers, "5.23"), reason=ON_CPU_0)
def test_another_number_of_processes(of, alone, tmp_path):
    """Whole weights in each process go on on any number; those of FSDP and DeepSpeed do not go on from them."""
    recipe = of("llava", "adapter")  # noqa: F811
    one = alone(recipe)
    found = train(recipe, "ddp", cut(one, tmp_path / "on-two"), tmp_path, resume=True)
    assert found == near(losses_of(one))
    run(recipe, cut(tmp_path / "on-two", tmp_path / "on-one"), resume=True)
    assert losses_of(tmp_path / "on-one") == near(found)
    # As a run by FSDP on one process leaves it, which had nothing to shard.
    run(shared(recipe, "llava", "fsdp"), tmp_path / "to-shard")
    folder = cut(tmp_path / "to-shard", tmp_path / "sharded")
    said = refused(shared(recipe, "llava", "fsdp"), "fsdp", folder, tmp_path, 2)
    assert "holds whole weights of 1 process(es), and 2 process(es) with shards of FSDP cannot go on" in said


@pytest.mark.parametrize("way", ["fsdp", "zero2"], indirect=True)
def test_another_number_of_shards(way, of, alone, tmp_path):
    """FSDP cuts anew; DeepSpeed does not, and one process alone has no shards."""
    recipe = of("aki", "whole")  # noqa: F811
    one, recipe = alone(recipe), shared(recipe, "aki", way)
    train(recipe, way, tmp_path / "two", tmp_path)
    names = {"fsdp": "FSDP", "zero2": "DeepSpeed"}
    said = refused(recipe, way, cut(tmp_path / "two", tmp_path / "on-one"), tmp_path, 1)
    assert f"holds shards of {names[way]} of 2 process(es), and 1 process(es) with" in said
    assert said.endswith("cannot go on from them: start 2 again.")
    if way == "fsdp":
        found = train(recipe, way, cut(tmp_path / "two", tmp_path / "four"), tmp_path, ranks=4, resume=True)
        assert found == near(losses_of(one))


@pytest.mark.parametrize("way", ["ddp", "fsdp", "zero3"], indirect=True)
def test_held_out_questions_and_the_best_checkpoint(way, of, recipe, alone, tmp_path):  # noqa: F811
    """Scored while it is in shards, and saved as it was at its best."""
    asked = recipe.data
    recipe = of("llava", "whole")
    one = losses_of(alone(recipe))
    recipe = replace(recipe, data=asked, sft=replace(recipe.sft, eval_every=1, save_every=1, patience=1))
    recipe = shared(recipe, "llava", way)
    scores = iter([0.5, 0.1])

    def scored():
        stages.accuracy_by_skill = lambda *rest, **more: measured(*rest, **more) | {"accuracy": next(scores, 0.2)}

    measured = stages.accuracy_by_skill
    found = train(recipe, way, tmp_path / "run", tmp_path, first=scored)
    assert found == near(one[:2])
    saved, best = weights(tmp_path / "run"), weights(tmp_path / "run/training/checkpoint-1")
    torch.testing.assert_close(saved, best, atol=0, rtol=0)
    predictions = tmp_path / "run/predictions.jsonl"
    assert predictions.exists() == (way == "ddp")


def test_deepspeed_on_cpu_is_refused(of, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    recipe = shared(of("aki", "whole"), "aki", "zero2")  # noqa: F811
    with pytest.raises(RecipeError, match="needs accelerators: on CPU accelerate connects"):
        run(recipe, tmp_path)


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_deepspeed_leaves_the_rates_to_the_stage(name, of, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    recipe = shared(of("aki", "whole"), "aki", "zero2")  # noqa: F811
    recipe.trainer["deepspeed"] |= {name: {"type": "a name", "params": {}}}
    with pytest.raises(RecipeError, match=f"its {name} would be used instead of the stage's"):
        run(recipe, tmp_path)


def test_deepspeed_that_is_not_there_is_named(of, tmp_path, monkeypatch):
    monkeypatch.setattr("aki.training.sharding.is_deepspeed_available", lambda: False)
    with pytest.raises(RecipeError, match="pip install deepspeed"):
        run(shared(of("aki", "whole"), "aki", "zero2"), tmp_path)


@pytest.mark.parametrize("way", ["fsdp"], indirect=True)
def test_losses_keep_their_digits_in_bfloat16(way, of, tmp_path):
    recipe = replace(of("aki", "whole"), bf16=True)  # noqa: F811
    run(recipe, tmp_path / "one")
    found = train(shared(recipe, "aki", way), way, tmp_path / "two", tmp_path)
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in losses_of(tmp_path / "one")], abs=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_no_batch_lacks_pictures(packing, models, of, data):  # noqa: F811
    """What joins a batch of text leaves all else of it as it is, and its loss too."""
    recipe = of("llava", "whole")  # noqa: F811
    stage = replace(recipe.sft, packing=packing, row_tokens=48, max_length=48)
    model, processor = load_start(models / "llava")
    stages.set_rule(model.train(), processor, "mma", "eager")
    samples = stages.open_samples(recipe, stage, 1, {})
    collators = stages.stage_collators(processor, stage)
    joined, plain = (
        islice(stages.stage_loader(samples, collators, recipe, stage, 0, 1, Position(), meets=meets), 30)
        for meets in (True, False)
    )
    lacking = 0
    for ours, theirs in zip(joined, plain, strict=True):
        if "pixel_values" in theirs:
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            continue
        lacking += 1
        rows, tokens = theirs["input_ids"].shape
        assert torch.equal(ours["input_ids"][:rows, :tokens], theirs["input_ids"])
        assert bool((ours["labels"][rows:] == IGNORE_INDEX).all())
        assert len(ours["pixel_values"]) == 1
        with torch.no_grad():
            torch.testing.assert_close(model(**ours).loss, model(**theirs).loss)
    assert lacking > 1


def test_a_kind_of_media_that_comes_too_late_is_named(models, of):
    recipe = of("llava", "whole")  # noqa: F811
    _, processor = load_start(models / "llava")
    samples = stages.open_samples(recipe, recipe.sft, 1, {})
    collators = stages.stage_collators(processor, recipe.sft)
    loader = stages.stage_loader(samples, collators, recipe, recipe.sft, 0, 1, Position(), meets=True)
    loader.feed.spares = []
    with pytest.raises(ValueError, match="a sample has pixel_values, which none of the first ones had"):
        list(islice(loader, 30))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --standalone --nproc-per-node 2",
        "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no",
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(launcher, of, alone, tmp_path):
    recipe = of("llava", "adapter")  # noqa: F811
    file, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(beyond_defaults(recipe)))
    command = [sys.executable, "-m", *launcher.split(), "-m", "aki", "train", str(file), "--output", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert losses_of(folder) == near(losses_of(alone(recipe)))


def test_deepspeed_is_launched_also_on_one_process(of, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr("aki.commands.train._launch", launched.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, way in (("plain", "ddp"), ("sharded", "zero2")):
        recipe = shared(of("aki", "whole"), "aki", way)  # noqa: F811
        monkeypatch.setattr("aki.commands.train.Train._train", lambda *_: None)
        (tmp_path / name).write_text(yaml.safe_dump(beyond_defaults(recipe)))
        main(["train", str(tmp_path / name), "--processes", "1"])
    assert launched == [1]
