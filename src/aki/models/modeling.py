"""AKI: an encoder and a connector a modality, a language model, and a visibility rule over them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from aki.attention import get_rule
from aki.attention.backends import settle
from aki.compat import CACHE, CACHE_NAMES
from aki.layout import IGNORE_INDEX, SequenceLayout, build_layout
from aki.models.backbones import join_backbones
from aki.models.blanks import with_blanks
from aki.models.checks import check_behind_cache
from aki.models.configuration import AkiConfig
from aki.models.connectors import Connector, connector_of
from aki.models.decoder_inputs import beyond_causal, blocks_of_call, decoder_inputs, identify, needs_layout, padding_of
from aki.models.encoding import AkiEncodingMixin, encode_media, encoder_of, put_media
from aki.models.explain import AkiExplainMixin
from aki.models.features import FeatureCache
from aki.models.generation import AkiGenerationMixin
from aki.models.heads import new_head, scale_logits
from aki.models.loading import check_before, check_loaded
from aki.models.outputs import AkiModelOutput, AkiOutput
from aki.models.remote import ImportedCode


class AkiPreTrainedModel(ImportedCode, PreTrainedModel):
    config: AkiConfig
    config_class = AkiConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Connector):
            module.initialise()

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As transformers'; a connector attends in its own way, and only takes note, without a warning."""
        connectors = {f"{m.connector}_config": m.connector_config for m in self.config.media.values()}
        before = {name: connector._attn_implementation for name, connector in connectors.items()}
        noted = (
            attn_implementation if isinstance(attn_implementation, dict) else dict.fromkeys(before, attn_implementation)
        )
        for name, connector in connectors.items():
            connector._attn_implementation_internal = noted.get(name, before[name])
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        except ValueError:
            for name, connector in connectors.items():
                connector._attn_implementation_internal = before[name]
            raise
        settle(self.base_model.language_model)

    def push_to_hub(self, repo_id: str, **options) -> str:
        """As transformers', with a card of what is known of the model."""
        from aki.models.publishing import push  # it knows of all models, this one among them

        return push(self, repo_id, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.language_model.set_input_embeddings(value)

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
        media = self.config.media.values()
        return build_layout(
            input_ids,
            {m.modality: m.token_id for m in media},
            {m.modality: m.tokens_per_item for m in media},
            attention_mask=attention_mask,
            position_ids=position_ids,
            prompt_block_ids=prompt_block_ids,
            labels=labels,
            training=self.training,
            scope_token_ids=self.config.scope_token_ids,
            grids={m.modality: m.grid for m in media} if numbers_tokens else None,
        )


class AkiModel(AkiPreTrainedModel, AkiEncodingMixin):
    """Encoders, connectors and a bare decoder that reads what they give by the attention rule.

    Attributes:
        encoder_dtype: in which the vision encoder computes; None is its own.
        feature_cache: where a frozen vision encoder's features lie on disk.
    """

    def __init__(self, config: AkiConfig):
        super().__init__(config)
        self.encoder_dtype: torch.dtype | None = None
        self.feature_cache: FeatureCache | None = None
        for media in config.media.values():
            self.add_module(media.encoder, encoder_of(AutoModel.from_config(media.encoder_config)))
            self.add_module(media.connector, connector_of(media, config))
        self.language_model = AutoModel.from_config(config.text_config)
        settle(self.language_model)
        self.post_init()

    def train(self, mode: bool = True) -> AkiModel:
        """As PyTorch's; a frozen encoder drops nothing out and counts no statistics of the batches."""
        super().train(mode)
        for media in self.config.media.values():
            encoder = self.get_submodule(media.encoder)
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_block_ids: Tensor | None = None,
        attention_rule: str | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        past_key_values: Cache | None = None,
        layout: SequenceLayout | None = None,
        **kwargs,
    ) -> AkiModelOutput:
        """Embed, encode, put in place, ask the rule, decode.

        Args:
            input_ids: (batch, length) int; the placeholder of `config.media` once for every embedding of an item.
            pixel_values: (images of the whole batch in order, channels, height, width) float.
            attention_mask: (batch, cached + length), 0 is padding; or masks already prepared, which are used as is.
            position_ids: (batch, length) int. Absent: counted over the attention mask, so padding may be on any side.
                Without attention_mask, a restart begins a packed document, which sees nothing of the others. A rule
                with positions of its own puts them in place of these, except behind cached tokens, where they are
                taken as they are (`positions_by_rule` gives them).
            cache: what was seen before; it stays causal.
            inputs_embeds: (batch, length, width) instead of input_ids; what is a placeholder is found by its embedding.
            labels: (batch, length) int; where there are no prompt_block_ids, what is -100 is prompt.
            prompt_block_ids: (batch, length) int from the processor, -1 for answers and padding; behind cached tokens
                theirs may stand before them, and a rule that opens text needs that.
            attention_rule: instead of the configuration's, for this call.
            pixel_values_videos: (videos, config.video_frames, channels, height, width) float.
            input_features: (audio clips, mel bins, time) float.
            past_key_values: what `cache` is called before transformers 5.24.
            layout: what these tokens are, where it was found beforehand. On the CPU, nothing has to be read off a GPU.

        Raises:
            ValueError: media and placeholders do not fit, or the rule cannot be applied.
        """
        if input_ids is not None and inputs_embeds is None:
            found, inputs_embeds = input_ids, self.get_input_embeddings()(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            found = self.named_tokens(inputs_embeds)
        else:
            raise ValueError("pass either input_ids or inputs_embeds.")
        cache = past_key_values if cache is None else cache
        given = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "input_features": input_features,
        }
        shown = with_blanks(self, {name: values for name, values in given.items() if values is not None}, cache)
        features = {name: encode_media(self, name, values).pooler_output for name, values in shown.items()}
        embeds = {name: values for name, values in features.items() if given[name] is not None}
        counted = input_ids is not None
        inputs_embeds = put_media(self, found, inputs_embeds, features, set(embeds), counted, layout)

        rule, length = get_rule(attention_rule or self.config.attention_rule), inputs_embeds.shape[1]
        text_config, padding = self.config.text_config, padding_of(attention_mask)
        check_behind_cache(rule, length, position_ids, prompt_block_ids, cache)
        if layout is None and needs_layout(rule, text_config, bool(embeds), length, cache):
            beyond = beyond_causal(rule, bool(embeds), length)
            layout = self.layout(
                found,
                attention_mask=None if padding is None else padding[:, -length:],
                position_ids=position_ids if cache is None else None,
                # Prompt blocks only matter where the rule is more than causal.
                prompt_block_ids=blocks_of_call(prompt_block_ids, length, cache, input_ids)
                if beyond
                else torch.full_like(found, -1),
                labels=labels,
                attention_rule=rule.name,
            )
        asked = decoder_inputs(rule, layout, text_config, inputs_embeds, attention_mask, position_ids, cache)
        outputs = self.language_model(**kwargs | asked, return_dict=True)
        return AkiModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=embeds.get("pixel_values"),
            **{CACHE: getattr(outputs, CACHE)},
        )

    def named_tokens(self, inputs_embeds: Tensor) -> Tensor:
        """Ids of those tokens that the configuration names, found by their embeddings; -1 for all others."""
        named = [media.token_id for media in self.config.media.values()] + (self.config.scope_token_ids or [])
        return identify(inputs_embeds, self.get_input_embeddings(), named)


class AkiForConditionalGeneration(AkiPreTrainedModel, AkiEncodingMixin, AkiGenerationMixin, AkiExplainMixin):
    """A decoder-only language model that reads images, and videos and audio if configured, by its attention rule."""

    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: AkiConfig):
        super().__init__(config)
        self.model = AkiModel(config)
        self.lm_head: nn.Module = new_head(config.text_config, config.output_bias)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
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
        vision_encoder: str | PreTrainedConfig,
        language_model: str | PreTrainedConfig,
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
            vision_encoder: hub id or folder of the encoder, or the configuration of a new one.
            language_model: hub id or folder of the language model, or the configuration of a new one.
            image_token_id: id of the placeholder, `len(tokenizer) - 1` after adding it as the last token.
            vocab_size: `len(tokenizer)` after adding tokens; the embeddings grow to it.
            video_encoder: hub id or folder of an encoder of frames; goes with `video_token_id`.
            audio_encoder: hub id or folder of an audio encoder; goes with `audio_token_id`.
            dtype: of all weights; a wider one than their checkpoints' loses nothing.
            config: further fields of `AkiConfig`.

        Raises:
            ValueError: a checkpoint lacks weights, the encoder wants more than pixels, or the language model makes of
                its output layer's values what AKI does not know.
        """
        named = {"vision": vision_encoder, "video": video_encoder, "audio": audio_encoder}
        encoders = {kind: name for kind, name in named.items() if name is not None}
        config["image_token_id"] = image_token_id
        return join_backbones(cls, language_model, encoders, vocab_size, dtype, **config)

    @property
    def parts(self) -> dict[str, nn.ModuleList]:
        """What is trained or frozen together: encoders, connectors, and the language model with its output layer."""
        found = {name: nn.ModuleList([module]) for name, module in self.model.named_children()}
        found["language_model"].append(self.lm_head)
        return found

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_block_ids: Tensor | None = None,
        attention_rule: str | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> AkiOutput:
        """The backbone (see `AkiModel.forward`), the output layer, and the loss.

        Args:
            labels: (batch, length) int, -100 is not learned. What stands on placeholders is ignored.
            logits_to_keep: only the logits of the last so many positions (0: all), or of these positions.
            shift_labels: (batch, length) int, what each position predicts, instead of labels moved by one, as context
                and sequence parallelism hand them over.
            num_items_in_batch: labels over which the loss is the mean; absent: those of this call.

        Raises:
            ValueError: media and placeholders do not fit, or the rule cannot be applied.
        """
        # Not a parameter by name: a Trainer would look for it among the labels of every batch.
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is None and shift_labels is not None:
            labels = nn.functional.pad(shift_labels[:, :-1], (1, 0), value=IGNORE_INDEX)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            prompt_block_ids=prompt_block_ids,
            attention_rule=attention_rule,
            pixel_values_videos=pixel_values_videos,
            input_features=input_features,
            **kwargs | {"return_dict": True},
        )
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        logits = scale_logits(self.lm_head(outputs.last_hidden_state[:, kept]), self.config.text_config)
        loss = None
        if labels is not None:
            targets = self._targets(input_ids, labels, shift_labels)[:, kept]
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=targets.contiguous(),
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        return AkiOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _targets(self, input_ids: Tensor | None, labels: Tensor, shift_labels: Tensor | None) -> Tensor:
        """What each position predicts, which is never a placeholder: (batch, length)."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        for media in self.config.media.values():
            never = shift_labels == media.token_id
            if input_ids is not None:
                never = never | nn.functional.pad(input_ids[:, 1:] == media.token_id, (0, 1))
            shift_labels = shift_labels.masked_fill(never, IGNORE_INDEX)
        return shift_labels
