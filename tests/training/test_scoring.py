"""The one-forward score against what generate says."""

import torch

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.training.scoring import accuracy_by_skill, answered_right, log_likelihoods, logits_of_labels
from aki.training.stages import build_model


def test_right_means_that_greedy_decoding_says_it(tiny_recipe):
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    model.eval()
    with torch.no_grad():
        # Loud weights give varied answers instead of one.
        for parameter in model.parameters():
            parameter.mul_(3.0)
    scenes = DigitScenes("test", "question", 12, 48)
    answers = set()
    for i in range(12):
        prompt = processor.apply_chat_template(
            scenes[i].messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = prompt["input_ids"].shape[1]
        said = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        answers.add(tuple(said[0, length:].tolist()))
        # A placeholder is suppressed in generate, as it must be, and is the one thing the score does not know of.
        labels = said.clone()
        labels[:, :length] = -100
        batch = {
            "input_ids": said,
            "labels": labels,
            "attention_mask": torch.ones_like(said),
            "pixel_values": prompt["pixel_values"],
            "prompt_block_ids": torch.nn.functional.pad(prompt["prompt_block_ids"], (0, 3), value=-1),
        }
        assert answered_right(model, batch).tolist() == [True]
        likely = log_likelihoods(*logits_of_labels(model, batch))
        with torch.no_grad():
            given = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.log_softmax(-1)
        one_by_one = [given[0, length + place - 1, said[0, length + place]] for place in range(3)]
        torch.testing.assert_close(likely[0], sum(one_by_one))
        for position in range(length, length + 3):
            wrong = labels.clone()
            wrong[0, position] = (wrong[0, position] + 1) % 300
            assert answered_right(model, batch | {"labels": wrong}).tolist() == [False]
    assert len(answers) > 3


def test_shares_by_skill(tiny_recipe, monkeypatch):
    model, processor = build_model(tiny_recipe)
    scenes = DigitScenes("test", "question", 14, 48, skills=("read", "exists"))
    verdicts = iter(
        [torch.tensor([True, False, True, True, False]), torch.tensor([True] * 5), torch.tensor([False] * 4)]
    )
    monkeypatch.setattr("aki.training.scoring.answered_right", lambda *_: next(verdicts))
    scored = accuracy_by_skill(model, ChatCollator(processor, 128), scenes, batch_size=5)
    # Even indices read: 1 1 0 . 1 1 . 0 0; odd ones ask for existence.
    assert scored == {"accuracy": 8 / 14, "read": 4 / 7, "exists": 4 / 7}
