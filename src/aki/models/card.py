"""A model card from what a run left: what the model is, how it is loaded, what it learned from, what was measured.

Folders of this machine are named by their last part alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from aki.attention.recorded import CAUSAL_ELSEWHERE, UNDER_THE_RULE
from aki.attention.rules import get_rule
from aki.models.adapters import adapter_of
from aki.models.configuration import AkiConfig
from aki.models.other import described

RESULT, RUN, DATA_REPORT = "result.json", "training/run.json", "data_report.json"
COMPARED, CELLS = "report.md", "cells"
"""Of a comparison, in the folder above."""


@dataclass(frozen=True)
class Stage:
    """A run that is finished, from its folder.

    Attributes:
        result: `result.json`.
        data: `data_report.json`; None where it trained on DigitScenes.
    """

    folder: Path
    result: dict[str, Any]
    data: dict[str, Any] | None

    @property
    def recipe(self) -> dict[str, Any]:
        return self.result["recipe"]

    @property
    def fields(self) -> dict[str, Any]:
        """Of this stage in its recipe, without those that are as they are by default."""
        return self.recipe.get(self.result["stage"], {})


def card_of(about: dict[str, Any], name: str, folder: Path | None = None, license: str | None = None) -> ModelCard:
    """
    Args:
        about: the model's configuration, as `aki.models.other.described` reads it.
        name: its id on the hub.
        folder: what a run left; None: nothing is known but the configuration.
        license: one of the hub's names; None leaves it to be stated.
    """
    base = None if folder is None else adapter_of(folder)
    stages = [] if folder is None else list(reversed(list(_stages(folder))))
    bases = [base] if base is not None else _started_from(stages)
    rule, is_aki = about.get("attention_rule", "causal"), about.get("model_type") == AkiConfig.model_type
    hub_ids = [one for one in bases if _is_hub_id(one)]
    data = ModelCardData(
        license=license,
        library_name="transformers" if base is None else "peft",
        base_model=hub_ids or None,
        pipeline_tag="image-text-to-text",
        tags=["aki", "modality-mutual-attention", *(f"attention-rule-{part}" for part in rule.split("+"))],
    )
    kind = "AKI" if is_aki else str((about.get("architectures") or [about.get("model_type")])[0])
    parts = [
        f"# {name.rpartition('/')[2]}",
        f"{'An adapter of ' if base else ''}{kind} under the attention rule `{rule}`.",
        *([] if is_aki or rule == "causal" else [f"**Open it with aki.** {CAUSAL_ELSEWHERE} {UNDER_THE_RULE}"]),
        "## How to load it",
        _loading(name, rule, is_aki, base),
        "## What it is",
        _table(("", ""), _about(bases, rule, stages)),
        *_training(stages),
        "## Measured",
        *_measured(stages[-1] if stages else None),
        "## Licence",
        "`license:` at the top of this page states it. Where that line is missing, nobody has stated one.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def folder_card(folder: Path, name: str, license: str | None = None) -> ModelCard:
    """The card of a model's folder."""
    return card_of(described(folder), name, folder, license)


def shown(name: str) -> str:
    """A model's name for others to read: a hub id, or the last part of a folder."""
    return f"`{name}`" if _is_hub_id(name) else f"a folder called `{Path(name).name}`, which is not on the hub"


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _stages(folder: Path) -> Iterator[Stage]:
    """The run in a folder, then the one that it started from, as long as they are there."""
    seen: set[Path] = set()
    at: Path | None = folder.resolve()
    while at is not None and at not in seen and (at / RESULT).is_file():
        seen.add(at)
        yield Stage(at, _read(at / RESULT), _read(at / DATA_REPORT) if (at / DATA_REPORT).is_file() else None)
        start = _read(at / RUN).get("start_from") if (at / RUN).is_file() else None
        at = Path(start) if start else None


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _started_from(stages: list[Stage]) -> list[str]:
    """The trained models or parts that the first of the runs began with."""
    if not stages:
        return []
    first = stages[0]
    parts = first.recipe["model"]
    if "pretrained" in parts:
        return [parts["pretrained"]]
    start = _read(first.folder / RUN).get("start_from") if (first.folder / RUN).is_file() else None
    return [start] if start else list(parts.get("from_backbones", {}).values())


def _about(bases: list[str], rule: str, stages: list[Stage]) -> Iterator[tuple[str, str]]:
    yield "base model", ", ".join(map(shown, bases)) or ("random weights" if stages else "not recorded")
    what = "; ".join((get_rule(part).allows.__doc__ or "").strip().rstrip(".") for part in rule.split("+"))
    yield "attention rule", f"`{rule}`: {what}"
    if stages:
        yield "parameters", f"{stages[-1].result['parameters']:,}"
    yield "code", "the Python package `aki-mma`, imported as `aki`"


def _loading(name: str, rule: str, is_aki: bool, base: str | None) -> str:
    auto = "AutoModelForImageTextToText" if is_aki else "AutoModelForMultimodalLM"
    lines = ["import aki  # pip install aki-mma"]
    if base is not None:
        lines.append("from peft import PeftModel")
    lines += [f"from transformers import {auto}, AutoProcessor", ""]
    lines.append(f'model = {auto}.from_pretrained("{base or name}")')
    if base is not None:
        lines.append(f'model = PeftModel.from_pretrained(model, "{name}")')
    lines.append(f'processor = AutoProcessor.from_pretrained("{name}")')
    if is_aki and base is not None:
        lines.append(f'model.get_base_model().config.attention_rule = "{rule}"')
    elif not is_aki and rule != "causal":
        lines.append(f'aki.unlock(model, processor, rule="{rule}")')
    text = "```python\n" + "\n".join(lines) + "\n```"
    if base is not None:
        return text
    asked = f"Or ask it: `aki chat {name} --image picture.jpg QUESTION`; `aki serve {name}` answers programs."
    without = " Without `import aki` it opens with `trust_remote_code=True`, where the package is installed."
    return f"{text}\n\n{asked}{without if is_aki else ''}"


def _training(stages: list[Stage]) -> list[str]:
    if not stages:
        return []
    rows = [
        (
            stage.result["stage"],
            str(stage.fields.get("task", "")),
            f"`{stage.fields.get('rule', '')}`",
            _number(stage.fields.get("steps")),
            _number(stage.fields.get("batch_size")),
            str(stage.fields.get("learning_rate", "")),
            _number(stage.result.get("tokens")),
        )
        for stage in stages
    ]
    heads = ("stage", "learned", "rule", "steps", "samples a step and device", "learning rate", "tokens")
    return ["## How it was trained", _table(heads, rows), "## What it was trained on", *_data(stages)]


def _data(stages: list[Stage]) -> list[str]:
    rows, drawn, skipped = [], 0, 0
    for stage in stages:
        name = stage.result["stage"]
        if stage.data is None:
            named = [str(one.get("name") or one["kind"]) for one in _sources(stage)] or ["DigitScenes, drawn by aki"]
            rows += [(name, one, "", "", "") for one in named]
            continue
        drawn, skipped = drawn + stage.data["drawn"], skipped + stage.data["skipped"]
        for source, tally in stage.data["sources"].items():
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in tally["skipped"].items())
            bad = sum(tally["skipped"].values())
            rows.append((name, source, f"{tally['drawn']:,}", f"{bad:,}", reasons))
    table = _table(("stage", "source", "samples drawn", "unusable", "why"), rows)
    return [table, f"{skipped:,} of {drawn:,} samples ({skipped / drawn:.2%}) could not be used."] if drawn else [table]


def _sources(stage: Stage) -> list[dict[str, Any]]:
    return [*stage.fields.get("sources", ()), *stage.fields.get("shards", ())]


def _measured(stage: Stage | None) -> list[str]:
    if stage is None:
        return ["Nothing is recorded."]
    compared = _comparison(stage)
    if compared is not None:
        return [f"It is one training of a row of this comparison (`{stage.folder.name}`).", compared]
    test = stage.result.get("test")
    if test is None:
        return ["Nothing was held out to measure it by."]
    names = {skill: "all" if skill == "accuracy" else skill.replace("_", " ") for skill in test}
    said = "Held-out accuracy in percent, of one training, so without an interval."
    if (asked := stage.result.get("held_out")) is not None:
        said += f" Asked {asked['test']:,} questions of {', '.join(asked['sources'])}. {asked['skipped']}."
    return [said, _table(("", "accuracy"), [(names[skill], f"{100 * value:.1f}") for skill, value in test.items()])]


def _comparison(stage: Stage) -> str | None:
    """The report of the comparison that trained this model, if it is still beside it."""
    report, cell = (stage.folder.parent / name for name in (COMPARED, f"{CELLS}/{stage.folder.name}.json"))
    if not (report.is_file() and cell.is_file()) or _read(cell).get("test") != stage.result.get("test"):
        return None
    return report.read_text().strip()


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    cells = ["| " + " | ".join(one.replace("|", "\\|").replace("\n", " ") for one in row) + " |" for row in rows]
    return "\n".join([*lines, *cells])
