"""A model's folder on the hub: what goes there, what stays here, and the card that goes with it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id

from aki.files import checksum
from aki.models.adapters import adapter_of, has_model
from aki.models.card import RESULT, card_of, folder_card
from aki.models.configuration import AkiConfig
from aki.models.other import kind_of
from aki.models.remote import LOADER

CARD = "README.md"
PUBLISHED = (
    CARD,
    "LICENSE*",
    "NOTICE*",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model*.safetensors",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    LOADER.name,
)
"""All that a model is made of. Whatever else lies in its folder (optimizer states, logs, pictures, keys) stays here."""


_FORM = "# Model Card for Model ID"
"""The title of a card that nobody has filled in."""


@dataclass(frozen=True)
class Parcel:
    """What `aki publish` uploads.

    Attributes:
        files: name -> bytes.
        left: names in the folder that stay here.
        said: sentences about the card.
    """

    folder: Path
    name: str
    files: dict[str, int]
    left: list[str]
    said: list[str]


def pack_folder(folder: Path, name: str, license: str | None = None) -> Parcel:
    """Make a model's folder ready, with its card.

    Args:
        name: its id on the hub.
        license: one of the hub's names, written into the card, also into one that is there.

    Raises:
        ValueError: no such name; no model there, or one that others could not open.
    """
    validate_repo_id(name)
    if not has_model(folder):
        models = sorted(path.name for path in folder.glob("*") if has_model(path))
        hint = f" There are some below it: {', '.join(models)}." if models else ""
        raise ValueError(f"{folder} holds no model: there is no config.json in it.{hint}")
    _check(folder)
    if kind_of(folder) == AkiConfig.model_type and adapter_of(folder) is None:
        shutil.copyfile(LOADER, folder / LOADER.name)
    said = _write_card(folder, name, license)
    files = {path: (folder / path).stat().st_size for path in sorted(_published(folder))}
    left = sorted({path.name for path in folder.iterdir()} - {path.split("/")[0] for path in files})
    return Parcel(folder, name, files, left, said)


def _write_card(folder: Path, name: str, license: str | None) -> list[str]:
    """Write a card where there is none; returns what its publisher should know of it."""
    path = folder / CARD
    # PEFT leaves a form.
    kept = path.exists() and _FORM not in path.read_text()
    card: Any = ModelCard.load(path) if kept else folder_card(folder, name, license)
    said = [f"{path} is {'kept as it is' if kept else 'written'}."]
    if kept and name not in card.content:
        said.append(f"It does not speak of {name}.")
    if kept and (folder / RESULT).exists() and (folder / RESULT).stat().st_mtime > path.stat().st_mtime:
        said.append("It is older than the end of the training: delete it to have it written again.")
    if license is not None:
        card.data.license = license
    if license is not None or not kept:
        card.save(path)
    if card.data.license is None:
        said.append("It states no licence: add --license, or the line `license: ...` at its top.")
    return said


def upload(parcel: Parcel, private: bool = False, api: HfApi | None = None) -> str:
    """Upload what was packed, as one commit; returns the address of the model.

    Args:
        private: who may see a repository that is made now; one that is there stays as it is.

    Raises:
        ConnectionError: the hub is not there, or does not take it.
    """
    api = api or HfApi()
    try:
        repository = api.create_repo(parcel.name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=parcel.folder,
            allow_patterns=list(parcel.files),
            commit_message="Upload the model",
        )
    except (httpx.HTTPError, OSError) as error:
        raise ConnectionError(
            f"the hub did not take {parcel.name}: {error} (Who may write there logs in with `hf auth login`, or sets "
            "HF_TOKEN.)"
        ) from error
    return str(repository)


def push(
    model: Any,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Iterable[str] | None = None,
) -> str:
    """What an AKI model's `push_to_hub` does: transformers' own would write a card that says nothing.

    The card tells of the run that the model was loaded from where these are still its weights, else of its
    configuration alone. One that is on the hub is kept.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if not api.file_exists(repository.repo_id, CARD):
            card: Any = card_of(model.config.to_dict(), repository.repo_id, _run_of(model, folder))
            card.data.tags += tags or ()
            card.save(folder / CARD)
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit)


def _run_of(model: Any, saved: Path) -> Path | None:
    """The folder of the run that made these weights."""
    result = Path(model.name_or_path) / RESULT
    if not result.is_file():
        return None
    weights = json.loads(result.read_text()).get("weights") or {}
    same = all((saved / name).is_file() and checksum(saved / name) == digest for name, (_, digest) in weights.items())
    return result.parent if weights and same else None


def _published(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(_matches(name, pattern) for pattern in PUBLISHED):
            yield name


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _check(folder: Path) -> None:
    """
    Raises:
        ValueError: no safetensors, or files that name what nobody else has.
    """
    if not any(fnmatch(path.name, "*model*.safetensors") for path in folder.iterdir()):
        raise ValueError(f"{folder} has no weights as safetensors: save the model there with save_pretrained.")
    base = adapter_of(folder)
    if base is not None and Path(base).exists():
        raise ValueError(
            f"the adapter in {folder} names a model of this machine, {base}, which others do not have: write the hub "
            "id of that model as base_model_name_or_path into adapter_config.json, or publish the two merged: "
            f"aki convert --merge {folder} OUT."
        )
    for file in sorted(path for path in folder.glob("*config.json") if path.is_file()):
        for value in _texts(json.loads(file.read_text())):
            if os.path.isabs(value) and os.path.exists(value):
                raise ValueError(f"{file} names {value}, a path of this machine: take it out before others read it.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
