"""transformers' Trainer with the leak guard, whole checkpoints, and progress that a person can read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from aki.attention import NothingOpensError, check_no_leak, get_rule
from aki.attention.families import underlying_model
from aki.attention.unlock import layout_of_batch
from aki.data.feed import Loader
from aki.data.report import DataReport
from aki.layout import IGNORE_INDEX, SequenceLayout, moved
from aki.models.opening import as_stock
from aki.models.other import is_aki
from aki.training.checkpoint import WHOLE, mark_whole
from aki.training.data import save_position
from aki.training.sharding import complete_states, keep_loss

NEVER_OPENS = 100
"""Batches with media that open nothing, after which a stage is taken for one that never opens anything."""


class AkiTrainer(Trainer):
    """Refuses batches that leak, measures by `score`, and marks a checkpoint once all of it is written.

    It trains on a list of chats too, with `data_collator=aki.ChatCollator(processor, max_length=...)`:
    examples/train_aki.py.

    Args:
        score: model -> metrics, called every `eval_steps` instead of the Trainer's own evaluation.
        loader: the batches of this process, instead of a `train_dataset` that is shuffled and dealt out here.
        may_open_nothing: a batch with media may open nothing, as long as one of the first opens something.
    """

    def __init__(
        self,
        *args,
        score: Callable[[Any], dict[str, float]] | None = None,
        loader: Loader | None = None,
        may_open_nothing: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs, **({} if loader is None else {"train_dataset": loader.feed}))
        if self.is_deepspeed_enabled:
            # What is saved is whole, also of the third stage.
            zero = self.accelerator.deepspeed_plugin.deepspeed_config.setdefault("zero_optimization", {})
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        if self.is_fsdp_enabled:
            keep_loss(self.accelerator.state.fsdp_plugin)
        self.score, self.loader = score, loader
        self.guard_seconds = 0.0
        self.may_open_nothing, self.opened, self.shut = may_open_nothing, False, 0

    def _build_accelerator_args(self, **kwargs) -> dict[str, Any]:
        """As the Trainer's, which with gradient checkpointing takes it that each parameter has a gradient: those behind
        an encoder's last hidden state (a pooling head) have none."""
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True
        return super()._build_accelerator_args(**kwargs)

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader() if self.loader is None else self.loader
        if isinstance(loader, DataLoaderShard):
            loader.device = None  # `_prepare_inputs` moves batches
        return loader

    def _prepare_input(self, data: Any) -> Any:
        """As the Trainer's, which waits for the copy to a GPU."""
        plain = isinstance(data, Tensor) and not self.is_deepspeed_enabled
        return moved(data, self.args.device) if plain else super()._prepare_input(data)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the Trainer's. What has to be read off a batch is read before it is moved to a GPU, which the host would
        wait for, and goes with it; pictures that come as bytes are normalised where the model is."""
        started = time.perf_counter()
        layout = self._guard(self.model, inputs)
        self.guard_seconds += time.perf_counter() - started
        if layout is not None:
            inputs = self._described(inputs, layout)
        inputs = super()._prepare_inputs(inputs)
        pixels = inputs.get("pixel_values")
        fast = None if self.loader is None else self.loader.feed.collators[0].fast
        if fast is not None and pixels is not None and pixels.dtype == torch.uint8:
            inputs["pixel_values"] = fast.pixels.normalise(pixels)
        return inputs

    def _set_signature_columns_if_needed(self) -> None:
        """As the Trainer's, which would take chats for columns that the model does not read."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += ["messages", "images", "id"]

    def data_report(self) -> DataReport:
        """What all processes have counted; every one of them has to ask."""
        assert self.loader is not None
        total = DataReport(self.loader.report.max_share)
        for report in gather_object([self.loader.report]):
            total.merge(report)
        return total

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.loader is not None and "loss" in logs:
            logs["skipped_samples"] = self.loader.report.skipped
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's; the mark comes last, so that a checkpoint cut off by a kill is never resumed from."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            (folder / WHOLE).unlink(missing_ok=True)  # of a damaged one that is written over
        super()._save_checkpoint(model, trial)
        if self.loader is not None:
            save_position(folder, self.loader, self.args.process_index, self.args.world_size)
        unlogged = {"loss": self._tr_loss.item(), "since": self._globalstep_last_logged}
        (folder / f"unlogged-{self.args.process_index}.json").write_text(json.dumps(unlogged))
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            mark_whole(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            # accelerate puts one around it, which may skip a step.
            wrapped: Any = self.optimizer
            complete_states(wrapped.optimizer)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As the Trainer's, which passes over weights that a family saves under the names of its published files."""
        model = model or self.model
        if self.is_fsdp_enabled or not isinstance(model, PreTrainedModel) or is_aki(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with as_stock():
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, which keeps the next step's rate of a shorter run, where this one was given more steps."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is not None and isinstance(schedule, LambdaLR):
            shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
            rates = [base * share for base, share in zip(schedule.base_lrs, shares, strict=True)]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates  # what the log says

    def _run_epoch(self, *, epoch: int, epochs_trained: int, resume_from_checkpoint: str | None, **kwargs) -> None:
        """As the Trainer's, which forgets the loss since the last log, and takes a step after the last one, when it
        resumes."""
        if resume_from_checkpoint is not None:
            self._find_best()
        if self.state.global_step >= self.state.max_steps or self._out_of_patience():
            self.control.should_training_stop = True
            return
        if resume_from_checkpoint is not None:
            unlogged = Path(resume_from_checkpoint) / f"unlogged-{self.args.process_index}.json"
            if epoch == epochs_trained and unlogged.exists():
                found = json.loads(unlogged.read_text())
                self._tr_loss += found["loss"]
                self._globalstep_last_logged = found["since"]
        super()._run_epoch(
            epoch=epoch, epochs_trained=epochs_trained, resume_from_checkpoint=resume_from_checkpoint, **kwargs
        )

    def _find_best(self) -> None:
        """The best checkpoint where the run lies now; its folder may have moved."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _out_of_patience(self) -> bool:
        """Whether it stopped early, just before it was cut off."""
        stopping = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        return any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stopping)

    def _load_best_model(self) -> None:
        """As the Trainer resumes: what it has for this moment passes over the names that other families save under."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _described(self, inputs: dict[str, Any], layout: SequenceLayout) -> dict[str, Any]:
        """With the layout, and the positions that the output layer is run on."""
        if self.label_smoother is not None or self.compute_loss_func is not None:
            inputs = _without_labels(inputs, layout)
        # Evaluation gathers all logits, and other families' losses want those of all labels.
        elif is_aki(self.model) and self.model.training and self.args.n_gpu <= 1:
            inputs = {**inputs, "logits_to_keep": supervised_positions(inputs["labels"])}
        # DataParallel deals out rows, of which neither knows.
        return inputs if self.args.n_gpu > 1 else {**inputs, "layout": layout}

    def _guard(self, model: nn.Module, inputs: dict[str, Any]) -> SequenceLayout | None:
        """As `guard_batch`, which refuses a batch that opens nothing too, unless that is what was drawn."""
        whole: Any = self.accelerator.unwrap_model(model)
        layout = layout_of(whole, inputs)
        try:
            check_layout(whole, inputs, layout)
            self.opened |= layout is not None and bool(layout.is_media.any())
        except NothingOpensError:
            self.shut += 1
            if not self.may_open_nothing or (not self.opened and self.shut >= NEVER_OPENS):
                raise
        return layout

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As the Trainer's, without the language model's input embeddings (paper, section 4)."""
        embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
        kept = {name for name, parameter in model.named_parameters() if id(parameter) not in embeddings}
        return [name for name in super().get_decay_parameter_names(model) if name in kept]

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        if self.score is None:
            return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.score(self.model).items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def supervised_positions(labels: Tensor) -> Tensor:
    """The positions at which any row predicts a label: those that the output layer is run on, and the loss needs.

    Args:
        labels: (batch, length); position q predicts label q + 1.

    Returns:
        (positions,) int64, ascending.
    """
    return (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero()[:, 0]


def _without_labels(inputs: dict[str, Any], layout: SequenceLayout) -> dict[str, Any]:
    """For a loss of the user's or a smoothed one, which keeps the labels from `forward`: all that it reads off them."""
    labels = inputs["labels"].masked_fill(layout.is_media, IGNORE_INDEX)
    return {"prompt_block_ids": layout.prompt_block, **inputs, "labels": labels}


def guard_batch(model: Any, inputs: dict[str, Any]) -> None:
    """Run the leak guard on a batch as `forward` would see it.

    Raises:
        LeakError: the batch leaks, or the rule opens nothing.
    """
    check_layout(model, inputs, layout_of(model, inputs))


def layout_of(model: Any, inputs: dict[str, Any]) -> SequenceLayout | None:
    """What each token of a training batch is; None where nothing is learned."""
    if inputs.get("labels") is None:
        return None
    if not is_aki(model):
        return layout_of_batch(model, inputs)
    return model.layout(
        inputs["input_ids"],
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        prompt_block_ids=inputs.get("prompt_block_ids"),
        labels=inputs["labels"],
        attention_rule=inputs.get("attention_rule"),
    )


def check_layout(model: Any, inputs: dict[str, Any], layout: SequenceLayout | None) -> None:
    if layout is not None:
        config = model.config if is_aki(model) else underlying_model(model).config
        check_no_leak(get_rule(inputs.get("attention_rule") or config.attention_rule), layout, inputs["labels"])


class Progress(TrainerCallback):
    """A bar on a terminal or news for a program, and a line a log in `log.txt`.

    Args:
        title: what the bar is called.
        log: the file that lines are appended to.
        report: called with {"step", "of", "loss", ...} at each log; None shows a bar instead.
    """

    def __init__(self, title: str, log: Path, report: Callable[[dict[str, Any]], None] | None = None):
        self.title, self.log, self.report = title, log, report
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.report is None:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        names = {"loss": "loss", "eval_accuracy": "accuracy", "learning_rate": "lr", "grad_norm": "grad"}
        names |= {"skipped_samples": "skipped"} if logs.get("skipped_samples") else {}
        fresh = {short: f"{logs[name]:.4g}" for name, short in names.items() if name in logs}
        if not fresh:
            return
        self.shown |= {name: value for name, value in fresh.items() if name in ("loss", "accuracy")}
        with self.log.open("a") as file:
            values = "  ".join(f"{name} {value}" for name, value in fresh.items())
            file.write(
                f"{time.strftime('%H:%M:%S')}  {self.title}  step {state.global_step}/{state.max_steps}  {values}\n"
            )
        if self.bar is not None:
            self.bar.set_postfix(self.shown)
        if self.report is not None:
            self.report({"step": state.global_step, "of": state.max_steps, **self.shown})

    def close(self) -> None:
        """End the bar's line, whether training ended or failed."""
        if self.bar is not None:
            self.bar.close()


def replace_progress(trainer: Trainer, progress: Progress) -> None:
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(progress)
