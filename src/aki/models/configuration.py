"""AkiConfig: a vision encoder, a connector, a language model, and the rule that says which token sees which."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from aki.attention.rules import get_rule


@strict
class AkiConnectorConfig(PreTrainedConfig):
    """How image features become embeddings of the language model.

    Attributes:
        connector: `perceiver_resampler` (the paper's) or `mlp` (LLaVA's two layers, one embedding a patch).
        num_latents: embeddings an image, for the resampler. depth, num_heads, head_dim, ff_mult: its sizes.
    """

    model_type = "aki_connector"

    connector: str = "perceiver_resampler"
    num_latents: int = 144
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4


@strict
class AkiConfig(PreTrainedConfig):
    """Configuration of `AkiForConditionalGeneration`.

    Attributes:
        vision_config: any encoder that AutoModel builds and that yields one feature a patch of a fixed-size image.
        text_config: any decoder-only language model that AutoModelForCausalLM builds.
        connector_config: see `AkiConnectorConfig`.
        image_token_id: the placeholder in input_ids, one for every embedding of an image.
        scope_token_ids: the tokens that open and close a scope, for the rule `mma_scoped`.
        attention_rule: which token may see which, a name in `aki.attention.RULES`; read at each call.
        output_bias: whether the output layer has a bias, as the published checkpoint does.
    """

    model_type = "aki"
    sub_configs_defaults: ClassVar = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="phi3"),
        "connector_config": AkiConnectorConfig,
    }
    # Those to which transformers hands an attention implementation; the connector is no transformers model.
    sub_configs: ClassVar = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None
    text_config: Any = None
    connector_config: Any = None
    image_token_id: int = 0
    scope_token_ids: list[int] | None = None
    attention_rule: str = "mma"
    output_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        get_rule(self.attention_rule)
        # A contrastive checkpoint (CLIP, SigLIP) names both towers; the picture's is the one wanted.
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As transformers', which only warns where the configuration is another model's and takes the defaults instead.

        Raises:
            ValueError: the configuration is not an AKI one.
        """
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = found.get("model_type")
        if kind != cls.model_type:
            what = f"a model of type {kind!r}" if kind else "a model of no named type"
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {what}, not an AKI model. "
                "AkiForConditionalGeneration.from_backbones makes one from a vision encoder and a language model, "
                "aki.models.published.load_published reads the published checkpoint."
            )
        return found, kwargs

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the vision encoder takes.

        Raises:
            ValueError: the encoder has no fixed size.
        """
        size = getattr(self.vision_config, "image_size", None)
        if size is None:
            raise ValueError(
                f"the vision encoder {self.vision_config.model_type!r} has no fixed image_size (NaFlex encoders take "
                "pictures of any size, which AKI does not): use a fixed-resolution checkpoint, for instance "
                "google/siglip2-so400m-patch14-384."
            )
        return _pair(size)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        (height, width), (patch_height, patch_width) = self.image_size, _pair(self.vision_config.patch_size)
        return (height // patch_height) * (width // patch_width)

    @property
    def image_seq_length(self) -> int:
        """Embeddings, and so placeholders, of one image."""
        if self.connector_config.connector == "perceiver_resampler":
            return self.connector_config.num_latents
        return self.num_patches


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
