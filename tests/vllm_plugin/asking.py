"""The same chats for transformers and for vLLM, and what each answers."""

from __future__ import annotations

import base64
import gc
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import aki

NEW_TOKENS = 10
_RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(_RNG.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]


@dataclass(frozen=True)
class Question:
    """A chat, and which pictures it shows."""

    chat: list[dict[str, Any]]
    pictures: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int = 0


def user(*parts: str | int) -> dict[str, Any]:
    """A message of text and pictures, these by number."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": PICTURES[part]}
        for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def ask(*chat: dict[str, Any]) -> Question:
    shown = tuple(
        next(i for i, picture in enumerate(PICTURES) if picture is part["image"])
        for message in chat
        for part in message["content"]
        if part["type"] == "image"
    )
    return Question(list(chat), shown)


QUESTIONS = [
    ask(user(0, "what is in the picture?")),
    ask(user(0, "how many digits are red?")),
    ask(user(1, "what is this?"), assistant("one two"), user("and the left?")),
    ask(user("what is two?")),
    ask(user(0, "one", 1, "is there a blue one? count them all")),
    ask(user(2, "describe it"), assistant("yes"), user(0, "describe it, left and right")),
]
"""Pictures, several pictures, turns, and text alone, of different lengths."""


class Reference:
    """What transformers answers, one question at a time."""

    def __init__(self, folder: Path):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.is_aki = self.model.config.model_type == "aki"

    def text(self, question: Question) -> str:
        return self.processor.apply_chat_template(question.chat, add_generation_prompt=True)

    def inputs(self, question: Question) -> dict[str, Any]:
        if self.is_aki:
            return self.processor.apply_chat_template(
                question.chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        pictures = {"images": [PICTURES[i] for i in question.pictures]} if question.pictures else {}
        return self.processor(text=self.text(question), return_tensors="pt", add_special_tokens=False, **pictures)

    def lay(self, rule: str | None) -> None:
        if self.is_aki:
            self.model.config.attention_rule = rule or "causal"
        elif rule is None:
            aki.lock(self.model)
        else:
            aki.unlock(self.model, self.processor, rule)

    def answer(self, question: Question, rule: str | None, new_tokens: int = NEW_TOKENS) -> Answer:
        self.lay(rule)
        return self.generated(self.inputs(question), new_tokens)

    def generated(self, inputs: dict[str, Any], new_tokens: int) -> Answer:
        out = self.model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        length = inputs["input_ids"].shape[1]
        tokens = out.sequences[0, length:].tolist()
        steps = zip(out.logits, tokens, strict=True)
        logprobs = [torch.log_softmax(logits[0].float(), -1)[token].item() for logits, token in steps]
        return Answer(inputs["input_ids"][0].tolist(), tokens, logprobs)


def as_clients_write(question: Question) -> list[dict[str, Any]]:
    """The messages as OpenAI's clients write them."""
    numbers = iter(question.pictures)
    return [{**message, "content": [_part(part, numbers) for part in message["content"]]} for message in question.chat]


def _part(part: dict[str, Any], numbers: Iterator[int]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    out = io.BytesIO()
    PICTURES[next(numbers)].save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


@contextmanager
def engine(folder: Path, rule: str | None = None, **options: Any) -> Iterator[Any]:
    """vLLM in this process, float32; its cache is of blocks of 32 tokens.

    Args:
        rule: over a folder that names none.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 3},
        "block_size": 32,
        "hf_overrides": None if rule is None else {"attention_rule": rule},
    }
    llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(
    llm: Any, reference: Reference, questions: list[Question], new_tokens: int = NEW_TOKENS, **more: Any
) -> list[Answer]:
    """What vLLM answers, all at once."""
    from vllm import SamplingParams

    prompts = []
    for question in questions:
        prompt: dict[str, Any] = {"prompt": reference.text(question)}
        if question.pictures:
            prompt["multi_modal_data"] = {"image": [PICTURES[i] for i in question.pictures]}
        prompts.append(prompt)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=1)
    return [_answer(result) for result in llm.generate(prompts, sampling, use_tqdm=False, **more)]


def chat_answer(llm: Any, question: Question) -> Answer:
    """What vLLM answers to a chat, whose ids it makes itself."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    return _answer(llm.chat(as_clients_write(question), sampling, use_tqdm=False)[0])


def _answer(result: Any) -> Answer:
    one = result.outputs[0]
    logprobs = [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
    return Answer(list(result.prompt_token_ids), list(one.token_ids), logprobs, result.num_cached_tokens or 0)


def same(one: Answer, other: Answer) -> bool:
    """The same prompt, tokens, and log-probabilities to 1e-4."""
    near = all(abs(a - b) < 1e-4 for a, b in zip(one.logprobs, other.logprobs, strict=True))
    return one.ids == other.ids and one.tokens == other.tokens and near
