"""Phrases for regions: RefCOCO, RefCOCO+ and RefCOCOg in MDETR's files (images: COCO train2014), and Visual Genome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from aki.data.augment import Box, View
from aki.data.schema import assistant, user
from aki.data.sources.base import Source, said
from aki.data.sources.files import Columns, Row, json_items
from aki.data.templates import region


class Regions(Source):
    """A picture, a box in it, and the phrase that describes what is there."""

    COLUMNS: ClassVar[Columns] = {"image": "string", "box": ["float64"], "phrase": "string"}

    def box(self, row: Row) -> Box | None:
        x1, y1, x2, y2 = row["box"]
        return x1, y1, x2, y2

    def chat(self, row: Row, rng: Random, view: View | None) -> list[dict[str, Any]]:
        box = view.box(row["box"]) if view else row["box"]
        return [user(row["image"], region(box)), assistant(said(row["phrase"], "phrase"))]


class RefCOCO(Regions):
    FILES = ("finetune_refcoco_train.json",)

    def entries(self, *files: Path) -> Iterator[tuple[Row, Row]]:
        needed = ("file_name", "caption", "width", "height")
        images = {
            image.get("id"): {name: image[name] for name in needed if name in image}
            for image in json_items(files[0], "images.item")
        }
        for annotation in json_items(files[0], "annotations.item"):
            yield annotation, images.get(annotation.get("image_id"), {})

    def parse(self, entry: tuple[Row, Row]) -> Iterator[Row]:
        annotation, image = entry
        yield {
            "id": str(annotation["id"]),
            "image": image["file_name"],
            "box": shares(annotation["bbox"], image["width"], image["height"]),
            "phrase": image["caption"],
        }


class RefCOCOPlus(RefCOCO):
    FILES = ("finetune_refcoco+_train.json",)


class RefCOCOg(RefCOCO):
    FILES = ("finetune_refcocog_train.json",)


class VisualGenome(Regions):
    FILES = ("region_descriptions.json", "image_data.json")

    def entries(self, *files: Path) -> Iterator[tuple[Row, tuple[int, int] | None]]:
        regions, images = files
        sizes = {image.get("image_id"): (image.get("width"), image.get("height")) for image in json_items(images)}
        for entry in json_items(regions):
            for described in entry.get("regions", ({},)):
                yield described, sizes.get(described.get("image_id"))

    def parse(self, entry: tuple[Row, tuple[int, int] | None]) -> Iterator[Row]:
        described, size = entry
        if size is None:
            raise LookupError(f"image_data.json has no image {described['image_id']}")
        corner_and_size = [described[name] for name in ("x", "y", "width", "height")]
        yield {
            "id": str(described["region_id"]),
            "image": f"{described['image_id']}.jpg",
            "box": shares(corner_and_size, *size),
            "phrase": described["phrase"],
        }


def shares(box: Sequence[float], width: float, height: float) -> list[float]:
    """A box in pixels (left, top, width, height) as x1, y1, x2, y2 from 0 to 1, cut at the picture's edges.

    Raises:
        ValueError: nothing of it is in the picture.
    """
    x, y, w, h = box
    x1, x2 = (min(max(value / width, 0.0), 1.0) for value in (x, x + w))
    y1, y2 = (min(max(value / height, 0.0), 1.0) for value in (y, y + h))
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"nothing of the box {box} is inside {width} x {height} pixels")
    return [x1, y1, x2, y2]
