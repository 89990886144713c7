"""The published checkpoint's reader against tensors made by the authors' modules (tests/fixtures/aki_tiny)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_folders import META, expanded, reference_cases
from published_folders import REFERENCE as FOLDER
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipConfig

from aki import AkiForConditionalGeneration
from aki.attention import dense_mask, get_rule
from aki.models.checkpoint_files import CheckpointError
from aki.models.published import load_published

IMAGE, PER_IMAGE = META["image_token_id"], META["num_vision_tokens"]
WITH_IMAGES = ("sft_single", "sft_batch", "pretrain")


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, torch.Tensor]]:
    return reference_cases()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request) -> AkiForConditionalGeneration:
    model = load_published(FOLDER)
    model.set_attn_implementation(request.param)
    return model


def masks_of(model: AkiForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the language model was handed, as (batch, length, length) bool."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with hook, torch.no_grad():
        model(**inputs)
    (mask,) = seen
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_masks_are_identical(model, cases, name):
    inputs = expanded(cases[name])
    wanted = cases[name]["mask"].bool()
    assert torch.equal(masks_of(model, inputs), wanted)
    tokens = {key: value for key, value in inputs.items() if key != "pixel_values"}
    assert torch.equal(dense_mask(get_rule("mma"), model.layout(**tokens)), wanted)


def test_the_reference_masks_show_the_rule(cases):
    causal = torch.ones(25, 25).tril().bool()
    assert (cases["sft_single"]["mask"][0].bool() & ~causal).any(), "the picture sees its question"
    assert torch.equal(cases["pretrain"]["mask"][0].bool(), causal[:19, :19]), "a caption stays causal under mma"


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_image_features_agree(model, cases, name):
    pixels = cases[name]["pixel_values"]
    with torch.no_grad():
        features, tokens = model.model.vision_encoder(pixels).last_hidden_state, model.get_image_features(pixels)
    tokens = tokens.pooler_output
    torch.testing.assert_close(features, cases[name]["vision_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens, cases[name]["vision_tokens"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*WITH_IMAGES, "text_only"])
def test_logits_and_loss_agree(model, cases, name):
    inputs = expanded(cases[name])
    with torch.no_grad():
        outputs = model(**inputs)
    real = inputs["attention_mask"].bool()
    assert outputs.logits.shape == cases[name]["logits"].shape
    torch.testing.assert_close(outputs.logits[real], cases[name]["logits"][real], atol=1e-4, rtol=0)
    assert outputs.loss.item() == pytest.approx(cases[name]["loss"].item(), rel=1e-5)
    assert outputs.loss.item() == pytest.approx(META["cases"][name]["loss"], rel=1e-5)


def test_only_mma_agrees(model, cases):
    with torch.no_grad():
        causal = model(**expanded(cases["sft_single"]), attention_rule="causal").logits
    assert (causal - cases["sft_single"]["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["generate_0", "generate_1"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_agrees(model, cases, name, use_cache, monkeypatch):
    # The reference generated 12 tokens, whatever they were.
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    inputs = expanded(cases[name])
    length = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=12,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences[:, length:], cases[name]["new_tokens"])
    torch.testing.assert_close(torch.stack(out.logits, 1), cases[name]["step_logits"], atol=1e-3, rtol=0)


def test_save_and_load_change_no_bit(cases, tmp_path):
    model = load_published(FOLDER)
    model.save_pretrained(tmp_path)
    again = AkiForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.attention_rule == "mma"
    for name in (*WITH_IMAGES, "text_only"):
        inputs = expanded(cases[name])
        with torch.no_grad():
            before, after = model(**inputs), again(**inputs)
        assert torch.equal(before.logits, after.logits)
        assert torch.equal(before.loss, after.loss)


def test_the_model_is_ready_to_use():
    model = load_published(str(FOLDER))
    assert not model.training
    assert model.config.attention_rule == "mma"
    assert model.config.image_seq_length == PER_IMAGE
    assert model.config.text_config.vocab_size == META["initial_tokenizer_len"] + 2
    assert model.get_output_embeddings().bias is not None


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder in the published layout, to be broken."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    return tmp_path


def rewrite_config(folder: Path, **changes) -> None:
    """Change entries of config.json; None takes one out."""
    meta = {name: value for name, value in (META | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(meta))


def rewrite_tensors(folder: Path, drop=(), **changes) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop} | changes
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_several_bad_tensors_are_one_error_in_the_names_of_the_file(copy):
    rewrite_tensors(
        copy,
        drop=["vision_tokenizer.latents", "lang_model.model.norm.weight"],
        **{
            "lang_model.model.rotary.scale": torch.zeros(3),
            "vision_encoder.post_layernorm.weight": torch.zeros(7),
        },
    )
    with pytest.raises(CheckpointError) as error:
        load_published(copy)
    message = str(error.value)
    assert str(copy) in message
    assert "4 tensors" in message
    assert "missing vision_tokenizer.latents (8, 24)" in message
    assert "missing lang_model.model.norm.weight (32,)" in message
    assert "extra lang_model.model.rotary.scale" in message
    assert "vision_encoder.post_layernorm.weight is (7,), expected (24,)" in message


@pytest.mark.parametrize(
    "name",
    [
        "lang_model.model.embed_tokens.weight",
        "lang_model.lm_head.weight",
        "lang_model.lm_head.bias",
        "lang_model.lm_head.additional_fc.weight",
        "lang_model.lm_head.additional_fc.bias",
        "lang_model.model.embed_tokens.additional_embedding.weight",
    ],
)
def test_a_missing_half_of_the_vocabulary_is_named(copy, name):
    rewrite_tensors(copy, drop=[name])
    with pytest.raises(CheckpointError, match=rf"{name}\b"):
        load_published(copy)


def test_a_vocabulary_with_too_few_rows_is_misshapen(copy):
    rewrite_tensors(copy, **{"lang_model.lm_head.bias": torch.zeros(80)})
    with pytest.raises(CheckpointError, match=r"lang_model\.lm_head\.bias is \(80,\)"):
        load_published(copy)


def test_at_most_ten_tensors_are_named(copy):
    tensors = load_file(copy / "model.safetensors")
    gone = [name for name in tensors if name.startswith("vision_encoder.")]
    rewrite_tensors(copy, drop=gone)
    with pytest.raises(CheckpointError) as error:
        load_published(copy)
    message = str(error.value)
    assert message.count("missing vision_encoder.") == 10
    assert f"{len(gone)} tensors" in message
    assert f"and {len(gone) - 10} more" in message


def test_sizes_that_do_not_fit_the_tensors(copy):
    rewrite_config(copy, num_vision_tokens=9)
    with pytest.raises(CheckpointError, match=r"vision_tokenizer\.latents is \(8, 24\), expected \(9, 24\)"):
        load_published(copy)


def test_no_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_published(copy)


def test_a_config_cut_off(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"config\.json is broken"):
        load_published(copy)


@pytest.mark.parametrize("key", ["initial_tokenizer_len", "num_vision_tokens"])
def test_a_missing_key_is_named(copy, key):
    rewrite_config(copy, **{key: None})
    with pytest.raises(CheckpointError, match=f"config.json has no {key}"):
        load_published(copy)


@pytest.mark.parametrize(("key", "path"), [("text", "lang_model_path"), ("vision", "vision_encoder_path")])
def test_neither_sizes_nor_a_backbone(copy, key, path):
    rewrite_config(copy, **{key: None})
    with pytest.raises(CheckpointError, match=f"neither {key} nor {path}"):
        load_published(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_published(copy)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_weights_cut_off(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is broken"):
        load_published(copy)


def test_a_checkpoint_of_another_architecture(tmp_path):
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not in the published layout"):
        load_published(tmp_path)
    shutil.copyfile(FOLDER / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not in the published layout"):
        load_published(tmp_path)


def test_sizes_from_the_named_backbones(copy, cases, tmp_path):
    """As the released checkpoint has it: no sizes in config.json, but two backbones (SigLIP with both its towers)."""
    vision = {name: value for name, value in META["vision"].items() if name != "model_type"}
    SiglipConfig(vision_config=vision).save_pretrained(tmp_path / "siglip")
    phi3 = load_published(FOLDER).config.text_config
    phi3.pad_token_id, phi3.tie_word_embeddings = 3, True
    phi3.save_pretrained(tmp_path / "phi3")
    rewrite_config(
        copy,
        text=None,
        vision=None,
        vision_encoder_path=str(tmp_path / "siglip"),
        lang_model_path=str(tmp_path / "phi3"),
    )
    model = load_published(copy)
    assert model.generation_config.pad_token_id == META["pad_token_id"]
    with torch.no_grad():
        logits = model(**expanded(cases["sft_single"])).logits
    torch.testing.assert_close(logits, cases["sft_single"]["logits"], atol=1e-4, rtol=0)


def test_the_image_id_from_the_tokenizer(copy):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    rewrite_config(copy, image_token_id=None)
    vocabulary = {f"w{i}": i for i in range(IMAGE)} | {"<image>": IMAGE}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(copy)
    assert load_published(copy).config.image_token_id == IMAGE


def test_no_image_id(copy):
    rewrite_config(copy, image_token_id=None)
    with pytest.raises(CheckpointError, match=r"image_token_id.*tokenizer"):
        load_published(copy)


def test_12_14_numbers_that_are_none(tmp_path):
    """Issue 12, entry 14."""
    shutil.copytree(FOLDER, tmp_path / "broken")
    weights = load_file(tmp_path / "broken/model.safetensors")
    weights["vision_tokenizer.latents"][0, 0] = float("nan")
    save_file(weights, tmp_path / "broken/model.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in 1 of its weights, .*: vision_tokenizer\.latents"):
        load_published(tmp_path / "broken")
