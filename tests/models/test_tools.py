"""What stands above transformers, with the real packages and a picture in each batch; docs/using.md has the table."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from model_builders import TOKENIZE, assert_same, assistant, user
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import aki
from aki.data.collate import ChatCollator
from aki.data.schema import Sample


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def inputs(processor, picture):
    return processor.apply_chat_template([user(picture(10), "what is this ?")], add_generation_prompt=True, **TOKENIZE)


@pytest.fixture
def batch(processor, picture):
    samples = [
        Sample([user(picture(10 * i), "what is this ?"), assistant("a red one")], "test", str(i)) for i in (1, 2)
    ]
    return ChatCollator(processor, max_length=64)(samples)


def options(folder, **more):
    plain = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    plain |= {"gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return {"output_dir": str(folder)} | plain | more


def asked(picture, i: int) -> dict:
    return {"images": [picture(40 * i)], "prompt": [{"role": "user", "content": "what is this ?"}]}


def moved(model, before) -> set[str]:
    return {
        n.removeprefix("model.").split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }


def weights(model) -> dict:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class TestTrl:
    def test_sft(self, model, processor, picture, tmp_path):
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        answer = [{"role": "assistant", "content": "a red one"}]
        rows = [asked(picture, i) | {"completion": answer} for i in range(4)]
        arguments = trl.SFTConfig(**options(tmp_path, max_length=None))
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor
        )
        trainer.data_collator = aki.write_prompt_blocks(trainer.data_collator)
        before = weights(model)
        trainer.train()
        assert {"connector", "language_model", "lm_head"} <= moved(model, before)

    def test_dpo(self, model, processor, picture, tmp_path):
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        model.config.attention_rule = "causal"
        answers = {
            "chosen": [{"role": "assistant", "content": "a red one"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        rows = [asked(picture, i) | answers for i in range(4)]
        trainer = trl.DPOTrainer(
            model,
            ref_model=copy.deepcopy(model),
            args=trl.DPOConfig(**options(tmp_path, max_length=None)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=processor,
        )
        before = weights(model)
        trainer.train()
        assert {"connector", "language_model", "lm_head"} <= moved(model, before)

    def test_grpo(self, model, processor, picture, tmp_path):
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        model.config.attention_rule = "causal"
        rows = [asked(picture, i) for i in range(4)]
        how = {"num_generations": 2, "max_completion_length": 4, "temperature": 2.0}
        trainer = trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
            args=trl.GRPOConfig(**options(tmp_path, **how)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=processor,
        )
        before = weights(model)
        trainer.train()
        assert {"connector", "language_model"} <= moved(model, before)


class TestPeft:
    @pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
    def test_adapters_learn_and_merge(self, model, inputs, batch, dora):
        config = LoraConfig(
            r=2, use_dora=dora, target_modules=r".*language_model.*(q_proj|v_proj)", task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(model, config).train()
        optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=1.0)
        for _ in range(2):
            tuned(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            wanted = tuned.eval()(**inputs).logits
            assert_same(tuned.merge_and_unload()(**inputs).logits, wanted)

    def test_prompt_tuning(self, model, inputs, batch):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        tuned = get_peft_model(model, config).train()
        tuned(**batch).loss.backward()
        gradient = tuned.prompt_encoder.default.embedding.weight.grad
        assert gradient.abs().max() > 0
        with torch.no_grad():
            logits = tuned.eval()(**inputs).logits
        assert logits.shape[1] == inputs["input_ids"].shape[1] + 3


class TestAccelerate:
    def test_dispatched(self, make_model, inputs, tmp_path):
        model, where = make_model(), {"model.vision_encoder": "cpu", "model.connector": "cpu", "lm_head": "cpu"}
        with torch.no_grad():
            wanted = model(**inputs).logits
            placed = dispatch_model(model, where | {"model.language_model": "disk"}, offload_dir=tmp_path)
            assert torch.equal(placed(**inputs).logits, wanted)

    def test_offloaded(self, make_model, inputs):
        """Not with SigLIP: its own pooling head is torch's MultiheadAttention, which takes no offloaded weights."""
        model = make_model(vision="clip")
        with torch.no_grad():
            wanted = model(**inputs).logits
            cpu_offload(model, torch.device("cpu"))
            assert torch.equal(model(**inputs).logits, wanted)


def test_predict(model, processor, picture, tmp_path):
    samples = [Sample([user(picture(20 * i), "what is this ?"), assistant("no")], "test", str(i)) for i in range(3)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False, per_device_eval_batch_size=2
    )
    trainer = Trainer(model, arguments, data_collator=ChatCollator(processor, max_length=64))
    found = trainer.predict(samples)
    logits = found.predictions
    assert logits.shape[0] == 3
    assert found.metrics["test_loss"] > 0
    with torch.no_grad():
        wanted = model(**ChatCollator(processor, max_length=64)(samples[:1])).logits
    assert_same(torch.tensor(logits[0, : wanted.shape[1]]), wanted[0])


def test_compiled_in_place(model, inputs):
    with torch.no_grad():
        wanted = model(**inputs).logits
        model.compile(backend="eager")
        assert_same(model(**inputs).logits, wanted)


@pytest.mark.parametrize("rule", ["mma", "causal"])
def test_exported(make_model, inputs, rule):
    model = make_model(attention_rule=rule)
    tensors = {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "prompt_block_ids")}
    model.forward = functools.partial(model.forward, use_cache=False, return_dict=True)
    with torch.no_grad():
        wanted = model(**tensors).logits
        program = torch.export.export(model, (), tensors, strict=False)
        assert torch.equal(program.module()(**tensors).logits, wanted)


def test_vllm_is_told_how_many_tokens_a_picture_takes(processor, picture):
    found = processor._get_num_multimodal_tokens(image_sizes=[[20, 30], [7, 9]])
    inputs = processor(images=[picture(1)], text="<image>", return_tensors="pt")
    placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert found.num_image_tokens == [placeholders, placeholders]
