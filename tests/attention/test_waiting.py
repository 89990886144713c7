"""In a training step nothing of ours waits for the GPU: what is read off a batch is read before it is moved there.

The meta device stands in for a GPU: its tensors have no values, so that whatever asks for one raises.
"""

from __future__ import annotations

import pytest
import torch
from test_backends import IMAGE, LENGTH, batch, build
from transformers import TrainingArguments
from transformers.models.llava.modeling_llava import LlavaModel
from unlock_families import IMAGE_ID, llava

import aki
from aki.attention import LeakError, NothingOpensError
from aki.attention.segments import decode
from aki.training.trainer import AkiTrainer

RULES = ("causal", "mma", "concentric", "prefix", "mma+image_bidirectional")


def padded() -> dict[str, torch.Tensor]:
    inputs = batch("right")
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["prompt_block_ids"] >= 0, -100)}


def packed() -> dict[str, torch.Tensor]:
    """The three rows as one, without a mask: positions restart."""
    inputs = padded()
    joined = {name: inputs[name].reshape(1, -1) for name in ("input_ids", "prompt_block_ids", "labels")}
    joined["labels"][:, ::LENGTH] = -100
    return joined | {"position_ids": torch.arange(LENGTH).repeat(3)[None], "pixel_values": inputs["pixel_values"]}


BATCHES = {"padded": padded, "packed": packed}


def trainer_of(model, folder, device, monkeypatch, inputs=None) -> AkiTrainer:
    found = TrainingArguments.device.fget
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: found(self) and torch.device(device)))
    arguments = TrainingArguments(str(folder), report_to="none", bf16=device == "cuda")
    options = {"train_dataset": [0, 0], "data_collator": lambda rows: inputs}
    return AkiTrainer(model=model.train(), args=arguments, **options)


def masks_given(decoder) -> list:
    """What the decoder was called with as `attention_mask`, from now on."""
    seen: list = []
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_reads_no_value_off_the_device(rule, form, tmp_path, monkeypatch):
    model = build("auto")
    model.config.attention_rule = rule
    trainer, seen = trainer_of(model, tmp_path, "meta", monkeypatch), masks_given(model.model.language_model)
    loss = trainer.training_step(model, BATCHES[form](), num_items_in_batch=torch.empty((), device="meta"))
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.ndim > 1)
    assert seen[0].device.type == "cpu"
    assert {segment.row for segment in decode(seen[0])} == ({0} if form == "packed" else {0, 1, 2})


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("rule", ["causal", "mma", "prefix"])
def test_nor_does_an_unlocked_models(rule, form, tmp_path, monkeypatch):
    """LLaVA's own count of its placeholders reads values; it is taken out."""
    model, inputs = llava().model, unlocked_batch(form)
    aki.unlock(model, rule=rule)
    model.model.vision_tower.requires_grad_(False)
    # The backward of LLaVA's masked_scatter, too.
    model.model.multi_modal_projector.requires_grad_(False)
    monkeypatch.setattr(LlavaModel, "get_placeholder_mask", lambda self, ids, **_: (ids == IMAGE_ID)[..., None])
    trainer, seen = trainer_of(model, tmp_path, "meta", monkeypatch), masks_given(model.model.language_model)
    loss = trainer.training_step(model, inputs, num_items_in_batch=torch.empty((), device="meta"))
    assert loss.device.type == "meta"
    assert seen[0].device.type == "cpu"
    assert len(decode(seen[0])) > 1


def unlocked_batch(form: str) -> dict[str, torch.Tensor]:
    family = llava()
    pictures = family.runs[0][1]
    ids = torch.randint(4, 19, (2, pictures + 12), generator=torch.Generator().manual_seed(0))
    ids[:, 2 : 2 + pictures] = IMAGE_ID
    labels = ids.clone()
    labels[:, :-4] = -100
    inputs = {"input_ids": ids, "labels": labels, **family.media}
    if form == "padded":
        mask = torch.ones_like(ids)
        mask[1, -1] = 0
        return inputs | {"attention_mask": mask}
    joined = {name: inputs[name].reshape(1, -1) for name in ("input_ids", "labels")}
    return inputs | joined | {"position_ids": torch.arange(ids.shape[1]).repeat(2)[None]}


@pytest.mark.parametrize("form", BATCHES)
def test_a_step_from_the_travelling_layout_is_the_step_without_it(form, tmp_path, monkeypatch):
    """Loss and gradients of the trainer's step against a plain forward of the same model, bit for bit."""
    ours, plain, inputs = build("segments"), build("segments").train(), BATCHES[form]()
    count = (inputs["labels"][:, 1:] != -100).sum()
    trainer = trainer_of(ours, tmp_path, "cpu", monkeypatch)
    loss = trainer.training_step(ours, dict(inputs), num_items_in_batch=count)
    wanted = plain(**inputs, num_items_in_batch=count).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=0)
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_leak_is_refused_before_the_batch_is_moved(tmp_path, monkeypatch):
    model, inputs = build("auto"), padded()
    model.config.attention_rule = "mma"
    trainer = trainer_of(model, tmp_path, "meta", monkeypatch)
    with pytest.raises(LeakError, match="leaks in row 0"):
        trainer.training_step(model, inputs | {"labels": inputs["input_ids"]})
    captions = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with pytest.raises(NothingOpensError, match="opens nothing"):
        trainer.training_step(model, inputs | {"labels": captions, "prompt_block_ids": torch.full_like(captions, -1)})


def test_the_trainers_own_loader_leaves_batches_where_they_can_be_read(tmp_path, monkeypatch):
    model, inputs = build("auto"), padded()
    trainer = trainer_of(model, tmp_path, "cpu", monkeypatch, inputs)
    # As accelerate's would be where there is a GPU.
    monkeypatch.setattr(trainer.accelerator.state, "device", torch.device("meta"))
    (found,) = list(trainer.get_train_dataloader())
    assert {value.device.type for value in found.values()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("rule", RULES)
def test_on_cuda_no_step_waits(rule, form, tmp_path, monkeypatch):
    model = build("auto")
    model.config.attention_rule = rule
    trainer = trainer_of(model, tmp_path, "cuda", monkeypatch)
    count = torch.tensor(10, device="cuda")
    trainer.training_step(model, BATCHES[form](), num_items_in_batch=count)  # loads the libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(model, BATCHES[form](), num_items_in_batch=count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
