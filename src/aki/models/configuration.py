"""AkiConfig: encoders, connectors, a language model, and the rule that says which token sees which."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from aki.attention.rules import get_rule
from aki.compat import CACHE_NAMES
from aki.layout import AUDIO, IMAGE, VIDEO
from aki.models.connectors import CONNECTORS
from aki.models.media import Media
from aki.models.remote import SavedWithLoader
from aki.models.weights import check_depth


@strict
class AkiConnectorConfig(PreTrainedConfig):
    """How an encoder's features become embeddings of the language model.

    Attributes:
        connector: a key of `aki.models.connectors.CONNECTORS`, which may have sizes of its own: `perceiver_resampler`
            (the paper's), `mlp` (LLaVA's two layers, one embedding a feature) or `pooled_mlp` (means over a square of
            places).
        num_latents: embeddings an image, a frame or an audio clip, for the resampler and `pooled_mlp`.
        depth, num_heads, head_dim, ff_mult: its sizes.
    """

    model_type = "aki_connector"

    connector: str = "perceiver_resampler"
    num_latents: int = 144
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4

    def __post_init__(self, **kwargs):
        own = CONNECTORS[self.connector].SIZES if self.connector in CONNECTORS else {}
        super().__post_init__(**own | kwargs)


@strict
class AkiConfig(SavedWithLoader, PreTrainedConfig):
    """Configuration of `AkiForConditionalGeneration`.

    Videos and audio are configured as images are, by an encoder, a connector and a placeholder each. They are fields of
    their own, not a dict of modalities, because transformers finds encoders by the names of such fields when it saves,
    loads and sets attention implementations. Without them the model takes images alone.

    Attributes:
        vision_config: any encoder that AutoModel builds and that yields one feature a patch of a fixed-size image.
        text_config: any decoder-only language model that AutoModelForCausalLM builds.
        connector_config: see `AkiConnectorConfig`.
        image_token_id: the placeholder in input_ids, one for every embedding of an image.
        video_config: an encoder as for images, which takes each frame alone; video_connector_config, video_token_id.
        video_frames: frames a video. The connector gives each its embeddings, in order, so that order is not lost.
        audio_config: an encoder of (items, mel bins, time) of a fixed length, as Whisper's or Voxtral's (of an
            encoder-decoder the encoder is taken); audio_connector_config, audio_token_id.
        scope_token_ids: the tokens that open and close a scope, for the rule `mma_scoped`.
        attention_rule: which token may see which, a name in `aki.attention.RULES`; read at each call.
        output_bias: whether the output layer has a bias, as the published checkpoint does.
    """

    model_type = "aki"
    # What evaluation does not gather, from all processes and for the whole set.
    keys_to_ignore_at_inference: ClassVar = [*CACHE_NAMES, "image_hidden_states"]
    sub_configs: ClassVar = {
        **dict.fromkeys(("vision_config", "text_config", "video_config", "audio_config"), AutoConfig),
        **dict.fromkeys(("connector_config", "video_connector_config", "audio_connector_config"), AkiConnectorConfig),
    }

    vision_config: Any = None
    text_config: Any = None
    connector_config: Any = None
    image_token_id: int = 0
    video_config: Any = None
    video_connector_config: Any = None
    video_token_id: int | None = None
    video_frames: int = 8
    audio_config: Any = None
    audio_connector_config: Any = None
    audio_token_id: int | None = None
    scope_token_ids: list[int] | None = None
    attention_rule: str = "mma"
    output_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _model_config(self.vision_config or {}, "siglip_vision_model")
        self.text_config = _model_config(self.text_config or {}, "phi3")
        self.video_config = _model_config(self.video_config, "siglip_vision_model")
        self.audio_config = _model_config(self.audio_config, "whisper")
        for name in ("connector_config", "video_connector_config", "audio_connector_config"):
            if isinstance(given := getattr(self, name), dict):
                setattr(self, name, AkiConnectorConfig(**given))
        self.connector_config = self.connector_config or AkiConnectorConfig()
        super().__post_init__(**kwargs)
        get_rule(self.attention_rule)
        # A contrastive checkpoint (CLIP, SigLIP) names both towers; the picture's is the one wanted.
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        self.video_config = getattr(self.video_config, "vision_config", self.video_config)
        if self.video_config is not None:
            self.video_connector_config = self.video_connector_config or AkiConnectorConfig()
        if self.audio_config is not None:
            self.audio_connector_config = self.audio_connector_config or AkiConnectorConfig()
        token_ids = [media.token_id for media in self.media.values()]
        if None in token_ids or len(set(token_ids)) < len(token_ids):
            raise ValueError(
                f"image_token_id, video_token_id and audio_token_id are {token_ids} (of those that have an encoder): "
                "each needs a token of its own."
            )
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As transformers', which only warns where the configuration is another model's and takes the defaults instead.

        Raises:
            ValueError: the configuration is not an AKI one, or asks for more layers than any model has.
        """
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = found.get("model_type")
        if kind != cls.model_type:
            what = f"a model of type {kind!r}" if kind else "a model of no named type"
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {what}, not an AKI model. "
                "AkiForConditionalGeneration.from_backbones makes one from a vision encoder and a language model, "
                "`aki convert` makes one from the published checkpoint."
            )
        check_depth(found, pretrained_model_name_or_path)
        return found, kwargs

    @property
    def media(self) -> dict[str, Media]:
        """The kinds of media that the model takes, by the names of their inputs to forward."""
        image: Any = (self.vision_config, self.connector_config, self.image_token_id)
        found = {"pixel_values": Media(IMAGE, "image", "vision_encoder", "connector", *image)}
        if self.video_config is not None:
            video: Any = (self.video_config, self.video_connector_config, self.video_token_id, self.video_frames)
            found["pixel_values_videos"] = Media(VIDEO, "video", "video_encoder", "video_connector", *video)
        if self.audio_config is not None:
            audio: Any = (self.audio_config, self.audio_connector_config, self.audio_token_id)
            found["input_features"] = Media(AUDIO, "audio clip", "audio_encoder", "audio_connector", *audio)
        return found

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the vision encoder takes.

        Raises:
            ValueError: the encoder has no fixed size.
        """
        return self.media["pixel_values"].image_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.media["pixel_values"].num_features

    @property
    def image_seq_length(self) -> int:
        """Embeddings, and so placeholders, of one image."""
        return self.media["pixel_values"].tokens_per_item


def _model_config(given: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig | None:
    """An encoder's or a language model's configuration from what config.json holds of it."""
    if given is None or isinstance(given, PreTrainedConfig):
        return given
    if not isinstance(given, dict):
        raise TypeError(
            f"{given!r} is no configuration of an encoder or a language model: give what AutoConfig.from_pretrained "
            "returns, or a dict."
        )
    return AutoConfig.for_model(**{"model_type": default_type} | given)
