"""Ways in which people use a model, unlocked: Trainer and TRL, PEFT, compile, device maps, saving, several turns."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)
from unlock_families import FAMILIES, IMAGE_ID, QUESTIONS, TEXT, VISION, chat, llava

import aki
from aki.attention import CannotUnlock, LeakError, NothingOpensWarning


@pytest.fixture
def model():
    return llava().model


@pytest.fixture
def inputs():
    return chat(llava())


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def picture(grey: int = 120) -> Image.Image:
    return Image.new("RGB", (20, 20), (grey, 40, 200))


def turns(*texts: str) -> list[dict]:
    roles = ("user", "assistant") * len(texts)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, texts, strict=False)
    ]
    messages[0]["content"].insert(0, {"type": "image", "image": picture()})
    return messages


def tokenised(processor, messages, **kwargs):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def test_prompt_blocks_decide_where_they_are_given(model, inputs):
    everything = torch.zeros_like(inputs["input_ids"])
    aki.unlock(model)
    assert torch.equal(logits(model, {**inputs, "prompt_block_ids": everything}), logits(model, inputs))
    nothing = logits(model, {**inputs, "prompt_block_ids": everything - 1})
    aki.lock(model)
    torch.testing.assert_close(nothing, logits(model, inputs), atol=1e-5, rtol=1e-5)


def test_inner_model_called_alone_is_unlocked_too(model, inputs):
    aki.unlock(model)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), model(**inputs).logits)


def test_training_without_labels_is_an_error_that_leaves_no_trace(model, inputs):
    aki.unlock(model)
    wanted = logits(model, inputs)
    with pytest.raises(ValueError, match="prompt_block_ids"):
        model.train()(**inputs)
    assert torch.equal(logits(model.eval(), inputs), wanted)


def test_a_leak_is_refused(model, inputs):
    aki.unlock(model)
    labels = inputs["input_ids"].clone()
    everything = torch.zeros_like(labels)
    with pytest.raises(LeakError, match="leaks in row 0"):
        model.train()(**inputs, labels=labels, prompt_block_ids=everything)


def test_all_labelled_is_said_loudly(model, inputs):
    aki.unlock(model)
    with pytest.warns(NothingOpensWarning, match=r"TRAINS WITH CAUSAL.*aki\.write_prompt_blocks"):
        model.train()(**inputs, labels=inputs["input_ids"])


def test_media_without_input_ids_is_an_error(model, inputs):
    aki.unlock(model)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(**inputs, inputs_embeds=embeds)


def test_rule_is_saved_with_the_model(model, inputs, tmp_path):
    aki.unlock(model, rule="causal")
    aki.unlock(model, rule="mma")
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.attention_rule == "mma"
    aki.unlock(again)
    torch.testing.assert_close(logits(again, inputs), wanted)
    aki.lock(again)
    again.save_pretrained(tmp_path / "locked")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "locked"), "attention_rule")


def test_the_recorded_rule_is_the_one_taken(model, inputs):
    stock = logits(model, inputs)
    model.config.attention_rule = "causal"
    aki.unlock(model)
    torch.testing.assert_close(logits(model, inputs), stock)
    with pytest.raises(ValueError, match="Did you mean 'mma'"):
        aki.unlock(model, rule="mna")


def test_a_copy_is_unlocked_by_itself(model, inputs):
    aki.unlock(model)
    wanted = logits(model, inputs)
    twin = copy.deepcopy(model)
    aki.lock(model)
    assert torch.equal(logits(twin, inputs), wanted)
    assert not torch.allclose(logits(model, inputs), wanted)


def test_gradient_checkpointing_changes_nothing(model, inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    aki.unlock(model).train()

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.model.language_model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for kept, given in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(given, kept)


def test_compiled(model, inputs):
    aki.unlock(model)
    wanted = logits(model, inputs)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager"), inputs), wanted, atol=1e-5, rtol=1e-5)


def test_device_map(model, inputs, tmp_path):
    aki.unlock(model)
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    placed = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    placed["model.language_model"] = "disk"
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=placed, offload_folder=str(tmp_path / "o"))
    torch.testing.assert_close(logits(aki.unlock(again), inputs), wanted)


def test_beams_and_sampling(model, inputs):
    aki.unlock(model)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)
    torch.manual_seed(0)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=True).shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_prepared_mask_says_what_is_padding(model):
    inputs = chat(llava(), pad="right")
    real = inputs["attention_mask"].bool()
    prepared = real[:, None, None, :] & torch.ones(real.shape[1], real.shape[1]).tril().bool()
    aki.unlock(model)
    wanted = logits(model, inputs)
    given = logits(model, {**inputs, "attention_mask": prepared})
    torch.testing.assert_close(given[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL"])
def test_positions_of_several_axes_are_no_packed_documents(name):
    """An image's tokens share a temporal position, which in a text would begin a new document."""
    family = FAMILIES[name]()
    inputs = chat(family)
    aki.unlock(family.model)
    wanted = logits(family.model, inputs)
    inputs.pop("attention_mask")
    torch.testing.assert_close(logits(family.model, inputs), wanted, atol=1e-5, rtol=1e-5)


def test_calls_of_one_shape_are_not_taken_for_generation(model, inputs):
    """A prompt that happens to begin like the call before is all prompt, unless that call was one token shorter."""
    aki.unlock(model)
    shorter = {**inputs, "input_ids": inputs["input_ids"][:, :-2], "attention_mask": inputs["attention_mask"][:, :-2]}
    wanted = logits(model, {**inputs, "use_cache": False})
    logits(model, {**shorter, "use_cache": False})
    assert torch.equal(logits(model, {**inputs, "use_cache": False}), wanted)


def test_several_turns_are_seen_as_in_training(reader, processor):
    """With the processor, an image sees the question of its own turn at inference too, cached or not."""
    two_turns = turns("how many digits are red?", "count", "is there a blue one?")
    first = tokenised(processor, two_turns[:1], add_generation_prompt=True)
    both = tokenised(processor, two_turns, add_generation_prompt=True)
    start = first["input_ids"].shape[1]
    aki.unlock(reader, processor)
    torch.testing.assert_close(logits(reader, both)[:, :start], logits(reader, first), atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(reader.generate(**both, **options), reader.generate(**both, **options, use_cache=False))
    written = tokenised(aki.write_prompt_blocks(processor), two_turns, add_generation_prompt=True)
    torch.testing.assert_close(logits(reader, written), logits(reader, both))
    aki.unlock(reader)
    assert not torch.allclose(logits(reader, both)[:, :start], logits(reader, first), atol=1e-3)
    torch.testing.assert_close(logits(reader, written)[:, :start], logits(reader, first), atol=1e-5, rtol=1e-5)


def test_a_second_image_into_the_cache(reader, processor):
    """A turn that comes with a new image after a cached one: the new image sees its question, the old one stays."""
    aki.unlock(reader, processor)
    messages = turns("how many digits are red?", "count") + turns("is there a blue one?")
    whole = tokenised(processor, messages, add_generation_prompt=True)
    ids, images = whole["input_ids"], whole["pixel_values"]
    start = int((ids[0] == processor.image_token_id).nonzero()[4]) - 1
    with torch.no_grad():
        before = reader(input_ids=ids[:, :start], pixel_values=images[:1], use_cache=True)
        after = reader(
            input_ids=ids[:, start:],
            attention_mask=torch.ones_like(ids),
            pixel_values=images[1:],
            past_key_values=before.past_key_values,
        )
    torch.testing.assert_close(after.logits, logits(reader, whole)[:, start:], atol=1e-4, rtol=1e-4)


def test_peft(model, inputs, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    stock = copy.deepcopy(model)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    tuned = peft.get_peft_model(aki.unlock(model), config)
    tuned.train()(**inputs, labels=labels).loss.backward()
    adapters = [p for name, p in tuned.named_parameters() if "lora_B" in name and "language_model" in name]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters)
    aki.unlock(tuned.eval(), rule="mma")
    wanted = logits(tuned, inputs)
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path)
    causal = logits(loaded, inputs)
    assert not torch.allclose(causal, wanted, atol=1e-3)
    assert loaded.peft_config["default"].auto_mapping["attention_rule"] == "mma"
    torch.testing.assert_close(logits(aki.unlock(loaded), inputs), wanted)
    assert torch.equal(logits(aki.lock(loaded), inputs), causal)


def test_an_adapters_rule_is_taken(model, inputs):
    peft = pytest.importorskip("peft")
    stock = logits(model, inputs)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.peft_config["default"].auto_mapping = {"attention_rule": "causal"}
    torch.testing.assert_close(logits(aki.unlock(tuned), inputs), stock)


def sft_trainer(reader, processor, folder, **options):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "images": [picture(40 * i)],
            "messages": [{"role": "user", "content": QUESTIONS[i]}, {"role": "assistant", "content": "count"}],
        }
        for i in range(4)
    ]
    options |= {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": None, "gradient_checkpointing": False}
    options |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
    arguments = trl.SFTConfig(output_dir=str(folder), **options)
    dataset = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(reader, arguments, train_dataset=dataset, processing_class=processor)


def test_trl_labels_whole_chats_and_is_told(reader, processor, tmp_path):
    trainer = sft_trainer(aki.unlock(reader), processor, tmp_path)
    with pytest.warns(NothingOpensWarning, match="TRAINS WITH CAUSAL"):
        trainer.train()


def test_trl_with_the_one_line(reader, processor, tmp_path):
    trainer = sft_trainer(aki.unlock(reader), processor, tmp_path)
    trainer.data_collator = aki.write_prompt_blocks(trainer.data_collator)
    seen = []
    reader.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    before = {name: p.clone() for name, p in reader.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingOpensWarning)
        trainer.train()
    changed = [name for name, p in reader.named_parameters() if not torch.equal(p, before[name])]
    assert any("vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(mask is not None and mask.triu(1).any() for mask in seen), "every step looked ahead"


def test_trl_with_assistant_only_loss(reader, processor, tmp_path):
    """TRL's own switch does as well, where the template has generation tags."""
    trainer = sft_trainer(aki.unlock(reader), processor, tmp_path, assistant_only_loss=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingOpensWarning)
        trainer.train()


def tiny_mllama():
    config = AutoConfig.for_model(
        "mllama",
        text_config={
            **TEXT,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
        image_token_index=IMAGE_ID,
    )
    return AutoModelForImageTextToText.from_config(config)


def tiny_llama():
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT))


def tiny_t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))


def tiny_idefics():
    parts = {"vision_config": {**VISION, "embed_dim": 16}, "perceiver_config": {"use_resampler": False}}
    config = AutoConfig.for_model("idefics", **TEXT, **parts, cross_layer_interval=1)
    return AutoModelForImageTextToText.from_config(config)


def tiny_lfm2():
    """Its convolutions carry what came before from token to token."""
    config = AutoConfig.for_model(
        "lfm2_vl",
        text_config={"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"]},
        vision_config={"model_type": "siglip2_vision_model", **VISION},
        image_token_id=IMAGE_ID,
    )
    return AutoModelForImageTextToText.from_config(config)


def tiny_aki():
    parts = {"vision_config": {"model_type": "siglip_vision_model", **VISION}, "connector_config": {"connector": "mlp"}}
    config = aki.AkiConfig(**parts, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE_ID)
    return aki.AkiForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (tiny_idefics, "'idefics' reads images by cross-attention"),
        (tiny_lfm2, "layers of kind conv, which have no mask over pairs of tokens"),
        (tiny_aki, "AKI has its rule in its configuration: set model.config.attention_rule"),
        (tiny_mllama, "cross-attention: no image token stands in the decoder's sequence"),
        (tiny_llama, "no media tokens among its text"),
        (tiny_t5, "an encoder-decoder"),
        (lambda: torch.nn.Linear(2, 2), "no model of transformers"),
    ],
)
def test_what_cannot_be_unlocked_says_why(make, why):
    with pytest.raises(CannotUnlock, match=why):
        aki.unlock(make())


def test_flash_attention_is_refused(model, inputs):
    aki.unlock(model)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        logits(model, inputs)
