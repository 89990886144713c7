"""Pretrained encoders and a pretrained language model, joined through new connectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from aki.models.configuration import AkiConfig
from aki.models.connectors import connector_of
from aki.models.encoding import encoder_of
from aki.models.heads import add_output_bias, check_head
from aki.models.weights import check_complete, check_finite

if TYPE_CHECKING:
    from aki.models.modeling import AkiForConditionalGeneration


def join_backbones(
    model_class: type[AkiForConditionalGeneration],
    language_model: str | PreTrainedConfig,
    encoders: dict[str, str | PreTrainedConfig],
    vocab_size: int | None,
    dtype: torch.dtype | None,
    **config,
) -> AkiForConditionalGeneration:
    """See `AkiForConditionalGeneration.from_backbones`.

    Args:
        encoders: kind (vision, video, audio) -> hub id or folder, or the configuration of a new one.
    """
    joined = AkiConfig(
        **{f"{kind}_config": _config(name) for kind, name in encoders.items()},
        text_config=_config(language_model),
        **config,
    )
    with torch.device("meta"):
        model = model_class(joined)
    backbone = model.model
    for kind, name in encoders.items():
        encoder = encoder_of(_load(AutoModel, name, getattr(joined, f"{kind}_config")))
        # from_pretrained copies the configuration that it is given.
        setattr(joined, f"{kind}_config", encoder.config)
        backbone.add_module(f"{kind}_encoder", encoder)
    decoder = _load(AutoModelForCausalLM, language_model, joined.text_config)
    check_head(decoder, language_model)
    joined.text_config = decoder.config
    backbone.language_model, model.lm_head = decoder.base_model, decoder.get_output_embeddings()
    if joined.output_bias:
        add_output_bias(model.lm_head)
    model.tie_weights()
    if vocab_size is not None and vocab_size > joined.text_config.vocab_size:
        model.resize_token_embeddings(vocab_size)
    for media in joined.media.values():
        backbone.add_module(media.connector, connector_of(media, joined).apply(model._init_weights))
    return model.to(dtype or decoder.dtype)


def _config(name: str | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(name, PreTrainedConfig):
        return name
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _load(auto_class: Any, name: str | PreTrainedConfig, config: PreTrainedConfig) -> PreTrainedModel:
    if isinstance(name, PreTrainedConfig):
        return auto_class.from_config(config)
    model, info = auto_class.from_pretrained(name, config=config, output_loading_info=True, trust_remote_code=False)
    check_complete(name, info["missing_keys"])
    check_finite(name, dict(model.named_parameters()))
    return model
