"""AKI and modality-mutual attention."""

from aki import plots
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
