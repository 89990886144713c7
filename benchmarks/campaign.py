"""Everything that is promised not to break, thrown at hard: requests, pictures, shards, kills and layouts.

Seeded, bounded, and on this machine alone. Prints a table of the parts with tries and failures, each failure in a
sentence below it, and ends with 1 where there are any.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """`run(seed, tries)` of the module returns the tries made and a sentence for each failure."""

    name: str
    module: str
    tries: int
    quick: int


PARTS = (
    Part("requests, 300 in 1,000 hung up on", "campaign_requests", 1000, 60),
    Part("mutated pictures", "campaign_pictures", 300, 100),
    Part("mutated shards", "campaign_shards", 200, 60),
    Part("kills and damaged checkpoints, in turn", "campaign_kills", 40, 2),
    Part("layouts", "campaign_layouts", 1000, 60),
)


def main() -> None:
    names = [part.module.removeprefix("campaign_") for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tries, in about a minute")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="these alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    told, numbers = list[str](), {}
    print("| part | tries | failures | seconds |\n| --- | ---: | ---: | ---: |")
    for name, part in zip(names, PARTS, strict=True):
        if name not in arguments.parts:
            continue
        started = time.monotonic()
        run = importlib.import_module(part.module).run
        tries, failures = run(arguments.seed, part.quick if arguments.quick else part.tries)
        seconds = time.monotonic() - started
        print(f"| {part.name} | {tries:,} | {len(failures)} | {seconds:.0f} |", flush=True)
        told += [f"{name}: {failure}" for failure in failures]
        numbers[name] = {"tries": tries, "failures": failures, "seconds": seconds}
    print("\n".join(["", *told]) if told else "", end="\n" if told else "")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "parts": numbers}, indent=1) + "\n")
    sys.exit(1 if told else 0)


if __name__ == "__main__":
    main()
