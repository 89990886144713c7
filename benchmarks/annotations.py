"""What opening an annotation file costs: seconds the first time and afterwards, memory of the process that reads it.

`python benchmarks/annotations.py` writes a file of a million entries in GQA's format, opens it in one process, which
parses it, and in another, which finds it parsed, and reads rows at random. Memory is the process's own (RssAnon,
Linux); what is mapped from the file is shared by all workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from aki.data.sources import Source, open_source

READS = 2000


def own_memory() -> float:
    """MB that belong to this process alone."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def write_annotations(path: Path, entries: int) -> None:
    with path.open("w") as file:
        for number in range(entries):
            entry = {
                "semantic": [{"operation": "select", "dependencies": [], "argument": f"bowl ({number})"}],
                "question": f"Is bowl number {number} to the right of the green apple?",
                "imageId": str(number),
                "isBalanced": True,
                "answer": "yes",
                "fullAnswer": "Yes, the bowl is to the right of the apple.",
            }
            file.write(f"{',' if number else '{'}{json.dumps(f'{number:08}')}: {json.dumps(entry)}")
        file.write("}")


def measure(folder: Path) -> dict[str, float]:
    before, started = own_memory(), time.perf_counter()
    source = open_source("gqa", annotations=folder / "gqa.json", images=folder, cache=folder / "cache")
    opened = time.perf_counter()
    assert isinstance(source, Source)
    rng = random.Random(0)
    for _ in range(READS):
        source.row(rng.randrange(len(source)))
    read = time.perf_counter()
    return {
        "seconds": opened - started,
        "own_mb": own_memory() - before,
        "microseconds_a_row": 1e6 * (read - opened) / READS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20,000 entries")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    entries = 20_000 if arguments.quick else arguments.entries
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gqa.json"
        write_annotations(path, entries)
        size = path.stat().st_size / 1e6
        times = {}
        for name in ("first", "later"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                times[name] = process.submit(measure, Path(folder)).result()
    print(f"{entries:,} entries, {size:.0f} MB of JSON\n")
    print("| opening | seconds | own memory, MB | microseconds a row |\n| --- | ---: | ---: | ---: |")
    for name, values in times.items():
        print(f"| {name} | {values['seconds']:.2f} | {values['own_mb']:.1f} | {values['microseconds_a_row']:.0f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"entries": entries, "json_mb": size, **times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
