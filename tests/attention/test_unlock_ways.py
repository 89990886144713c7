"""Ways in which people use a model, unlocked: PEFT, compile, device maps, saving, generating, several turns."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer, TrainingArguments, pipeline
from unlock_chats import chat, picture
from unlock_families import FAMILIES, build, llava

import aki
from aki.attention import CannotUnlock, LeakError, NothingOpensWarning
from aki.compat import CACHE, given_cache


@pytest.fixture
def model():
    return llava().model


@pytest.fixture
def inputs():
    return chat(llava())


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


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


def test_embeddings_alone_are_said_to_be_causal(model, inputs):
    """They may hold an image's, which nothing shows."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    aki.unlock(model)
    with pytest.warns(NothingOpensWarning, match="this call is causal"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_a_decoder_that_is_not_called_is_an_error(model, inputs, monkeypatch):
    """The rule would be named and not be there."""
    monkeypatch.setattr(type(model), "get_decoder", lambda self: copy.deepcopy(self.model.language_model))
    aki.unlock(model)
    with pytest.raises(CannotUnlock, match="answered without its decoder, LlamaModel"):
        logits(model, inputs)


def test_rule_is_saved_with_the_model(model, inputs, tmp_path):
    aki.unlock(model, rule="causal")
    aki.unlock(model, rule="mma")
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.config.attention_rule == "mma"
    torch.testing.assert_close(logits(again, inputs), wanted)
    aki.lock(again)
    again.save_pretrained(tmp_path / "locked")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "locked"), "attention_rule")


def test_what_is_saved_under_a_rule_says_once_who_answers_causally(model, tmp_path, caplog):
    aki.unlock(model, rule="causal").save_pretrained(tmp_path)
    assert not caplog.records
    aki.unlock(model, rule="mma").save_pretrained(tmp_path)
    copy.deepcopy(model).save_pretrained(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    for named in (type(model).__name__, "'mma'", "vLLM", "SGLang", "llama.cpp", "TRL", "`import aki`"):
        assert named in said
    aki.lock(model).save_pretrained(tmp_path)
    assert len(caplog.records) == 1


def test_an_adapter_and_a_trainers_checkpoint_say_it_too(model, tmp_path, caplog):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    tuned = aki.unlock(peft.get_peft_model(model, config), rule="mma")
    tuned.save_pretrained(tmp_path / "adapter")
    assert [record.getMessage().count("answers causally") for record in caplog.records] == [1]
    aki.unlock(tuned)
    Trainer(tuned, TrainingArguments(str(tmp_path), use_cpu=True)).save_model()
    assert [record.getMessage().count("answers causally") for record in caplog.records] == [1, 1]


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


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # for another name of the same
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


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.fixture
def shallow(model):
    """One layer is quicker to compile than two."""
    del model.model.language_model.layers[1:]
    return model


def test_compiled(shallow, inputs):
    model = aki.unlock(shallow)
    wanted = logits(model, inputs)
    torch.testing.assert_close(logits(compiled(model), inputs), wanted, atol=1e-5, rtol=1e-5)


def test_what_is_compiled_already_follows(shallow):
    """Compiled code doesn't look again for hooks. The rule opens text, so that there is no image to compile for."""
    model = shallow
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    stock = logits(model, inputs)
    wanted = logits(aki.unlock(model, rule="prefix"), inputs)
    aki.lock(model).compile(backend="eager")
    torch.testing.assert_close(logits(model, inputs), stock, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(aki.unlock(model, rule="prefix"), inputs), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(aki.lock(model), inputs), stock, atol=1e-5, rtol=1e-5)


def parallel_and_compiled(model):
    return compiled(torch.nn.DataParallel(model))


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, compiled, parallel_and_compiled])
def test_within_wrappers(model, inputs, wrap):
    stock = logits(model, inputs)
    wanted = logits(aki.unlock(model), inputs)
    aki.unlock(wrap(aki.lock(model)))
    assert torch.equal(logits(model, inputs), wanted)
    aki.lock(wrap(model))
    assert torch.equal(logits(model, inputs), stock)


def test_threads_are_within_the_model_at_once(model, inputs):
    """As the replicas of DataParallel are, and the requests of a server."""
    aki.unlock(model)
    batches = [inputs, {name: tensor[:1] for name, tensor in inputs.items()}]
    wanted = [logits(model, batch) for batch in batches]
    both = Barrier(2, timeout=60)

    def wait(*_) -> None:
        both.wait()

    model.model.vision_tower.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        given = list(threads.map(lambda batch: logits(model, batch), batches))
    torch.testing.assert_close(given, wanted)


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


def test_assistants_candidates_are_no_prompt(model, inputs):
    """They come with the prompt in the first call, and would be seen ahead by its media."""
    aki.unlock(model)
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = model.generate(**one, **options)
    assert torch.equal(model.generate(**one, **options, assistant_model=copy.deepcopy(model)), alone)
    other = build(model.config)
    other.lm_head.weight.data.normal_(0, 0.2)
    assert torch.equal(model.generate(**one, **options, assistant_model=aki.unlock(other)), alone)
    assert torch.equal(model.generate(**one, **options, prompt_lookup_num_tokens=2), alone)


def test_a_pipeline(reader, processor):
    asked = pipeline("image-text-to-text", model=aki.unlock(reader, processor), processor=processor)
    said = asked(turns("how many digits are red?"), max_new_tokens=4, do_sample=False, return_full_text=False)
    prompt = tokenised(processor, turns("how many digits are red?"), add_generation_prompt=True)
    tokens = reader.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert said[0]["generated_text"] == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_rows_with_and_without_images_are_as_alone(model, inputs):
    inputs["input_ids"][1] = torch.randint(
        3, 20, inputs["input_ids"].shape[1:], generator=torch.Generator().manual_seed(0)
    )
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    aki.unlock(model)
    together = logits(model, inputs)
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    second = {"input_ids": inputs["input_ids"][1:]}
    torch.testing.assert_close(together[:1], logits(model, first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:], logits(model, second), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["prompt_block_ids", "labels"])
def test_another_shape_is_a_sentence(model, inputs, name):
    aki.unlock(model)
    with pytest.raises(ValueError, match=rf"{name} have the shape \(2, 3\), input_ids"):
        model(**inputs, **{name: torch.zeros(2, 3, dtype=torch.long)})


def test_unlocked_twice_and_locked_twice(model, inputs):
    stock = logits(model, inputs)
    assert torch.equal(logits(aki.lock(model), inputs), stock), "never unlocked"
    once = logits(aki.unlock(model), inputs)
    assert torch.equal(logits(aki.unlock(model), inputs), once)
    assert torch.equal(logits(aki.lock(aki.lock(model)), inputs), stock)


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
            **{CACHE: given_cache(before)},
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
    assert loaded.peft_config["default"].auto_mapping["attention_rule"] == "mma"
    torch.testing.assert_close(logits(loaded, inputs), wanted)
    causal = logits(aki.lock(loaded), inputs)
    assert not torch.allclose(causal, wanted, atol=1e-3)
    torch.testing.assert_close(logits(aki.unlock(loaded), inputs), wanted)
    assert torch.equal(logits(aki.lock(loaded), inputs), causal)


def test_an_adapters_rule_is_taken(model, inputs):
    peft = pytest.importorskip("peft")
    stock = logits(model, inputs)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.peft_config["default"].auto_mapping = {"attention_rule": "causal"}
    torch.testing.assert_close(logits(aki.unlock(torch.nn.DataParallel(tuned)), inputs), stock)


def test_flash_attention_switched_on_later_is_refused(model, inputs):
    """It takes no mask; unlocked, the model computes by segments, which is FlashAttention on a GPU."""
    aki.unlock(model)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        logits(model, inputs)
