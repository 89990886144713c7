"""What stands on what: a backbone that gives hidden states, an output layer on it, and the names of both in folders."""

import pytest
import torch
from model_builders import (
    IMAGE,
    TEXT,
    assert_same,
    pad,
    pictures,
    stock_language_model,
    stock_logits,
    tiny_model,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, CohereConfig, GraniteConfig, PhiConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from aki import AkiConfig, AkiForConditionalGeneration, AkiModel
from aki.models.heads import check_head, scale_logits

IDS = pad([tokens(5, "image", 7, 8, 9), tokens("image", 6, "image", 9)], 0)
BLOCKS = torch.where(torch.arange(IDS.shape[1]) < IDS.shape[1] - 1, 0, -1).expand_as(IDS)
INPUTS = {"input_ids": IDS, "pixel_values": pictures(3), "prompt_block_ids": BLOCKS}
LABELS = torch.where(BLOCKS < 0, IDS, -100)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class TestBackbone:
    @pytest.mark.parametrize("text", TEXT)
    def test_it_is_shown_the_pictures_and_goes_by_the_rule(self, text):
        model = tiny_model(text=text, **{"output_bias": False})
        if text == "gemma2":
            model.set_attn_implementation("eager")
        assert isinstance(model.base_model, AkiModel)
        with torch.no_grad():
            hidden = model.base_model(**INPUTS).last_hidden_state
            stock = stock_language_model(model)
            logits = scale_logits(stock.get_output_embeddings()(hidden), model.config.text_config)
        assert_same(logits, stock_logits(model, IDS, pictures(3), BLOCKS))
        assert_same(logits, model(**INPUTS).logits)

    def test_auto_classes(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        alone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert type(alone) is AkiModel
        assert not info["missing_keys"]
        assert list(info["unexpected_keys"]) == ["lm_head.weight"]
        with torch.no_grad():
            assert torch.equal(alone(**INPUTS).last_hidden_state, model.base_model(**INPUTS).last_hidden_state)
        alone.save_pretrained(tmp_path / "alone")
        assert weights(tmp_path / "alone").keys() == alone.state_dict().keys()
        again, info = AkiModel.from_pretrained(tmp_path / "alone", output_loading_info=True)
        assert not any(info.values())
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in alone.state_dict().items())

    def test_parts_are_all_there_is(self):
        model = tiny_model()
        counted = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()}
        assert sum(counted.values()) == model.num_parameters()
        model.parts["language_model"].requires_grad_(False)
        assert not model.lm_head.weight.requires_grad
        assert model.model.connector.latents.requires_grad


class TestNamesInFolders:
    """Names as AKI's folders had them before the backbone was a model of its own, written out by hand."""

    OLD = ("connector.latents", "vision_encoder.post_layernorm.bias", "language_model.lm_head.weight")

    @pytest.mark.parametrize("text", ["llama", "phi3", "gemma2"])
    def test_old_folders_load(self, text, tmp_path):
        model = tiny_model(text=text)
        model.config.save_pretrained(tmp_path)
        state = {self.old(name): tensor.clone() for name, tensor in model.state_dict().items()}
        assert set(self.OLD[:2]) | {"language_model.model.embed_tokens.weight"} <= state.keys()
        if model.config.tie_word_embeddings:
            del state["language_model.lm_head.weight"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again, info = AkiForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        for which, name in ((model, "new"), (again, "loaded")):
            which.save_pretrained(tmp_path / name)
            assert {self.old(key) for key in weights(tmp_path / name)} == state.keys()
            assert weights(tmp_path / name).keys() <= model.state_dict().keys(), "the Trainer resumes by these names"
        backbone = AkiModel.from_pretrained(tmp_path)
        assert all(torch.equal(backbone.state_dict()[name], t) for name, t in model.model.state_dict().items())

    @staticmethod
    def old(name: str, decoder: str = "model") -> str:
        if name.startswith("lm_head."):
            return f"language_model.{name}"
        name = name.removeprefix("model.")
        return name.replace("language_model.", f"language_model.{decoder}.", 1)

    def test_gpt2_called_its_decoder_a_transformer(self, tmp_path):
        model = tiny_model(text="gpt2")
        model.config.save_pretrained(tmp_path)
        state = {self.old(name, "transformer"): tensor.clone() for name, tensor in model.state_dict().items()}
        del state["language_model.lm_head.weight"]  # it is that of the embeddings
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again, info = AkiForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
SCALING = {
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "phi": lambda: PhiConfig(**SIZES),
}


class TestOutputLayer:
    @pytest.mark.parametrize("kind", SCALING)
    def test_what_a_language_model_makes_of_its_logits_is_kept(self, kind):
        config = SCALING[kind]()
        model = tiny_model(text_config=config)
        assert (model.lm_head.bias is not None) == (kind == "phi")
        stock, ids = stock_language_model(model), torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            assert_same(model(input_ids=ids).logits, stock(input_ids=ids).logits)

    def test_one_that_does_what_nobody_knows_is_refused(self):
        model = AutoModelForCausalLM.from_config(TEXT["llama"]())
        check_head(model, "a-model")
        model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits * 3 + 1))
        with pytest.raises(ValueError, match=r"the language model a-model \(LlamaForCausalLM\) makes something"):
            check_head(model, "a-model")


class TestLabels:
    def test_shifted_labels_are_those_moved_by_one(self):
        model = tiny_model().train()
        wanted = model(**INPUTS, labels=LABELS).loss
        shifted = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)
        assert torch.equal(model(**INPUTS, shift_labels=shifted).loss, wanted)
        assert torch.equal(model(**INPUTS, shift_labels=shifted, labels=LABELS).loss, wanted)
        other = shifted.clone()
        other[0, 6] = 11
        assert not torch.equal(model(**INPUTS, shift_labels=other, labels=LABELS).loss, wanted)

    def test_shifted_labels_say_what_is_prompt(self):
        model = tiny_model().train()
        inputs = {name: value for name, value in INPUTS.items() if name != "prompt_block_ids"}
        shifted = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)
        assert torch.equal(model(**inputs, shift_labels=shifted).loss, model(**inputs, labels=LABELS).loss)

    def test_placeholders_are_no_targets(self):
        model = tiny_model(attention_rule="causal").train()
        shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=IMAGE)
        wanted = model(**INPUTS, labels=IDS.masked_fill(IDS == IMAGE, -100)).loss
        assert torch.equal(model(**INPUTS, shift_labels=shifted).loss, wanted)


class TestFeatures:
    def test_they_come_with_the_encoders_own(self):
        model, pixels = tiny_model(vision="clip"), pictures(2)
        with torch.no_grad():
            found = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
            own = model.model.vision_encoder(pixels)
            shown = model(**INPUTS | {"pixel_values": pictures(3)}).image_hidden_states
        assert type(found) is BaseModelOutputWithPooling
        assert torch.equal(found.last_hidden_state, own.last_hidden_state)
        assert torch.equal(found.pooler_output, shown[:2]) or found.pooler_output.shape == shown[:2].shape
        assert len(found.hidden_states) == 3
        with torch.no_grad():
            as_tuple = model.get_image_features(pixels, return_dict=False)
            assert torch.equal(as_tuple[1], found.pooler_output)
            assert torch.equal(model.model.get_image_features(pixels).pooler_output, found.pooler_output)


class TestEmbeddingsInsteadOfIds:
    @pytest.mark.parametrize("rule", ["mma", "causal", "prefix", "concentric"])
    def test_placeholders_are_found_by_their_embedding(self, rule):
        sizes = {"connector": "mlp"}
        model = tiny_model(attention_rule=rule, **sizes)
        ids = pad([tokens(5, "image", 7, 8, per_image=4), tokens("image", 6, 9, 10, per_image=4)], 0)
        inputs = {"pixel_values": pictures(2), "prompt_block_ids": torch.zeros_like(ids)}
        with torch.no_grad():
            wanted = model(input_ids=ids, **inputs).logits
            found = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs).logits
        assert torch.equal(found, wanted)

    def test_too_few_placeholders(self):
        with pytest.raises(ValueError, match=r"1 image\(s\) need 3 placeholders .* found 0"):
            tiny_model()(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=pictures(1))

    @pytest.mark.parametrize("with_ids", [True, False])
    def test_generation(self, with_ids):
        model, ids = tiny_model(), torch.tensor([tokens(5, "image", 7, 8)])
        how = {"pixel_values": pictures(1), "max_new_tokens": 6, "min_new_tokens": 6}
        wanted = model.generate(input_ids=ids, **how)[:, -6:]
        embeds = model.get_input_embeddings()(ids)
        given = {"input_ids": ids} if with_ids else {}
        assert torch.equal(model.generate(**given, inputs_embeds=embeds, **how)[:, -6:], wanted)


def test_a_configuration_round_trips():
    model = tiny_model()
    again = AkiConfig.from_dict(model.config.to_dict())
    assert again.connector_config.to_dict() == model.config.connector_config.to_dict()
