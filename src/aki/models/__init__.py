"""The model, its processor, and their places in transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto import modeling_auto

from aki.models.configuration import AkiConfig, AkiConnectorConfig
from aki.models.modeling import AkiForConditionalGeneration, AkiModel
from aki.models.names import register_names
from aki.models.processing import AkiProcessor

AutoConfig.register(AkiConfig.model_type, AkiConfig, exist_ok=True)
AutoModel.register(AkiConfig, AkiModel, exist_ok=True)
AutoModelForImageTextToText.register(AkiConfig, AkiForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(AkiConfig, AkiForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AkiConfig, AkiProcessor, exist_ok=True)
register_names()
# transformers' Trainer shifts the labels that it smooths for classes of the first kind alone; where it serves, the
# second tells that this one reads pictures.
for names in (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
):
    names[AkiConfig.model_type] = AkiForConditionalGeneration.__name__

__all__ = ["AkiConfig", "AkiConnectorConfig", "AkiForConditionalGeneration", "AkiModel", "AkiProcessor"]
