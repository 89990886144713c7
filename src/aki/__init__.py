"""AKI and modality-mutual attention."""

from aki.attention import lock, unlock, write_prompt_blocks
from aki.models import AkiConfig, AkiConnectorConfig, AkiForConditionalGeneration, AkiProcessor

__version__ = "0.1.0"
__all__ = [
    "AkiConfig",
    "AkiConnectorConfig",
    "AkiForConditionalGeneration",
    "AkiProcessor",
    "lock",
    "unlock",
    "write_prompt_blocks",
]
