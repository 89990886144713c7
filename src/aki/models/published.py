"""The published checkpoint's layout, read into an `AkiForConditionalGeneration`.

A flat state dict in four groups: `vision_encoder.`, `vision_tokenizer.` (the resampler), `lang_model.model.` and
`lang_model.lm_head.`. Its embeddings are decoupled: the original vocabulary in one matrix (with rows of padding that
are never produced), the added tokens in another. Here they become one vocabulary, cut and joined as the published class
does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from aki.models.checkpoint_files import CheckpointError, TensorFiles, read_json
from aki.models.configuration import AkiConfig
from aki.models.modeling import AkiForConditionalGeneration
from aki.models.templates import IMAGE_TOKEN
from aki.models.weights import check_depth, check_finite

_SHOWN = 10
_COUNTS = ("initial_tokenizer_len", "num_vision_tokens")
_GROUPS = {
    "vision_encoder.": "model.vision_encoder.",
    "vision_tokenizer.": "model.connector.",
    "lang_model.model.": "model.language_model.",
    "lang_model.lm_head.": "lm_head.",
}
"""Prefixes: the published, ours."""
_ADDED = {
    "lang_model.model.embed_tokens.weight": "lang_model.model.embed_tokens.additional_embedding.weight",
    "lang_model.lm_head.weight": "lang_model.lm_head.additional_fc.weight",
    "lang_model.lm_head.bias": "lang_model.lm_head.additional_fc.bias",
}
"""Tensors over the original vocabulary, and the same for the added tokens."""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A folder in the published layout, by its headers alone: no weights are in memory.

    Attributes:
        folder: where it is.
        meta: its config.json.
        files: its tensors.
    """

    folder: Path
    meta: dict[str, Any]
    files: TensorFiles

    @classmethod
    def open(cls, folder: str | Path) -> PublishedCheckpoint:
        """
        Raises:
            CheckpointError: files or the keys of the layout are missing, or broken.
        """
        folder = Path(folder)
        meta = read_json(folder / "config.json", "it is not a checkpoint folder.")
        check_depth(meta, folder)
        missing = [key for key in _COUNTS if key not in meta]
        if missing:
            raise CheckpointError(
                f"{folder}/config.json has no {', '.join(missing)}: it is not in the published layout."
            )
        wrong = [key for key in _COUNTS if type(meta[key]) is not int or meta[key] < 1]
        if wrong:
            raise CheckpointError(f"{wrong[0]} in {folder}/config.json is {meta[wrong[0]]!r}, which is no count.")
        files = TensorFiles(folder)
        added = _ADDED["lang_model.model.embed_tokens.weight"]
        if added not in files.shapes:
            raise CheckpointError(f"{folder}/model.safetensors has no {added}: it is not in the published layout.")
        if len(files.shapes[added]) != 2:
            raise CheckpointError(f"{added} in {folder} is {files.shapes[added]}, expected (added tokens, width).")
        return cls(folder, meta, files)

    @property
    def original_tokens(self) -> int:
        return self.meta["initial_tokenizer_len"]

    @property
    def added_tokens(self) -> int:
        return self.files.shapes[_ADDED["lang_model.model.embed_tokens.weight"]][0]

    def config(self, image_token_id: int) -> AkiConfig:
        """The configuration, with the rule `mma`.

        Sizes come from `text` and `vision` in config.json where it has them, else from the two backbones that it names.

        Raises:
            CheckpointError: it names no backbones, or they cannot be read.
        """
        changes = {"vocab_size": self.original_tokens + self.added_tokens, "tie_word_embeddings": False}
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        changes |= {name: self.meta[name] for name in names if name in self.meta}
        return AkiConfig(
            vision_config=self._backbone("vision", "vision_encoder_path"),
            text_config=self._backbone("text", "lang_model_path", **changes),
            connector_config={"connector": "perceiver_resampler", "num_latents": self.meta["num_vision_tokens"]},
            image_token_id=image_token_id,
            attention_rule="mma",
            output_bias=True,
        )

    def check(self, model: AkiForConditionalGeneration) -> None:
        """Compare names and shapes with a model's, which may be on the meta device.

        Raises:
            CheckpointError: naming up to ten that are missing, extra or misshapen.
        """
        found, wanted = self._shapes(), published_shapes(model.state_dict(), self.original_tokens)
        problems = [f"missing {name} {wanted[name]}" for name in wanted.keys() - found.keys()]
        problems += [f"extra {name}" for name in found.keys() - wanted.keys()]
        problems += [
            f"{name} is {found[name]}, expected {wanted[name]}"
            for name in wanted.keys() & found.keys()
            if found[name] != wanted[name]
        ]
        if problems:
            rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            shown = "; ".join(sorted(problems)[:_SHOWN])
            raise CheckpointError(
                f"{self.folder} does not fit its config.json in {len(problems)} tensors: {shown}{rest}."
            )

    def dtype(self, ours: str) -> torch.dtype:
        """Of a tensor by the name that it has in an `AkiForConditionalGeneration`; of halves what holds both."""
        name = _published_name(ours)
        return torch.promote_types(self.files.dtypes[name], self.files.dtypes[_ADDED.get(name, name)])

    def read(self, ours: str) -> Tensor:
        """A tensor by the name that it has in an `AkiForConditionalGeneration`; of vocabularies both halves.

        Raises:
            ValueError: it has numbers that are none.
        """
        tensor = self._read(ours)
        check_finite(self.folder, {_published_name(ours): tensor})
        return tensor

    def _read(self, ours: str) -> Tensor:
        name = _published_name(ours)
        if name not in _ADDED:
            return self.files.read(name)
        added = self.files.read(_ADDED[name])
        rows = self.original_tokens + len(added)
        joined = torch.empty((rows, *added.shape[1:]), dtype=self.dtype(ours))
        self.files.copy_rows(name, joined[: self.original_tokens])
        joined[self.original_tokens :] = added
        return joined

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """As stored, the original vocabulary's without the rows of padding behind it."""
        shapes = dict(self.files.shapes)
        for name in _ADDED.keys() & shapes.keys():
            shapes[name] = (*(min(rows, self.original_tokens) for rows in shapes[name][:1]), *shapes[name][1:])
        return shapes

    def _backbone(self, key: str, path_key: str, **changes) -> PreTrainedConfig:
        if key not in self.meta and path_key not in self.meta:
            raise CheckpointError(
                f"{self.folder}/config.json has neither {key} nor {path_key}: it is not in the published layout."
            )
        try:
            if key in self.meta:
                return AutoConfig.for_model(**self.meta[key] | changes)
            return AutoConfig.from_pretrained(self.meta[path_key], trust_remote_code=False, **changes)
        except (OSError, ValueError, TypeError, StrictDataclassError) as error:
            why = str(error).splitlines()[0][:200]
            raise CheckpointError(
                f"the sizes that {self.folder}/config.json names as {key if key in self.meta else path_key} could not "
                f"be read: write the folder or hub id of a configuration as {path_key}. ({why})"
            ) from error


def load_published(folder: str | Path) -> AkiForConditionalGeneration:
    """A model from a folder in the published layout, with the rule `mma`; `aki convert` writes one that lasts.

    Raises:
        CheckpointError: a file or tensors are missing, extra or misshapen; up to ten are named.
    """
    published = PublishedCheckpoint.open(folder)
    model = AkiForConditionalGeneration(published.config(_image_token_id(published)))
    published.check(model)
    model.load_state_dict({name: published.read(name) for name in model.state_dict()})
    return model.eval()


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


def _published_name(name: str) -> str:
    for published, ours in _GROUPS.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def _image_token_id(published: PublishedCheckpoint) -> int:
    if "image_token_id" in published.meta:
        return published.meta["image_token_id"]
    try:
        token_id = AutoTokenizer.from_pretrained(published.folder, trust_remote_code=False).get_vocab().get(IMAGE_TOKEN)
    except (OSError, ValueError):
        token_id = None
    if token_id is None:
        raise CheckpointError(
            f"{published.folder}/config.json has no image_token_id, and the folder no tokenizer that knows "
            f"{IMAGE_TOKEN}: add the checkpoint's tokenizer files."
        )
    return token_id
