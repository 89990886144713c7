"""`unlock`: a visibility rule for any multimodal language model of transformers, through forward hooks alone.

One hook describes the batch when the model is called, and keeps the description for that call; one lays the rule over
the masks that the text decoder is given. Nothing of the model is replaced, and its weights are untouched.
"""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aki.attention.backends import prepare_attention, settle
from aki.attention.dense import as_boolean, check_takes_masks, is_prepared, language_model_masks
from aki.attention.families import (
    CannotUnlock,
    makes_own_masks,
    media_token_ids,
    text_decoder,
    underlying_model,
    unwrapped,
)
from aki.attention.guard import NothingOpensError, check_no_leak
from aki.attention.recorded import on_saving, record_rule, recorded_rule
from aki.attention.rules import Rule, get_rule
from aki.compat import given_cache
from aki.layout import END_SCOPE_TOKEN, SCOPE_TOKEN, SequenceLayout, build_layout, is_packed
from aki.prompts.blocks import AnswerMarks
from aki.prompts.scopes import scope_token_ids

logger = logging.getLogger(__name__)

_STATE = "_aki_unlocked"
_MEDIA_INPUTS = ("pixel_values", "input_features", "image_pixel_values", "audio_input_features", "pixel_values_videos")


class NothingOpensWarning(UserWarning):
    """A batch with media on which an unlocked model trains exactly as a causal one."""


def unlock(model: nn.Module, processor: Any = None, rule: str | None = None) -> nn.Module:
    """Lay a visibility rule over a model's own masks, from now on. `lock` takes it off again.

    forward then also takes `prompt_block_ids` (batch, length), which `write_prompt_blocks` writes. Without them,
    maximal runs of -100 in `labels` are the prompts; without labels, the stretches between answers where `processor` is
    given, else the whole input. What was generated is never prompt. The rule's name goes into the configuration (and an
    adapter's), from where `from_pretrained` lays it again.

    Args:
        model: what AutoModelForImageTextToText and its like return, also within PEFT's wrapper, torch.compile's or
            that of data-parallel training.
        processor: its processor, whose chat template says where answers are. Needed for generation from chats of
            several turns, and for media tokens that the configuration doesn't name.
        rule: a name in `aki.attention.RULES`. Absent: what the configuration says, else "mma".

    Returns:
        The model that was passed.

    Raises:
        CannotUnlock: no rule could be laid over this model, and why.
        ValueError: no such rule, one that needs what the processor does not have, no processor but a name, or
            FlashAttention in a decoder that does not take its attention from transformers' AttentionInterface.
    """
    if isinstance(processor, str):
        raise ValueError(f"unlock takes a processor there, not {processor!r}: aki.unlock(model, rule={processor!r}).")
    base, inner = underlying_model(model), unwrapped(model)
    decoder = text_decoder(base)
    name = rule or recorded_rule(inner, base) or "mma"
    marks = None if processor is None else AnswerMarks.of(processor)
    scopes = scope_token_ids(processor)
    if "mma_scoped" in name.split("+"):
        _check_scopes(base, scopes)
    if get_rule(name).positions is not None:
        raise CannotUnlock(
            f"the rule {name!r} also numbers the tokens in its own way, which a model that is not AKI's own does not "
            "take: train an AkiForConditionalGeneration with it."
        )
    if not _takes_segments(decoder):
        check_takes_masks(get_rule(name), decoder.config)
    state = _Unlocked(get_rule(name), media_token_ids(base.config, processor), decoder, marks, scopes)
    lock(model)
    state.attach(base)
    setattr(base, _STATE, state)
    record_rule(inner, base, name)
    _say_what_is_joined(base, name)
    return model


def is_under(base: PreTrainedModel, rule: str) -> bool:
    """Whether a rule is laid over a model, itself and not its wrapper."""
    state = getattr(base, _STATE, None)
    return state is not None and state.rule.name == rule


def layout_of_batch(model: nn.Module, inputs: dict[str, Any]) -> SequenceLayout:
    """What each token of a training batch is to an unlocked model.

    Args:
        inputs: as forward takes them, with `labels`.
    """
    state: _Unlocked = getattr(underlying_model(model), _STATE)
    return state.layout(inputs, inputs.get("prompt_block_ids"), training=True)


def _check_scopes(model: PreTrainedModel, scopes: list[int] | None) -> None:
    if scopes is None:
        raise ValueError(
            f"the rule 'mma_scoped' reads scopes from the tokens {SCOPE_TOKEN} and {END_SCOPE_TOKEN}: add them to the "
            "tokenizer as special tokens, and pass unlock the processor."
        )
    known = model.get_input_embeddings().weight.shape[0]
    if max(scopes) >= known:
        raise ValueError(
            f"the tokens {SCOPE_TOKEN} and {END_SCOPE_TOKEN} are {scopes}, the model knows {known} tokens: call "
            "model.resize_token_embeddings(len(tokenizer)) first."
        )


def lock(model: nn.Module) -> nn.Module:
    """Take the rule off: the model is again what it was, bit for bit. One that was never unlocked stays as it is."""
    base = underlying_model(model)
    state = getattr(base, _STATE, None)
    if state is not None:
        state.detach()
        delattr(base, _STATE)
        record_rule(unwrapped(model), base, None)
    return model


class _Unlocked:
    """The hooks of one model, and what they know during a call. torch.compile leaves them out, and compiles around."""

    def __init__(
        self,
        rule: Rule,
        media_token_ids: dict[int, int],
        decoder: Any,
        marks: AnswerMarks | None,
        scope_token_ids: list[int] | None,
    ):
        self.rule, self.media_token_ids, self.decoder = rule, media_token_ids, decoder
        self.marks, self.scope_token_ids = marks, scope_token_ids
        self.handles: list[Any] = []
        self.call = _Call()
        self.locked_attention = decoder.config._attn_implementation
        self.has_own_masks = self.said_on_saving = False

    def attach(self, model: PreTrainedModel) -> None:
        """Whichever of the model and the model inside it is called first describes the call."""
        for module in {id(m): m for m in (model, model.base_model)}.values():
            self.handles.append(module.register_forward_pre_hook(self.before_model, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after_model, always_call=True))
        self.handles.append(self.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True))
        if self.rule.name != "causal":
            self.handles.append(model.register_state_dict_pre_hook(self.before_saving))
        self.has_own_masks = makes_own_masks(model)
        if _takes_segments(self.decoder):
            # By segments where the rule opens something, and as sdpa everywhere else.
            self.locked_attention = self.decoder.config._attn_implementation
            self.decoder.config._attn_implementation = {"": "auto"}
            settle(self.decoder)
        _forget_compiled()

    def detach(self) -> None:
        # Of the decoder alone: its configuration may be the whole model's, and hold its encoders'.
        self.decoder.config._attn_implementation = {"": self.locked_attention}
        for handle in self.handles:
            handle.remove()
        _forget_compiled()

    @torch.compiler.disable
    def before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        blocks, layout = kwargs.pop("prompt_block_ids", None), kwargs.pop("layout", None)
        if self.call.called is None:
            self.call.called, self.call.laid = module, False
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            self.call.layout = self.describe(module, inputs, blocks, layout)
            if _is_packed(inputs, layout):
                # transformers keeps packed documents apart only where no cache is made.
                kwargs["use_cache"] = False
        return args, kwargs

    @torch.compiler.disable
    def after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module is not self.call.called:
            return
        missed = self.call.layout is not None and not self.call.laid
        self.call.called = self.call.layout = None
        # Where the model raises an error of its own, there is no output.
        if missed and output is not None:
            raise CannotUnlock(
                f"{type(module).__name__} answered without its decoder, {type(self.decoder).__name__}, so the rule "
                f"{self.rule.name!r} was not laid over its mask: this model cannot be unlocked."
            )

    def before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Whoever saves a model, transformers, PEFT or a Trainer, asks for its weights first."""
        if not self.said_on_saving:
            self.said_on_saving = True
            logger.warning(on_saving(type(module).__name__, self.rule.name))

    def describe(
        self, module: nn.Module, inputs: dict[str, Any], blocks: Tensor | None, layout: SequenceLayout | None
    ) -> SequenceLayout | None:
        """The layout of a call; None where there is no media in it, so that the model's own masks stand.

        Args:
            layout: found beforehand, by `layout_of_batch`, and guarded there.
        """
        if layout is not None:
            return layout if self.rule.changes_text or bool(layout.is_media.any()) else None
        ids = inputs.get("input_ids")
        if ids is None:
            if self.rule.changes_text or any(inputs.get(name) is not None for name in _MEDIA_INPUTS):
                raise ValueError("an unlocked model needs input_ids, which say what each token is.")
            embeds = inputs.get("inputs_embeds")
            if embeds is not None and embeds.shape[1] > 1:
                warnings.warn(
                    "inputs_embeds don't say what is media, so this call is causal although the model is unlocked: "
                    "pass input_ids.",
                    NothingOpensWarning,
                    stacklevel=2,
                )
            return None
        if ids.shape[1] == 1 or not (self.rule.changes_text or self.has_media(ids)):
            return None
        labels, cache = inputs.get("labels"), given_cache(inputs)
        seen = 0 if cache is None else int(cache.get_seq_length())
        if blocks is None and labels is None:
            if self.marks is not None:
                blocks = self.marks.blocks(ids, _padding(inputs.get("attention_mask"), ids.shape[1], seen))
            elif not module.training:
                blocks = self.call.growing.blocks(ids, inputs.get("use_cache") is False)
                # Tokens whose own logits are asked for are being judged: assisted generation's candidates.
                judged = inputs.get("logits_to_keep")
                if isinstance(judged, int) and judged > 1:
                    blocks[:, 1 - judged :] = -1
        layout = self.layout(inputs, blocks, module.training, seen)
        if labels is not None and module.training:
            self.guard(layout, labels)
        return layout

    def layout(self, inputs: dict[str, Any], blocks: Tensor | None, training: bool, seen: int = 0) -> SequenceLayout:
        """Of the tokens of a call, before which so many are cached."""
        ids = inputs["input_ids"]
        return build_layout(
            ids,
            self.media_token_ids,
            None,
            attention_mask=_padding(inputs.get("attention_mask"), ids.shape[1], seen),
            position_ids=_text_positions(inputs.get("position_ids")) if seen == 0 else None,
            prompt_block_ids=blocks,
            labels=inputs.get("labels"),
            training=training,
            scope_token_ids=self.scope_token_ids,
        )

    def has_media(self, ids: Tensor) -> bool:
        return bool(torch.isin(ids, torch.tensor(list(self.media_token_ids.values()), device=ids.device)).any())

    def guard(self, layout: SequenceLayout, labels: Tensor) -> None:
        try:
            check_no_leak(self.rule, layout, labels)
        except NothingOpensError as nothing:
            warnings.warn(
                f"THE MODEL TRAINS WITH CAUSAL ATTENTION, although it is unlocked: {nothing} A collator that labels "
                "whole chats, as TRL's does by default, is mended by one line: "
                "trainer.data_collator = aki.write_prompt_blocks(trainer.data_collator)",
                NothingOpensWarning,
                stacklevel=2,
            )

    @torch.compiler.disable
    def before_decoder(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        layout, self.call.laid = self.call.layout, True
        if layout is None:
            return args, kwargs
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs["input_ids"]
            embeds = torch.empty(*ids.shape, 0, dtype=module.dtype, device=ids.device)
        if embeds.shape[:2] != layout.shape:
            raise ValueError(
                f"the decoder got {tuple(embeds.shape[:2])} tokens where input_ids had {tuple(layout.shape)}: a "
                "rule needs one placeholder for every embedding."
            )
        mask, cache = kwargs.get("attention_mask"), given_cache(kwargs)
        described = (module.config, embeds, mask, cache, _text_positions(kwargs.get("position_ids")))
        if self.has_own_masks or is_prepared(mask):
            kwargs["attention_mask"] = language_model_masks(self.rule, layout.to(embeds.device), *described)
        else:
            kwargs["attention_mask"] = prepare_attention(self.rule, layout, *described)
        return args, kwargs


class _Call(threading.local):
    """What is known during a call, by thread: data-parallel replicas and servers call from several at once."""

    def __init__(self) -> None:
        self.layout: SequenceLayout | None = None
        self.called: nn.Module | None = None
        self.laid = False
        self.growing = _GrowingPrompt()

    def __reduce__(self) -> tuple[type, tuple]:
        # A copy of the model makes calls of its own.
        return type(self), ()


class _GrowingPrompt:
    """Where nothing says what is prompt, all of the input is, but for what `generate` has added to it without a cache.

    Such a call has the prompt of the one before, and one token more than that call.
    """

    def __init__(self) -> None:
        self.prompt: Tensor | None = None
        self.length = 0

    def blocks(self, ids: Tensor, uncached: bool) -> Tensor:
        """(batch, length): 0 for the prompt, -1 for what was added."""
        grown = uncached and self.prompt is not None and self._continues(ids, self.prompt)
        if not grown:
            self.prompt = ids if uncached else None
        self.length = ids.shape[1]
        added = ids.shape[1] - self.prompt.shape[1] if grown and self.prompt is not None else 0
        return nn.functional.pad(torch.zeros_like(ids[:, added:]), (0, added), value=-1)

    def _continues(self, ids: Tensor, prompt: Tensor) -> bool:
        same_shape = ids.shape[0] == prompt.shape[0] and ids.shape[1] == self.length + 1
        return same_shape and torch.equal(ids[:, : prompt.shape[1]], prompt)


def _takes_segments(decoder: Any) -> bool:
    """Whether its layers take their attention from transformers' AttentionInterface, and compute it fused."""
    implementation = str(decoder.config._attn_implementation)
    return bool(decoder._supports_attention_backend) and (implementation == "sdpa" or "flash" in implementation)


def _forget_compiled() -> None:
    """What torch.compile has made of a model doesn't look again at its hooks."""
    torch.compiler.reset()


def _padding(attention_mask: Any, length: int, seen: int) -> Tensor | None:
    """(batch, length), 0 for padding, of this call's tokens. In a prepared mask, padding is what nobody sees."""
    if not is_prepared(attention_mask):
        return None if attention_mask is None else attention_mask[:, -length:]
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    mask = as_boolean(attention_mask)
    if mask is None:
        return None
    visible = mask[:, 0].any(1)[:, seen : seen + length]
    return visible.long() if visible.shape[1] == length else None


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """(batch, length). Of multimodal rotary positions, (4, batch, length), the first are those of the text."""
    if position_ids is None or position_ids.ndim == 2:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == 4 else None


def _is_packed(inputs: dict[str, Any], layout: SequenceLayout | None) -> bool:
    """Whether rows hold several documents, and no cache does."""
    positions = _text_positions(inputs.get("position_ids"))
    if positions is None or inputs.get("attention_mask") is not None or given_cache(inputs) is not None:
        return False
    return is_packed(positions, layout)


def _say_what_is_joined(model: PreTrainedModel, rule: str) -> None:
    """Some models see more, or less, than plain causal attention: say what becomes of that."""
    text_config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text_config, "layer_types", None) or ())
    windowed = kinds - {"full_attention"} or (not kinds and getattr(text_config, "sliding_window", None))
    if windowed:
        logger.warning(
            "%s has layers with a window: they keep it, and what the rule %r opens is seen beyond it (the union).",
            type(model).__name__,
            rule,
        )
    if makes_own_masks(model):
        logger.warning(
            "%s has masks of its own, in which media may see each other both ways: it keeps them, and the rule %r adds "
            "to them (the union).",
            type(model).__name__,
            rule,
        )
