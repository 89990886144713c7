"""What lets transformers open a saved folder without `import aki` first, given `trust_remote_code=True`.

A saved configuration and a saved processor name, in `auto_map`, a file beside them that imports this package. It is
never run where the package is imported already.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

LOADER = Path(__file__).with_name("modeling_aki.py")
"""The file, which is copied as it is and which nothing here imports."""
AUTO_MAP = {
    "AutoConfig": "modeling_aki.AkiConfig",
    "AutoModel": "modeling_aki.AkiModel",
    "AutoModelForImageTextToText": "modeling_aki.AkiForConditionalGeneration",
    "AutoProcessor": "modeling_aki.AkiProcessor",
}


class ImportedCode:
    """Of a class that transformers may find through the file: nothing of its own code goes into a folder."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """transformers calls this, and would then copy the class's module, without what it imports."""


class SavedWithLoader(ImportedCode):
    """Of a configuration or a processor: saved with the file, and with what names it."""

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().to_dict(*args, **kwargs) | {"auto_map": dict(AUTO_MAP)}  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            shutil.copyfile(LOADER, Path(save_directory) / LOADER.name)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class SavedProcessor(SavedWithLoader, ProcessorMixin):
    """Looks to transformers as ProcessorMixin does: it asks the first parent of a processor for its methods."""
