"""Scopes in chat messages, written out as the tokens that open and close them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aki.layout import END_SCOPE_TOKEN, SCOPE_TOKEN

SCOPE_PARTS = tuple({"type": "text", "text": token} for token in (SCOPE_TOKEN, END_SCOPE_TOKEN))


def write_scopes(parts: Any) -> Iterator[dict[str, Any]]:
    """A message's parts, with tokens around what stands in a scope.

    Args:
        parts: as in chat messages, and {"type": "scope", "content": parts}, and {"type": "table", "rows":
            [[parts of a cell, ...], ...]}, which is a scope of rows of cells. A string is a part of text.

    Raises:
        ValueError: a table without rows of cells.
    """
    for part in _as_parts(parts):
        inside = part.get("content")
        if part.get("type") == "table":
            rows = part.get("rows")
            if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) for row in rows):
                raise ValueError(
                    "the table part of a message has no rows: give it `rows`, a list of rows, each a list of cells."
                )
            inside = [{"type": "scope", "content": [{"type": "scope", "content": c} for c in row]} for row in rows]
        if part.get("type") in ("scope", "table"):
            yield SCOPE_PARTS[0]
            yield from write_scopes(inside)
            yield SCOPE_PARTS[1]
        else:
            yield part


def _as_parts(content: Any) -> list[dict[str, Any]]:
    parts = [content] if isinstance(content, str | dict) else content or []
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def scope_token_ids(processor: Any) -> list[int] | None:
    """The tokens that open and close a scope, where the processor's tokenizer has them.

    Args:
        processor: a processor or tokenizer, or None.
    """
    if processor is None:
        return None
    known: Mapping[str, int] = getattr(processor, "tokenizer", processor).get_vocab()
    if SCOPE_TOKEN not in known or END_SCOPE_TOKEN not in known:
        return None
    return [known[SCOPE_TOKEN], known[END_SCOPE_TOKEN]]


def add_scope_tokens(tokenizer: Any) -> int:
    """Let a tokenizer know the tokens that open and close a scope; returns how many are new."""
    return tokenizer.add_tokens([SCOPE_TOKEN, END_SCOPE_TOKEN], special_tokens=True)


def check_scopes(chats: list[list[dict[str, Any]]], processor: Any) -> None:
    """
    Args:
        chats: their scopes written out.

    Raises:
        ValueError: there are scopes, and the tokenizer has no tokens for them, or the chat template takes pictures
            out of them.
    """
    contents = [message.get("content") for chat in chats for message in chat]
    scoped = any(part in SCOPE_PARTS for content in contents if isinstance(content, list) for part in content)
    if not scoped:
        return
    if scope_token_ids(processor) is None:
        raise ValueError(
            f"the chat has scopes, but the tokenizer does not know {SCOPE_TOKEN} and {END_SCOPE_TOKEN}: add them as "
            "special tokens, and let the model know them (AKI: scope_token_ids in its configuration; others: "
            "resize_token_embeddings, and aki.unlock with the processor)."
        )
    template = getattr(processor, "chat_template", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    kinds = {part.get("type", "").removesuffix("_url") for part in parts} & {"image", "video", "audio"}
    for kind in sorted(kinds) if isinstance(template, str) else ():
        figure = [{"role": "user", "content": [SCOPE_PARTS[0], {"type": kind}, SCOPE_PARTS[1]]}]
        text = tokenizer.apply_chat_template(figure, chat_template=template, tokenize=False)
        if SCOPE_TOKEN + END_SCOPE_TOKEN in text.replace(" ", ""):
            raise ValueError(
                "the chat template writes pictures before the text, out of the scopes that they stand in: set "
                "`processor.chat_template` to one that keeps the parts of a message in order."
            )
