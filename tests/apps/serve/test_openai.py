"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from serving import WEB, client, data_url, message, picture_bytes, running

from aki.apps.serve.limits import Limits

RED = "how many digits are red?"


def alone(engine, chat, tokens):
    """What `generate` says when it is asked in the documented way: text, prompt tokens, new tokens."""
    inputs = engine.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = engine.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return engine.tokenizer.decode(new, skip_special_tokens=True).lstrip(), inputs["input_ids"].shape[1], len(new)


def ask(port, messages, **options):
    return client(port).chat.completions.create(model="tiny", messages=messages, **options)


def text_of(answer):
    return answer.choices[0].message.content


def chats(count):
    """Different pictures, questions of different lengths, two pictures, none, and a second turn."""
    for i in range(count):
        url = data_url(picture_bytes(11 * i % 250, (20 + i, 30)))
        if i % 5 == 3:
            yield [message("what is this " * (i % 4 + 1))]
        elif i % 5 == 4:
            yield [message(RED, url, data_url(picture_bytes(i)))]
        elif i % 5 == 2:
            yield [message(RED, url), {"role": "assistant", "content": "two"}, message(f"and number {i}?")]
        else:
            yield [{"role": "system", "content": "be brief"}, message(f"what is number {i}? " * (i % 3 + 1), url)]


def test_an_answer_is_what_generate_says(engine, port):
    chat = [message(RED, data_url(picture_bytes(40)))]
    wanted, prompt, new = alone(engine, chat, 12)
    said = ask(port, chat, max_tokens=12)
    assert text_of(said) == wanted
    assert said.choices[0].message.role == "assistant"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (prompt, new)
    assert said.usage.total_tokens == prompt + new
    assert said.choices[0].finish_reason == ("length" if new == 12 else "stop")
    assert (said.model, said.object) == ("tiny", "chat.completion")


def test_the_picture_matters(port):
    said = {text_of(ask(port, [message(RED, data_url(picture_bytes(shade)))], max_tokens=12)) for shade in (0, 90, 200)}
    assert len(said) == 3


def test_streaming_gives_the_same_in_pieces_and_the_usage(port):
    chat = [message(RED, data_url(picture_bytes(40)))]
    whole = ask(port, chat, max_tokens=20)
    chunks = list(ask(port, chat, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == text_of(whole)
    assert len(pieces) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert not any(chunk.usage for chunk in ask(port, chat, max_tokens=2, stream=True))


def test_a_stream_ends_with_done(port):
    body = {"model": "tiny", "messages": [message("what?")], "stream": True, "max_tokens": 2}
    answer = WEB.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_32_clients_at_once_get_what_they_would_get_alone(engine):
    asked = list(enumerate(chats(32)))
    lengths = [3 + 5 * (i % 7) for i, _ in asked]
    wanted = [alone(engine, chat, tokens)[0] for (_, chat), tokens in zip(asked, lengths, strict=True)]

    def one(i, chat):
        if i % 2:
            return text_of(ask(port, chat, max_tokens=lengths[i]))
        stream = ask(port, chat, max_tokens=lengths[i], stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with running(engine) as port, ThreadPoolExecutor(32) as pool:
        said = list(pool.map(lambda pair: one(*pair), asked))
        numbers = WEB.get(f"http://127.0.0.1:{port}/metrics").text
    batches = [line for line in numbers.splitlines() if line.startswith("aki_batch_requests_count")]
    assert said == wanted
    assert len(set(wanted)) > 25
    assert float(batches[0].split()[1]) < 16, "32 requests at once were not batched"


class TestSampling:
    CHAT = (message(RED, data_url(picture_bytes(40))),)

    def test_a_seed_means_the_same_beside_others(self, port):
        def sampled(seed):
            return text_of(ask(port, self.CHAT, max_tokens=10, temperature=1.5, top_p=0.9, seed=seed))

        first = [sampled(seed) for seed in range(4)]
        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(ask, port, chat, max_tokens=15) for chat in chats(4)]
            again = list(pool.map(sampled, range(4)))
            assert [other.result() for other in others]
        assert first == again
        assert len(set(first)) > 1

    def test_temperature_0_is_greedy_and_so_is_saying_nothing(self, port):
        nothing, zero = ask(port, self.CHAT, max_tokens=10), ask(port, self.CHAT, max_tokens=10, temperature=0, seed=3)
        narrow = ask(port, self.CHAT, max_tokens=10, temperature=1, top_p=1e-6)
        assert text_of(nothing) == text_of(zero) == text_of(narrow)


def test_a_stop_string_cuts_the_answer_and_ends_it(port):
    chat = [message(RED, data_url(picture_bytes(40)))]
    whole = text_of(ask(port, chat, max_tokens=20))
    stop = whole[6:9]
    cut = ask(port, chat, max_tokens=20, stop=[stop, "not there"])
    assert text_of(cut) == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 20
    stream = ask(port, chat, max_tokens=20, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text_of(cut)


def test_an_end_token_ends_an_answer(engine, port, monkeypatch):
    chat = [message(RED)]
    inputs = engine.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    out = engine.model.generate(torch.tensor(inputs["input_ids"]), max_new_tokens=6, do_sample=False)[0]
    end = int(out[len(inputs["input_ids"][0]) + 3])
    first = out[len(inputs["input_ids"][0]) :].tolist().index(end)
    monkeypatch.setattr(engine, "end_tokens", frozenset([end]))
    said = ask(port, chat, max_tokens=6)
    assert said.choices[0].finish_reason == "stop"
    assert said.usage.completion_tokens == first + 1
    kept = out[len(inputs["input_ids"][0]) :][:first]
    assert text_of(said) == engine.tokenizer.decode(kept, skip_special_tokens=True).lstrip()


def test_models_health_and_metrics(port):
    assert [model.id for model in client(port).models.list()] == ["tiny"]
    assert WEB.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}

    def tokens():
        numbers = WEB.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in numbers if not line.startswith("#")}

    before = tokens()
    ask(port, [message("what?")], max_tokens=5)
    after = tokens()
    name = 'aki_requests_total{path="/v1/chat/completions",status="200"}'
    assert after[name] == before[name] + 1
    assert after["aki_generated_tokens_total"] == before["aki_generated_tokens_total"] + 5
    assert after["aki_first_token_seconds_count"] == before["aki_first_token_seconds_count"] + 1
    assert after["aki_waiting_requests"] == 0


def test_neutral_parameters_pass_and_others_are_refused(port):
    chat = [message("what?")]
    plain = ask(port, chat, max_tokens=4)
    neutral = ask(port, chat, max_tokens=4, n=1, frequency_penalty=0, user="me", response_format={"type": "text"})
    assert text_of(plain) == text_of(neutral)
    for name, value in {"n": 2, "frequency_penalty": 0.5, "logprobs": True, "tools": [{"type": "function"}]}.items():
        with pytest.raises(openai.BadRequestError, match=f"'{name}' is not supported"):
            ask(port, chat, max_tokens=4, extra_body={name: value})


def test_a_model_that_fails_says_so_and_goes_on(engine, port, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    chat = [message(RED)]
    before = text_of(ask(port, chat, max_tokens=4))
    with monkeypatch.context() as broken:
        broken.setattr(engine.model, "generate", lambda **_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="its log says how") as error:
            ask(port, chat, max_tokens=4)
        assert "division" not in str(error.value)
        with pytest.raises(openai.APIError, match="its log says how"):
            list(ask(port, chat, max_tokens=4, stream=True))
        broken.setattr(engine.processor, "apply_chat_template", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="its log says how"):
            ask(port, chat, max_tokens=4)
    assert text_of(ask(port, chat, max_tokens=4)) == before


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_ends_its_own_answer_alone(engine, streams, monkeypatch):
    steps = []

    def slow(*_):
        steps.append(1)
        time.sleep(0.01)

    ours = [message("count them all", data_url(picture_bytes(70)))]
    wanted = alone(engine, ours, 40)[0]
    body = {"model": "tiny", "messages": [message("what is this", data_url(picture_bytes(7)))], "max_tokens": 150}
    limits = Limits(max_batch=2)
    with running(engine, limits) as port, engine.model.register_forward_pre_hook(slow), ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, port, ours, max_tokens=40)
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        if streams:
            with WEB.stream("POST", url, json=body | {"stream": True}) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                WEB.post(url, json=body, timeout=0.3)
        assert text_of(other.result()) == wanted
        # The next request would have to wait for the 150 tokens.
        ask(port, [message("what?")], max_tokens=1)
        assert len(steps) < 120
