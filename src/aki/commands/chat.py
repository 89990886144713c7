"""`aki chat`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from aki.commands.shared import TakesPlugins


@dataclass
class Chat(TakesPlugins):
    """Ask a model about pictures: once, with a question or piped input, or in a chat at the terminal."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder or a hub id."""
    question: Annotated[Positional[str | None], arg(metavar="QUESTION")] = None
    """Absent: standard input, which at a terminal is a chat."""
    image: UseAppendAction[tuple[str, ...]] = ()
    """A path or URL; --image again for one more."""
    rule: str | None = None
    """Another attention rule than the model's."""
    unlock: bool = False
    """Lay MMA over a model that is not AKI's, as it is."""
    max_new_tokens: int = 128
    """Of one answer."""
    json: bool = False
    """Print one JSON object, for scripts."""

    def run(self, overrides: list[str]) -> None:
        from aki.apps.chat import Chat as Conversation
        from aki.apps.chat import load
        from aki.apps.terminal import Terminal, printable

        interactive = self.question is None and sys.stdin.isatty() and not self.json
        # A pipe ends with a line break that nobody asked.
        question = None if interactive else (self.question if self.question is not None else sys.stdin.read().strip())
        chat = Conversation(*load(self.model, self.unlock), self.max_new_tokens)
        if self.rule is not None:
            chat.set_rule(self.rule)
        for image in self.image:
            chat.add_image(image)
        if question is None:
            Terminal(chat).run()
        elif self.json:
            self.print_json(chat, question)
        else:
            shown = printable if sys.stdout.isatty() else str
            chat.ask(question, lambda piece: print(shown(piece), end="", flush=True))
            print()

    def print_json(self, chat: Any, question: str) -> None:
        start = time.perf_counter()
        said = chat.ask(question)
        seconds = round(time.perf_counter() - start, 3)
        row = {"question": question, "answer": said, "images": list(self.image), "rule": chat.rule, "seconds": seconds}
        print(json.dumps({"model": self.model} | row, ensure_ascii=False))
