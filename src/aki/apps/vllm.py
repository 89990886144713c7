"""`--engine vllm`: vLLM's own OpenAI server, started with the flags under which it answers as `aki serve` does."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NEEDED = (
    "the engine vllm needs vLLM, built for this machine's hardware: pip install vllm (docs/serving.md says which), in "
    "the same environment as aki."
)


def check_installed() -> None:
    """Raises ValueError where vLLM is not there."""
    if find_spec("vllm") is None:
        raise ValueError(NEEDED)


def overrides(rule: str | None) -> dict[str, str]:
    """What of a folder's configuration is answered otherwise."""
    return {} if rule is None else {"attention_rule": rule}


def server_command(
    model: str, host: str, port: int, rule: str | None = None, remote_images: bool = False, more: Sequence[str] = ()
) -> list[str]:
    """The command line of vLLM's server.

    Args:
        rule: over what the folder says.
        remote_images: whether pictures are fetched by URL.
        more: flags of vLLM's own, handed on; of a flag that is given twice vLLM takes the last.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    # aki serve's own name for a folder first.
    command += ["--served-model-name", Path(model).resolve().name, model, "--host", host, "--port", str(port)]
    if not remote_images:
        # vLLM fetches from the domains that are named, and from any where none is; no host has this name.
        command += ["--allowed-media-domains", "nowhere.invalid"]
    if rule is not None:
        command += ["--hf-overrides", json.dumps(overrides(rule))]
    return [*command, *more]


def serve(command: list[str], api_key: str | None) -> None:
    """Become vLLM's server. The key goes through the environment, because others can read a command line.

    Raises:
        ValueError: vLLM is not installed.
    """
    check_installed()
    environment = os.environ | ({"VLLM_API_KEY": api_key} if api_key else {})
    os.execve(command[0], command, environment)
