"""AKI: an encoder and a connector a modality, a language model, and a visibility rule over them."""

from __future__ import annotations

from collections.abc import Collection
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

from aki.attention import Rule, get_rule, prepare_attention
from aki.attention.backends import takes_prepared
from aki.layout import IGNORE_INDEX, IMAGE, VIDEO, SequenceLayout, build_layout
from aki.models.blanks import with_blanks
from aki.models.checks import (
    check_count,
    check_rule_inputs,
    check_size,
    check_takes_one_input,
)
from aki.models.configuration import AkiConfig
from aki.models.connectors import PerceiverResampler, build_connector, computation_dtype
from aki.models.explain import AkiExplainMixin
from aki.models.features import FeatureCache
from aki.models.generation import AkiGenerationMixin
from aki.models.loading import check_before, check_loaded
from aki.models.media import Media
from aki.models.weights import check_complete, check_finite


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


class AkiForConditionalGeneration(AkiPreTrainedModel, AkiGenerationMixin, AkiExplainMixin):
    """A decoder-only language model that reads images, and videos and audio if configured, by its attention rule."""

    def __init__(self, config: AkiConfig):
        super().__init__(config)
        self.encoder_dtype: torch.dtype | None = None
        self.feature_cache: FeatureCache | None = None
        for media in config.media.values():
            encoder = _encoder_of(AutoModel.from_config(media.encoder_config))
            check_takes_one_input(encoder)
            self.add_module(media.encoder, encoder)
            self.add_module(media.connector, _connector_of(media, config))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.output_bias:
            _add_output_bias(self.language_model)
        self.post_init()
        # A placeholder stands for what comes in; it is never an answer.
        self.generation_config.suppress_tokens = [media.token_id for media in config.media.values()]

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
            ValueError: the checkpoint is another model's, or its weights are not those of its config.json, or broken.
        """
        check_before(cls, pretrained_model_name_or_path, kwargs)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            **kwargs,
        )
        check_loaded(pretrained_model_name_or_path, model, info)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_backbones(
        cls,
        vision_encoder: str,
        language_model: str,
        *,
        image_token_id: int,
        vocab_size: int | None = None,
        video_encoder: str | None = None,
        audio_encoder: str | None = None,
        dtype: torch.dtype | None = None,
        **config,
    ) -> AkiForConditionalGeneration:
        """Join pretrained encoders and a pretrained language model through new connectors.

        All of it takes one dtype, by default that of the language model's checkpoint.

        Args:
            vision_encoder: hub id or folder of the encoder.
            language_model: hub id or folder of the language model.
            image_token_id: id of the placeholder, `len(tokenizer) - 1` after adding it as the last token.
            vocab_size: `len(tokenizer)` after adding tokens; the embeddings grow to it.
            video_encoder: hub id or folder of an encoder of frames; goes with `video_token_id`.
            audio_encoder: hub id or folder of an audio encoder; goes with `audio_token_id`.
            dtype: of all weights; a wider one than their checkpoints' loses nothing.
            config: further fields of `AkiConfig`.

        Raises:
            ValueError: a checkpoint lacks weights, or the encoder wants more than pixels.
        """
        named = {"vision": vision_encoder, "video": video_encoder, "audio": audio_encoder}
        encoders = {kind: name for kind, name in named.items() if name is not None}
        joined = AkiConfig(
            **{f"{kind}_config": AutoConfig.from_pretrained(name) for kind, name in encoders.items()},
            text_config=AutoConfig.from_pretrained(language_model),
            image_token_id=image_token_id,
            **config,
        )
        with torch.device("meta"):
            model = cls(joined)
        for kind, name in encoders.items():
            encoder = _encoder_of(_load_backbone(AutoModel, name, getattr(joined, f"{kind}_config")))
            # from_pretrained copies the configuration that it is given.
            setattr(joined, f"{kind}_config", encoder.config)
            model.add_module(f"{kind}_encoder", encoder)
        model.language_model = _load_backbone(AutoModelForCausalLM, language_model, joined.text_config)
        joined.text_config = model.language_model.config
        if joined.output_bias:
            _add_output_bias(model.language_model)
        if vocab_size is not None and vocab_size > joined.text_config.vocab_size:
            model.resize_token_embeddings(vocab_size)
        for media in joined.media.values():
            model.add_module(media.connector, _connector_of(media, joined).apply(model._init_weights))
        return model.to(dtype or model.language_model.dtype)

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
        return self._media_features("pixel_values", pixel_values)

    def _media_features(self, name: str, values: Tensor) -> Tensor:
        """Embeddings of one kind of media: (items, embeddings an item, text width)."""
        if name not in self.config.media:
            raise ValueError(
                f"this model has no encoder for {name}: give its AkiConfig a video_config or an audio_config, "
                "with a placeholder."
            )
        media = self.config.media[name]
        check_size(name, media, values)
        if name == "pixel_values" and self.feature_cache is not None:
            features = self.feature_cache(values, self.patch_features)
        else:
            features = self._encode(media, values.flatten(0, 1) if media.modality == VIDEO else values)
        connector = self.get_submodule(media.connector)
        embeds = connector(features.to(computation_dtype(connector, features.dtype)))
        return embeds.unflatten(0, (-1, media.frames)).flatten(1, 2)

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """The vision encoder's features of images, (images, patches, width)."""
        return self._encode(self.config.media["pixel_values"], pixel_values)

    def _encode(self, media: Media, values: Tensor) -> Tensor:
        """An encoder's features, (items, features, width); a frozen encoder runs without gradient."""
        encoder = self.get_submodule(media.encoder)
        learns = any(parameter.requires_grad for parameter in encoder.parameters())
        # It was settled on pictures; where it is, an autocast around the model changes nothing.
        lower = self.encoder_dtype if media.modality == IMAGE else None
        precision = (
            nullcontext()
            if lower is None
            else torch.autocast(values.device.type, lower, enabled=lower != encoder.dtype)
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns), precision:
            features = encoder(values.to(encoder.dtype)).last_hidden_state
        # Class and register tokens come before the patches.
        return features[:, -media.num_features :]

    def layout(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt_block_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_rule: str | None = None,
    ) -> SequenceLayout:
        """What each token of these inputs is; all (batch, length).

        Raises:
            ValueError: the rule needs media on a grid, and theirs is none.
        """
        numbers_tokens = get_rule(attention_rule or self.config.attention_rule).positions is not None
        return build_layout(
            input_ids,
            {media.modality: media.token_id for media in self.config.media.values()},
            {media.modality: media.tokens_per_item for media in self.config.media.values()},
            attention_mask=attention_mask,
            position_ids=position_ids,
            prompt_block_ids=prompt_block_ids,
            labels=labels,
            training=self.training,
            scope_token_ids=self.config.scope_token_ids,
            grids={m.modality: m.grid for m in self.config.media.values()} if numbers_tokens else None,
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
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        **kwargs,
    ) -> AkiOutput:
        """Embed, put the media in place, lay the rule over the mask, decode.

        Args:
            input_ids: (batch, length) int; the placeholder of `config.media` once for every embedding of an item.
            pixel_values: (images of the whole batch in order, channels, height, width) float.
            attention_mask: (batch, cached + length), 0 is padding; or masks already prepared, which are used as is.
            position_ids: (batch, length) int. Absent: counted over the attention mask, so padding may be on any side.
                Without attention_mask, a restart begins a packed document, which sees nothing of the others. A rule
                with positions of its own puts them in place of these, except behind cached tokens, where they are
                taken as they are (`positions_by_rule` gives them).
            past_key_values: what was seen before; it stays causal.
            inputs_embeds: (batch, length, width) instead of input_ids, for text alone.
            labels: (batch, length) int, -100 is not learned. What stands on placeholders is ignored.
            prompt_block_ids: (batch, length) int from the processor, -1 for answers and padding.
            attention_rule: instead of the configuration's, for this call.
            logits_to_keep: only the logits of the last so many positions (0: all), or of these positions.
            pixel_values_videos: (videos, config.video_frames, channels, height, width) float.
            input_features: (audio clips, mel bins, time) float.

        Raises:
            ValueError: media and placeholders do not fit, or the rule cannot be applied.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds.")
        given = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "input_features": input_features,
        }
        media_values = {name: values for name, values in given.items() if values is not None}
        embeds: dict[str, Tensor] = {}
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            shown = with_blanks(self, media_values, past_key_values)
            features = {name: self._media_features(name, values) for name, values in shown.items()}
            embeds = {name: features[name] for name in media_values}
            inputs_embeds = self._put_media(input_ids, inputs_embeds, features, media_values)
            if labels is not None:
                for media in self.config.media.values():
                    labels = labels.masked_fill(input_ids == media.token_id, IGNORE_INDEX)
        elif media_values:
            raise ValueError(f"{next(iter(media_values))} need input_ids, whose placeholders say where they go.")

        rule = get_rule(attention_rule or self.config.attention_rule)
        check_rule_inputs(rule, input_ids, position_ids, past_key_values)
        length = inputs_embeds.shape[1]
        padding = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
        if position_ids is None and padding is not None:
            position_ids = (padding.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is not None and attention_mask is None and past_key_values is None:
            # transformers keeps packed documents apart only where no cache is made.
            kwargs |= {"use_cache": False} if _starts_again(position_ids) else {}

        masks: Tensor | BlockMask | dict | None = attention_mask
        prepared = masks is not None and padding is None
        opens_ahead = rule.name != "causal" and (bool(embeds) or (rule.opens_text and length > 1))
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
                attention_rule=rule.name,
            )
            masks = prepare_attention(
                rule, layout, self.config.text_config, inputs_embeds, padding, past_key_values, position_ids
            )
            position_ids = _positions(rule, layout, past_key_values, position_ids)

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
            image_hidden_states=embeds.get("pixel_values"),
        )

    def _put_media(
        self, input_ids: Tensor, inputs_embeds: Tensor, embeds: dict[str, Tensor], given: Collection[str]
    ) -> Tensor:
        """What is not given stays in the graph, at no placeholder."""
        for name, media in self.config.media.items():
            placeholders = input_ids == media.token_id
            if name in embeds:
                items, tokens, _ = embeds[name].shape
                check_count(int(placeholders.sum()), items if name in given else 0, tokens, media.name)
                inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], embeds[name].to(inputs_embeds))
            elif self.training or input_ids.shape[1] > 1:
                check_count(int(placeholders.sum()), 0, media.tokens_per_item, media.name)
        return inputs_embeds


def _positions(rule: Rule, layout: SequenceLayout, cache: Cache | None, position_ids: Tensor | None) -> Tensor | None:
    """The rule's own positions where it has some; behind cached tokens they are counted over those too, elsewhere."""
    if rule.positions is None or (cache is not None and int(cache.get_seq_length()) > 0):
        return position_ids
    return rule.positions(layout)


def _starts_again(position_ids: Tensor) -> bool:
    """Whether rows hold several documents."""
    return bool((torch.diff(position_ids) != 1).any())


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or its encoder where a decoder comes with it, as Whisper's."""
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _connector_of(media: Media, config: AkiConfig) -> nn.Module:
    return build_connector(media.connector_config, media.encoder_config.hidden_size, config.text_config.hidden_size)


def _load_backbone(auto_class: Any, name: str, config: PreTrainedConfig) -> PreTrainedModel:
    model, info = auto_class.from_pretrained(name, config=config, output_loading_info=True)
    check_complete(name, info["missing_keys"])
    check_finite(name, dict(model.named_parameters()))
    return model


def _add_output_bias(language_model: PreTrainedModel) -> None:
    head = language_model.get_output_embeddings()
    head.bias = nn.Parameter(head.weight.new_zeros(head.out_features))
