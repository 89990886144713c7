"""Questions that are held out: which, how many, and that the score is what greedy decoding says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures.make import write_sources
from interrupting import interrupt_before

from aki.data.collate import ChatCollator
from aki.data.digits import DigitScenes
from aki.data.report import BadSample, TooManyBadSamples
from aki.data.schema import Sample, assistant, user
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.data import stage_collators
from aki.training.held_out import choose, held_out
from aki.training.model import build_processor
from aki.training.recipe import RecipeError, SourceRecipe
from aki.training.stages import Job, run_stage


class Texts:
    """A source whose sample i asks `NAME i?`; those in `bad` cannot be used."""

    def __init__(self, name, size, bad=(), answer="yes"):
        self.name, self.size, self.bad, self.answer = name, size, set(bad), answer

    def __len__(self):
        return self.size

    def sample(self, index, epoch):
        if index in self.bad:
            raise BadSample("broken image", f"{index} is bad", self.name, str(index))
        answers = [assistant(self.answer)] if self.answer else []
        return Sample([user(text=f"{self.name} {index}?"), *answers], self.name, str(index))


@pytest.fixture
def collator(tiny_recipe):
    return ChatCollator(build_processor(tiny_recipe, ["yes no 0 1 2 3"]), 512)


def ids(part):
    return [f"{part[i].source}/{part[i].id}" for i in range(len(part))]


def drawn(sources, collator, sizes, weights=(1,), share=1.0):
    return choose(sources, np.array(weights) / sum(weights), sizes, collator, share)


class TestChoose:
    def test_parts_never_meet_and_are_always_the_same(self, collator):
        asked = drawn([Texts("a", 40), Texts("b", 40)], collator, (10, 21), (1, 1))
        validation, test = ids(asked.validation), ids(asked.test)
        assert (len(set(validation)), len(set(test))) == (10, 21)
        assert not set(validation) & set(test)
        again = drawn([Texts("a", 40), Texts("b", 40)], collator, (10, 21), (1, 1))
        assert (ids(again.validation), ids(again.test)) == (validation, test)
        assert validation != sorted(validation), "drawn, not the first"

    def test_sources_have_the_shares_of_their_weights(self, collator):
        asked = drawn([Texts("a", 99), Texts("b", 99), Texts("c", 99)], collator, (8, 16), (2, 1, 1))
        for part, shares in ((asked.validation, (4, 2, 2)), (asked.test, (8, 4, 4))):
            assert tuple(sum(one.startswith(name) for one in ids(part)) for name in "abc") == shares

    def test_a_small_source_is_split_in_proportion(self, collator):
        asked = drawn([Texts("a", 12)], collator, (600, 3000))
        assert (len(asked.validation), len(asked.test)) == (2, 10)
        assert sorted(ids(asked.validation) + ids(asked.test)) == sorted(f"a/{i}" for i in range(12))

    def test_bad_samples_are_skipped_and_counted_and_move_nothing_else(self, collator):
        whole = drawn([Texts("a", 40)], collator, (10, 10))
        bad = int(ids(whole.validation)[3].removeprefix("a/"))
        asked = drawn([Texts("a", 40, bad=[bad])], collator, (10, 10))
        assert ids(asked.validation)[:9] == [one for one in ids(whole.validation) if one != f"a/{bad}"]
        assert len(asked.validation) == 10
        assert ids(asked.test) == ids(whole.test)
        assert asked.summary() == {
            "validation": 10,
            "test": 10,
            "sources": ["a"],
            "skipped": "1 of 21 samples skipped: a broken image 1",
        }

    @pytest.mark.parametrize("answer", ["", "yes " * 600])
    def test_a_sample_without_a_whole_answer_asks_nothing(self, collator, answer):
        with pytest.raises(RecipeError, match=r"no question left for validation: 4 of 4 samples skipped: a .* 4; hold"):
            drawn([Texts("a", 4, answer=answer)], collator, (2, 2))

    def test_too_many_bad_samples_end_the_run(self, collator):
        with pytest.raises(TooManyBadSamples, match=r"11 of \d+ samples .* share of 1\.00%"):
            drawn([Texts("a", 40, bad=range(11))], collator, (20, 20), share=0.01)

    def test_one_sample_is_too_few(self, collator):
        with pytest.raises(RecipeError, match="no question left for test: 0 of 1 samples skipped; hold out more"):
            drawn([Texts("a", 1)], collator, (2, 2))


@pytest.fixture
def own_data(tiny_recipe, tmp_path):
    """SFT on VQAv2 in its released form, asked by other files: VQAv2 again, GQA with a picture missing, and ScienceQA,
    where not every question has a picture."""
    for folder in ("learned", "asked"):
        write_sources(tmp_path / folder)
    (tmp_path / "asked/gqa/images/2354787.jpg").unlink()
    tiny_recipe.model.text["max_position_embeddings"] = 512
    tiny_recipe.root, tiny_recipe.cache = str(tmp_path), str(tmp_path / "cache")
    tiny_recipe.data.held_out = (
        SourceRecipe("vqav2", ("asked/vqav2",), ("asked/coco/train2014",)),
        SourceRecipe("gqa", ("asked/gqa",), ("asked/gqa/images",)),
        SourceRecipe("scienceqa", ("asked/scienceqa",), ("asked/scienceqa/images",)),
    )
    learned = SourceRecipe("vqav2", ("learned/vqav2",), ("learned/coco/train2014",))
    tiny_recipe.sft = replace(tiny_recipe.sft, sources=(learned,), log_every=1)
    return tiny_recipe


def run(recipe, folder, **options):
    return run_stage(Job(recipe, "sft", folder, report=lambda news: None, **options))


@torch.no_grad()
def greedily_right(folder, recipe):
    """source/id -> whether the answer comes out token by token, of the test questions."""
    model, processor = AkiForConditionalGeneration.from_pretrained(folder), AkiProcessor.from_pretrained(folder)
    (collate,) = stage_collators(processor, recipe.sft)
    asked, found = held_out(recipe, recipe.sft, collate), {}
    for sample in (asked.test[i] for i in range(len(asked.test))):
        whole, _ = collate.encode(sample)
        wanted = whole["labels"][0][whole["labels"][0] != -100]
        start = whole["input_ids"].shape[1] - len(wanted)
        tokens = ("input_ids", "attention_mask", "prompt_block_ids")
        prompt = {name: whole[name][:, :start] for name in tokens}
        prompt |= {"pixel_values": whole["pixel_values"]} if "pixel_values" in whole else {}
        said = model.generate(**prompt, max_new_tokens=len(wanted), do_sample=False)[0, start:]
        found[f"{sample.source}/{sample.id}"] = torch.equal(said, wanted[: len(said)]) and len(said) == len(wanted)
    return found


def test_the_score_is_what_greedy_decoding_says(own_data, tmp_path):
    own_data.sft = replace(own_data.sft, steps=60, eval_every=60, save_every=0, learning_rate=1e-2)
    result = run(own_data, tmp_path / "sft")
    right = greedily_right(tmp_path / "sft", own_data)
    assert result["test"]["accuracy"] == pytest.approx(sum(right.values()) / len(right))
    for name in ("vqav2", "gqa", "scienceqa"):
        of_source = [ok for one, ok in right.items() if one.startswith(name)]
        assert result["test"][name] == pytest.approx(sum(of_source) / len(of_source))
    assert 0 < result["test"]["accuracy"] < 1, (right, result["test"], result["losses"][::5])
    assert result["held_out"]["skipped"] == "1 of 11 samples skipped: gqa missing image 1"
    assert [{**point} for point in result["curve"]] == [{"step": 60, **result["validation"]}]


def test_in_both_orders_resumed_equals_uninterrupted(own_data, tmp_path, monkeypatch):
    own_data.sft = replace(own_data.sft, order="both", steps=4, eval_every=2)
    whole = run(own_data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_before(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(own_data, tmp_path / "cut")
    resumed = run(own_data, tmp_path / "cut", resume=True)
    assert {name: resumed[name] for name in ("losses", "curve", "test")} == {
        name: whole[name] for name in ("losses", "curve", "test")
    }


def test_digits_are_one_case(tiny_recipe, collator):
    asked = held_out(tiny_recipe, tiny_recipe.sft, collator)
    assert isinstance(asked.test, DigitScenes)
    assert [(part.split, part.size, part.seed) for part in (asked.validation, asked.test)] == [
        ("test", 12, 0),
        ("test", 12, 1),
    ]
    assert held_out(tiny_recipe, tiny_recipe.pretrain, collator) is None
