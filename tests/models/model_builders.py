"""Tiny models of every kind, and an account of who sees whom that shares no line with the package."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    ResNetConfig,
    SiglipConfig,
    SiglipVisionConfig,
)

from aki import AkiConfig, AkiForConditionalGeneration

PAD, EOS, IMAGE, VOCAB = 0, 1, 2, 64
PIXELS, PATCH, PER_IMAGE, WINDOW = 16, 8, 3, 6

_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT = _ENCODER | {"image_size": PIXELS, "patch_size": PATCH}
_SIGLIP = _VIT | {"intermediate_size": 24}
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
_WITH_HEAD_DIM = _DECODER | {"head_dim": 8}

VISION = {
    "siglip": lambda: SiglipVisionConfig(**_SIGLIP),
    "siglip (both towers)": lambda: SiglipConfig(vision_config=_SIGLIP, text_config=_ENCODER),
    "clip": lambda: CLIPVisionConfig(**_SIGLIP),
    "clip (both towers)": lambda: CLIPConfig(vision_config=_SIGLIP, text_config=_ENCODER),
    "dinov2": lambda: Dinov2Config(**_VIT),
    "dinov2 with registers": lambda: Dinov2WithRegistersConfig(**_VIT, num_register_tokens=2),
    "resnet": lambda: ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        # What a convolutional network's configuration does not say by itself.
        **{"image_size": PIXELS, "patch_size": PATCH, "hidden_size": 16},
    ),
}
"""SigLIP 2's fixed-resolution checkpoints are SigLIP models, config.json says "siglip"."""

TOKENS_BEFORE_PATCHES = {"clip": 1, "clip (both towers)": 1, "dinov2": 1, "dinov2 with registers": 3}

TEXT = {
    "phi3": lambda: Phi3Config(**_DECODER),
    "llama": lambda: LlamaConfig(**_DECODER),
    "qwen2": lambda: Qwen2Config(**_DECODER),
    "qwen3": lambda: Qwen3Config(**_WITH_HEAD_DIM),
    "gemma2": lambda: Gemma2Config(**_WITH_HEAD_DIM, sliding_window=WINDOW, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(
        **_WITH_HEAD_DIM, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    # With learned positions, for which padding on the left must not count.
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4, pad_token_id=PAD, eos_token_id=EOS
    ),
    "mistral with a window": lambda: MistralConfig(**_DECODER, sliding_window=WINDOW),
    "phi3 with a window": lambda: Phi3Config(**_DECODER, sliding_window=WINDOW),
    "qwen2 with a window": lambda: Qwen2Config(
        **_DECODER, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
}
WINDOWED = ["gemma2", "gemma3", "mistral with a window", "phi3 with a window", "qwen2 with a window"]

ATTENDING = [(text, how) for text in TEXT for how in ("sdpa", "eager") if (text, how) != ("gemma2", "sdpa")]
"""transformers has no sdpa for Gemma 2, which caps the scores."""


def tiny_model(
    vision: str = "siglip", text: str = "llama", connector: str = "perceiver_resampler", **config: Any
) -> AkiForConditionalGeneration:
    """A model for inference whose weights are large enough for any difference in what is seen to show."""
    torch.manual_seed(0)
    sizes = {"connector": connector, "num_latents": PER_IMAGE, "depth": 2, "num_heads": 2, "head_dim": 4, "ff_mult": 2}
    config = {"image_token_id": IMAGE, "text_config": TEXT[text]()} | config
    model = AkiForConditionalGeneration(AkiConfig(vision_config=VISION[vision](), connector_config=sizes, **config))
    enlarge(model)
    return model.eval()


@torch.no_grad()
def enlarge(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Equal in float32; the logits of these models are of the order of 10."""
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-5)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def tokens(*parts: int | str, per_image: int = PER_IMAGE) -> list[int]:
    """Text tokens as they are, each "image" as its placeholders."""
    return [token for part in parts for token in ([IMAGE] * per_image if part == "image" else [part])]


TOKENIZE = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
"""How a chat becomes the model's inputs."""


def user(*parts) -> dict:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def pad(rows: list[list[int]], value: int, side: str = "right") -> Tensor:
    length = max(map(len, rows))
    filler = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([r + f if side == "right" else f + r for r, f in zip(rows, filler, strict=True)])


def who_sees_whom(ids: Tensor, attention: Tensor, blocks: Tensor, window: int | None = None) -> Tensor:
    """Modality-mutual attention, read off its definition entry by entry: (batch, length, length) bool.

    Within a window the past ends early; what the rule opens ahead is not cut. Padding sees itself, to see something.
    """
    batch, length = ids.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for q in range(length):
            for k in range(length):
                past = k <= q and (window is None or k > q - window)
                media_to_text = ids[b, q] == IMAGE and ids[b, k] != IMAGE
                same_prompt = blocks[b, q] == blocks[b, k] and blocks[b, q] >= 0
                ahead = k > q and media_to_text and same_prompt
                seen[b, q, k] = (attention[b, k] == 1 and (past or ahead)) or k == q
    return seen


def stock_language_model(model: AkiForConditionalGeneration, implementation: str | None = None) -> Any:
    """transformers' own language model with the model's weights."""
    config = copy.deepcopy(model.config.text_config)
    language_model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    language_model.base_model.load_state_dict(model.model.language_model.state_dict())
    language_model.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    return language_model


def stock_logits(
    model: AkiForConditionalGeneration,
    ids: Tensor,
    pixel_values: Tensor | None,
    blocks: Tensor,
    attention: Tensor | None = None,
    tokens_before_patches: int = 0,
) -> Tensor:
    """The logits that transformers' own language model gives for embeddings and masks put together by hand."""
    implementation = model.config.text_config._attn_implementation
    text_config = model.config.text_config
    language_model = stock_language_model(model, implementation)
    attention = torch.ones_like(ids) if attention is None else attention
    with torch.no_grad():
        embeds = language_model.get_input_embeddings()(ids).clone()
        if pixel_values is not None:
            embeddings = iter(_image_embeddings(model, pixel_values, tokens_before_patches))
            for b, position in (ids == IMAGE).nonzero().tolist():
                embeds[b, position] = next(embeddings)
            assert next(embeddings, None) is None
        positions = torch.tensor([[max(int(row[: i + 1].sum()) - 1, 0) for i in range(len(row))] for row in attention])

        def mask(window: int | None) -> Tensor:
            seen = who_sees_whom(ids, attention, blocks, window)[:, None]
            return seen if implementation == "sdpa" else torch.zeros(seen.shape).masked_fill(~seen, -1e9)

        window = getattr(text_config, "sliding_window", None)
        masks: Any = mask(window)
        if hasattr(text_config, "layer_types"):
            windows = {"full_attention": None, "sliding_attention": window}
            masks = {kind: mask(windows[kind]) for kind in set(text_config.layer_types)}
        return language_model(inputs_embeds=embeds, attention_mask=masks, position_ids=positions).logits


def _image_embeddings(model: AkiForConditionalGeneration, pixel_values: Tensor, before: int) -> list[Tensor]:
    encoder = AutoModel.from_config(copy.deepcopy(model.config.vision_config)).eval()
    encoder.load_state_dict(model.model.vision_encoder.state_dict())
    embedded = []
    for picture in pixel_values:
        features = encoder(picture[None]).last_hidden_state[:, before:]
        if features.ndim == 4:
            rows, columns = features.shape[2:]
            features = torch.stack([features[:, :, r, c] for r in range(rows) for c in range(columns)], dim=1)
        assert features.shape[1] == (PIXELS // PATCH) ** 2
        embedded += list(model.model.connector(features)[0])
    return embedded
