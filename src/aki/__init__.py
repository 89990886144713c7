"""AKI and modality-mutual attention."""

# compat first: it warns of a transformers that was not tested, before an import fails.
from aki import compat, plots  # noqa: F401
from aki.attention import lock, unlock, write_prompt_blocks
from aki.data.pack import pack
from aki.models import AkiConfig, AkiConnectorConfig, AkiForConditionalGeneration, AkiModel, AkiProcessor
from aki.models.explain import explain

__version__ = "0.1.0"
__all__ = [
    "AkiConfig",
    "AkiConnectorConfig",
    "AkiForConditionalGeneration",
    "AkiModel",
    "AkiProcessor",
    "explain",
    "lock",
    "pack",
    "plots",
    "unlock",
    "write_prompt_blocks",
]
