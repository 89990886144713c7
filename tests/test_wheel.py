"""What a user gets: the wheel, installed where there is nothing but what it asks for.

Installing that anew would fetch a gigabyte. So the environment holds links to the distributions of this one that the
wheel's own Requires-Dist lead to, and to no others: what an extra would add is not there.
"""

import json
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import aki

ROOT = Path(__file__).parents[1]
OF_EXTRAS = ("fastapi", "uvicorn", "gradio", "peft", "soundfile", "soxr", "lmms_eval", "pytest")
COMMANDS = """
import contextlib, io, json, sys
from aki.cli import main
for arguments in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The Python of an environment with the wheel and what it needs."""
    place = tmp_path_factory.mktemp("clean")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(place), str(ROOT)], check=True)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "venv", symlinks=True)
    python = place / "venv/bin/python"
    (site_packages,) = (place / "venv/lib").glob("python3*/site-packages")
    (description,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    for distribution in needed(metadata.PathDistribution(description).requires):
        link(distribution, site_packages)
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return python


def needed(requirements):
    """The installed distributions that these requirements and theirs lead to, without extras that none asks for."""
    found, seen = {}, set()
    todo = [(Requirement(one), {""}) for one in requirements]
    while todo:
        requirement, extras = todo.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name, asked = canonicalize_name(requirement.name), {"", *requirement.extras}
        found[name] = metadata.distribution(name)
        if (name, *sorted(asked)) not in seen:
            seen.add((name, *sorted(asked)))
            todo += [(Requirement(one), asked) for one in found[name].requires or ()]
    return found.values()


def link(distribution, site_packages):
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (site_packages / top).is_symlink():
            (site_packages / top).symlink_to(distribution.locate_file(top))


def run(python, *arguments):
    # Neither this checkout nor its environment.
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": str(python.parent),
        "HOME": str(python.parent),
    }
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=python.parent,
        env=environment,
    ).stdout


def test_the_wheel_in_an_environment_without_extras(clean, tmp_path):
    here = "import aki, importlib.util as u; from importlib.metadata import version; "
    here += f"print(aki.__file__, version('aki-mma'), [name for name in {OF_EXTRAS} if u.find_spec(name)])"
    (installed,) = clean.parents[1].glob("lib/*/*/aki/__init__.py")
    assert run(clean, clean, "-c", here).split() == [str(installed), aki.__version__, "[]"]
    assert "Multimodal LLMs with modality-mutual attention" in run(clean, clean.parent / "aki", "--help")

    model, adapter, recipe = tmp_path / "model", tmp_path / "adapter", tmp_path / "recipe.yaml"
    few = ["--sft.steps", "2", "--sft.batch-size", "2", "--sft.eval-every", "0", "--sft.save-every", "0"]
    few += ["--data.eval-size", "4", "--data.test-size", "4", "--workers", "0"]
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    sft = {"task": "question", "rule": "mma", "steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    sft |= {"min_learning_rate": 0, "warmup_steps": 0, "weight_decay": 0}
    recipe.write_text(yaml.safe_dump({"name": "a", "model": {"pretrained": str(model)}, "adapter": {}, "sft": sft}))
    commands = [
        (["mask", "--picture", tmp_path / "mask.png"], 0, "mma: 115 pairs, 24 beyond causal"),
        (["train", "digits", "--tiny", "--stage", "sft", "--output", model, *few], 0, f"saved in {model}"),
        (["chat", model, "--image", tmp_path / "mask.png", "how many?", "--max-new-tokens", "2"], 0, ""),
        (["train", "digitz"], 2, "aki's own are aki-4b/pretrain, aki-4b/sft, digits,"),
        (["serve", model], 2, "pip install 'aki-mma[serve]'"),
        (["serve", model, "--engine", "vllm"], 2, "needs vLLM"),
        (["demo", model], 2, "pip install 'aki-mma[demo]'"),
        (["eval", model], 2, "pip install 'aki-mma[eval]'"),
        (["chat", adapter, "how many?"], 2, "pip install 'aki-mma[adapter]'"),
        (["train", recipe, "--output", tmp_path / "adapted"], 2, "pip install 'aki-mma[adapter]'"),
    ]
    asked = json.dumps([[str(argument) for argument in arguments] for arguments, _, _ in commands])
    answers = [json.loads(line) for line in run(clean, clean, "-c", COMMANDS, asked).splitlines()]
    for (arguments, code, says), (stopped, said) in zip(commands, answers, strict=True):
        assert stopped == code, (arguments, said)
        assert says in said, (arguments, said)
        assert code == 0 or said.splitlines()[-1].startswith("aki: "), said
    assert (tmp_path / "mask.png").exists()
    assert (model / "model.safetensors").exists()
