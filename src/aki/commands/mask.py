"""`aki mask`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aki.commands.shared import TakesPlugins


@dataclass
class Mask(TakesPlugins):
    """Draw which token sees which, beside causal attention."""

    rule: tuple[str, ...] = ("mma",)
    """One or several."""
    picture: Path = Path("mask.png")

    def run(self, overrides: list[str]) -> None:
        from aki.apps.pictures import draw_masks

        rules = list(dict.fromkeys(["causal", *self.rule]))
        for name, (pairs, opened) in draw_masks(rules, self.picture).items():
            print(f"{name}: {pairs} pairs, {opened} beyond causal")
        print(f"drawn in {self.picture}")
