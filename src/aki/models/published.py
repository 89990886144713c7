"""The published checkpoint's layout, read into an `AkiForConditionalGeneration`.

A flat state dict in four groups: `vision_encoder.`, `vision_tokenizer.` (the resampler), `lang_model.model.` and
`lang_model.lm_head.`. Its embeddings are decoupled: the original vocabulary in one matrix (with rows of padding that
are never produced), the added tokens in another. Here they become one vocabulary, cut and joined as the published class
does.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from aki.models.configuration import AkiConfig
from aki.models.modeling import AkiForConditionalGeneration
from aki.models.templates import IMAGE_TOKEN

_SHOWN = 10
_GROUPS = {"vision_tokenizer.": "connector.", "lang_model.": "language_model."}
"""Prefixes: the published, ours."""
_ADDED = {
    "lang_model.model.embed_tokens.weight": "lang_model.model.embed_tokens.additional_embedding.weight",
    "lang_model.lm_head.weight": "lang_model.lm_head.additional_fc.weight",
    "lang_model.lm_head.bias": "lang_model.lm_head.additional_fc.bias",
}
"""Tensors over the original vocabulary, and the same for the added tokens."""


class CheckpointError(ValueError):
    """A folder that does not hold what it should."""


def load_published(folder: str | Path) -> AkiForConditionalGeneration:
    """A model from a folder in the published layout (config.json and model.safetensors), with the rule `mma`.

    Sizes come from `text` and `vision` in config.json where it has them, else from the two backbones that it names.

    Raises:
        CheckpointError: a file or tensors are missing, extra or misshapen; up to ten are named.
    """
    folder = Path(folder)
    config, meta = read_published_config(folder)
    original_tokens = meta["initial_tokenizer_len"]
    model = AkiForConditionalGeneration(config)
    tensors = _read_tensors(folder, original_tokens)
    check_tensors(tensors, published_shapes(model.state_dict(), original_tokens), folder)
    model.load_state_dict(published_to_aki(tensors))
    return model.eval()


def read_published_config(folder: Path) -> tuple[AkiConfig, dict]:
    """The configuration for a folder in the published layout, and its config.json as it stands."""
    try:
        meta = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint folder.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder}/config.json is broken: {error}") from error
    missing = [key for key in ("initial_tokenizer_len", "num_vision_tokens") if key not in meta]
    if missing:
        raise CheckpointError(f"{folder}/config.json has no {', '.join(missing)}: it is not in the published layout.")
    token_ids = {name: meta[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in meta}
    text = _backbone(folder, meta, "text", "lang_model_path", **token_ids)
    text.vocab_size = meta["initial_tokenizer_len"] + _added_tokens(folder)
    text.tie_word_embeddings = False
    config = AkiConfig(
        vision_config=_backbone(folder, meta, "vision", "vision_encoder_path"),
        text_config=text,
        connector_config={"connector": "perceiver_resampler", "num_latents": meta["num_vision_tokens"]},
        image_token_id=_image_token_id(folder, meta),
        attention_rule="mma",
        output_bias=True,
    )
    return config, meta


def published_shapes(state: dict[str, Tensor], original_tokens: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint in the published layout, from the state of an `AkiForConditionalGeneration`."""
    shapes = {}
    for ours, tensor in state.items():
        name, shape = _published_name(ours), tuple(tensor.shape)
        if name in _ADDED:
            shapes[_ADDED[name]] = (shape[0] - original_tokens, *shape[1:])
            shape = (original_tokens, *shape[1:])
        shapes[name] = shape
    return shapes


def published_to_aki(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published tensors, and join the two vocabularies: the original rows, then the added."""
    joined = {name: torch.cat([tensors[name], tensors[added]]) for name, added in _ADDED.items()}
    return {_our_name(name): tensor for name, tensor in (tensors | joined).items() if name not in _ADDED.values()}


def check_tensors(found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: naming up to ten that are missing, extra or misshapen.
    """
    problems = [f"missing {name} {wanted[name]}" for name in wanted.keys() - found.keys()]
    problems += [f"extra {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(found[name].shape)}, expected {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name]
    ]
    if problems:
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = "; ".join(sorted(problems)[:_SHOWN])
        raise CheckpointError(f"{folder} does not fit its config.json in {len(problems)} tensors: {shown}{rest}.")


def _our_name(name: str) -> str:
    for published, ours in _GROUPS.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return name


def _published_name(name: str) -> str:
    for published, ours in _GROUPS.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def _backbone(folder: Path, meta: dict, key: str, path_key: str, **changes) -> PreTrainedConfig:
    if key in meta:
        return AutoConfig.for_model(**meta[key] | changes)
    if path_key not in meta:
        raise CheckpointError(
            f"{folder}/config.json has neither {key} nor {path_key}: it is not in the published layout."
        )
    return AutoConfig.from_pretrained(meta[path_key], **changes)


def _image_token_id(folder: Path, meta: dict) -> int:
    if "image_token_id" in meta:
        return meta["image_token_id"]
    try:
        token_id = AutoTokenizer.from_pretrained(folder).get_vocab().get(IMAGE_TOKEN)
    except (OSError, ValueError):
        token_id = None
    if token_id is None:
        raise CheckpointError(
            f"{folder}/config.json has no image_token_id, and the folder no tokenizer that knows {IMAGE_TOKEN}: "
            "add the checkpoint's tokenizer files."
        )
    return token_id


def _added_tokens(folder: Path) -> int:
    with _open(folder) as file:
        name = _ADDED["lang_model.model.embed_tokens.weight"]
        stored = file.keys()
        if name not in stored:
            raise CheckpointError(f"{folder}/model.safetensors has no {name}: it is not in the published layout.")
        return file.get_slice(name).get_shape()[0]


def _read_tensors(folder: Path, original_tokens: int) -> dict[str, Tensor]:
    """All tensors; the original vocabulary's without the rows of padding behind it."""
    with _open(folder) as file:
        stored = file.keys()
        tensors = {name: file.get_tensor(name) for name in stored}
    return {name: tensor[:original_tokens] if name in _ADDED else tensor for name, tensor in tensors.items()}


def _open(folder: Path):
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors.")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is broken: {error}") from error
