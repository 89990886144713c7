"""`aki convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass
class Convert:
    """Write the published checkpoint, or an adapter with its model, as a folder that `aki chat` and from_pretrained
    load."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder in the published layout, or a hub id; with --merge the folder of an adapter."""
    output: Annotated[Positional[Path], arg(metavar="OUT")]
    """A new folder."""
    merge: bool = False
    """Write an adapter and its model as one."""

    def run(self, overrides: list[str]) -> None:
        if self.merge:
            self._merge()
            return
        from aki.models.convert import convert

        done = convert(self.source, self.output)
        dtype = str(done.dtype).removeprefix("torch.")
        files = "1 file" if done.files == 1 else f"{done.files} files"
        print(f"{self.output} holds {done.parameters:,} parameters in {dtype} ({done.bytes / 1e9:.2f} GB in {files}).")
        print(f'Ask it:\n  aki chat {self.output} --image picture.jpg "What is in the picture?"')

    def _merge(self) -> None:
        from aki.attention import unlock
        from aki.models.adapters import adapter_of, model_of_adapter, rule_of_adapter
        from aki.models.other import is_aki, load_any

        if adapter_of(self.source) is None:
            raise ValueError(f"{self.source} holds no adapter to merge.")
        if self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} holds something already: name a new folder.")
        with model_of_adapter(self.source):
            model, processor = load_any(self.source)
            if not is_aki(model) and rule_of_adapter(self.source) is not None:
                unlock(model, processor)  # says what becomes of it elsewhere
        model.save_pretrained(self.output)
        processor.save_pretrained(self.output)
        print(f"{self.output} holds {sum(p.numel() for p in model.parameters()):,} parameters, the adapter merged.")
