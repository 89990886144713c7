"""What the families are asked: the same chat for each, some text, its media, a question and, if wanted, an answer."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from unlock_families import MODALITY_OF, ROWS, Family

QUESTIONS = ["what is in the picture?", "how many digits are red?", "is there a blue one?", "count them."]


def picture(grey: int = 120) -> Image.Image:
    return Image.new("RGB", (20, 20), (grey, 40, 200))


def chat(family: Family, answer: int = 0, pad: str | None = None) -> dict[str, Tensor]:
    """Inputs of ROWS rows; with `pad`, the last row is shorter and padded on that side.

    Args:
        answer: tokens of the answer.
    """
    generator = torch.Generator().manual_seed(2)

    def words(count: int) -> list[int]:
        return torch.randint(3, 20, (count,), generator=generator).tolist()

    rows = []
    for row in range(ROWS):
        ids = words(2)
        for placeholder, count in family.runs:
            begin, end = ([i] for i in family.around.get(placeholder, (3, 4)))
            ids += begin + [placeholder] * count + end
        question = 2 if pad and row == ROWS - 1 else 5
        rows.append(ids + words(question + answer))
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    left = pad == "left"
    ids = torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)])
    ones = [[1] * len(row) for row in rows]
    mask = torch.tensor([f + r if left else r + f for r, f in zip(ones, fill, strict=True)])
    return {"input_ids": ids, "attention_mask": mask, **types(family, ids), **family.media}


def types(family: Family, ids: Tensor) -> dict[str, Tensor]:
    if family.token_types is None:
        return {}
    kinds = torch.zeros_like(ids)
    if family.own == "prefix":
        return {family.token_types: kinds}
    for token_id, modality in MODALITY_OF.items():
        kinds[ids == token_id] = modality
    return {family.token_types: kinds}
