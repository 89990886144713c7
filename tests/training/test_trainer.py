"""Issue 12, entries 11 and 12: what the Trainer offers beside a plain loss: smoothing, a loss of one's own, metrics."""

from __future__ import annotations

import global_batch
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from aki.data.packing import PackedCollator
from aki.layout import IGNORE_INDEX
from aki.training.trainer import AkiTrainer

TRAINERS = pytest.mark.parametrize("trainer_class", [AkiTrainer, Trainer])
TEXT_ONLY = {1, 3}


def make(trainer_class, folder, rows=range(4), compute_loss_func=None, compute_metrics=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        per_device_eval_batch_size=2,
        label_names=["labels"],
        **options,
    )
    return trainer_class(
        global_batch.build(),
        arguments,
        eval_dataset=[global_batch.sample(number, number not in TEXT_ONLY) for number in rows],
        data_collator=PackedCollator(0),
        compute_loss_func=compute_loss_func,
        compute_metrics=compute_metrics,
    )


def batch(prompt_blocks: bool = True):
    rows = PackedCollator(0)([global_batch.sample(number) for number in range(3)])
    # What stands on a placeholder is not learned, whatever it is.
    rows["labels"][rows["input_ids"] == global_batch.IMAGE] = 7
    return rows if prompt_blocks else {name: values for name, values in rows.items() if name != "prompt_block_ids"}


def loss_of(trainer, rows):
    """As `training_step` computes it."""
    model = trainer.model.train()
    return trainer.compute_loss(model, trainer._prepare_inputs(rows))


def by_hand(epsilon: float = 0.0) -> torch.Tensor:
    """Cross-entropy with smoothing over the answers, by torch's own function."""
    model, rows = global_batch.build().train(), batch()
    targets = rows["labels"].masked_fill(rows["input_ids"] == global_batch.IMAGE, IGNORE_INDEX)[:, 1:]
    logits = model(**{name: values for name, values in rows.items() if name != "labels"}).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 1e-7, 0.3])
@pytest.mark.parametrize("prompt_blocks", [True, False])
def test_12_11_smoothing(tmp_path, epsilon, prompt_blocks):
    trainer = make(AkiTrainer, tmp_path, label_smoothing_factor=epsilon)
    torch.testing.assert_close(loss_of(trainer, batch(prompt_blocks)), by_hand(epsilon))


@pytest.mark.parametrize("epsilon", [1e-7, 0.3])
def test_12_11_smoothing_by_transformers_own_trainer(tmp_path, epsilon):
    rows = batch()
    # Labels on placeholders are the collator's to leave out, where the model does not see the labels.
    rows["labels"][rows["input_ids"] == global_batch.IMAGE] = IGNORE_INDEX
    trainer = make(Trainer, tmp_path, label_smoothing_factor=epsilon)
    torch.testing.assert_close(loss_of(trainer, rows), by_hand(epsilon))


@pytest.mark.parametrize("prompt_blocks", [True, False])
def test_12_11_a_loss_of_ones_own_gets_all_logits_and_all_labels(tmp_path, prompt_blocks):
    def own(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    trainer = make(AkiTrainer, tmp_path, compute_loss_func=own)
    torch.testing.assert_close(loss_of(trainer, batch(prompt_blocks)), by_hand())


def answered(prediction) -> dict[str, float]:
    logits, labels = prediction
    assert isinstance(logits, np.ndarray), "more than logits was gathered"
    assert logits.shape[:2] == labels.shape
    kept = labels[:, 1:] != IGNORE_INDEX
    return {"right": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[kept].mean())}


@TRAINERS
def test_12_12_evaluation_with_metrics_gathers_logits_alone(tmp_path, trainer_class):
    trainer = make(trainer_class, tmp_path, compute_metrics=answered)
    model, right = trainer.model.eval(), []
    with torch.no_grad():
        for row in trainer.eval_dataset:
            predicted, labels = model(**row).logits[:, :-1].argmax(-1), row["labels"][:, 1:]
            right += (predicted == labels)[labels != IGNORE_INDEX].tolist()
    metrics = trainer.evaluate()
    assert metrics["eval_right"] == pytest.approx(np.mean(right))
    assert metrics["eval_loss"] > 0
