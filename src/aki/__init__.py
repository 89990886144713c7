"""AKI and modality-mutual attention."""

# compat first: it warns of a transformers that was not tested, before an import fails.
from aki import compat, plots, plugins  # noqa: F401
from aki.attention import lock, unlock
from aki.data import ChatCollator, pack
from aki.models import (
    AkiConfig,
    AkiConnectorConfig,
    AkiForConditionalGeneration,
    AkiModel,
    AkiProcessor,
    opening,
    templates,
)
from aki.models.explain import explain
from aki.prompts import write_prompt_blocks

opening.open_under_rules()
plugins.load_from_environment()

__version__ = "0.1.0"
__all__ = [
    "AkiConfig",
    "AkiConnectorConfig",
    "AkiForConditionalGeneration",
    "AkiModel",
    "AkiProcessor",
    "ChatCollator",
    "explain",
    "lock",
    "pack",
    "plots",
    "templates",
    "unlock",
    "write_prompt_blocks",
]
