"""The published checkpoint as a folder that `from_pretrained` loads: weights shard by shard, and all that belongs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.files import alone
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.models.checkpoint_files import INDEX, CheckpointError
from aki.models.published import PublishedCheckpoint
from aki.models.published_tokenizer import published_tokenizer
from aki.models.templates import AKI, CAPTION, IMAGE_TOKEN

SHARD_BYTES = 1 << 30
"""What a written file holds at most, and so what is in memory at a time; less where the source's files are smaller."""

_EMBEDDINGS = "model.language_model.embed_tokens.weight"
_LOCK = ".lock"


@dataclass(frozen=True)
class Converted:
    """What was written: parameters of which dtype, bytes in so many files."""

    parameters: int
    dtype: torch.dtype
    bytes: int
    files: int


def convert(source: str | Path, out: str | Path) -> Converted:
    """Write a checkpoint in the published layout as a folder for `from_pretrained`, with its processor.

    Nothing is computed: every number is the source's, in the source's dtype. `out` appears when all of it is written.

    Args:
        source: a folder, or a hub id.
        out: a folder that is not there yet, or empty.

    Raises:
        CheckpointError: the source is not in the published layout, is incomplete, or its tokenizer does not fit;
            `out` holds something.
        InUseError: another process is writing `out`.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty: choose another folder, or delete it.")
    published = PublishedCheckpoint.open(local_folder(source))
    tokenizer = published_tokenizer(published)
    config = published.config(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.device("meta"):
        model = AkiForConditionalGeneration(config)
    published.check(model)
    config.dtype = published.dtype(_EMBEDDINGS)
    for holder in (config.text_config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(holder, name, getattr(tokenizer, name))
    processor = AkiProcessor(
        _image_processor(published, config.image_size),
        tokenizer,
        config.image_seq_length,
        chat_template={"default": AKI, "caption": CAPTION},
    )
    with _whole_or_nothing(out) as folder:
        converted = _write_weights(published, model, folder)
        processor.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        # Last, because without it nothing loads.
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    return converted


def local_folder(source: str | Path) -> Path:
    """The folder itself, or that of a hub id's files, which are fetched if they are not there yet.

    Raises:
        CheckpointError: there is no such folder and no such hub id.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no folder {source}, and no such checkpoint could be fetched from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _write_weights(published: PublishedCheckpoint, model: AkiForConditionalGeneration, folder: Path) -> Converted:
    empty = {
        name: torch.empty(tensor.shape, dtype=published.dtype(name), device="meta")
        for name, tensor in model.state_dict().items()
    }
    split = split_torch_state_dict_into_shards(empty, max_shard_size=min(SHARD_BYTES, published.files.largest))
    total = sum(map(_bytes, empty.values()))
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        for file, names in split.filename_to_tensors.items():
            save_file({name: published.read(name) for name in names}, folder / file, metadata={"format": "pt"})
            bar.update(sum(_bytes(empty[name]) for name in names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    parameters = sum(tensor.numel() for tensor in empty.values())
    return Converted(parameters, published.dtype(_EMBEDDINGS), total, len(split.filename_to_tensors))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _image_processor(published: PublishedCheckpoint, size: tuple[int, int]) -> SiglipImageProcessorPil:
    """RGB, bicubic resize without a crop, mean and std (paper, section 2)."""
    pixels = published.meta.get("n_px", size[0])
    if size != (pixels, pixels):
        raise CheckpointError(
            f"n_px in {published.folder}/config.json is {pixels}, the vision encoder takes {size[0]} x {size[1]}."
        )
    mean, std = (_three(published, name) for name in ("norm_mean", "norm_std"))
    if not all(std):
        raise CheckpointError(f"norm_std in {published.folder}/config.json has a zero: nothing is divided by that.")
    return SiglipImageProcessorPil(
        size={"height": pixels, "width": pixels}, resample=3, image_mean=mean, image_std=std, do_convert_rgb=True
    )


def _three(published: PublishedCheckpoint, name: str) -> list[float]:
    """A number for each colour; one is for all."""
    value = published.meta.get(name, 0.5)
    numbers = value if isinstance(value, list) else [value] * 3
    if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
        raise CheckpointError(f"{name} in {published.folder}/config.json is {value!r}: write one number, or three.")
    return numbers


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end; what an earlier try left there is deleted."""
    partial = out.with_name(f".{out.name}.converting")
    with alone(partial / _LOCK, f"the output folder {out}"):
        for left in partial.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != _LOCK:
                left.unlink()
        try:
            yield partial
            partial.rename(out)
            (out / _LOCK).unlink()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
