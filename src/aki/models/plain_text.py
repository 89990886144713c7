"""What somebody writes is text, also where it looks like the chat's own tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import normalizers

from aki.prompts.scopes import SCOPE_PARTS

_BREAK = "\ufdd0"
"""A noncharacter of Unicode: it keeps a tokenizer from finding a token of its own, and is gone before text is read."""

_TEXTS = ("content", "text", "rows", "refusal", "thinking", "reasoning", "reasoning_content")
"""Of a message or a part, where somebody wrote."""


@contextmanager
def as_text(processor: Any, conversation: Any) -> Iterator[Any]:
    """The chat, or the list of chats, for `apply_chat_template` within the block: its texts cannot forge a turn.

    A special token that a text spells ("<|assistant|>") becomes the tokens of these characters, as does any added token
    of the chat template and any placeholder of media. (transformers' `sanitize_control_tokens` does the same, but not
    where answers are marked, and cuts words at the token's ends.)

    Args:
        processor: a processor with a fast tokenizer, or the tokenizer. Not for another thread meanwhile.

    Raises:
        ValueError: a text spells a token that this tokenizer reads in any text.
    """
    chat = broken(conversation, own_tokens(processor))
    if chat == conversation:
        yield conversation
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    before = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    read_past_breaks(tokenizer)
    try:
        yield chat
    finally:
        tokenizer.backend_tokenizer.normalizer = before


def read_past_breaks(tokenizer: Any) -> None:
    """From now on the tokenizer reads a chat that was `broken`.

    Raises:
        ValueError: it reads special tokens in any text, or is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or any(token.normalized for token in tokenizer.added_tokens_decoder.values() if token.special):
        raise ValueError("a text holds one of the model's own tokens, and this tokenizer cannot read it as text.")
    before, remove = backend.normalizer, normalizers.Replace(_BREAK, "")
    backend.normalizer = remove if before is None else normalizers.Sequence([remove, before])


def own_tokens(processor: Any) -> dict[str | None, re.Pattern[str]]:
    """role -> the tokens that its texts may not spell, None -> those of all other roles.

    All but the model's answers, which may hold tokens that are not special, such as those around its reasoning, may
    not spell any added token that the chat template writes either.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    templates = [getattr(part, "chat_template", None) or "" for part in (processor, tokenizer)]
    source = "".join("".join(t.values()) if isinstance(t, dict) else t for t in templates)
    added = tokenizer.added_tokens_decoder.values()
    named = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio", "boi"))
    special = {token.content for token in added if token.special} | {str(token) for token in named if token}
    written = {token.content for token in added if token.content in source and token.content.strip()}
    return {None: _any_of(special | written), "assistant": _any_of(special)}


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def broken(value: Any, own: dict[str | None, re.Pattern[str]], role: str | None = None) -> Any:
    """A chat, a message or a part, with a break within each token of its texts; the rest of it is the same.

    Args:
        own: `own_tokens`.
    """
    if isinstance(value, str):
        return own.get(role, own[None]).sub(lambda found: found[0][0] + _BREAK + found[0][1:], value)
    if isinstance(value, list | tuple):
        return [broken(inner, own, role) for inner in value]
    # A scope that was written out stands in a part that is ours.
    if not isinstance(value, dict) or any(value is part for part in SCOPE_PARTS):
        return value
    role = value.get("role", role)
    return {key: broken(inner, own, role) if key in _TEXTS else inner for key, inner in value.items()}


def mended(value: Any) -> Any:
    """Without the breaks of `broken`."""
    if isinstance(value, str):
        return value.replace(_BREAK, "")
    if isinstance(value, list):
        return [mended(inner) for inner in value]
    return {key: mended(inner) for key, inner in value.items()} if isinstance(value, dict) else value
