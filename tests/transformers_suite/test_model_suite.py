"""AKI in transformers' suite for models and configurations, as transformers tests its own multimodal models."""

import unittest

import torch
from shared import suite
from transformers import LlamaConfig, SiglipVisionConfig

from aki import AkiConfig, AkiForConditionalGeneration, AkiModel

common = suite("test_modeling_common")
configurations = suite("test_configuration_common")
training = suite("test_training_mixin")

# Beyond 20: the suite of training writes the tokens below.
IMAGE, PAD, VOCAB = 50, 0, 99


class Tester:
    """A tiny AKI and its inputs, in the words of transformers' suites."""

    batch_size, seq_length, is_training = 3, 12, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    image_size, patch_size, num_channels = 16, 8, 3
    shows = True
    causal_lm_class = AkiForConditionalGeneration

    def __init__(self, parent, connector: str, rule: str):
        self.parent, self.connector, self.rule = parent, connector, rule
        self.vision = {
            "model_type": "siglip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        self.text = {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": self.hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def get_config(self) -> AkiConfig:
        sizes = {"connector": self.connector, "num_latents": 4, "depth": 1, "num_heads": 2, "head_dim": 8}
        return AkiConfig(
            vision_config=SiglipVisionConfig(**self.vision),
            text_config=LlamaConfig(**self.text),
            connector_config=sizes,
            image_token_id=IMAGE,
            attention_rule=self.rule,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[AkiConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        pictures = config.image_seq_length
        ids = torch.randint(8, IMAGE, (self.batch_size, self.seq_length))
        if not self.shows:
            return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids[:, 1 : 1 + pictures] = IMAGE
        size = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return config, {
            "pixel_values": torch.randn(size),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }


INCOMPLETE = "AKI refuses a checkpoint that lacks weights, which this test leaves to be made up at random"
NO_PROMPT = "AKI refuses to train under a rule that opens prompts where neither blocks nor labels say what is prompt"
NOT_SHOWN = "the test draws ids at random, and AKI refuses placeholders without pictures"
ON_LOADING = "AKI's folders of before are renamed on loading alone: a Trainer resumes by the model's own names"
NOT_DISTRIBUTED = "the suite of generation is in no source distribution"
IMAGES_ALONE = "the tiny model takes images alone; tests/models/test_modalities.py has videos and audio"
REFUSED = {
    "test_can_load_ignoring_mismatched_shapes": INCOMPLETE,
    "test_base_model_prefix_loads_base_weights": INCOMPLETE,
    "test_correct_missing_keys": INCOMPLETE,
    "test_model_weights_reload_no_missing_tied_weights": INCOMPLETE,
    "test_model_rope_scaling_from_config": NOT_SHOWN,
    "test_reverse_loading_mapping": ON_LOADING,
    "test_generation_tester_mixin_inheritance": NOT_DISTRIBUTED,
    "test_get_video_features": IMAGES_ALONE,
    "test_get_audio_features": IMAGES_ALONE,
}
"""Beginnings of tests' names -> why they are not run."""
REFUSED_BEYOND_CAUSAL = {
    "test_enable_input_require_grads_with_gradient_checkpointing": NO_PROMPT,
    "test_resize_tokens_embeddings": NO_PROMPT,
    "test_retain_grad_hidden_states_attentions": NO_PROMPT,
}
WITHOUT_PICTURES = "test_eager_matches_sdpa_inference"
"""It drops pixel_values, and so gets ids without placeholders."""


class AkiSuite(common.ModelTesterMixin):
    all_model_classes = (AkiModel, AkiForConditionalGeneration)
    _is_composite = True
    connector, rule = "perceiver_resampler", "mma"

    def setUp(self):
        refused = REFUSED | (REFUSED_BEYOND_CAUSAL if self.rule != "causal" else {})
        for name, reason in refused.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        self.model_tester = Tester(self, self.connector, self.rule)
        self.model_tester.shows = not self._testMethodName.startswith(WITHOUT_PICTURES)


class ResamplerMmaTest(AkiSuite, unittest.TestCase):
    pass


class ResamplerCausalTest(AkiSuite, unittest.TestCase):
    rule = "causal"


class MlpMmaTest(AkiSuite, unittest.TestCase):
    connector = "mlp"


class MlpCausalTest(AkiSuite, unittest.TestCase):
    connector, rule = "mlp", "causal"


class ConfigurationTest(unittest.TestCase):
    def test_config(self):
        self.model_tester = Tester(self, "perceiver_resampler", "mma")
        given = {"config_class": AkiConfig, "has_text_modality": False, "image_token_id": IMAGE}
        configurations.ConfigTester(self, **given).run_common_tests()


class TrainingTest(training.TrainingTesterMixin, unittest.TestCase):
    """A fixed batch of text is learned by heart, and said again."""

    @property
    def model_tester(self):
        tester = Tester(self, "mlp", "causal")
        config = tester.get_config()
        config.vocab_size = VOCAB  # which the suite looks for on top
        tester.get_config = lambda: config
        return tester
