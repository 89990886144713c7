"""The paper's recipes from end to end over fixture files: both stages, resumed, dealt out, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aki4b import PRETRAIN, SFT, short, write_released
from interrupting import interrupt_before

from aki.cli import main
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.model import tiny
from aki.training.recipe import load_recipe


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def pretrained(released, tmp_path_factory):
    """What the pre-training recipe makes of its shards; the SFT recipe starts from it."""
    output = tmp_path_factory.mktemp("pretrained") / "run"
    main(short("pretrain", released, output, steps=4))
    return output


@pytest.fixture(scope="module")
def sft(released, pretrained, tmp_path_factory):
    """An SFT run with all eleven sources, not interrupted."""
    output = tmp_path_factory.mktemp("sft") / "run"
    main(short("sft", released, output, "--start-from", pretrained))
    return output


def result(folder):
    return json.loads((folder / "result.json").read_text())


def report(folder):
    return json.loads((folder / "data_report.json").read_text())


def says(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_pretrained_run_is_what_sft_starts_from(pretrained, sft):
    before, after = (AkiForConditionalGeneration.from_pretrained(folder) for folder in (pretrained, sft))
    assert (before.config.attention_rule, after.config.attention_rule) == ("causal", "mma")
    moved = {
        name.removeprefix("model.").split(".")[0]
        for (name, one), two in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert moved == {"connector", "language_model", "lm_head"}
    assert len(result(pretrained)["losses"]) == 4
    assert len(result(sft)["losses"]) == 6
    assert report(pretrained)["drawn"] == 4 * 8
    assert set(report(pretrained)["sources"]) == {"kale", "ocr"}
    assert (report(sft)["drawn"], report(sft)["skipped"]) == (6 * 4, 0)


def test_the_processor_writes_the_papers_prompt(sft):
    processor = AkiProcessor.from_pretrained(sft)
    assert processor.image_seq_length == 144
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    text = processor.tokenizer.apply_chat_template(
        chat, chat_template=processor.chat_template["default"], tokenize=False
    )
    assert text.startswith("<s><|system|>\nA chat between a curious user")
    assert text.endswith("<|end|>\n<|user|>\n<image>\nWhy?<|end|>\n")


@pytest.mark.parametrize(("step", "workers"), [(4, 0), (6, 2)])
def test_interrupted_and_resumed_it_has_the_same_losses(
    released, pretrained, sft, tmp_path, monkeypatch, step, workers
):
    """Also on another number of workers than it began with."""
    arguments = short("sft", released, tmp_path / "cut", "--start-from", pretrained)
    with monkeypatch.context() as patch:
        interrupt_before(patch, step)
        with pytest.raises(SystemExit, match="130"):
            main(arguments)
    main([*arguments, "--resume", "--workers", str(workers)])
    assert result(tmp_path / "cut")["losses"] == result(sft)["losses"]
    assert report(tmp_path / "cut") == report(sft)


def test_interrupted_pretraining_goes_on_within_its_shards(released, pretrained, tmp_path, monkeypatch, capsys):
    arguments = short("pretrain", released, tmp_path / "cut", steps=4)
    with monkeypatch.context() as patch:
        interrupt_before(patch, 4)
        with pytest.raises(SystemExit, match="130"):
            main(arguments)
    assert "Shards are dealt out to them" in says(capsys, [*arguments, "--resume", "--workers", "2"])
    main([*arguments, "--resume"])
    assert result(tmp_path / "cut")["losses"] == result(pretrained)["losses"]
    assert report(tmp_path / "cut") == report(pretrained)


def test_packed_rows_resume_too(released, pretrained, tmp_path, monkeypatch):
    packed = ["--start-from", pretrained, "--sft.packing", "--sft.row-tokens", "1400", "--sft.batch-size", "1"]
    main(short("sft", released, tmp_path / "whole", *packed))
    arguments = short("sft", released, tmp_path / "cut", *packed)
    with monkeypatch.context() as patch:
        interrupt_before(patch, 4)
        with pytest.raises(SystemExit, match="130"):
            main(arguments)
    main([*arguments, "--resume"])
    assert result(tmp_path / "cut")["losses"] == result(tmp_path / "whole")["losses"]
    assert report(tmp_path / "cut") == report(tmp_path / "whole")


def test_fewer_processes_accumulate_what_the_recipe_asks_for(released, pretrained, tmp_path):
    main(short("sft", released, tmp_path / "run", "--start-from", pretrained, "--devices", "3", steps=2))
    assert report(tmp_path / "run")["drawn"] == 2 * 3 * 4


def test_too_many_bad_samples_end_the_run_in_a_sentence(released, pretrained, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    missing = ["--start-from", pretrained, "--sft.sources.0.images", tmp_path / "images"]
    said = says(capsys, short("sft", released, tmp_path / "run", *missing, steps=40))
    assert "Most are 'missing image' in vqav2 (" in said
    assert "for instance vqav2/" in said
    assert report(tmp_path / "run")["sources"]["vqav2"]["skipped"]["missing image"] > 10


def test_wrong_data_is_a_sentence(released, pretrained, tmp_path, capsys):
    def said(*more):
        return says(capsys, short("sft", released, tmp_path / "run", "--start-from", pretrained, *more))

    assert "Did you mean 'vqav2'" in said("--sft.sources.0.kind", "vqav3")
    assert "there are no annotations at" in said("--sft.sources.1.annotations", "nowhere")
    wrong = short("pretrain", released, tmp_path / "run", "--workers", "5")
    assert "kale has 4 shard(s), 1 process(es) with 5 worker(s) each need 5" in says(capsys, wrong)


def test_a_model_that_is_not_there_is_told_before_any_data_is_read(tmp_path, capsys):
    arguments = short("sft", tmp_path / "nowhere", tmp_path / "run", "--start-from", tmp_path / "none")
    assert f"{tmp_path}/none holds no model to start from: run the stage before it first." in says(capsys, arguments)


def test_tiny_keeps_everything_but_the_parts():
    for path in (PRETRAIN, SFT):
        recipe = load_recipe(path)
        small = tiny(recipe)
        assert replace(small, model=recipe.model) == recipe
        assert small.model.connector["num_latents"] == 144
        assert small.model.from_backbones is None


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return clean | {"OMP_NUM_THREADS": "1"} | more


def command(arguments):
    return [sys.executable, "-m", "aki", *arguments]


@pytest.mark.slow
def test_killed_for_real_and_resumed(released, pretrained, tmp_path):
    """SIGKILL at whatever moment it comes, several times."""
    steps = 60
    whole = short("sft", released, tmp_path / "whole", "--start-from", pretrained, "--workers", "1", steps=steps)
    subprocess.run(command(whole), check=True, env=environment())
    cut = short("sft", released, tmp_path / "cut", "--start-from", pretrained, "--workers", "1", steps=steps)
    training = tmp_path / "cut/training"
    for patience in (0.0, 0.07, 0.2):
        before = set(training.glob("checkpoint-*"))
        process = subprocess.Popen(command([*cut, "--resume"]), env=environment(), start_new_session=True)
        while process.poll() is None and not set(training.glob("checkpoint-*")) - before:
            time.sleep(0.01)
        time.sleep(patience)
        assert process.poll() is None, "it was to be killed before its end"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command([*cut, "--resume"]), check=True, env=environment())
    assert result(tmp_path / "cut")["losses"] == result(tmp_path / "whole")["losses"]
    assert report(tmp_path / "cut") == report(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_a_step_and_one_goes_on(released, pretrained, tmp_path):
    """gloo on CPU: the samples of a step, and so its loss, are those of one process; so is what a resumed one sees."""
    options = ["--start-from", pretrained, "--devices", "2", "--workers", "1"]
    one = short("sft", released, tmp_path / "one", *options)
    subprocess.run(command(one), check=True, env=environment())
    two = short("sft", released, tmp_path / "two", *options, "--processes", "2")
    subprocess.run(command(two), check=True, env=environment())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert report(tmp_path / "two") == report(tmp_path / "one")
    weights = [AkiForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)
    # The checkpoint of two processes, taken on by one.
    (tmp_path / "two/result.json").unlink()
    for last in (tmp_path / "two/training").glob("checkpoint-6"):
        (last / "WHOLE").unlink()
    subprocess.run(
        command([*short("sft", released, tmp_path / "two", *options), "--resume"]), check=True, env=environment()
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert report(tmp_path / "two") == report(tmp_path / "one")


def losses(folder):
    return [loss for _, loss in result(folder)["losses"]]


@pytest.mark.slow
def test_the_model_shards_as_the_recipe_says():
    script = Path(__file__).with_name("sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(launch, check=True, env=environment())
