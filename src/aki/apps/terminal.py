"""The chat at a terminal: a line is a question, or a command that begins with a slash."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from aki.apps.chat import Chat
from aki.attention import RULES

PROMPT = "> "


class Terminal:
    """Reads lines until /quit or the end of input. Errors are sentences, Ctrl-C stops an answer and not the session.

    Args:
        say: prints; with end="" while an answer streams.
    """

    def __init__(self, chat: Chat, say: Callable[..., None] = print):
        self.chat, self.say = chat, say
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/image": ("PATH or URL: a picture for the next question, again for one more", self.add_image),
            "/rule": (f"NAME: another attention rule ({', '.join(RULES)})", self.set_rule),
            "/save": ("[FILE]: write the chat as JSON", self.save),
            "/reset": ("forget the chat and its pictures", self.reset),
            "/help": ("this list", self.help),
            "/quit": ("or Ctrl-D: leave", self.quit),
        }
        self.leaving = False
        self.saved: set[Path] = set()

    def run(self) -> None:
        # The import gives input() arrow keys and a history.
        with suppress(ImportError):
            import readline

            readline.parse_and_bind("tab: complete")
            readline.set_completer_delims(" ")
        self.say(f"{self.chat.model.name_or_path}, rule {self.chat.rule}. Ask away; /help lists commands.")
        while not self.leaving:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                self.say()
                return
            except KeyboardInterrupt:
                self.say("\n(Ctrl-D or /quit leaves)")
                continue
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One line of input."""
        try:
            if line.startswith("/"):
                self.command(line)
            else:
                self.chat.ask(line, lambda piece: self.say(printable(piece), end="", flush=True))
                self.say()
        except KeyboardInterrupt:
            self.say(" (stopped)")
        except (ValueError, OSError, RuntimeError) as error:
            self.say(f"aki: {error}")

    def command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name not in self.commands:
            raise ValueError(f"there is no command {name}; /help lists them.")
        self.commands[name][1](argument.strip())

    def add_image(self, source: str) -> None:
        # Terminals put quotes around a path that is dropped on them.
        source = source.strip("'\"")
        if not source:
            raise ValueError("say which picture: /image PATH or URL.")
        self.chat.add_image(source if "://" in source else Path(source).expanduser())
        width, height = self.chat.pending[-1]["image"].size
        count = len(self.chat.pending)
        self.say(f"{width} x {height} pixels, {'picture' if count == 1 else f'{count} pictures'} for the next question")

    def set_rule(self, name: str) -> None:
        if name:
            self.chat.set_rule(name)
        self.say(f"rule {self.chat.rule}")

    def save(self, path: str) -> None:
        if not self.chat.messages:
            raise ValueError("nothing was said yet: there is no chat to save.")
        file = Path(path or time.strftime("chat-%Y%m%d-%H%M%S.json")).expanduser()
        if file.exists() and file.resolve() not in self.saved:
            raise ValueError(f"{file} is there already: give the chat another name.")
        try:
            self.chat.save(file)
        except OSError as error:
            raise ValueError(f"{file} cannot be written: {error.strerror}.") from error
        self.saved.add(file.resolve())
        self.say(f"{len(self.chat.messages) // 2} turns in {file}")

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.say("forgotten")

    def help(self, _: str) -> None:
        for name, (what, _run) in self.commands.items():
            self.say(f"{name:8}{what}")
        self.say("Ctrl-C stops an answer; the arrow keys bring earlier lines back.")

    def quit(self, _: str) -> None:
        self.leaving = True


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
