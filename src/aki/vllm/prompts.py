"""What a prompt's ids say: which rows see keys ahead of them, under the rule of the model or of an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aki.attention.families import media_token_ids
from aki.attention.rules import Rule, get_rule
from aki.attention.segments import segments
from aki.layout import SequenceLayout, build_layout
from aki.models.adapters import rule_of_adapter
from aki.models.templates import ANSWER_TOKEN
from aki.prompts.blocks import AnswerMarks
from aki.prompts.scopes import scope_token_ids

_rule_of_adapter = lru_cache(maxsize=1024)(rule_of_adapter)  # asked for every request

Span = tuple[int, int]
"""Positions `start` to `stop - 1`."""


@dataclass(frozen=True)
class Opening:
    """Consecutive rows that see more than causal attention shows them, beside all that is behind them.

    Attributes:
        first, stop: the rows.
        ahead: spans of keys behind `stop`, in order, which every row sees.
        whole: every row also sees all of `first` to `stop`; else these rows are causal among themselves.
    """

    first: int
    stop: int
    ahead: tuple[Span, ...]
    whole: bool

    @property
    def reach(self) -> int:
        """Where the last key that it needs ends."""
        return max(self.stop if self.whole else self.first, *(stop for _, stop in self.ahead), 0)


@dataclass(frozen=True)
class Prompt:
    """What a rule opens in one prompt.

    Attributes:
        ids: of its tokens.
        items: (first position, stop, identity) of each picture, video or clip.
        openings: in order.
    """

    ids: tuple[int, ...]
    items: tuple[tuple[int, int, str], ...]
    openings: tuple[Opening, ...]

    def cut(self, start: int, stop: int, whole: bool = False) -> int:
        """The last place up to `stop` where a step that begins at `start` may end: no row of it needs a later key.

        With `whole`, no row that is opened needs an earlier step's key either.
        """
        if whole and self.openings and start < self.openings[-1].stop:
            return stop if stop >= max(o.reach for o in self.openings) else start
        for _ in self.openings:
            torn = [o for o in self.openings if o.stop > start and o.first < stop < o.reach]
            if not torn:
                break
            stop = max(start, min(o.first for o in torn))
        return stop

    def seen_ahead(self, start: int, stop: int) -> str | None:
        """A name for what the rows `start` to `stop - 1` see beyond causal keys; None: nothing.

        Two prompts that are alike up to `stop` and have equal names compute equal keys and values there. Positions
        count from `start`, because what stands before is known by other names.
        """
        seen = []
        for opening in self.openings:
            if opening.first >= stop or opening.stop <= start:
                continue
            spans = [(opening.first, opening.stop), *opening.ahead] if opening.whole else list(opening.ahead)
            later = [i for first, end in spans for i in range(max(first, stop), end)]
            items = [item for item in self.items if any(item[0] < end and first < item[1] for first, end in spans)]
            seen.append(
                (
                    (opening.first - start, opening.stop - start, opening.whole),
                    [(first - start, end - start) for first, end in spans],
                    [self.ids[i] for i in later],
                    [(first - start, end - start, identity) for first, end, identity in items],
                )
            )
        return hashlib.sha256(repr(seen).encode()).hexdigest() if seen else None


class PromptReader:
    """Reads prompts of one model.

    Args:
        config: the model's configuration, of transformers or of vLLM.
        rule: of requests without an adapter that names one.
        tokenizer: whose chat template says where answers are. None, or one without: a prompt is one block.
        own: a rule that the model's own mask opens, whatever else is opened.

    Raises:
        ValueError: there is no such rule, or vLLM cannot follow it.
    """

    def __init__(self, config: Any, rule: str, tokenizer: Any = None, own: str | None = None):
        self.own = own
        self.rule = self._with_own(rule)
        self.media_token_ids: dict[int, int] = {}
        self.tokens_per_item: dict[int, int] | None = None
        if config.model_type == "aki":
            self.media_token_ids = {media.modality: media.token_id for media in config.media.values()}
            self.tokens_per_item = {media.modality: media.tokens_per_item for media in config.media.values()}
            self.scope_token_ids = config.scope_token_ids
            self.answer_token_id = None if tokenizer is None else tokenizer.convert_tokens_to_ids(ANSWER_TOKEN)
        else:
            self.media_token_ids = media_token_ids(config)
            self.scope_token_ids, self.answer_token_id = scope_token_ids(tokenizer), None
        is_for_chats = getattr(tokenizer, "chat_template", None)
        self.marks = AnswerMarks.of(tokenizer, told_from_text=True) if is_for_chats else None
        # Scheduler and worker read the same prompts, in threads of their own.
        self._kept = lru_cache(maxsize=64)(self._read)

    def rule_for(self, adapter: str | None) -> Rule:
        """The rule that an adapter's folder names, else the model's."""
        named = _rule_of_adapter(adapter) if adapter else None
        return self.rule if named is None else self._with_own(named)

    def _with_own(self, rule: str) -> Rule:
        return checked_rule(rule if self.own is None else f"{rule}+{self.own}")

    def read(self, ids: Sequence[int], items: Sequence[tuple[Tensor, str]], adapter: str | None = None) -> Prompt:
        """What is opened in one prompt.

        Args:
            ids: of the prompt alone; what was generated since is never prompt.
            items: of each picture, video or clip the positions of its embeddings, and what it is known by.
            adapter: the folder of the request's adapter.
        """
        return self._kept(tuple(ids), tuple((tuple(at.tolist()), name) for at, name in items), adapter)

    def _read(
        self, ids: tuple[int, ...], items: tuple[tuple[tuple[int, ...], str], ...], adapter: str | None
    ) -> Prompt:
        spans = tuple((min(at), max(at) + 1, name) for at, name in items if at)
        layout = self.layout(ids, [torch.tensor(at, dtype=torch.long) for at, _ in items])
        return Prompt(ids, spans, tuple(openings(self.rule_for(adapter), layout)))

    def layout(self, ids: Sequence[int], embedded: Sequence[Tensor]) -> SequenceLayout:
        """(1, length). A placeholder that stands for no embedding is text that somebody wrote."""
        written = torch.tensor([list(ids)])
        is_embedded = torch.zeros_like(written, dtype=torch.bool)
        for positions in embedded:
            is_embedded[0, positions] = True
        blocks = self._blocks(written)
        return build_layout(
            written.masked_fill(~is_embedded & self._is_placeholder(written), -1),
            self.media_token_ids,
            self.tokens_per_item,
            prompt_block_ids=blocks,
            scope_token_ids=self.scope_token_ids,
        )

    def _blocks(self, ids: Tensor) -> Tensor | None:
        """Where answers are, (1, length); None: nothing says so, and all is one prompt."""
        if self.marks is None:
            return None
        blocks = self.marks.blocks(ids)
        if self.answer_token_id is not None:
            # White space that a template writes after the token is answer (paper, section 3).
            place = torch.arange(ids.shape[1])
            for block in range(int(blocks.max()) + 1):
                starts = place[(blocks[0] == block) & (ids[0] == self.answer_token_id)]
                if len(starts):
                    blocks[0, (blocks[0] == block) & (place > starts[-1])] = -1
        return blocks

    def _is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(list(self.media_token_ids.values())))


def checked_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: there is none, or it needs what vLLM does not have.
    """
    rule = get_rule(name)
    if rule.positions is not None:
        raise ValueError(
            f"the rule {name!r} numbers the tokens in its own way, which vLLM does not take: serve this model with "
            "`aki serve`."
        )
    return rule


def openings(rule: Rule, layout: SequenceLayout) -> list[Opening]:
    """Which rows of a layout of one row see keys ahead of them, from the rule's segments.

    Every rule that vLLM can follow also shows all that is behind a token, so that only what is ahead has to be kept.
    """
    found = []
    for segment in segments(rule, layout):
        for first, stop in segment.queries:
            others = [span for span in segment.keys if not segment.is_causal or span not in segment.queries]
            ahead = tuple((max(start, stop), end) for start, end in others if end > stop)
            whole = not segment.is_causal and stop - first > 1
            if ahead or whole:
                found.append(Opening(first, stop, ahead, whole))
    return sorted(found, key=lambda opening: opening.first)
