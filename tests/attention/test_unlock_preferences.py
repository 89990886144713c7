"""TRL's DPO and GRPO with an unlocked policy: under which rule their reference reads, and the line that mends it."""

import warnings

import pytest
import torch
from transformers import AutoModelForImageTextToText
from unlock_chats import QUESTIONS, picture

import aki
from aki.attention import NothingOpensWarning

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

OPTIONS = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 0.0, "report_to": []}
OPTIONS |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
LEVEL = torch.tensor(2.0).log().item()
"""DPO's loss where policy and reference agree in everything: -log sigmoid(0)."""


@pytest.fixture
def stock(reader, processor, tmp_path):
    """The folder of a model as it was published, without a rule."""
    reader.save_pretrained(tmp_path / "stock")
    processor.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def policy(stock, processor):
    return aki.unlock(AutoModelForImageTextToText.from_pretrained(stock), processor)


def asked(**columns):
    rows = [
        {"images": [picture(40 * i)], "prompt": [{"role": "user", "content": QUESTIONS[i]}], **columns}
        for i in range(2)
    ]
    return datasets.Dataset.from_list(rows)


def dpo(model, processor, folder, **options):
    answers = {"chosen": "count", "rejected": "is it red"}
    data = asked(**{name: [{"role": "assistant", "content": text}] for name, text in answers.items()})
    arguments = trl.DPOConfig(output_dir=str(folder), max_length=None, **OPTIONS)
    return trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=processor, **options)


def grpo(model, processor, folder):
    settings = OPTIONS | {"num_generations": 2, "max_completion_length": 4, "beta": 0.5}
    arguments = trl.GRPOConfig(output_dir=str(folder), **settings)

    def reward(completions, **_):
        return [float(number) for number in range(len(completions))]

    return trl.GRPOTrainer(model, reward, arguments, train_dataset=asked(), processing_class=processor)


def first_log(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingOpensWarning)
        trainer.train()
    return trainer.state.log_history[0]


def test_the_reference_that_trl_makes_is_causal(policy, processor, tmp_path):
    """Why the line is there. The day this fails, docs/unlock.md can lose it."""
    assert first_log(dpo(policy, processor, tmp_path))["loss"] != pytest.approx(LEVEL, abs=1e-4)
    assert first_log(grpo(policy, processor, tmp_path))["kl"] > 1e-4


def test_dpo_with_the_line(policy, processor, tmp_path):
    trainer = dpo(policy, processor, tmp_path)
    aki.unlock(trainer.ref_model, processor)
    log = first_log(trainer)
    assert log["loss"] == pytest.approx(LEVEL, abs=1e-6)
    # The log-probabilities are those of a model unlocked by hand, whose prompt is what TRL doesn't call completion.
    batch = next(iter(trainer.get_train_dataloader()))
    answers = batch.pop("completion_mask").bool() & batch["attention_mask"].bool()
    blocks = torch.zeros_like(batch["input_ids"]).masked_fill(answers, -1)
    for rule, same in (("mma", True), ("causal", False)):
        aki.unlock(policy.eval(), rule=rule)
        with torch.no_grad():
            logits = policy(**batch, prompt_block_ids=blocks).logits[:, :-1].log_softmax(-1)
        chosen = logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0].masked_fill(~answers[:, 1:], 0).sum(1)[:2]
        assert (chosen.mean().item() == pytest.approx(log["logps/chosen"], abs=1e-3)) == same


def test_grpo_with_the_line(policy, processor, tmp_path):
    trainer = grpo(policy, processor, tmp_path)
    aki.unlock(trainer.ref_model, processor)
    assert first_log(trainer)["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("how", [dpo, grpo])
def test_a_policy_that_was_saved_unlocked_needs_no_line(policy, processor, tmp_path, how):
    """TRL opens the reference from where the policy came from."""
    policy.save_pretrained(tmp_path / "sft")
    processor.save_pretrained(tmp_path / "sft")
    log = first_log(how(AutoModelForImageTextToText.from_pretrained(tmp_path / "sft"), processor, tmp_path))
    name, level = ("loss", LEVEL) if how is dpo else ("kl", 0)
    assert log[name] == pytest.approx(level, abs=1e-6)


def test_an_adapter_needs_no_line(policy, processor, tmp_path):
    """Its reference is the policy itself, with the adapter switched off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = dpo(policy, processor, tmp_path, peft_config=config)
    assert trainer.ref_model is None
    assert first_log(trainer)["loss"] == pytest.approx(LEVEL, abs=1e-6)
