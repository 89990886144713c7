"""TRL's own SFTTrainer on a vision data set, with an unlocked model."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from unlock_chats import QUESTIONS, picture

import aki
from aki.attention import NothingOpensWarning


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


def test_trl_with_packed_rows(reader, processor, tmp_path):
    """TRL refuses packing for models that read pictures; joined behind its collator, losses are those of padding."""
    losses = {}
    for packed in (False, True):
        torch.manual_seed(0)
        trainer = sft_trainer(aki.unlock(reader), processor, tmp_path / str(packed), learning_rate=0.0, seed=3)
        trainer.data_collator = aki.write_prompt_blocks(trainer.data_collator)
        if packed:
            trainer.data_collator = aki.pack(trainer.data_collator, reader, row_tokens=500)
        trainer.train()
        losses[packed] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL wants transformers 5.18 for it, and says so"
)
def test_trl_with_assistant_only_loss(reader, processor, tmp_path):
    """TRL's own switch does as well, where the template has generation tags."""
    trainer = sft_trainer(aki.unlock(reader), processor, tmp_path, assistant_only_loss=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingOpensWarning)
        trainer.train()
