"""`aki serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from aki.apps.serve.limits import Limits
from aki.commands.shared import TakesPlugins


@dataclass
class Serve(TakesPlugins):
    """Answer OpenAI's chat completions, for programs."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder or a hub id."""
    host: str = "127.0.0.1"
    """0.0.0.0 lets others in; give it an API key then."""
    port: int = 8000
    api_key: str | None = None
    """What clients must send. Better in the environment, as AKI_API_KEY: others can read a command line."""
    unlock: bool = False
    """Lay mma over a model of transformers that was not saved unlocked."""
    allow_remote_images: bool = False
    """Fetch images that clients name by http(s) URL, from public addresses."""
    engine: Literal["aki", "vllm"] = "aki"
    """vllm: many clients, several GPUs; needs vLLM, and hands on what vLLM's own server knows (docs/serving.md)."""
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)

    def run(self, overrides: list[str]) -> None:
        key = self.api_key or os.environ.get("AKI_API_KEY") or None
        if self.engine == "vllm":
            from aki.apps.vllm import serve as become_vllm
            from aki.apps.vllm import server_command

            if self.limits != Limits():
                raise ValueError("the limits are aki's own engine's: give vLLM's flags (docs/serving.md).")
            rule = "mma" if self.unlock else None
            command = server_command(self.model, self.host, self.port, rule, self.allow_remote_images, overrides)
            return become_vllm(command, key)
        if overrides:
            raise ValueError(f"aki serve does not know {' '.join(overrides)}; see aki serve --help.")
        try:
            from aki.apps.serve.engine import Engine
            from aki.apps.serve.server import serve
        except ModuleNotFoundError as error:
            raise ValueError(f"serving needs {error.name}: pip install 'aki-mma[serve]'.") from error

        engine = Engine.from_folder(self.model, self.unlock)
        serve(engine, self.host, self.port, self.limits, remote_images=self.allow_remote_images, api_key=key)
