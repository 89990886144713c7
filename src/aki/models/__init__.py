"""The model, its processor, and their places in transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from aki.models.configuration import AkiConfig, AkiConnectorConfig
from aki.models.modeling import AkiForConditionalGeneration, AkiModel
from aki.models.names import register_names
from aki.models.processing import AkiProcessor

AutoConfig.register(AkiConfig.model_type, AkiConfig, exist_ok=True)
AutoModel.register(AkiConfig, AkiModel, exist_ok=True)
AutoModelForImageTextToText.register(AkiConfig, AkiForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AkiConfig, AkiProcessor, exist_ok=True)
register_names()

__all__ = ["AkiConfig", "AkiConnectorConfig", "AkiForConditionalGeneration", "AkiModel", "AkiProcessor"]
