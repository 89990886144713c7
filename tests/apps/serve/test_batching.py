"""What goes into a batch, and what becomes of it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from serving import message, picture_bytes

from aki.apps.serve.batching import Batcher, collate, fit_together
from aki.apps.serve.images import decoded_images
from aki.apps.serve.job import Job, Sampler
from aki.apps.serve.limits import Limits, Refused
from aki.apps.serve.schema import ChatRequest
from aki.apps.serve.text import AnswerText


def job(engine, text="how many?", shade=None, tokens=6):
    urls = [] if shade is None else ["data:"]
    chat = ChatRequest(model="tiny", messages=[message(text, *urls)])
    images = [] if shade is None else [*decoded_images([picture_bytes(shade)], Limits())]
    inputs = engine.inputs(chat, images)
    return Job(inputs, tokens, AnswerText(engine.tokenizer, []), engine.end_tokens)


def answers(engine, jobs, limits=None, watch=None):
    """All jobs together in the queue; what each was answered, or the error."""
    sizes = []

    async def read(one):
        try:
            return "".join([piece async for piece in one.pieces()])
        except Exception as error:
            return error

    async def run():
        batcher = Batcher(engine, limits or Limits(), sizes.append)
        with batcher.place():
            for one in jobs:
                batcher.submit(one)
        if watch is not None:
            watch(batcher)
        said = await asyncio.wait_for(asyncio.gather(*map(read, jobs)), 30)
        batcher.close()
        return said

    return asyncio.run(run()), sizes


def test_what_is_alike_is_one_batch_up_to_its_largest_size(engine):
    jobs = [job(engine, "what? " * (i + 1), shade=i) for i in range(7)]
    wanted = [answers(engine, [job(engine, "what? " * (i + 1), shade=i)])[0][0] for i in range(7)]
    said, sizes = answers(engine, jobs, Limits(max_batch=4))
    assert said == wanted
    assert sizes == [4, 3]


def test_a_models_own_penalties_do_not_make_answers_depend_on_others(engine, monkeypatch):
    plain = answers(engine, [job(engine, shade=7, tokens=20)])[0][0]
    monkeypatch.setattr(engine.model.generation_config, "repetition_penalty", 5.0)
    monkeypatch.setattr(engine.model.generation_config, "no_repeat_ngram_size", 1)
    said, sizes = answers(engine, [job(engine, shade=7, tokens=20), job(engine, "what? " * 9, shade=9)])
    assert sizes == [2]
    assert said[0] == plain


def test_what_is_not_alike_waits_and_nobody_is_overtaken_for_ever(engine):
    jobs = [job(engine, shade=1), job(engine), job(engine, shade=2), job(engine)]
    said, sizes = answers(engine, jobs)
    assert sizes == [2, 2]
    assert [one.finish for one in jobs] == ["length"] * 4
    assert len(said) == 4


def test_a_padded_batch_stays_within_the_context(engine):
    long, short = job(engine, "how " * 200, tokens=40), job(engine, tokens=60)
    assert long.prompt_tokens + 40 <= engine.context
    assert fit_together([long], engine.context)
    assert not fit_together([long, short], engine.context)
    assert fit_together([long, job(engine, tokens=40)], engine.context)
    assert fit_together([long, short], None)
    assert answers(engine, [long, short])[1] == [1, 1]


def test_collate_pads_on_the_left_and_joins_media():
    def row(ids, images, **more):
        length = torch.tensor([ids])
        given = {"input_ids": length, "attention_mask": torch.ones_like(length), "token_type_ids": length * 0 + 1}
        given |= {"prompt_block_ids": length * 0}
        return given | {"pixel_values": torch.full((images, 3, 2, 2), float(ids[0]))} | more

    batch = collate([row([5, 6, 7, 8], 1), row([9], 2)], pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [3, 3, 3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["prompt_block_ids"].tolist() == [[0, 0, 0, 0], [-1, -1, -1, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 9, 9]


def test_collate_for_every_family_that_can_be_unlocked(monkeypatch):
    """Rows of a batch that is known to be right, taken apart without their padding, make that batch again."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "attention")
    from unlock_chats import chat
    from unlock_families import FAMILIES, ROWS

    for name, build in FAMILIES.items():
        family = build()
        batch = chat(family, pad="left")
        real, shape = batch["attention_mask"].bool(), batch["input_ids"].shape
        rows = [
            {
                key: value[r : r + 1, real[r]] if value.shape == shape else value.chunk(ROWS)[r]
                for key, value in batch.items()
            }
            for r in range(ROWS)
        ]
        assert rows[0]["input_ids"].shape != rows[1]["input_ids"].shape
        assert fit_together([Job(row, 1, AnswerText(None, []), frozenset()) for row in rows], None), name
        again = collate(rows, pad_token_id=0)
        assert all(torch.equal(again[key], value) for key, value in batch.items()), name


def test_one_bad_request_does_not_take_the_others_with_it(engine, caplog):
    caplog.set_level(logging.CRITICAL)
    good = [job(engine, shade=i) for i in range(3)]
    wanted = [answers(engine, [job(engine, shade=i)])[0][0] for i in range(3)]
    bad = job(engine, shade=5)
    bad.inputs["input_ids"][0, 0] = 10**6
    said, _ = answers(engine, [good[0], bad, *good[1:]])
    assert isinstance(said[1], IndexError)
    assert [said[0], *said[2:]] == wanted


@pytest.mark.parametrize("part", ["sampler", "text"])
def test_a_request_that_fails_in_the_middle_of_its_answer_fails_alone(engine, part, caplog):
    caplog.set_level(logging.CRITICAL)
    wanted = answers(engine, [job(engine, shade=1)])[0][0]

    class Failing:
        stopped, steps = False, 0

        def push(self, token):
            self.steps += 1
            return "x" if self.steps < 3 else 1 / 0

        def draw(self, ids, scores):
            return 0 * len(self.push(0))

    others = [job(engine, shade=1), job(engine, shade=1)]
    bad = job(engine, shade=5)
    setattr(bad, part, Failing())
    said, sizes = answers(engine, [others[0], bad, others[1]])
    assert sizes == [3]
    assert isinstance(said[1], ZeroDivisionError)
    assert [said[0], said[2]] == [wanted, wanted]
    assert bad.tokens == (3 if part == "text" else 2)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-38, 1e-9])
def test_a_temperature_near_0_is_greedy(temperature):
    scores = torch.tensor([-torch.inf, 40.0, 3e38, -3e38])
    for factor in (1.0, 1e-37):
        assert Sampler(temperature, None, 0).draw(torch.tensor([1]), scores * factor) == 2
        assert Sampler(temperature, 0.5, 0).draw(torch.tensor([1]), scores * factor) == 2


def test_an_answer_that_nobody_waits_for_is_not_begun(engine):
    gone, one = job(engine, tokens=100), job(engine, tokens=3)
    gone.cancelled = True
    steps = []

    async def run():
        batcher = Batcher(engine, Limits())
        with engine.model.register_forward_pre_hook(lambda *_: steps.append(1)):
            batcher.submit(gone)
            batcher.submit(one)
            assert "".join([piece async for piece in one.pieces()])
        batcher.close()

    asyncio.run(run())
    assert gone.tokens == 0
    assert len(steps) == 3


def test_a_full_queue(engine):
    async def run():
        batcher = Batcher(engine, Limits(max_waiting=2))
        with batcher.place(), batcher.place(), pytest.raises(Refused) as refused, batcher.place():
            pass
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        with batcher.place():
            pass
        batcher.close()

    asyncio.run(run())


def test_who_hangs_up_leaves_the_queue(engine):
    free = threading.Event()

    async def run():
        batcher = Batcher(engine, Limits(max_waiting=2, max_batch=1))
        running, gone, staying = (job(engine, tokens=3) for _ in range(3))
        with engine.model.register_forward_pre_hook(lambda *_: free.wait(20) and None):
            batcher.submit(running)
            while batcher.waiting:
                await asyncio.sleep(0.01)
            batcher.submit(gone)
            batcher.submit(staying)
            with pytest.raises(Refused), batcher.place():
                pass
            batcher.drop(gone)
            with batcher.place():
                pass
            free.set()
            assert "".join([piece async for piece in staying.pieces()])
        batcher.close()
        assert gone.tokens == 0

    asyncio.run(run())


def test_closing_finishes_what_is_there(engine):
    def watch(batcher):
        started = time.monotonic()
        batcher.close()
        assert time.monotonic() - started < 20

    jobs = [job(engine, tokens=30), job(engine, shade=3, tokens=30)]
    said, _ = answers(engine, jobs, watch=watch)
    assert [one.finish for one in jobs] == ["length", "length"]
    assert all(said)
