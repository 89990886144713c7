"""A language model's own chat template as AKI's processor takes one: media as placeholders, answers marked."""

from __future__ import annotations

import re
from typing import Any

from aki.models.templates import CONTENT
from aki.prompts.blocks import AnswerMarks

_OPEN, _CLOSE = "\ufdd1", "\ufdd2"
"""Noncharacters of Unicode: they stand around an answer while a template is rendered, and never in what it gives."""
_MARK = re.compile(r"<\|[^<>|\s]+\|>|<[a-z]+(?:_[a-z]+)+>")
"""What chat templates call a turn's beginning and end: <|im_start|>, <start_of_turn>."""
_CHAT = [
    {"role": role, "content": content}
    for role, content in (("user", "alpha"), ("assistant", "beta"), ("user", "gamma"), ("assistant", "delta"))
]

_FLAT = (
    "{%- set separator = '\n' -%}" + CONTENT + "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    f"{{%- set text = content(message) | replace('{_OPEN}', '') | replace('{_CLOSE}', '') -%}}"
    "{%- if message.role == 'assistant' and mark -%}"
    f"{{%- set text = '{_OPEN}' ~ text ~ '{_CLOSE}' -%}}"
    "{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text)] -%}"
    "{%- endfor -%}{%- set messages = flat.messages -%}"
)
"""Contents as strings, which is what templates of language models take."""


def as_akis(tokenizer: Any, template: str) -> tuple[str, str]:
    """
    Args:
        tokenizer: which the template is for.
        template: writes text alone, with or without generation tags around its answers.

    Returns:
        the template with a placeholder where media stand, and generation tags around answers and what ends them; and
        what ends an answer, "" where that is only the next question.

    Raises:
        ValueError: no answers could be found in what the template writes.
    """
    end = _end_of_answers(tokenizer, template)
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return "{%- set mark = false -%}" + _FLAT + template, end
    quoted = end.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return (
        "{%- set mark = true -%}" + _FLAT + "{%- set written -%}" + template + "{%- endset -%}"
        f"{{%- set answer_end = '{quoted}' -%}}"
        f"{{%- for piece in written.split('{_OPEN}') -%}}"
        "{%- if loop.first -%}{{ piece }}{%- else -%}"
        f"{{%- set answer, rest = piece.split('{_CLOSE}', 1) -%}}"
        "{%- set ended = answer_end if rest.startswith(answer_end) else '' -%}"
        "{% generation %}{{ answer ~ ended }}{% endgeneration %}{{ rest[ended | length:] }}"
        "{%- endif -%}{%- endfor -%}",
        end,
    )


def unknown_marks(tokenizer: Any, template: str) -> list[str]:
    """The marks of turns that a template writes and the tokenizer has no single token for."""
    text = tokenizer.apply_chat_template(_CHAT, chat_template=template, tokenize=False)
    known = tokenizer.get_vocab()
    return [mark for mark in dict.fromkeys(_MARK.findall(text)) if mark not in known]


def _end_of_answers(tokenizer: Any, template: str) -> str:
    """The mark that ends each answer."""
    written = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        AnswerMarks.of(tokenizer)
        text = tokenizer.apply_chat_template(_CHAT, tokenize=False)
    finally:
        tokenizer.chat_template = written
    first, last = text.partition("beta")[2].partition("gamma")[0], text.rpartition("delta")[2]
    known = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    ends = [token for token in known if first.startswith(token) and last.startswith(token)]
    return max(ends, key=len, default="")
