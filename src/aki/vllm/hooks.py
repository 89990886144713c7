"""The places of vLLM that are asked to keep to the rule. Each is a method that is called around; without a rule in the
configuration each hands on as if it were not there.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from aki.models.plain_text import mended
from aki.vllm import settings
from aki.vllm.chats import Chats
from aki.vllm.prompts import Prompt, PromptReader
from aki.vllm.steps import Steps, request_inputs

_READER: ContextVar[PromptReader | None] = ContextVar("aki_prompt_reader", default=None)
"""Of the engine whose request is being named in the cache."""

_MARK = "_aki_laid"


class VllmMoved(ImportError):
    """vLLM has not what a hook needs."""


def around(owner: Any, name: str, takes: tuple[str, ...], hook: Callable[..., Any]) -> None:
    """Call `hook(original, ...)` wherever `owner.name` is called.

    Raises:
        VllmMoved: it does not exist, or does not take these arguments.
    """
    original: Any = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return
    known = () if original is None else tuple(inspect.signature(original).parameters)
    if not set(takes) <= set(known):
        raise VllmMoved(
            f"vLLM's {getattr(owner, '__qualname__', owner.__name__)}.{name}({', '.join(takes)}) is not there, by "
            "which aki keeps to the attention rule: this version of vLLM is newer or older than aki knows."
        )

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(called, _MARK, True)
    setattr(owner, name, called)


def attach() -> None:
    """Call around all of it.

    Raises:
        VllmMoved: this vLLM is not one that aki knows.
    """
    from vllm.config import VllmConfig
    from vllm.renderers import hf as renderer
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    around(VllmConfig, "try_verify_and_update_config", ("self",), _configure)
    around(Scheduler, "_try_schedule_encoder_inputs", _SCHEDULE, _schedule)
    around(EngineCore, "__init__", ("self", "vllm_config"), _start_engine)
    around(kv_cache_utils, "_gen_mm_extra_hash_keys", _NAME, _name_block)
    around(renderer, "_try_get_processor_chat_template", ("tokenizer",), _template)
    around(renderer.HfRenderer, "__init__", ("self", "config", "tokenizer"), _start_renderer)
    around(renderer.HfRenderer, "render_messages", ("self", "messages", "params"), _render)
    around(renderer.HfRenderer, "render_messages_async", ("self", "messages", "params"), _render_async)
    for runner in _runners():
        around(runner, "load_model", ("self", "load_dummy_weights"), _load)
        around(runner, "initialize_kv_cache", ("self", "kv_cache_config"), _look_at_cache)
        around(runner, "execute_model", ("self", "scheduler_output"), _execute)


def refuse_rules(reason: str) -> None:
    """A model with a rule does not start; any other is served as if aki were not there."""
    from vllm.config import VllmConfig

    def configure(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if settings.rule_of(self) is not None:
            raise settings.CannotServe(reason)

    around(VllmConfig, "__post_init__", ("self",), configure)


_SCHEDULE = ("self", "request", "num_computed_tokens", "num_new_tokens", "encoder_compute_budget")
_NAME = ("request", "start_token_idx", "end_token_idx", "start_mm_idx")


def _runners() -> list[type]:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

    around(SecondRunner, "prepare_attn", ("self", "input_batch"), _note_order)
    return [FirstRunner, SecondRunner, CPUModelRunner]


_READERS: dict[int, PromptReader | None] = {}
"""By the id of the configuration, which cannot be a key: what the scheduler read the worker beside it need not."""


def reader_of(vllm_config: Any) -> PromptReader | None:
    """None where no request of this engine can be under a rule.

    Raises:
        CannotServe: nothing would say where answers are.
    """
    if id(vllm_config) not in _READERS:
        _READERS[id(vllm_config)] = _make_reader(vllm_config)
        weakref.finalize(vllm_config, _READERS.pop, id(vllm_config), None)
    return _READERS[id(vllm_config)]


def _make_reader(vllm_config: Any) -> PromptReader | None:
    rule = settings.rule_of(vllm_config)
    if rule is None:
        return None
    from transformers import PreTrainedTokenizerBase
    from vllm.tokenizers import cached_tokenizer_from_config

    model = vllm_config.model_config
    tokenizer = cached_tokenizer_from_config(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise settings.CannotServe(
            "the answers of earlier turns, which no picture may see, are found by a tokenizer of transformers, and "
            "this engine has none: start vLLM with --tokenizer-mode hf and without --skip-tokenizer-init."
        )
    return PromptReader(model.hf_config, rule, tokenizer, settings.own_rule(vllm_config))


def _configure(original: Any, self: Any) -> None:
    fresh = self.model_config is not None and not getattr(self.model_config, "config_updated", False)
    original(self)
    if fresh:
        settings.lay(self)


def _start_engine(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Requests get the names of their blocks from a hasher, which is told here whose they are."""
    original(self, vllm_config, *args, **kwargs)
    reader, hasher = reader_of(vllm_config), self.request_block_hasher
    if reader is None or hasher is None:
        return

    def named(request: Any) -> Any:
        token = _READER.set(reader)
        try:
            return hasher(request)
        finally:
            _READER.reset(token)

    self.request_block_hasher = named


def _prompt(reader: PromptReader, request: Any) -> Prompt | None:
    """A request's prompt, read once."""
    if request.prompt_token_ids is None:
        return None
    held = getattr(request, "_aki_prompt", None)
    if held is None or len(held.ids) != request.num_prompt_tokens:
        held = request._aki_prompt = reader.read(request.prompt_token_ids, *request_inputs(request))
    return held


def _name_block(original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    """A block of the cache is known by its tokens and pictures, and by what its rows see ahead of it."""
    names, after = original(request, start_token_idx, end_token_idx, start_mm_idx)
    reader = _READER.get()
    prompt = None if reader is None else _prompt(reader, request)
    ahead = None if prompt is None else prompt.seen_ahead(start_token_idx, end_token_idx)
    return (names if ahead is None else [*names, ("aki", ahead)]), after


def _template(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Of several templates in a processor, which vLLM takes for one, that for chats."""
    found = original(*args, **kwargs)
    return found.get("default") if isinstance(found, dict) else found


def _start_renderer(original: Any, self: Any, config: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
    reader = reader_of(config)
    self._aki_chats = None
    if reader is not None:
        # Others hold the one that was given; of this one vLLM makes copies for its threads.
        tokenizer = copy.deepcopy(tokenizer)
        self._aki_chats = Chats(tokenizer, reader.marks)
    original(self, config, tokenizer, *args, **kwargs)


def _render(original: Any, self: Any, messages: Any, params: Any) -> Any:
    if self._aki_chats is None:
        return original(self, messages, params)
    conversation, prompt = original(self, self._aki_chats.as_text(messages, params.chat_template), params)
    return mended(conversation), prompt


async def _render_async(original: Any, self: Any, messages: Any, params: Any) -> Any:
    if self._aki_chats is None:
        return await original(self, messages, params)
    conversation, prompt = await original(self, self._aki_chats.as_text(messages, params.chat_template), params)
    return mended(conversation), prompt


def _schedule(
    original: Any,
    self: Any,
    request: Any,
    num_computed_tokens: int,
    num_new_tokens: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a picture is shown with is computed in one step: a step that would end within it ends before it."""
    reader = reader_of(self.vllm_config)
    prompt = None if reader is None else _prompt(reader, request)
    whole = settings.keeps_prompts_whole(self.vllm_config)
    while True:
        result = original(self, request, num_computed_tokens, num_new_tokens, *args, **kwargs)
        stop = num_computed_tokens + result[1]
        allowed = stop if prompt is None else prompt.cut(num_computed_tokens, stop, whole)
        if allowed == stop:
            return result
        num_new_tokens = allowed - num_computed_tokens


def _load(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """The runner's attention layers do their rows again."""
    original(self, *args, **kwargs)
    reader = reader_of(self.vllm_config)
    if reader is None or getattr(self, "_aki_steps", None) is not None:
        return
    from aki.vllm.layers import lay_layers

    self._aki_order = lambda: self.input_batch.req_ids
    steps = Steps(reader, lambda: self._aki_order())
    steps.layers = lay_layers(self.vllm_config, steps)
    self._aki_steps = steps


def _look_at_cache(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    steps = getattr(self, "_aki_steps", None)
    if steps is not None and not settings.keeps_prompts_whole(self.vllm_config):
        from aki.vllm.cache import find_layout

        layers = self.vllm_config.compilation_config.static_forward_context
        steps.pages = {name: find_layout(name, layers[name]) for name in steps.layers}
    return result


def _note_order(original: Any, self: Any, input_batch: Any) -> Any:
    """The second runner keeps a step's batch to itself."""
    self._aki_order = lambda: input_batch.req_ids
    return original(self, input_batch)


def _execute(original: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    steps = getattr(self, "_aki_steps", None)
    if steps is None or kwargs.get("dummy_run"):
        return original(self, scheduler_output, *args, **kwargs)
    with steps.step(scheduler_output):
        return original(self, scheduler_output, *args, **kwargs)
