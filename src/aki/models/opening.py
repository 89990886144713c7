"""What was saved under a rule opens under it, once aki is imported: by `from_pretrained` and `load_adapter` of
transformers and of PEFT.

Both keep a field of the configuration that they do not know without looking at it, and call nothing of ours, so their
methods are wrapped.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils import is_peft_available

from aki.attention.families import unwrapped
from aki.attention.recorded import recorded_rule
from aki.attention.unlock import is_under, unlock
from aki.prompts.blocks import AnswerMarks

logger = logging.getLogger(__name__)

_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""Arguments of `from_pretrained` that say where a processor is as they say where its model is."""

_stock: ContextVar[bool] = ContextVar("stock", default=False)


class OpenedCausalWarning(UserWarning):
    """A model that was saved under a rule could not be opened under it."""


@contextmanager
def as_stock() -> Iterator[None]:
    """Within it models open as transformers makes them, the rule's name in the configuration: the caller lays it."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


def open_under_rules() -> None:
    """From now on `from_pretrained` and `load_adapter` lay the rule that what they open was saved under. Called once,
    by the import."""
    _wrap(PreTrainedModel, "from_pretrained", "pretrained_model_name_or_path", 0)
    _wrap(PreTrainedModel, "load_adapter", "peft_model_id", 0)


def _wrap(kind: Any, method: str, parameter: str, place: int) -> None:
    """
    Args:
        method: a class method that returns a model, or a model's own.
        parameter: of the method: the folder or hub id.
        place: of that parameter among the positional ones.
    """
    bound = getattr(kind, method)
    original = getattr(bound, "__func__", bound)

    @functools.wraps(original)
    def opens(self: Any, *args: Any, **kwargs: Any) -> Any:
        outermost = not _stock.get()
        with as_stock():
            opened = original(self, *args, **kwargs)
        if outermost:
            name = args[place] if len(args) > place else kwargs.get(parameter)
            returned = opened[0] if isinstance(opened, tuple) else opened
            _lay_recorded(self if isinstance(self, nn.Module) else returned, name, kwargs)
        _wrap_peft()
        return opened

    setattr(kind, method, opens if bound is original else classmethod(opens))


@functools.cache
def _wrap_peft() -> None:
    """Once a model was opened, which comes before its adapter: the import of aki does not wait for that of PEFT."""
    if is_peft_available():
        from peft import PeftModel

        _wrap(PeftModel, "from_pretrained", "model_id", 1)
        _wrap(PeftModel, "load_adapter", "model_id", 0)


def _lay_recorded(model: Any, name: Any, options: dict[str, Any]) -> None:
    inner = unwrapped(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    base = getattr(base, "thinker", base)
    rule = recorded_rule(inner, base) if isinstance(base, PreTrainedModel) else None
    if rule is None:
        return
    if base.config.model_type == "aki":
        # Its own code reads the rule there; of an adapter it stands elsewhere until now.
        base.config.attention_rule = rule
        return
    adapter = (options.get("adapter_kwargs") or {}).get("_adapter_model_path")
    processor, why = _processor([adapter, name, base.config._name_or_path], options)
    if processor is None and is_under(base, rule):
        return
    try:
        unlock(model, processor, rule)
    except ValueError as error:
        warnings.warn(
            f"{name} was saved under the attention rule {rule!r} and is opened causal: {error}",
            OpenedCausalWarning,
            stacklevel=3,
        )
        return
    if processor is None:
        logger.warning(
            "%s is opened under the attention rule %r without its processor (%s), which says where answers are: in "
            "chats of several turns a picture sees answers too, until you call aki.unlock(model, processor).",
            name,
            rule,
            why,
        )


def _processor(names: list[Any], options: dict[str, Any]) -> tuple[Any, str]:
    """The first that can be opened and whose chat template marks answers, else why the last could not."""
    where = {key: options[key] for key in _WHERE if options.get(key) is not None}
    why = "no folder was named"
    for name in dict.fromkeys(str(name) for name in names if name):
        try:
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False, **where)
            AnswerMarks.of(processor)
            return processor, ""
        # Whatever a processor lacks, the model was opened, as it would have been without aki.
        except Exception as error:
            why = str(error)
    return None, why
