"""A run that ends with Ctrl-C."""

from __future__ import annotations

from aki.training.trainer import AkiTrainer


def interrupt_before(monkeypatch, step: int) -> None:
    """Let training end with Ctrl-C before that step of this process, once."""
    original, calls = AkiTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AkiTrainer, "training_step", training_step)
