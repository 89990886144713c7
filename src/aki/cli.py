"""The command `aki`: it parses and calls. Each command is a file in aki/commands."""

from __future__ import annotations

import os
import sys
from functools import reduce
from operator import or_
from typing import Any

import tyro

from aki import plugins
from aki.commands.chat import Chat
from aki.commands.compare import Compare
from aki.commands.convert import Convert
from aki.commands.data import Data
from aki.commands.demo import Demo
from aki.commands.eval import Eval
from aki.commands.mask import Mask
from aki.commands.publish import Publish
from aki.commands.recipe import Recipe
from aki.commands.serve import Serve
from aki.commands.table import Table
from aki.commands.train import Train
from aki.threads import use_threads
from aki.training.recipe import RecipeError

COMMANDS: tuple[Any, ...] = (
    Train,
    Compare,
    Chat,
    Convert,
    Demo,
    Mask,
    Data,
    Recipe,
    Eval,
    Table,
    Serve,
    Publish,
)
TAKE_RECIPE_FIELDS = (Train, Compare, Data)  # --sft.steps 100
GOES_ON = {
    Train: " The same command with --resume goes on from the last checkpoint.",
    Compare: " The same command goes on.",
    Eval: " The same command goes on.",
}


def main(arguments: list[str] | None = None) -> None:
    """Run `aki COMMAND ...`; a wrong input ends with a sentence and exit code 2, Ctrl-C with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command, rest = tyro.cli(
        reduce(or_, COMMANDS),
        args=arguments,
        prog="aki",
        description="Multimodal LLMs with modality-mutual attention.",
        return_unknown_args=True,
    )
    use_threads()
    if not isinstance(command, Chat):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # those of loading and saving; ours say more
    try:
        plugins.load(getattr(getattr(command, "action", command), "plugin", ()))
        takes_fields = isinstance(command, TAKE_RECIPE_FIELDS) or (isinstance(command, Eval) and command.recipe)
        if rest and not (takes_fields or isinstance(command, Serve)):
            name = type(command).__name__.lower()
            raise RecipeError(f"aki {name} does not know {' '.join(rest)}; see aki {name} --help.")
        command.run(rest)
    except KeyboardInterrupt:
        print(f"\naki: interrupted.{GOES_ON.get(type(command), '')}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"aki: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        # What a recipe or a model needs and is not installed; transformers says it in several lines.
        print(f"aki: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
