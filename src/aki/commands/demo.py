"""`aki demo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from aki.commands.shared import TakesPlugins


@dataclass
class Demo(TakesPlugins):
    """A web page: ask about a picture, and see what the image read."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A folder or a hub id."""
    host: str = "127.0.0.1"
    """0.0.0.0 shows the page to the network."""
    port: int = 7860
    unlock: bool = False
    """Lay MMA over a model that is not AKI's, as it is."""
    max_new_tokens: int = 128
    """Of one answer."""

    def run(self, overrides: list[str]) -> None:
        from aki.apps.loading import load

        try:
            from aki.apps.demo.page import serve
        except ImportError as error:
            raise RuntimeError(f"the web page needs Gradio: pip install 'aki-mma[demo]' ({error})") from error
        model, processor = load(self.model, self.unlock)
        serve(model, processor, self.host, self.port, self.max_new_tokens)
