"""Entry 30 of issue 12: an answer is the one that the request gets alone, whoever else is in its batch."""

from __future__ import annotations

import pytest
import torch
from test_adapter import QUESTIONS, chats, save_loud

from aki.evaluation.lmms import Aki


def answers(folder, docs, asked, batch_size, pad=None, **generation):
    model = Aki(folder, batch_size=batch_size)
    model.model.double()
    if pad is not None:
        model.tokenizer.pad_token_id = pad
    for name, value in generation.items():
        setattr(model.model.generation_config, name, value)
    contents, request = chats(*docs)
    model.task_dict["t"] = {"test": contents}
    return model.generate_until([request(i, asked) for i in range(len(docs))])


def test_a_long_prompt_does_not_shorten_the_others_answers(tiny_recipe, tmp_path):
    """Entry 30: near the context's end each row has the room that its own prompt leaves."""
    folder = save_loud(tiny_recipe, tmp_path / "short", context=64)
    docs = [["what?"], ["look " * 9 + "what?"], QUESTIONS[0]]
    alone = answers(folder, docs, {"max_new_tokens": 100}, 1)
    assert answers(folder, docs, {"max_new_tokens": 100}, 3) == alone
    assert len(alone[0]) > len(alone[1])


@pytest.fixture
def longrope(tiny_recipe, tmp_path):
    """A model that computes positions in another way from 40 tokens on."""
    half = tiny_recipe.model.text["hidden_size"] // tiny_recipe.model.text["num_attention_heads"] // 2
    tiny_recipe.model.text["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
    }
    tiny_recipe.model.text["original_max_position_embeddings"] = 40
    tiny_recipe.model.text["model_type"] = "phi3"
    return save_loud(tiny_recipe, tmp_path / "longrope", context=160)


def test_a_long_prompt_does_not_switch_the_others_rope(longrope):
    """Entry 30: longrope looks at the longest row, and turns the keys of all."""
    docs = [["what?"], ["is there?"], ["look " * 30 + "what?"]]
    alone = answers(longrope, docs, {"max_new_tokens": 10}, 1)
    assert answers(longrope, docs, {"max_new_tokens": 10}, 3) == alone


@pytest.mark.parametrize(
    ("asked", "generation"),
    [({"repetition_penalty": 1000.0}, {}), ({}, {"repetition_penalty": 1000.0}), ({}, {"no_repeat_ngram_size": 1})],
)
def test_penalties_do_not_count_padding(tiny_recipe, tmp_path, asked, generation):
    """Entry 30, of the kind: a token that pads the row is none that it said; transformers 5.16 takes it for one."""
    folder = save_loud(tiny_recipe, tmp_path / "loud", context=2048)
    docs = [["what?"], ["look " * 9 + "what?"]]
    options = {"max_new_tokens": 12} | asked
    pad = first_token(folder, docs[0], **asked, **generation)
    alone = answers(folder, docs, options, 1, pad, **generation)
    assert answers(folder, docs, options, 2, pad, **generation) == alone


def first_token(folder, doc, **decoding):
    """The id of what a model says first: with it as padding, whoever counts that changes the answer."""
    model = Aki(folder)
    contents, request = chats(doc)
    model.task_dict["t"] = {"test": contents}
    inputs = model._inputs([request(0, {})])
    out = model.model.double().generate(**inputs, max_new_tokens=1, do_sample=False, **decoding)
    return int(out[0, inputs["input_ids"].shape[1]])


def test_beams_end_where_each_alone_would(tiny_recipe, tmp_path):
    """Entry 30, of the kind."""
    folder = save_loud(tiny_recipe, tmp_path / "beams", context=48)
    docs = [["what?"], ["look " * 6 + "what?"]]
    asked = {"max_new_tokens": 100, "num_beams": 2}
    assert answers(folder, docs, asked, 2) == answers(folder, docs, asked, 1)


def test_a_sampled_answer_does_not_depend_on_the_others(tiny_recipe, tmp_path):
    """Entry 30, of the kind: rows that share a generator draw by who is beside and before them."""
    folder = save_loud(tiny_recipe, tmp_path / "loud")
    asked = {"max_new_tokens": 12, "temperature": 1.0}
    docs = [["what?"], ["is there?"], ["how many?"]]
    torch.manual_seed(1234)
    together = answers(folder, docs, asked, 3)
    torch.manual_seed(1234)
    assert answers(folder, docs[:1], asked, 1) == together[:1]
    torch.manual_seed(1234)
    assert answers(folder, docs, asked, 1) == together
    torch.manual_seed(7)
    assert answers(folder, docs, asked, 3) != together

    model = Aki(folder, batch_size=4)
    contents, request = chats(docs[0])
    model.task_dict["t"] = {"test": contents}
    # lmms-eval asks so where it scores several answers to a question.
    assert len(set(model.generate_until([request(0, asked)] * 4))) > 1
