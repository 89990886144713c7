"""AKI: vision encoder, connector, language model, and a visibility rule over them."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from aki.attention import get_rule, prepare_attention
from aki.attention.backends import takes_prepared
from aki.layout import IGNORE_INDEX, IMAGE, SequenceLayout, build_layout
from aki.models.configuration import AkiConfig
from aki.models.connectors import PerceiverResampler, build_connector
from aki.models.features import FeatureCache
from aki.models.generation import AkiGenerationMixin


@dataclass
class AkiOutput(CausalLMOutputWithPast):
    """Output of the language model, and what it was shown of the images.

    Attributes:
        image_hidden_states: (images, embeddings an image, text width).
    """

    image_hidden_states: Tensor | None = None


class AkiPreTrainedModel(PreTrainedModel):
    config: AkiConfig
    config_class = AkiConfig
    base_model_prefix = "language_model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents, mean=0.0, std=1.0)


class AkiForConditionalGeneration(AkiPreTrainedModel, AkiGenerationMixin):
    """A decoder-only language model that reads images, with the attention rule of its configuration."""

    def __init__(self, config: AkiConfig):
        super().__init__(config)
        self.encoder_dtype: torch.dtype | None = None
        self.feature_cache: FeatureCache | None = None
        self.vision_encoder = AutoModel.from_config(config.vision_config)
        _check_takes_images_only(self.vision_encoder)
        self.connector = build_connector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.output_bias:
            _add_output_bias(self.language_model)
        self.post_init()
        # A placeholder stands for a picture that comes in; it is never an answer.
        self.generation_config.suppress_tokens = [config.image_token_id]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        use_safetensors: bool = True,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As transformers' `from_pretrained`, which would make up missing weights at random, and load pickles.

        Raises:
            ValueError: the checkpoint is another model's, or lacks weights.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            **kwargs,
        )
        _check_complete(pretrained_model_name_or_path, info["missing_keys"])
        return (model, info) if output_loading_info else model

    @classmethod
    def from_backbones(
        cls, vision_encoder: str, language_model: str, *, image_token_id: int, vocab_size: int | None = None, **config
    ) -> AkiForConditionalGeneration:
        """Join a pretrained vision encoder and a pretrained language model through a new connector.

        All of it takes the dtype of the language model's checkpoint.

        Args:
            vision_encoder: hub id or folder of the encoder.
            language_model: hub id or folder of the language model.
            image_token_id: id of the placeholder, `len(tokenizer) - 1` after adding it as the last token.
            vocab_size: `len(tokenizer)` after adding tokens; the embeddings grow to it.
            config: further fields of `AkiConfig`.

        Raises:
            ValueError: a checkpoint lacks weights, or the encoder wants more than pixels.
        """
        joined = AkiConfig(
            vision_config=AutoConfig.from_pretrained(vision_encoder),
            text_config=AutoConfig.from_pretrained(language_model),
            image_token_id=image_token_id,
            **config,
        )
        with torch.device("meta"):
            model = cls(joined)
        model.vision_encoder = _load_backbone(AutoModel, vision_encoder, joined.vision_config)
        model.language_model = _load_backbone(AutoModelForCausalLM, language_model, joined.text_config)
        # from_pretrained copies the configuration that it is given.
        joined.vision_config, joined.text_config = model.vision_encoder.config, model.language_model.config
        if joined.output_bias:
            _add_output_bias(model.language_model)
        if vocab_size is not None and vocab_size > joined.text_config.vocab_size:
            model.resize_token_embeddings(vocab_size)
        model.connector = build_connector(joined).apply(model._init_weights)
        return model.to(model.language_model.dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            pixel_values: (images, channels, height, width).

        Returns:
            (images, embeddings an image, text width).

        Raises:
            ValueError: the images are not of the encoder's size.
        """
        size, expected = tuple(pixel_values.shape[-2:]), self.config.image_size
        if size != expected:
            raise ValueError(
                f"pixel_values are {size[0]} x {size[1]}, the vision encoder takes {expected[0]} x {expected[1]}: "
                "give the image processor that size."
            )
        cache = self.feature_cache
        features = self.patch_features(pixel_values) if cache is None else cache(pixel_values, self.patch_features)
        return self.connector(features.to(next(self.connector.parameters()).dtype))

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """The vision encoder's features, (images, patches, width); a frozen encoder runs without gradient."""
        encoder = self.vision_encoder
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        lower = self.encoder_dtype
        precision = torch.autocast(pixel_values.device.type, lower) if lower is not None else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns), precision:
            features = encoder(pixel_values.to(encoder.dtype)).last_hidden_state
        # Class and register tokens come before the patches.
        return features[:, -self.config.num_patches :]

    def layout(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_block_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceLayout:
        """What each token of these inputs is; all (batch, length)."""
        return build_layout(
            input_ids,
            {IMAGE: self.config.image_token_id},
            self.config.image_seq_length,
            attention_mask=attention_mask,
            position_ids=position_ids,
            prompt_block_ids=prompt_block_ids,
            labels=labels,
            training=self.training,
            scope_token_ids=self.config.scope_token_ids,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_block_ids: Tensor | None = None,
        attention_rule: str | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> AkiOutput:
        """Embed, put the images in place, lay the rule over the mask, decode.

        Args:
            input_ids: (batch, length) int; `config.image_token_id` once for every embedding of an image.
            pixel_values: (images of the whole batch in order, channels, height, width) float.
            attention_mask: (batch, cached + length), 0 is padding; or masks already prepared, which are used as is.
            position_ids: (batch, length) int. Absent: counted over the attention mask, so padding may be on any side.
                Without attention_mask, a restart begins a packed document, which sees nothing of the others.
            past_key_values: what was seen before; it stays causal.
            inputs_embeds: (batch, length, width) instead of input_ids, for text alone.
            labels: (batch, length) int, -100 is not learned. What stands on image placeholders is ignored.
            prompt_block_ids: (batch, length) int from the processor, -1 for answers and padding.
            attention_rule: instead of the configuration's, for this call.
            logits_to_keep: only the logits of the last so many positions (0: all), or of these positions.

        Raises:
            ValueError: images and placeholders do not fit, or the rule cannot be applied.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds.")
        image_embeds = None
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                image_embeds = self.get_image_features(pixel_values)
            inputs_embeds = self._put_images(input_ids, inputs_embeds, image_embeds)
            if labels is not None:
                labels = labels.masked_fill(input_ids == self.config.image_token_id, IGNORE_INDEX)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids, whose placeholders say where the images go.")

        length = inputs_embeds.shape[1]
        padding = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        if position_ids is None and padding is not None:
            position_ids = (padding.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is not None and attention_mask is None and past_key_values is None:
            # transformers keeps packed documents apart only where no cache is made.
            kwargs |= {"use_cache": False} if _starts_again(position_ids) else {}

        rule = get_rule(attention_rule or self.config.attention_rule)
        masks: Tensor | BlockMask | dict | None = attention_mask
        prepared = masks is not None and padding is None
        opens_ahead = rule.name != "causal" and image_embeds is not None
        without_mask = takes_prepared(self.config.text_config, past_key_values)
        if input_ids is not None and (opens_ahead or without_mask) and not prepared:
            # Prompt blocks only matter where something can be opened.
            nowhere = None if opens_ahead else torch.full_like(input_ids, -1)
            layout = self.layout(
                input_ids,
                attention_mask=None if padding is None else padding[:, -length:],
                position_ids=position_ids if past_key_values is None else None,
                prompt_block_ids=prompt_block_ids if nowhere is None else nowhere,
                labels=labels,
            )
            masks = prepare_attention(
                rule, layout, self.config.text_config, inputs_embeds, padding, past_key_values, position_ids
            )

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        loss = None
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
            loss = self.loss_function(
                logits=outputs.logits,
                labels=labels,
                shift_labels=targets[:, kept].contiguous(),
                vocab_size=outputs.logits.shape[-1],
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return AkiOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_embeds,
        )

    def _put_images(self, input_ids: Tensor, inputs_embeds: Tensor, image_embeds: Tensor | None) -> Tensor:
        placeholders = input_ids == self.config.image_token_id
        if image_embeds is None:
            if self.training or input_ids.shape[1] > 1:
                _check_count(int(placeholders.sum()), 0, self.config.image_seq_length)
            return inputs_embeds
        _check_count(int(placeholders.sum()), image_embeds.shape[0], self.config.image_seq_length)
        return inputs_embeds.masked_scatter(placeholders[..., None], image_embeds.to(inputs_embeds))


def _starts_again(position_ids: Tensor) -> bool:
    """Whether rows hold several documents."""
    return bool((torch.diff(position_ids) != 1).any())


def _check_count(placeholders: int, images: int, tokens_per_image: int) -> None:
    if placeholders != images * tokens_per_image:
        raise ValueError(
            f"{images} image(s) need {images * tokens_per_image} placeholders in input_ids ({tokens_per_image} an "
            f"image), found {placeholders}: pass the images that the prompt names, and let the processor write the "
            "placeholders."
        )


def _check_complete(name: str, missing: set[str]) -> None:
    if missing:
        shown = ", ".join(sorted(missing)[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ValueError(
            f"the checkpoint {name} lacks {len(missing)} of the weights that its config.json describes, which would be "
            f"left random: {shown}."
        )


def _load_backbone(auto_class: Any, name: str, config: PreTrainedConfig) -> PreTrainedModel:
    model, info = auto_class.from_pretrained(name, config=config, output_loading_info=True)
    _check_complete(name, info["missing_keys"])
    return model


def _add_output_bias(language_model: PreTrainedModel) -> None:
    head = language_model.get_output_embeddings()
    head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))


def _check_takes_images_only(encoder: PreTrainedModel) -> None:
    required = [
        name
        for name, parameter in inspect.signature(encoder.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name != "pixel_values"
    ]
    if required:
        raise ValueError(
            f"the vision encoder {encoder.config.model_type!r} wants more than pixel_values ({', '.join(required)}): "
            "AKI takes fixed-resolution encoders (SigLIP, SigLIP 2 fixed, CLIP, DINOv2), not NaFlex ones."
        )
