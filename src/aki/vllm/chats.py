"""Chats on their way to ids: what somebody wrote is text, and answers stand where the reader of prompts finds them."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

from aki.models.plain_text import broken, own_tokens, read_past_breaks
from aki.prompts.blocks import AnswerMarks


class Chats:
    """The chats of one engine.

    Args:
        tokenizer: with which vLLM reads them. From now on it reads past breaks, as do copies that are made of it.
        marks: by which the reader of prompts finds answers; None: it looks for none.
    """

    def __init__(self, tokenizer: Any, marks: AnswerMarks | None):
        self.tokenizer, self.marks = tokenizer, marks
        self.own = own_tokens(tokenizer)
        self.refused: ValueError | None = None
        try:
            read_past_breaks(tokenizer)
        except ValueError as error:
            self.refused = error
        self.check = lru_cache(maxsize=32)(self._check)

    def as_text(self, messages: Any, template: str | None) -> Any:
        """The messages, whose texts cannot forge a turn.

        Args:
            messages: before vLLM writes placeholders into them.
            template: the chat template, where it is not the folder's own.

        Raises:
            ValueError: a text spells a token that this tokenizer reads in any text, or the template marks answers
                otherwise than the folder's.
        """
        if template is not None:
            self.check(template)
        found = broken(messages, self.own)
        if self.refused is not None and found != messages:
            raise self.refused
        return found

    def _check(self, template: str) -> None:
        if self.marks is None:
            return
        other = copy.copy(self.tokenizer)
        other.chat_template = template
        try:
            marks = AnswerMarks.of(other, told_from_text=True)
        except ValueError:
            marks = None
        if marks is None or replace(marks, tokenizer=None) != replace(self.marks, tokenizer=None):
            raise ValueError(
                "this chat template marks answers otherwise than the one of the model's folder, by which the attention "
                "rule finds them: put it into the folder (chat_template.jinja), and leave --chat-template out."
            )
