"""Every vision encoder and language model that AKI promises, against transformers' own classes."""

import pytest
import torch
from model_builders import (
    ATTENDING,
    EOS,
    IMAGE,
    PER_IMAGE,
    TEXT,
    TOKENS_BEFORE_PATCHES,
    VISION,
    VOCAB,
    assert_same,
    enlarge,
    pictures,
    stock_language_model,
    stock_logits,
    tiny_model,
    tokens,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipModel,
    SiglipVisionModel,
)

from aki import AkiConfig, AkiForConditionalGeneration

# Text before the first image, two images, two turns: with a window of 6 some of it lies beyond the window.
IDS = torch.tensor([tokens(5, "image", 7, 8, "image", 9, 10, 11, 12, 13, EOS, 14, "image", 15, 16, 17, 18)])
ANSWERS = [14, 15, 16, IDS.shape[1] - 2, IDS.shape[1] - 1]
BLOCKS = torch.tensor([[-1 if i in ANSWERS else int(i > 16) for i in range(IDS.shape[1])]])
LABELS = torch.where(BLOCKS < 0, IDS, -100)

NEVER_USED = {
    "siglip": {"head."},
    "siglip (both towers)": {"head."},
    "clip": {"post_layernorm."},
    "clip (both towers)": {"post_layernorm."},
    "dinov2": {"embeddings.mask_token"},
    "dinov2 with registers": {"embeddings.mask_token"},
}
"""Weights behind pooling and masking, which patch features do not go through."""


@pytest.mark.parametrize(("text", "implementation"), ATTENDING)
def test_logits_equal_the_stock_language_model(text, implementation):
    model = tiny_model(text=text)
    model.set_attn_implementation(implementation)
    images = pictures(3)
    with torch.no_grad():
        logits = model(input_ids=IDS, pixel_values=images, prompt_block_ids=BLOCKS).logits
        causal = model(input_ids=IDS, pixel_values=images, attention_rule="causal").logits
    assert_same(logits, stock_logits(model, IDS, images, BLOCKS))
    assert (logits - causal).abs().max() > 1e-2, "the rule must show, or the comparison shows nothing"


@pytest.mark.parametrize("connector", ["perceiver_resampler", "mlp"])
@pytest.mark.parametrize("vision", VISION)
def test_patches_alone_reach_the_language_model(vision, connector):
    model = tiny_model(vision=vision, connector=connector)
    per_image = {"perceiver_resampler": PER_IMAGE, "mlp": 4}[connector]
    assert model.config.image_seq_length == per_image
    ids = torch.tensor([tokens(5, "image", 7, 8, per_image=per_image)])
    blocks, images = torch.zeros_like(ids), pictures(1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=images, prompt_block_ids=blocks).logits
    before = TOKENS_BEFORE_PATCHES.get(vision, 0)
    assert_same(logits, stock_logits(model, ids, images, blocks, tokens_before_patches=before))


def test_a_frozen_encoder_is_never_in_training():
    """ResNet's batch norm is what would show: on statistics of the batch, and keeping them."""
    model = tiny_model(vision="resnet")
    features = model.patch_features(pictures(3))
    model.model.vision_encoder.requires_grad_(False)
    model.train()
    assert torch.equal(model.patch_features(pictures(3)), features)
    assert torch.equal(model.eval().patch_features(pictures(3)), features)
    assert model.train().model.connector.training
    model.model.vision_encoder.requires_grad_(True)
    assert not torch.equal(model.train().patch_features(pictures(3)), features)


def test_final_softcapping_is_kept():
    model = tiny_model(text="gemma2")
    with torch.no_grad():
        logits = model(input_ids=IDS, pixel_values=pictures(3), prompt_block_ids=BLOCKS).logits
    assert 1.0 < logits.abs().max() <= 2.0


@pytest.mark.parametrize(
    ("vision", "text"), [("siglip", text) for text in TEXT] + [(vision, "llama") for vision in VISION]
)
def test_every_weight_that_is_used_is_trained(vision, text):
    model = tiny_model(vision=vision, text=text).train()
    model(input_ids=IDS, pixel_values=pictures(3), labels=LABELS, prompt_block_ids=BLOCKS).loss.backward()
    for name, parameter in model.named_parameters():
        if any(name.startswith(f"model.vision_encoder.{part}") for part in NEVER_USED.get(vision, ())):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # A bias on keys moves all scores of a row alike.
            assert parameter.grad.any() or "k_proj.bias" in name or "key.bias" in name, name


@pytest.mark.parametrize(
    ("vision", "text"), [("siglip", text) for text in TEXT] + [(vision, "llama") for vision in VISION]
)
def test_save_and_load_change_no_bit(vision, text, tmp_path):
    model = tiny_model(vision=vision, text=text, attention_rule="mma")
    model.save_pretrained(tmp_path)
    again = AkiForConditionalGeneration.from_pretrained(tmp_path)
    inputs = {"input_ids": IDS, "pixel_values": pictures(3), "prompt_block_ids": BLOCKS}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), again.generate(**inputs, max_new_tokens=3))


def test_defaults_of_another_family_survive_saving(tmp_path):
    """The default text config is Phi-3's: where a Llama has Phi-3's value, it must be written all the same."""
    text = LlamaConfig(num_hidden_layers=1, vocab_size=32064, hidden_size=16, num_attention_heads=2, pad_token_id=32000)
    config = tiny_model().config
    AkiConfig(vision_config=config.vision_config, text_config=text, image_token_id=7).save_pretrained(tmp_path)
    again = AkiConfig.from_pretrained(tmp_path)
    assert type(again.text_config) is LlamaConfig
    assert again.text_config.to_dict() == text.to_dict()
    assert again.image_token_id == 7


@pytest.mark.parametrize("text", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("output_bias", [False, True])
def test_tied_embeddings_stay_tied(text, output_bias, tmp_path):
    text_config = TEXT[text]()
    text_config.tie_word_embeddings = True
    model = tiny_model(text_config=text_config, output_bias=output_bias)
    model.save_pretrained(tmp_path)
    again = AkiForConditionalGeneration.from_pretrained(tmp_path)
    again.resize_token_embeddings(VOCAB + 3)
    for each in (model, again):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight[:VOCAB], model.get_input_embeddings().weight)


def test_untied_embeddings_stay_untied(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = AkiForConditionalGeneration.from_pretrained(tmp_path)
    assert not torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight)
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("text", ["llama", "phi3"])
def test_output_bias_is_added_to_the_logits(text, tmp_path):
    model, plain = tiny_model(text=text, output_bias=True), tiny_model(text=text)
    state = model.state_dict()
    bias = state.pop("lm_head.bias")
    plain.load_state_dict(state)
    inputs = {"input_ids": IDS, "pixel_values": pictures(3), "prompt_block_ids": BLOCKS}
    with torch.no_grad():
        assert_same(model(**inputs).logits, plain(**inputs).logits + bias)
    model.save_pretrained(tmp_path)
    again = AkiForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.bias, bias)


def test_a_new_output_bias_is_zero():
    config = tiny_model().config
    config.output_bias = True
    assert not AkiForConditionalGeneration(config).lm_head.bias.any()


@pytest.mark.parametrize("config_class", [Siglip2Config, Siglip2VisionConfig])
def test_naflex_encoders_are_refused(config_class):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = config_class(**(sizes if config_class is Siglip2VisionConfig else {"vision_config": sizes}))
    config = AkiConfig(vision_config=vision, text_config=TEXT["llama"](), image_token_id=IMAGE)
    with pytest.raises(ValueError, match=r"'siglip2_vision_model' wants more than pixel_values .* not NaFlex"):
        AkiForConditionalGeneration(config)
    with pytest.raises(ValueError, match="has no fixed image_size"):
        _ = config.num_patches


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov2"])
def test_pictures_of_another_size_are_refused(vision):
    # DINOv2 would stretch its position embeddings and give another number of patches.
    with pytest.raises(ValueError, match=r"pixel_values are 24 x 16, the vision encoder takes 16 x 16"):
        tiny_model(vision=vision).get_image_features(torch.zeros(1, 3, 24, 16))


CONNECTOR = {"num_latents": PER_IMAGE, "depth": 1, "num_heads": 2, "head_dim": 4}


class TestFromBackbones:
    @pytest.fixture
    def folders(self, tmp_path):
        """A contrastive model and a language model, as people find them on the hub."""

        def save(vision: str, text: str, dtype: torch.dtype = torch.float32):
            torch.manual_seed(1)
            encoder = AutoModel.from_config(VISION[vision]())
            language_model = AutoModelForCausalLM.from_config(TEXT[text]()).to(dtype)
            for name, model in (("vision", encoder), ("text", language_model)):
                enlarge(model)
                model.save_pretrained(tmp_path / name)
            return encoder, language_model, {"vision_encoder": tmp_path / "vision", "language_model": tmp_path / "text"}

        return save

    @pytest.mark.parametrize(("vision", "text"), [("clip (both towers)", "llama"), ("dinov2", "gemma2")])
    def test_the_weights_are_the_backbones(self, folders, vision, text):
        encoder, language_model, names = folders(vision, text)
        model = AkiForConditionalGeneration.from_backbones(**names, image_token_id=IMAGE, connector_config=CONNECTOR)
        model.eval()
        tower = encoder.vision_model if isinstance(encoder, CLIPModel) else encoder
        for mine, theirs in ((model.model.vision_encoder, tower), (stock_language_model(model), language_model)):
            theirs = theirs.state_dict()
            assert mine.state_dict().keys() <= theirs.keys()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.state_dict().items())
        model.set_attn_implementation("eager")
        assert (
            model.model.language_model.config._attn_implementation
            == model.config.text_config._attn_implementation
            == "eager"
        )
        with torch.no_grad():
            logits = model(input_ids=IDS, pixel_values=pictures(3), prompt_block_ids=BLOCKS).logits
        before = TOKENS_BEFORE_PATCHES[vision]
        assert_same(logits, stock_logits(model, IDS, pictures(3), BLOCKS, tokens_before_patches=before))

    def test_a_siglip_with_both_towers(self, folders):
        encoder, _, names = folders("siglip (both towers)", "llama")
        assert isinstance(encoder, SiglipModel)
        model = AkiForConditionalGeneration.from_backbones(**names, image_token_id=IMAGE)
        assert isinstance(model.model.vision_encoder, SiglipVisionModel)
        theirs = encoder.vision_model.state_dict()
        assert all(
            torch.equal(tensor, theirs[name]) for name, tensor in model.model.vision_encoder.state_dict().items()
        )

    def test_it_trains_grows_and_is_saved(self, folders, tmp_path):
        _, language_model, names = folders("siglip", "llama", torch.bfloat16)
        model = AkiForConditionalGeneration.from_backbones(
            **names, image_token_id=VOCAB, vocab_size=VOCAB + 1, connector_config=CONNECTOR, output_bias=True
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.config.text_config.vocab_size == model.model.language_model.config.vocab_size == VOCAB + 1
        assert torch.equal(model.get_input_embeddings().weight[:VOCAB], language_model.get_input_embeddings().weight)
        assert 0.1 < model.model.connector.latents.float().std() < 3, "latents are drawn, not left empty"
        ids = torch.where(IDS == IMAGE, VOCAB, IDS)
        model(input_ids=ids, pixel_values=pictures(3), labels=LABELS, prompt_block_ids=BLOCKS).loss.backward()
        assert model.model.connector.projection.weight.grad.isfinite().all()
        model.save_pretrained(tmp_path / "joined")
        again = AkiForConditionalGeneration.from_pretrained(tmp_path / "joined")
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    def test_a_backbone_without_its_weights_is_refused(self, folders):
        _, language_model, names = folders("siglip", "llama")
        assert isinstance(language_model, LlamaForCausalLM)
        state = language_model.state_dict()
        del state["model.layers.1.mlp.up_proj.weight"]
        language_model.save_pretrained(names["language_model"], state_dict=state)
        with pytest.raises(ValueError, match=r"lacks 1 of the weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
            AkiForConditionalGeneration.from_backbones(**names, image_token_id=IMAGE)
