"""Models that start from trained backbones."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from aki.training.model import build_model, tiny
from aki.training.recipe import BackbonesRecipe, RecipeError, load_recipe

WORDS = ["<unk>", "<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "what", "is"]


@pytest.fixture
def recipe(tmp_path):
    """The pre-training recipe with small backbones in folders, in bfloat16 as Phi-3.5 is."""
    small = tiny(load_recipe("aki-4b/pretrain"))
    # As the authors met it: what pads is what ends.
    small.model.text |= {"vocab_size": len(WORDS), "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**small.model.vision)).save_pretrained(tmp_path / "vision")
    text = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small.model.text))
    text.to(torch.bfloat16).save_pretrained(tmp_path / "text")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token=WORDS[2], pad_token=WORDS[2]
    )
    tokenizer.save_pretrained(tmp_path / "text")
    where = BackbonesRecipe(str(tmp_path / "vision"), str(tmp_path / "text"))
    return replace(small, model=replace(small.model, from_backbones=where))


def test_trained_parts_come_whole_and_tokens_are_added_as_the_authors_do(recipe, tmp_path):
    model, processor = build_model(recipe, ["text"])
    tokens = len(WORDS)
    added = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<image>", "<|endofchunk|>")]
    assert added == [tokens, tokens + 1, tokens + 2]
    assert processor.tokenizer.pad_token_id == model.config.text_config.pad_token_id == tokens
    assert model.config.image_token_id == tokens + 1
    assert model.get_input_embeddings().weight.shape[0] == tokens + 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    vision = AutoModel.from_pretrained(tmp_path / "vision").state_dict()
    for name, weight in vision.items():
        assert torch.equal(model.model.vision_encoder.state_dict()[name], weight), name
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").state_dict()
    for name, weight in text.items():
        ours = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(model.state_dict()[ours][: len(weight)], weight.float()), name
    assert processor.image_processor.size == {"height": 56, "width": 56}
    assert processor.image_seq_length == 144


def test_backbones_of_another_size_are_refused(recipe):
    recipe.model.vision["num_hidden_layers"] = 27
    with pytest.raises(RecipeError, match=r"vision has num_hidden_layers 1, model.vision says 27: correct the recipe"):
        build_model(recipe, ["text"])
