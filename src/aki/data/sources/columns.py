"""Any data set that the `datasets` library opens, with a mapping of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pandas
from datasets.packaged_modules.csv.csv import CsvConfig

from aki.data.augment import View
from aki.data.plain import plain_messages
from aki.data.schema import assistant
from aki.data.sources.base import Source, malformed
from aki.data.sources.files import Paths, Row, SourceError, as_list

FIELDS = ("id", "image", "question", "answer", "messages")
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


class DatasetColumns(Source):
    """A data set by path: a folder that `save_to_disk` wrote, files (parquet, JSON, CSV, Arrow), or a name on the hub.

    Args:
        columns: the data set's column for `answer` and, where there are, `question` and `image`; or for `messages`
            (and `image`, for image parts that name none themselves). `id` is the row's number if absent. An image is a
            picture, its bytes, its name below `images`, or a list of these. Questions and answers may be numbers;
            those of a CSV file are what stands in it, "007" and "None" too.
        split: of a data set that has several.
    """

    def __init__(
        self,
        annotations: Paths,
        images: Paths | None = None,
        *,
        columns: Mapping[str, str],
        split: str = "train",
        **options: Any,
    ):
        if not isinstance(columns, Mapping):
            raise SourceError(
                f"columns should be a mapping, as {{answer: caption, image: picture}}; it is {columns!r}."
            )
        self.columns, self.split = dict(columns), split
        super().__init__(annotations, images, **options)

    def open_rows(self, annotations: Paths, cache: str | Path | None) -> datasets.Dataset:
        rows = open_dataset(as_list(annotations), self.split, cache)
        if not len(rows):
            raise SourceError(f"{annotations} holds no rows.")
        unknown = [f"{field}: {name}" for field, name in self.columns.items() if name not in rows.column_names]
        if unknown or not set(self.columns) <= set(FIELDS) or not {"answer", "messages"} & set(self.columns):
            raise SourceError(
                f"columns should map answer or messages, and any of {', '.join(FIELDS)}, to columns of the data set "
                f"({', '.join(rows.column_names)}); it is {self.columns}."
            )
        # Arrow leaves pictures as the bytes they are: the processor opens them, and counts those that it cannot.
        return rows.select_columns(sorted(set(self.columns.values()))).with_format("arrow")

    def row(self, index: int) -> Row:
        raw = self.rows[index].to_pylist()[0]
        values = {field: raw[name] for field, name in self.columns.items()}
        name = str(values.get("id", index))
        with malformed(name, values):
            return {"id": name, "messages": self._messages(values)}

    def chat(self, row: Row, rng: Random, view: View | None) -> list[Row]:
        return row["messages"]

    def _messages(self, values: Row) -> list[Row]:
        image = values.get("image")
        images = image if isinstance(image, list) else [] if image in (None, "") else [image]
        if "messages" in values:
            return plain_messages(values["messages"], images)
        asked = [{"type": "image"} for _ in images]
        if "question" in values:
            asked.append({"type": "text", "text": _written(values["question"])})
        return plain_messages([{"role": "user", "content": asked}, assistant(_written(values["answer"]))], images)


def _written(value: Any) -> Any:
    """A number as text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def open_dataset(paths: list[str | Path], split: str, cache: str | Path | None) -> datasets.Dataset:
    """
    Raises:
        SourceError: it cannot be opened, or has no such split.
    """
    first, cache_dir = Path(paths[0]), None if cache is None else str(cache)
    if first.is_file() and first.suffix not in READERS:
        raise SourceError(f"{first} is none of {', '.join(READERS)}: convert it to one of these.")
    try:
        if (first / "state.json").exists() or (first / "dataset_dict.json").exists():
            opened = datasets.load_from_disk(str(first))
            return opened[split] if isinstance(opened, datasets.DatasetDict) else opened
        where: dict[str, Any] = {"path": str(paths[0])}
        if first.is_file():
            where = {"path": READERS[first.suffix], "data_files": {split: [str(path) for path in paths]}}
        return _load(split, **where, cache_dir=cache_dir)
    # What the library raises at a file without rows is an IndexError or a StopIteration.
    except (LookupError, StopIteration, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        nothing = isinstance(error, LookupError | StopIteration)
        why = "it holds no rows, or no such split." if nothing else str(error.__cause__ or error).partition("\n")[0]
        raise SourceError(f"{paths[0]} with the split {split!r} cannot be opened by `datasets`: {why}") from error


def _load(split: str, **where: Any) -> datasets.Dataset:
    """As the library does, which takes "NA" in a CSV file for nothing and "007" for 7; here it is what stands there."""
    config = datasets.load_dataset_builder(**where).config
    if isinstance(config, CsvConfig):
        heads = pandas.read_csv(config.data_files[split][0], sep=config.sep, nrows=0, encoding="utf-8-sig").columns
        texts = datasets.Features({name: datasets.Value("string") for name in heads})
        options = {"features": texts, "keep_default_na": False, "encoding": "utf-8-sig"}
        return datasets.load_dataset(**where, split=split, **options)
    return datasets.load_dataset(**where, split=split)
