"""lmms-eval's chat model `aki`: this project's models, unlocked ones, and plain Hugging Face ones for comparison."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from torch import Tensor
from tqdm.auto import tqdm
from transformers import StoppingCriteria

import aki
from aki.evaluation.answers import AnswerCache, key_of
from aki.evaluation.fingerprints import data_fingerprint, model_fingerprint
from aki.evaluation.opening import load_model

MAX_NEW_TOKENS = 1024
"""Where a task names no limit."""
_SAMPLING = ("temperature", "top_p", "top_k")
_DECODING = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty", "min_new_tokens")
_COUNTING_PADDING = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
"""What looks at a prompt's tokens, padding among them, and the values with which it doesn't."""


class Aki(lmms):
    """Batches sorted by length and padded on the left, greedy unless the task asks for something else;
    what it samples is answered alone, by a seed of lmms-eval's seed and the request.

    Args:
        pretrained: a folder or a hub id.
        batch_size: prompts at a time, on each device.
        device: where accelerate doesn't choose one.
        dtype: a torch dtype's name; "auto" is the checkpoint's.
        rule: an attention rule instead of the checkpoint's.
        unlock: lay the rule (or "mma") over a model that is not AKI, with `aki.unlock`.
        backend: `attn_implementation` of the language model.
        answers: a folder in which answers are kept, so that a killed run goes on.
        limit_new_tokens: no answer is longer, whatever the task allows.

    Raises:
        ValueError: arguments that do not go together.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        rule: str | None = None,
        unlock: bool = False,
        backend: str | None = None,
        answers: str | Path | None = None,
        limit_new_tokens: int | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else torch.device(device)
        self.batch_size, self.limit_new_tokens = _batch_size(batch_size, max_batch_size), limit_new_tokens
        self.model, self.processor = load_model(str(pretrained), dtype, rule, unlock, backend)
        self.model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.settings = {
            "checkpoint": model_fingerprint(str(pretrained), getattr(self.model.config, "_commit_hash", None)),
            "model_type": self.model.config.model_type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "rule": getattr(self.model.config, "attention_rule", None) or "causal",
            "unlocked": bool(unlock),
            "backend": self.model.config.get_text_config()._attn_implementation,
            "device": self.device.type,
            "batch_size": self.batch_size,
            "limit_new_tokens": limit_new_tokens,
        }
        self.cache = AnswerCache(None if answers is None else Path(answers), self._rank)
        self._data: dict[tuple[str, str], str] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in the requests' order; what is in the cache is not computed again."""
        texts: list[str] = [""] * len(requests)
        keys: dict[int, str] = {}
        seeds: dict[int, int] = {}
        drawn: Counter[str] = Counter()
        groups: dict[str, list[int]] = defaultdict(list)
        for position, request in enumerate(requests):
            if request.metadata.get("__padding_only__"):
                continue  # lmms-eval fills up the ranks, which nothing here needs
            context, _, asked, doc_id, task, split = request.args
            decoding = decoding_of(asked, self.limit_new_tokens)
            if self.cache.file and not decoding["do_sample"]:
                keys[position] = key_of(self._decided_by(task, split), doc_id, context, decoding, asked.get("until"))
            if decoding["do_sample"]:
                again = key_of(torch.initial_seed(), context, doc_id, task, split, decoding)
                seeds[position] = int(key_of(again, drawn[again])[:15], 16)
                drawn[again] += 1
            found = self.cache.get(keys.get(position, ""))
            if found is None:
                groups[key_of(decoding)].append(position)
            else:
                texts[position] = found
        with tqdm(total=sum(map(len, groups.values())), disable=self._rank != 0, desc="answers", unit="answer") as bar:
            for batch, inputs in self._prepared(requests, groups):
                # What is sampled comes alone, and draws by a seed of its own.
                devices = [self.device] if self.device.type == "cuda" else []
                with torch.random.fork_rng(devices, enabled=batch[0] in seeds):
                    if batch[0] in seeds:
                        torch.manual_seed(seeds[batch[0]])
                    answers = self._answer(inputs, [requests[i] for i in batch])
                for position, answer in zip(batch, answers, strict=True):
                    texts[position] = answer
                self.cache.add({keys[i]: texts[i] for i in batch if i in keys})
                bar.update(len(batch))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("the model aki answers in text: choose tasks whose output_type is generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("the model aki answers once: choose tasks whose output_type is generate_until.")

    def data_of(self, task: str, split: str) -> str:
        """The fingerprint of a task's rows, computed once."""
        if (task, split) not in self._data:
            self._data[task, split] = data_fingerprint(self.task_dict[task][split])
        return self._data[task, split]

    def _decided_by(self, task: str, split: str) -> list[Any]:
        settings = {name: value for name, value in self.settings.items() if name != "batch_size"}
        # "alone": answers that were kept before each was what the request gets alone are not taken.
        return ["alone", versions(), settings, task, self.data_of(task, split)]

    def _prepared(self, requests: Sequence[Instance], groups: dict[str, list[int]]) -> Iterator[tuple[list[int], Any]]:
        """Batches with their inputs, the next being prepared while one is computed."""
        batches = [batch for group in groups.values() for batch in self._batches(requests, group)]
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self._inputs, [requests[i] for i in batch]) for batch in batches[:1]]
            for number, batch in enumerate(batches):
                inputs = ahead.pop().result()
                if number + 1 < len(batches):
                    ahead.append(pool.submit(self._inputs, [requests[i] for i in batches[number + 1]]))
                if self._as_alone(inputs, requests[batch[0]]):
                    yield batch, inputs
                else:
                    for i in batch:
                        yield [i], pool.submit(self._inputs, [requests[i]]).result()

    def _as_alone(self, inputs: Any, request: Instance) -> bool:
        """Whether each row of a batch is answered as it would be alone, of which padding can be in the way."""
        decoding, config = decoding_of(request.args[2], self.limit_new_tokens), self.model.generation_config
        lengths = inputs["attention_mask"].sum(1).tolist()
        budgets = self._budgets(lengths, decoding)
        # Beyond this a longrope model computes all rows in another way.
        switch = getattr(self.model.config.get_text_config(), "original_max_position_embeddings", None)
        if len(lengths) == 1:
            return True
        if decoding["do_sample"]:
            return False
        if switch is not None and max(lengths) + max(budgets) > switch:
            return False
        if decoding.get("num_beams", config.num_beams or 1) > 1 and len(set(budgets)) > 1:
            return False
        counts_padding = any(
            decoding.get(name, getattr(config, name, None)) not in (None, neutral)
            for name, neutral in _COUNTING_PADDING.items()
        )
        return len(set(lengths)) == 1 or not counts_padding

    def _budgets(self, lengths: Sequence[int], decoding: dict[str, Any]) -> list[int]:
        """Tokens that each answer may have, by the length of its own prompt."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        most = decoding["max_new_tokens"]
        return [most if context is None else max(1, min(most, context - length)) for length in lengths]

    def _batches(self, requests: Sequence[Instance], group: list[int]) -> list[list[int]]:
        """The longest first, so that a batch that does not fit fails at once."""
        lengths = dict(
            zip(group, map(len, self.tokenizer([requests[i].args[0] for i in group])["input_ids"]), strict=True)
        )
        ordered = sorted(group, key=lambda i: -lengths[i])
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]

    def _inputs(self, requests: Sequence[Instance]) -> Any:
        chats = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            chats.append(ChatMessages(messages=messages).to_hf_messages())
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
        )

    @torch.inference_mode()
    def _answer(self, inputs: Any, requests: Sequence[Instance]) -> list[str]:
        asked = requests[0].args[2]
        decoding = decoding_of(asked, self.limit_new_tokens)
        length = inputs["input_ids"].shape[1]
        budgets = self._budgets(inputs["attention_mask"].sum(1).tolist(), decoding)
        decoding["max_new_tokens"] = max(budgets)
        ends = [_Budgets(length, budgets)] if len(set(budgets)) > 1 else []
        inputs = inputs.to(self.device)
        if inputs.get("pixel_values") is not None and inputs["pixel_values"].is_floating_point():
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        out = self.model.generate(
            **inputs, **decoding, pad_token_id=self.tokenizer.pad_token_id, stopping_criteria=ends
        )
        said = [row[length : length + budget] for row, budget in zip(out, budgets, strict=True)]
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [until(text, request.args[2].get("until")) for text, request in zip(texts, requests, strict=True)]


class _Budgets(StoppingCriteria):
    """Ends each row of a batch after tokens of its own number."""

    def __init__(self, prompt: int, budgets: list[int]):
        self.prompt, self.budgets = prompt, torch.tensor(budgets)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        return (input_ids.shape[1] - self.prompt >= self.budgets).to(input_ids.device)


@cache
def versions() -> dict[str, str]:
    """Of the packages that can change an answer or its score."""
    others = ("lmms_eval", "torch", "transformers", "datasets", "pillow")
    return {"aki": aki.__version__} | {package: version(package) for package in others}


def decoding_of(asked: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """The arguments of transformers' `generate` that a task's generation_kwargs ask for.

    Sampling is what do_sample says, else whether there is a temperature; a temperature of 0 is greedy either way. What
    other models' adapters read (`image_aspect_ratio`) is left out.
    """
    temperature = asked.get("temperature")
    sample = bool(asked.get("do_sample", temperature)) and temperature != 0
    decoding = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": sample}
    decoding |= {name: asked[name] for name in _DECODING if asked.get(name) is not None}
    if sample:
        decoding |= {name: asked[name] for name in _SAMPLING if asked.get(name) is not None}
    if limit is not None:
        decoding["max_new_tokens"] = min(decoding["max_new_tokens"], limit)
    return decoding


def until(text: str, stops: str | list[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def _batch_size(asked: int | str, largest: int | None) -> int:
    if not str(asked).isdecimal() or int(asked) < 1:
        raise ValueError(f"batch_size must be a number from 1 up, it is {asked!r}.")
    return min(int(asked), largest or int(asked))
