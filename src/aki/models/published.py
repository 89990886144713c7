"""The published checkpoint's layout, read into an `AkiForConditionalGeneration`.

A flat state dict in four groups: `vision_encoder.`, `vision_tokenizer.` (the resampler), `lang_model.model.` and
`lang_model.lm_head.`. Its embeddings are decoupled: the original vocabulary in one matrix (with rows of padding that are
never produced), the added tokens in another. Here they become one vocabulary, cut and joined as the published class does.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from aki.models.configuration import AkiConfig
from aki.models.modeling import AkiForConditionalGeneration
from aki.models.templates import IMAGE_TOKEN

_SHOWN = 10


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
    model = AkiForConditionalGeneration(config)
    state = published_to_aki(_read_tensors(folder), config, meta["initial_tokenizer_len"])
    check_tensors(state, model.state_dict(), folder)
    model.load_state_dict(state)
    return model.eval()


def read_published_config(folder: Path) -> tuple[AkiConfig, dict]:
    """The configuration for a folder in the published layout, and its config.json as it stands."""
    try:
        meta = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is not a checkpoint folder.") from None
    missing = [key for key in ("initial_tokenizer_len", "num_vision_tokens") if key not in meta]
    if missing:
        raise CheckpointError(f"{folder}/config.json has no {', '.join(missing)}: it is not in the published layout.")
    vision = _backbone(meta, "vision", "vision_encoder_path")
    text = _backbone(meta, "text", "lang_model_path")
    vision = getattr(vision, "vision_config", vision)
    added = _added_tokens(folder)
    text.vocab_size = meta["initial_tokenizer_len"] + added
    text.tie_word_embeddings = False
    image_token_id = meta.get("image_token_id")
    if image_token_id is None:
        image_token_id = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(IMAGE_TOKEN)
    config = AkiConfig(
        vision_config=vision,
        text_config=text,
        connector_config={"connector": "perceiver_resampler", "num_latents": meta["num_vision_tokens"]},
        image_token_id=image_token_id,
        attention_rule="mma",
        output_bias=True,
    )
    return config, meta


def published_to_aki(tensors: dict[str, Tensor], config: AkiConfig, original_tokens: int) -> dict[str, Tensor]:
    """Rename the published tensors, and join the two vocabularies: the first `original_tokens` rows, then the added."""
    added = {
        "lang_model.model.embed_tokens.weight": "lang_model.model.embed_tokens.additional_embedding.weight",
        "lang_model.lm_head.weight": "lang_model.lm_head.additional_fc.weight",
        "lang_model.lm_head.bias": "lang_model.lm_head.additional_fc.bias",
    }
    state = {}
    for name, tensor in tensors.items():
        if name in added.values():
            continue
        if name in added and added[name] in tensors:
            tensor = torch.cat([tensor[:original_tokens], tensors[added[name]]])
        state[_rename(name)] = tensor
    return state


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: naming up to ten that are missing, extra or misshapen.
    """
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted.keys() - found.keys()]
    problems += [f"extra {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        rest = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = "; ".join(sorted(problems)[:_SHOWN])
        raise CheckpointError(f"{folder} does not fit its config.json in {len(problems)} tensors: {shown}{rest}.")


def _rename(name: str) -> str:
    for published, ours in (("vision_tokenizer.", "connector."), ("lang_model.", "language_model.")):
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return name


def _backbone(meta: dict, key: str, path_key: str) -> PreTrainedConfig:
    if key in meta:
        ids = {name: meta[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in meta}
        sizes = meta[key] | (ids if key == "text" else {})
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    return AutoConfig.from_pretrained(meta[path_key])


def _added_tokens(folder: Path) -> int:
    with _open(folder) as file:
        name = "lang_model.model.embed_tokens.additional_embedding.weight"
        if name not in file.keys():
            raise CheckpointError(f"{folder}/model.safetensors has no {name}: it is not in the published layout.")
        return file.get_slice(name).get_shape()[0]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    with _open(folder) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _open(folder: Path):
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors.")
    try:
        return safe_open(path, "pt")
    except Exception as error:
        raise CheckpointError(f"{path} is broken: {error}") from error
