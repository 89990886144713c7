"""`aki chat`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class Chat:
    """Ask a model about a picture."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder or a hub id."""
    question: Annotated[Positional[str | None], arg(metavar="QUESTION")] = None
    """Read from standard input if absent."""
    image: str | None = None
    """A path or URL."""
    rule: str | None = None
    """Another attention rule than the model's."""
    max_new_tokens: int = 128

    def run(self, overrides: list[str]) -> None:
        from aki.apps.chat import answer, load

        question = self.question if self.question is not None else sys.stdin.read()
        model, processor = load(self.model)
        answer(
            model,
            processor,
            question,
            self.image,
            max_new_tokens=self.max_new_tokens,
            attention_rule=self.rule,
            emit=lambda piece: print(piece, end="", flush=True),
        )
        print()
