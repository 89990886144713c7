"""A run of the trainer, or one sharded step, whose results do not depend on how a global batch is dealt out.

Imported by the tests, and run by torchrun as `global_batch.py WHAT FILE`: rank 0 writes what it has at the end.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, SiglipVisionConfig, TrainingArguments

from aki import AkiConfig, AkiForConditionalGeneration
from aki.data.packing import PackedCollator, Row, join
from aki.layout import IGNORE_INDEX
from aki.training.trainer import AkiTrainer, supervised_positions

IMAGE, PICTURE = 3, 4
SAMPLES = [(5, 1), (9, 6), (4, 2), (12, 3), (6, 5), (7, 1), (5, 4), (8, 2)]
"""Tokens of the question and of the answer: the answers' lengths differ, so that a mean of means is not the mean."""


def build(attention: str = "segments") -> AkiForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=8, patch_size=4, **sizes).to_dict()
    config = AkiConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=40, **sizes),
        connector_config={"connector": "mlp"},
        image_token_id=IMAGE,
    )
    model = AkiForConditionalGeneration._from_config(config, attn_implementation={"text_config": attention})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    return model


def sample(number: int, picture: bool = True) -> Row:
    generator = torch.Generator().manual_seed(number)
    question, answer = SAMPLES[number]
    ids = torch.randint(5, 40, (1, PICTURE + question + answer), generator=generator)
    ids[:, :PICTURE] = IMAGE
    labels, blocks = ids.clone(), torch.zeros_like(ids)
    labels[:, : PICTURE + question], blocks[:, PICTURE + question :] = IGNORE_INDEX, -1
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    row = {"input_ids": ids, "labels": labels, "prompt_block_ids": blocks}
    return row | {"pixel_values": pixels} if picture else {name: values[:, PICTURE:] for name, values in row.items()}


class Rows(Dataset):
    """Rows of so many samples each, in order."""

    def __init__(self, samples_a_row: int, text_only: Collection[int] = ()):
        numbers = range(len(SAMPLES))
        self.rows = [
            join([sample(i, i not in text_only) for i in numbers[start : start + samples_a_row]])
            for start in numbers[::samples_a_row]
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class InOrder(AkiTrainer):
    """Samples are dealt out as they come, so that every way of dealing has the same global batches."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(
    samples_a_row: int = 1,
    batch: int = 4,
    accumulation: int = 1,
    text_only: Collection[int] = (),
    frozen: Collection[str] = (),
    **more,
) -> dict[str, Tensor]:
    """Weights after an epoch of SGD over the samples, four a step.

    Args:
        text_only: numbers of the samples without a picture.
        frozen: parts that are not trained.
        more: arguments of training.
    """
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
        label_names=["labels"],
        **more,
    )
    model = build()
    for part in frozen:
        model.parts[part].requires_grad_(False)
    trainer = InOrder(model, arguments, train_dataset=Rows(samples_a_row, text_only), data_collator=PackedCollator(0))
    trainer.train()
    assert trainer.state.global_step == len(SAMPLES) // 4
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def sharded_step(rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of all samples; with several ranks the model is sharded, and each takes its share of them."""
    model = build()
    own = [sample(i) for i in range(len(SAMPLES)) if i % ranks == rank]
    batch = PackedCollator(0)([join(own)])
    labels = sum(answer for _, answer in SAMPLES)
    if ranks > 1:
        mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
        for layer in model.model.language_model.layers:
            dist.fsdp.fully_shard(layer, mesh=mesh)
        dist.fsdp.fully_shard(model, mesh=mesh)
    loss = model(
        **batch, logits_to_keep=supervised_positions(batch["labels"]), num_items_in_batch=torch.tensor(labels)
    ).loss
    # Sharding takes the mean of the ranks' gradients, and what is wanted is their sum.
    (loss * ranks).backward()
    total = loss.detach()
    if ranks > 1:
        dist.all_reduce(total)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if ranks > 1 else g for name, g in gradients.items()}
    return {"loss": total, **whole}


RUNS = {
    "ranks": lambda: train(batch=2),
    "ranks and accumulation": lambda: train(batch=1, accumulation=2),
    "ranks and packing": lambda: train(samples_a_row=2, batch=1),
    "fsdp": lambda: sharded_step(dist.get_rank(), dist.get_world_size()),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = RUNS[sys.argv[1]]()
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()
