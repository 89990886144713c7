"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import pytest
from openai import APIStatusError
from serving import client, data_url, message, picture_bytes


def alone(engine, chat, tokens):
    """What `generate` says when it is asked in the documented way."""
    inputs = engine.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = engine.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return engine.tokenizer.decode(new, skip_special_tokens=True).lstrip(), inputs["input_ids"].shape[1], len(new)


def test_an_answer_is_what_generate_says(engine, port):
    chat = [message("how many digits are red?", data_url(picture_bytes(40)))]
    wanted, prompt, new = alone(engine, chat, 12)
    said = client(port).chat.completions.create(model="tiny", messages=chat, max_tokens=12)
    assert said.choices[0].message.content == wanted
    assert said.choices[0].message.role == "assistant"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (prompt, new)
    assert said.choices[0].finish_reason == ("length" if new == 12 else "stop")
