"""Ask a model about a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from aki.data.schema import user
from aki.models import AkiForConditionalGeneration, AkiProcessor


def load(folder: str | Path) -> tuple[AkiForConditionalGeneration, AkiProcessor]:
    """Model and processor from a folder or a hub id, on the GPU if there is one.

    Raises:
        ValueError: there is no such folder, or no whole AKI model in it.
    """
    local = Path(folder)
    looks_local = local.is_absolute() or str(folder).startswith(".") or len(local.parts) > 2
    if local.is_file() or (looks_local and not local.exists()):
        raise ValueError(f"there is no model folder at {folder}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AkiForConditionalGeneration.from_pretrained(folder).to(device).eval()
    return model, AkiProcessor.from_pretrained(folder)


def answer(
    model: AkiForConditionalGeneration,
    processor: AkiProcessor,
    question: str,
    image: Any = None,
    *,
    max_new_tokens: int = 128,
    attention_rule: str | None = None,
    emit: Callable[[str], None] | None = None,
) -> str:
    """The greedy answer to a question about a picture, or about none.

    Args:
        image: anything that `aki.models.images.open_image` opens.
        attention_rule: instead of the configuration's.
        emit: called with each piece of the answer as it is generated.

    Raises:
        ValueError: an empty question, a prompt longer than the context.
        ImageError: the picture cannot be read.
    """
    if not question.strip():
        raise ValueError("the question is empty.")
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise ValueError("the question is not UTF-8 text.")
    inputs = processor.apply_chat_template(
        [user(image, question)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    ).to(model.device)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"attention_rule": attention_rule} if attention_rule else {}
    failure: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    pieces = []
    for piece in streamer:
        pieces.append(piece)
        if emit is not None:
            emit(piece if len(pieces) > 1 else piece.lstrip())
    thread.join()
    if failure:
        raise failure[0]
    return "".join(pieces).strip()
