"""Models that start from trained backbones."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from aki.data.fast import fast_inputs
from aki.data.orders import template_in_order
from aki.models import AkiProcessor
from aki.models.templates import AKI
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


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nhelpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen2's."""


@pytest.fixture
def chatml(recipe, tmp_path):
    """The language model's tokenizer is one like Qwen2's."""
    tokenizer = qwen_like()
    tokenizer.save_pretrained(tmp_path / "text")
    sizes = recipe.model.text | {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": None}
    recipe.model.text.update(sizes | {"eos_token_id": tokenizer.eos_token_id})
    config = AutoConfig.for_model(**recipe.model.text)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    return recipe


def qwen_like():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["user assistant system what is it a cat"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def chat(processor, picture=True, **kwargs):
    image = [{"type": "image", "image": Image.new("RGB", (8, 8))}] if picture else []
    messages = [
        {"role": "user", "content": [*image, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "is it"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "it is"}]},
    ]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    ), messages


def test_the_language_models_own_template_is_taken_with_its_answers_marked(chatml):
    model, processor = build_model(chatml, ["text"])
    out, messages = chat(processor, picture=False)
    plain = [{**one, "content": one["content"][0]["text"]} for one in messages]
    own = qwen_like().apply_chat_template(plain, return_dict=False)
    assert out["input_ids"][0].tolist() == own
    learned = out["input_ids"][0][out["prompt_block_ids"][0] < 0]
    assert processor.tokenizer.decode(learned) == "a cat<|im_end|>it is<|im_end|>"
    pictured, _ = chat(processor)
    text = processor.tokenizer.decode(pictured["input_ids"][0])
    assert text.startswith("<|im_start|>system\nhelpful<|im_end|>\n<|im_start|>user\n<image><image>")
    assert text.count("<image>") == processor.image_seq_length
    learned = pictured["input_ids"][0][pictured["prompt_block_ids"][0] < 0]
    assert processor.tokenizer.decode(learned) == "a cat<|im_end|>it is<|im_end|>"
    asked = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert asked.endswith("what is it<|im_end|>\n<|im_start|>assistant\n")
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_fast_way_and_a_saved_folder_read_it_alike(chatml, tmp_path):
    model, processor = build_model(chatml, ["text"])
    out, messages = chat(processor)
    fast = fast_inputs(processor, None)(messages)
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    again, _ = chat(AkiProcessor.from_pretrained(tmp_path / "out"))
    for name in ("input_ids", "prompt_block_ids"):
        assert torch.equal(fast[name], out[name])
        assert torch.equal(again[name], out[name])


def test_text_first_moves_the_question_in_it_too(chatml):
    _, processor = build_model(chatml, ["text"])
    template = template_in_order(processor, None, "text_first")
    _, messages = chat(processor)
    text = processor.apply_chat_template(messages, chat_template=template)
    assert "what is it\n<image><|im_end|>" in text
    assert text.index("what is it") < text.index("a cat") < text.rindex("it is")


def test_marks_that_are_no_tokens_are_refused(chatml):
    asked = replace(chatml, model=replace(chatml.model, chat_template="aki"))
    with pytest.raises(RecipeError, match=r"<\|system\|>, <\|end\|>, .*no tokens of its vocabulary"):
        build_model(asked, ["text"])


def test_a_file_of_ones_own(chatml, tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML.replace("helpful", "brief"))
    mine = replace(chatml, root=str(tmp_path), model=replace(chatml.model, chat_template="mine.jinja"))
    out, _ = chat(build_model(mine, ["text"])[1])
    assert "brief" in qwen_like().decode(out["input_ids"][0])
    gone = replace(mine, model=replace(mine.model, chat_template="gone.jinja"))
    with pytest.raises(RecipeError, match="there is no file"):
        build_model(gone, ["text"])


def test_the_papers_prompt_stays_where_its_tokens_are(recipe):
    assert build_model(recipe, ["text"])[1].chat_template["default"] == AKI


def test_no_template_and_no_tokens_for_the_papers(chatml, tmp_path):
    tokenizer = qwen_like()
    tokenizer.chat_template = None
    (tmp_path / "text" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "text")
    with pytest.raises(RecipeError, match="no chat template of its own, and no tokens"):
        build_model(chatml, ["text"])


@pytest.mark.parametrize("trained", ["vision", "text"])
def test_one_trained_part_and_a_new_other(recipe, trained, tmp_path):
    where = replace(recipe.model.from_backbones, **{{"vision": "text", "text": "vision"}[trained]: None})
    model, processor = build_model(replace(recipe, model=replace(recipe.model, from_backbones=where)), ["a text"])
    found = AutoModel.from_pretrained(tmp_path / trained).state_dict()
    part = model.model.vision_encoder if trained == "vision" else model.model.language_model
    for name, weight in part.state_dict().items():
        assert torch.equal(weight[: len(found[name])], found[name].float()), name
    other = model.model.language_model if trained == "vision" else model.model.vision_encoder
    assert other.config.hidden_size == 16
    assert not torch.equal(next(other.parameters()), torch.zeros_like(next(other.parameters())))
    assert len(processor.tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert chat(processor)[0]["input_ids"].shape[0] == 1


def test_no_trained_part_is_no_backbone():
    with pytest.raises(RecipeError, match="names no trained part"):
        BackbonesRecipe()
