"""`aki publish` and `push_to_hub`: the card, what goes to the hub, and what stays."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from test_adapting import adapted, logits
from test_pretrained import data, of, published, recipe, run  # noqa: F401

from aki import AkiForConditionalGeneration, AkiProcessor
from aki.apps.loading import load
from aki.cli import main
from aki.models.card import folder_card
from aki.models.publishing import pack_folder, upload
from aki.training.stages import Job, build_model, run_stage
from aki.training.start import load_processor

RESULTS = Path(__file__).parents[2] / "results/rings-digits"


class Hub(HfApi):
    """The hub's client as far as it is asked, and a folder for what it was given."""

    def __init__(self, folder: Path, down: Exception | None = None):
        super().__init__()
        self.folder, self.down, self.private = folder, down, None

    def create_repo(self, repo_id, *, private=None, exist_ok=False, **others):
        if self.down is not None:
            raise self.down
        self.folder.mkdir(exist_ok=exist_ok)
        self.private = private
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, repo_id, filename, **others):
        return (self.folder / filename).exists()

    def upload_folder(self, *, repo_id, folder_path, allow_patterns=None, **others):
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(folder_path) / name, self.folder / name)
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    api = Hub(tmp_path / "hub")
    monkeypatch.setattr("aki.models.publishing.HfApi", lambda token=None: api)
    return api


@pytest.fixture
def digits_run(tiny_recipe, tmp_path):
    """Both stages on DigitScenes, two steps each."""
    for stage in ("pretrain", "sft"):
        setattr(tiny_recipe, stage, replace(getattr(tiny_recipe, stage), steps=2, save_every=0, eval_every=0))
    start = None
    for stage in ("pretrain", "sft"):
        run_stage(Job(tiny_recipe, stage, tmp_path / stage, start, report=lambda news: None))
        start = tmp_path / stage
    return tmp_path / "sft"


@pytest.fixture
def aki_folder(tiny_recipe, tmp_path):
    """A model without a run."""
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def opened(card: ModelCard, folder: Path):
    """What the card's own lines open, from a folder instead of the hub."""
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    found: dict = {}
    exec(code.replace("me/mine", str(folder)), found)
    return found["model"], found["processor"]


def rows(card: ModelCard, first: str) -> list[list[str]]:
    """The rows of the card's tables that begin so."""
    lines = [line for line in card.content.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_family_trained_on_own_data(recipe, published, data, tmp_path, hub):  # noqa: F811
    lines = (data / "train.jsonl").read_text().splitlines()
    lost = [{"role": "user", "content": [{"type": "image", "image": "gone.png"}, {"type": "text", "text": "and now?"}]}]
    lost.append({"role": "assistant", "content": "it is red"})
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join([*lines[:2], json.dumps({"messages": lost})]) + "\n")
    recipe = of(recipe, published, "llava", steps=6, save_every=0)
    (source,) = recipe.sft.sources
    recipe.sft.sources = (replace(source, annotations=(str(own),), name="photos"),)
    run(recipe, tmp_path / "run")

    parcel = pack_folder(tmp_path / "run", "me/mine", "cc-by-4.0")
    upload(parcel, private=True, api=hub)
    card = ModelCard.load(hub.folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("cc-by-4.0", "transformers", None)
    report = json.loads((tmp_path / "run/data_report.json").read_text())["sources"]["photos"]
    drawn, skipped = report["drawn"], report["skipped"]["missing image"]
    assert skipped
    trained, learned = rows(card, "sft")
    assert trained[1:4] == ["question", "`mma`", "6"]
    assert learned[1:] == ["photos", str(drawn), str(skipped), f"missing image: {skipped}"]
    assert f"{skipped} of {drawn} samples ({skipped / drawn:.2%}) could not be used" in card.content
    assert rows(card, "base model") == [["base model", "a folder called `llava`, which is not on the hub"]]
    for server in ("transformers alone", "vLLM", "SGLang", "llama.cpp", "TRL"):
        assert server in card.content
    # Nothing of this machine, and what is measured is what the run said.
    assert str(tmp_path) not in card.content
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert rows(card, "all") == [["all", f"{100 * result['test']['accuracy']:.1f}"]]
    # The uploaded folder is whole, and the card's lines open it under its rule.
    assert hub.private is True
    assert not any((hub.folder / name).exists() for name in ("training", "result.json", "data_report.json"))
    model, _ = opened(card, hub.folder)
    processor = load_processor(tmp_path / "run")
    wanted = logits(load(tmp_path / "run")[0], processor, data)
    assert model._aki_unlocked.rule.name == "mma"
    torch.testing.assert_close(logits(model, processor, data), wanted)
    torch.testing.assert_close(logits(load(hub.folder)[0], load_processor(hub.folder), data), wanted)


def test_an_adapter_names_a_model_that_others_have(recipe, published, data, tmp_path, caplog):  # noqa: F811
    run(of(adapted(recipe), published, "llava"), tmp_path / "run")
    base = str(published("llava"))
    with pytest.raises(ValueError, match=f"names a model of this machine, {base}, .*aki convert --merge"):
        pack_folder(tmp_path / "run", "me/mine")
    file = tmp_path / "run/adapter_config.json"
    named = json.loads(file.read_text())
    card = folder_card(tmp_path / "run", "me/mine")
    model, _ = opened(card, tmp_path / "run")
    processor = load_processor(tmp_path / "run")
    torch.testing.assert_close(logits(model, processor, data), logits(load(tmp_path / "run")[0], processor, data))
    # As a person would put it who published the model first.
    file.write_text(json.dumps(named | {"base_model_name_or_path": "me/base"}))
    of_base = json.loads((published("llava") / "config.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aki.models.other.PreTrainedConfig.get_config_dict", lambda name: (of_base, {}))
        parcel = pack_folder(tmp_path / "run", "me/mine")
    card = ModelCard.load(tmp_path / "run/README.md")
    # PEFT's own, which nobody has filled in and which names the folder, is none.
    assert (card.data.base_model, card.data.library_name) == (["me/base"], "peft")
    assert base not in card.content
    assert "adapter_model.safetensors" in parcel.files
    # Merged, it is a model of its family, and says so.
    file.write_text(json.dumps(named))
    caplog.clear()
    main(["convert", "--merge", str(tmp_path / "run"), str(tmp_path / "merged")])
    assert "answers causally" in caplog.text
    assert "It states no licence" in pack_folder(tmp_path / "merged", "me/mine").said[-1]


def test_a_run_of_two_stages_and_what_stays_here(digits_run, hub, capsys):
    kept = {"optimizer.pt": 1, ".env": 2, "scene.png": 3, "training_args.bin": 4, "notes.safetensors": 5}
    for name, size in kept.items():
        (digits_run / name).write_bytes(b"x" * size)
    main(["publish", str(digits_run), "me/mine", "--dry-run"])
    said = capsys.readouterr().out
    assert not hub.folder.exists()
    assert "Nothing was uploaded" in said
    assert "states no licence" in said
    weights = (digits_run / "model.safetensors").stat().st_size
    assert f"{weights:,} bytes  model.safetensors" in said
    assert set(re.search("Stays here: (.*)", said)[1].split(", ")) == {*kept, "training", "result.json"}
    card = ModelCard.load(digits_run / "README.md")
    assert [rows(card, stage)[0][2] for stage in ("pretrain", "sft")] == ["`causal`", "`mma`"]
    assert rows(card, "pretrain")[1][1] == "DigitScenes, drawn by aki"
    assert rows(card, "base model")[0][1] == "random weights"
    assert rows(card, "parameters")[0][1] == f"{json.loads((digits_run / 'result.json').read_text())['parameters']:,}"

    # A person's own words and licence are kept; the loader is this package's, whatever lies there.
    (digits_run / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (digits_run / "modeling_aki.py").write_text("import os\n")
    main(["publish", str(digits_run), "me/mine"])
    said = capsys.readouterr().out
    assert "README.md is kept as it is" in said
    assert "https://huggingface.co/me/mine" in said
    assert "# Mine" in (hub.folder / "README.md").read_text()
    assert "from aki.models import" in (hub.folder / "modeling_aki.py").read_text()
    assert not {path.name for path in hub.folder.iterdir()} & {*kept, "training", "result.json"}
    model, processor = load(hub.folder)
    assert (type(model), type(processor)) == (AkiForConditionalGeneration, AkiProcessor)
    assert set(processor.chat_template) == {"default", "caption"}


def test_numbers_with_intervals_where_it_was_compared(aki_folder, tmp_path):
    """The comparison's own report, as long as it is the one that this model was trained in."""
    cell = json.loads((RESULTS / "cells/mma.json").read_text())
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells/model.json").write_text(json.dumps(cell))
    shutil.copy(RESULTS / "report.md", tmp_path)
    made = {"stage": "sft", "recipe": {"model": {}, "sft": {"rule": "mma"}}, "parameters": 1, "test": cell["test"]}
    (aki_folder / "result.json").write_text(json.dumps(made))
    (line,) = [line for line in (RESULTS / "report.md").read_text().splitlines() if line.startswith("| MMA |")]
    assert " +0.9 ± 3.0 " in line
    assert line in folder_card(aki_folder, "me/mine").content
    (aki_folder / "result.json").write_text(json.dumps(made | {"test": {"accuracy": 0.125}}))
    card = folder_card(aki_folder, "me/mine")
    assert line not in card.content
    assert rows(card, "all") == [["all", "12.5"]]


@pytest.mark.parametrize(
    ("model", "bases"),
    [
        ({"pretrained": "llava-hf/llava-1.5-7b-hf"}, ["llava-hf/llava-1.5-7b-hf"]),
        ({"from_backbones": {"vision": "google/siglip", "text": "microsoft/phi"}}, ["google/siglip", "microsoft/phi"]),
    ],
)
def test_what_it_began_with_stands_where_the_hub_looks(aki_folder, model, bases):
    made = {"stage": "sft", "recipe": {"model": model, "sft": {}}, "parameters": 1, "tokens": None}
    (aki_folder / "result.json").write_text(json.dumps(made))
    card = folder_card(aki_folder, "me/mine")
    assert card.data.base_model == bases
    assert "Nothing was held out" in card.content


def test_the_cards_lines_open_a_model_without_a_run(aki_folder):
    pack_folder(aki_folder, "me/mine", "apache-2.0")
    card = ModelCard.load(aki_folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "image-text-to-text")
    model, processor = opened(card, aki_folder)
    assert (type(model), type(processor)) == (AkiForConditionalGeneration, AkiProcessor)
    # The licence goes into a card that is there, and its words stay; what it may be wrong in is said.
    assert len(pack_folder(aki_folder, "me/mine").said) == 1
    (aki_folder / "result.json").write_text("{}")
    os.utime(aki_folder / "README.md", (0, 0))
    _, other, older = pack_folder(aki_folder, "me/other", "mit").said
    assert "does not speak of me/other" in other
    assert "older than the end of the training" in older
    again = ModelCard.load(aki_folder / "README.md")
    assert (again.data.license, again.text) == ("mit", card.text)


def test_push_to_hub_tells_of_the_run_whose_weights_these_are(digits_run, hub):
    model = AkiForConditionalGeneration.from_pretrained(digits_run)
    model.push_to_hub("me/mine", private=True, tags=["digits"])
    card = ModelCard.load(hub.folder / "README.md")
    assert "digits" in card.data.tags
    assert hub.private is True
    assert rows(card, "sft")[0][3] == "2"
    assert (hub.folder / "model.safetensors").read_bytes() == (digits_run / "model.safetensors").read_bytes()
    (hub.folder / "README.md").write_text("# Mine\n")
    model.push_to_hub("me/mine")
    assert (hub.folder / "README.md").read_text() == "# Mine\n"
    (hub.folder / "README.md").unlink()
    with torch.no_grad():
        model.lm_head.weight += 1
    model.push_to_hub("me/mine")
    assert rows(ModelCard.load(hub.folder / "README.md"), "sft") == []


def test_what_cannot_be_published_is_a_sentence(digits_run, aki_folder, hub, tmp_path, capsys):
    def says(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["publish", *map(str, arguments)])
        assert stopped.value.code == 2
        assert not hub.folder.exists()
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "holds no model: there is no config.json in it." in says(tmp_path / "empty", "me/mine")
    assert "There are some below it: model, pretrain, sft." in says(tmp_path, "me/mine")
    assert "Repo id must" in says(aki_folder, "me/mine/again")
    config = json.loads((aki_folder / "config.json").read_text())
    (aki_folder / "config.json").write_text(json.dumps(config | {"made_of": [{"folder": str(tmp_path)}]}))
    assert f"config.json names {tmp_path}, a path of this machine" in says(aki_folder, "me/mine")
    (aki_folder / "config.json").write_text(json.dumps(config))
    (aki_folder / "model.safetensors").rename(aki_folder / "pytorch_model.bin")
    assert "has no weights as safetensors" in says(aki_folder, "me/mine")
    (digits_run / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors has 1 bytes of" in says(digits_run, "me/mine")
    (digits_run / "result.json").unlink()
    assert "a run that is not finished" in says(digits_run, "me/mine")


def test_a_hub_that_is_not_there_is_a_sentence(aki_folder, hub, capsys):
    hub.down = httpx.ConnectError("no route")
    with pytest.raises(SystemExit) as stopped:
        main(["publish", str(aki_folder), "me/mine"])
    assert stopped.value.code == 2
    assert "aki: the hub did not take me/mine: no route" in capsys.readouterr().err
