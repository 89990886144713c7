"""DigitScenes written out as a data set that lmms-eval loads like any other."""

from __future__ import annotations

import json
from pathlib import Path

import datasets

from aki.data.digits import DigitScenes
from aki.models import AkiProcessor
from aki.training.folder import RESULT
from aki.training.held_out import TEST_SEED
from aki.training.recipe import DataRecipe

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "skill": datasets.Value("string"),
    }
)


def held_out(model: Path) -> DigitScenes:
    """The questions that `aki train` and `aki compare` scored this model on.

    Raises:
        ValueError: the folder holds no result of a training on DigitScenes.
    """
    result = model / RESULT
    values = json.loads(result.read_text())["recipe"].get("data", {}) if result.exists() else None
    if values is None or "held_out" in values:
        raise ValueError(
            f"{model} has no {RESULT} on DigitScenes: the suite digits is for models that `aki train` made on them."
        )
    data = DataRecipe(**values)
    size = AkiProcessor.from_pretrained(model).image_processor.size["height"]
    return DigitScenes("test", "question", data.test_size, size, data.grid, TEST_SEED)


def write_scenes(scenes: DigitScenes, folder: Path) -> None:
    """One parquet file, pictures as PNG, which loses nothing."""
    rows = []
    for sample in (scenes[i] for i in range(len(scenes))):
        image = sample.messages[0]["content"][0]["image"]
        rows.append(
            {
                "id": sample.id,
                "image": image,
                "question": sample.question,
                "answer": sample.answer,
                "skill": sample.skill,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "test.parquet")
