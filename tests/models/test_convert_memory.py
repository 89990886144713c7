"""`aki convert` of a checkpoint of over 2 GB, in a process of its own: what it holds in memory at most."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phi_tokenizers import NEWLINE, ROLES, phi_tokenizer
from published_folders import META, published_folder, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file

from aki import AkiForConditionalGeneration
from aki.models.published import PublishedCheckpoint, published_shapes

MEGABYTE = 1 << 20
SHARD = 300 * MEGABYTE
ORIGINAL, PADDING = 32012, 52
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}

MEASURE = """
import json, re, sys
from pathlib import Path
from aki.models.convert import convert

def megabytes(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

tiny, tiny_out, source, out = sys.argv[1:]
convert(tiny, tiny_out)  # so that what stays in memory after a first call is not counted
Path("/proc/self/clear_refs").write_text("5")
before = megabytes("VmRSS")
done = convert(source, out)
print(json.dumps({"grown": megabytes("VmHWM") - before, "bytes": done.bytes, "files": done.files}))
"""


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest keeps the folders of its last runs


def big_checkpoint(folder: Path) -> int:
    """Written shard by shard, each tensor full of its own number; the bytes of the largest shard."""
    changes = {"text": META["text"] | SIZES, "initial_tokenizer_len": ORIGINAL, "image_token_id": ORIGINAL}
    changes["pad_token_id"] = ORIGINAL - 1
    pieces = ["<unk>", "<s>", "<|endoftext|>", NEWLINE, "▁", *ROLES]
    pieces += [f"▁w{i}" for i in range(ORIGINAL - 1 - len(pieces))]
    published_folder(folder, phi_tokenizer(pieces), **changes)
    config = PublishedCheckpoint.open(folder).config(ORIGINAL)
    config.text_config.vocab_size = ORIGINAL + 2
    with torch.device("meta"):
        shapes = published_shapes(AkiForConditionalGeneration(config).state_dict(), ORIGINAL)
    (folder / "model.safetensors").unlink()
    shards: list[dict[str, torch.Size]] = [{}]
    room = SHARD
    for name, shape in shapes.items():
        if name in ("lang_model.model.embed_tokens.weight", "lang_model.lm_head.weight", "lang_model.lm_head.bias"):
            shape = (ORIGINAL + PADDING, *shape[1:])
        size = 2 * torch.Size(shape).numel()
        if size > room:
            shards, room = [*shards, {}], SHARD
        room -= size
        shards[-1][name] = torch.Size(shape)
    weight_map = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    numbers = {name: i % 100 for i, name in enumerate(weight_map)}
    for i, shard in enumerate(shards):
        tensors = {name: torch.full(shape, numbers[name], dtype=torch.bfloat16) for name, shape in shard.items()}
        save_file(tensors, folder / f"model-{i}.safetensors")
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc")
def test_memory_stays_under_that_of_the_largest_shard(folder):
    largest = big_checkpoint(folder / "source")
    published_folder(folder / "tiny", tiny_tokenizer())
    names = ("tiny", "tiny_out", "source", "out")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(folder / name) for name in names)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    print(f"largest shard {largest / MEGABYTE:.0f} MB, memory grew by {measured['grown']:.0f} MB")
    assert measured["bytes"] > 2e9
    assert measured["files"] > 5
    # The constant: the tokenizer of 32,014 tokens and the model without weights.
    assert measured["grown"] < 1.3 * largest / MEGABYTE + 100

    weight_map = json.loads((folder / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    numbers = json.loads((folder / "source" / "model.safetensors.index.json").read_text())["weight_map"]
    first, added = (
        list(numbers).index(f"lang_model.lm_head.{name}") % 100 for name in ("weight", "additional_fc.weight")
    )
    name = "lm_head.weight"
    with safe_open(folder / "out" / weight_map[name], "pt") as file:
        head = file.get_tensor(name)
    assert head.shape == (ORIGINAL + 2, SIZES["hidden_size"])
    assert head.dtype == torch.bfloat16
    assert bool((head[:ORIGINAL] == first).all())
    assert bool((head[ORIGINAL:] == added).all())
