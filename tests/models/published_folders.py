"""The reference checkpoint (tests/fixtures/aki_tiny) with a tokenizer whose ids are its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from phi_tokenizers import NEWLINE, SYSTEM_TOKENS, phi_tokenizer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

REFERENCE = Path(__file__).parents[1] / "fixtures" / "aki_tiny"
META = json.loads((REFERENCE / "config.json").read_text())


def tiny_tokenizer(assistant_token_id: int = META["assistant_token_id"]) -> PreTrainedTokenizerFast:
    """One token less than initial_tokenizer_len, as Phi-3.5's, so that `<pad>` fills it up."""
    pieces = ["<unk>", "<s>", "<|endoftext|>", NEWLINE, "▁", "▁▁", "<|user|>", *SYSTEM_TOKENS.split()]
    pieces = list(dict.fromkeys([*pieces, "what", "▁is", "▁this", "▁?"]))
    pieces += [f"▁w{i}" for i in range(META["initial_tokenizer_len"] - 2 - len(pieces))]
    pieces.insert(assistant_token_id, "<|assistant|>")
    return phi_tokenizer(pieces)


def published_folder(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, files: int = 1, **changes) -> Path:
    """A copy of the reference.

    Args:
        tokenizer: saved with it.
        files: shards that the weights are in.
        changes: entries of config.json; None takes one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meta = {name: value for name, value in (META | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(meta))
    if files == 1:
        shutil.copyfile(REFERENCE / "model.safetensors", folder / "model.safetensors")
    else:
        write_shards(folder, load_file(REFERENCE / "model.safetensors"), files)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    names = sorted(tensors)
    weight_map = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].contiguous() for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def reference_cases() -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(REFERENCE / "cases.safetensors").items():
        case, _, key = name.partition(".")
        found.setdefault(case, {})[key] = tensor
    return found


def expanded(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a case with each `<image>` once for every embedding."""
    ids = case["input_ids"]
    copies = torch.where(ids == META["image_token_id"], META["num_vision_tokens"], 1)
    inputs = {
        name: torch.stack([row.repeat_interleave(n) for row, n in zip(case[name], copies, strict=True)])
        for name in ("input_ids", "attention_mask", "labels")
        if name in case
    }
    if "pixel_values" in case:
        inputs["pixel_values"] = case["pixel_values"]
    return inputs
