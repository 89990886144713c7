"""Chat templates are programs of whoever wrote the folder: one that never ends, or fills the memory, is refused."""

from __future__ import annotations

import os
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

SECONDS, MEGABYTES = 2, 512
"""Of processor time and of memory beyond what is in use, that a chat of three short messages may take."""
_TOO_LONG, _OUT_OF_MEMORY = 3, 4
_LONGEST = 1_000_000
"""Characters of such a chat."""

_TURNS = [("user", "alpha"), ("assistant", "beta"), ("user", "gamma")]


def check_templates(processor: Any) -> None:
    """Render a small chat by each template of a processor, in a process that ends when it takes too much.

    What a template says no to (a role, parts instead of a text) is no fault here: whoever uses it is told.

    Raises:
        ValueError: a template does not end, or builds too much.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    templates: dict[str, None] = {}
    for holder in (processor, tokenizer):
        found = getattr(holder, "chat_template", None) or {}
        templates |= dict.fromkeys(found.values() if isinstance(found, dict) else [found])
    for template in templates:
        problem = _problem(template, getattr(tokenizer, "special_tokens_map", {}))
        if problem:
            raise ValueError(
                f"the chat template {template[:60]!r}... {problem} for a chat of three words: it is broken or means "
                "harm; set another one in the folder."
            )


def _problem(template: str, tokens: dict[str, Any]) -> str | None:
    with warnings.catch_warnings():
        # Nothing but the template runs in the copy, which takes no lock of another thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render_and_exit(template, tokens)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"takes more than {SECONDS} s"
    found = {_TOO_LONG: f"writes more than {_LONGEST:,} characters", _OUT_OF_MEMORY: f"takes more than {MEGABYTES} MB"}
    return found.get(os.waitstatus_to_exitcode(status))


def _render_and_exit(template: str, tokens: dict[str, Any]) -> None:
    code = 0
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (MEGABYTES << 20),) * 2)
        for parts in (False, True):
            for asked in (False, True):
                code = code or _render(template, parts, add_generation_prompt=asked, **tokens)
    except MemoryError:
        code = _OUT_OF_MEMORY
    finally:
        os._exit(code)


def _render(template: str, parts: bool, **values: Any) -> int:
    turns = [(role, [{"type": "text", "text": text}] if parts else text) for role, text in _TURNS]
    chat = [{"role": role, "content": content} for role, content in turns]
    try:
        text = render_jinja_template([chat], chat_template=template, **values)[0][0]
    except MemoryError:
        raise
    except Exception:
        # Templates raise anything.
        return 0
    return _TOO_LONG if len(text) > _LONGEST else 0
