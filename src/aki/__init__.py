"""AKI and modality-mutual attention."""

from aki import plots
from aki.attention import lock, unlock, write_prompt_blocks
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
    "plots",
    "unlock",
    "write_prompt_blocks",
]
