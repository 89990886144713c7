"""AKI and modality-mutual attention."""

from aki.models import AkiConfig, AkiConnectorConfig, AkiForConditionalGeneration, AkiProcessor

__version__ = "0.1.0"
__all__ = ["AkiConfig", "AkiConnectorConfig", "AkiForConditionalGeneration", "AkiProcessor"]
