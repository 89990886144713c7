"""What digit_scenes.yaml calls; lmms-eval loads this file by its path."""

from __future__ import annotations

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match, counted for all and for the question's skill."""
    right = float(results[0].strip() == doc["answer"])
    return {"accuracy": right, doc["skill"]: right}
