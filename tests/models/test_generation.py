"""Generation: prefill by the rule, decoding causal, in every mode; each step against a stock language model."""

import pytest
import torch
from model_builders import (
    ATTENDING,
    IMAGE,
    PAD,
    TEXT,
    TOKENIZE,
    WINDOWED,
    assert_same,
    assistant,
    pad,
    pictures,
    stock_language_model,
    stock_logits,
    tiny_model,
    tokens,
    user,
)
from torch import Tensor
from transformers import DynamicCache, LlamaModel, Phi3Config, StaticCache

STEPS = 8
PROMPTS = [
    # two images; none; one, after text
    tokens(5, "image", 7, "image", 8, 9, 3),
    tokens(5, 6, 7, 3),
    tokens(5, 6, 7, 8, 9, 10, 11, "image", 12, 13, 3),
]
IMAGES = pictures(3)
OF_PROMPT = [slice(0, 2), slice(2, 2), slice(2, 3)]


def prompts(*rows: int) -> dict[str, Tensor]:
    """These of the prompts, padded on the left, as the processor gives them."""
    ids = [PROMPTS[row] for row in rows]
    images = torch.cat([IMAGES[OF_PROMPT[row]] for row in rows])
    return {
        "input_ids": pad(ids, PAD, "left"),
        "attention_mask": pad([[1] * len(row) for row in ids], 0, "left"),
        "prompt_block_ids": pad([[0] * len(row) for row in ids], -1, "left"),
        **({"pixel_values": images} if len(images) else {}),
    }


def pad_blocks(inputs: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """Prompt blocks of sequences that begin with these inputs: what was generated is answer."""
    added = sequences.shape[1] - inputs["input_ids"].shape[1]
    return torch.nn.functional.pad(inputs["prompt_block_ids"], (0, added), value=-1)


def generate(model, inputs: dict, **options) -> tuple[Tensor, Tensor]:
    """(sequences, logits of each step), greedy unless asked for otherwise, never stopping early."""
    length = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    out = model.generate(**inputs, **{**length, "return_dict_in_generate": True, "output_logits": True, **options})
    return out.sequences, torch.stack(out.logits, 1)


def stock_steps(model, inputs: dict, sequences: Tensor) -> Tensor:
    """What a stock language model predicts at each step of these sequences; what was generated is answer."""
    start = inputs["input_ids"].shape[1]
    context = sequences[:, :-1]
    new = context.shape[1] - start
    grown = [
        torch.nn.functional.pad(inputs[name], (0, new), value=value)
        for name, value in (("prompt_block_ids", -1), ("attention_mask", 1))
    ]
    return stock_logits(model, context, inputs.get("pixel_values"), *grown)[:, start - 1 :]


@pytest.mark.parametrize(("text", "implementation"), ATTENDING)
def test_every_step_equals_the_stock_language_model(text, implementation):
    model, inputs = tiny_model(text=text), prompts(0, 1, 2)
    model.set_attn_implementation(implementation)
    sequences, logits = generate(model, inputs)
    assert sequences.shape == (3, inputs["input_ids"].shape[1] + STEPS)
    assert torch.equal(sequences[:, -STEPS:], without_placeholder(logits).argmax(-1))
    assert_same(logits, stock_steps(model, inputs, sequences))


def without_placeholder(logits: Tensor) -> Tensor:
    """Neither a placeholder nor (see generate) the end."""
    return logits.index_fill(-1, torch.tensor([IMAGE, 1]), -torch.inf)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["uncached", "static"]
)
def test_caches_change_nothing(text, options):
    model, inputs = tiny_model(text=text), prompts(0, 1, 2)
    sequences, logits = generate(model, inputs)
    again, again_logits = generate(model, inputs, **options)
    assert torch.equal(again, sequences)
    assert_same(again_logits, logits)


@pytest.mark.parametrize("text", ["llama", *WINDOWED])
def test_rows_of_a_batch_get_what_they_get_alone(text):
    model = tiny_model(text=text)
    sequences, logits = generate(model, prompts(0, 1, 2))
    for row in range(3):
        alone, alone_logits = generate(model, prompts(row))
        assert torch.equal(alone[0, -STEPS:], sequences[row, -STEPS:])
        assert_same(alone_logits[0], logits[row])


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_prompt_blocks_the_prompt_is_one_and_answers_never_join_it(use_cache):
    model, inputs = tiny_model(), prompts(0, 1, 2)
    wanted, wanted_logits = generate(model, inputs)
    del inputs["prompt_block_ids"]
    found, logits = generate(model, inputs, use_cache=use_cache)
    assert torch.equal(found, wanted)
    assert_same(logits, wanted_logits)


def test_the_rule_of_one_call():
    model, inputs = tiny_model(), prompts(0)
    _, mma = generate(model, inputs)
    sequences, causal = generate(model, inputs, attention_rule="causal")
    assert (mma - causal).abs().max() > 1e-2
    inputs["prompt_block_ids"].fill_(-1)
    assert_same(causal, stock_steps(model, inputs, sequences))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_rotation_that_changes_with_the_length(options):
    """Phi-3.5's longrope: beyond a length every key is turned by other angles, those in the cache too."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 7.0], "rope_theta": 1e4}
    short = 14
    sizes = TEXT["phi3"]().to_dict() | {"rope_parameters": rope, "original_max_position_embeddings": short}
    model, inputs = tiny_model(text_config=Phi3Config(**sizes)), prompts(0)
    length = inputs["input_ids"].shape[1]
    assert length < short < length + STEPS
    sequences, logits = generate(model, inputs, **options)
    for step in range(STEPS):
        wanted = stock_steps(model, inputs, sequences[:, : length + step + 1])[:, -1]
        assert_same(logits[:, step], wanted)


class TestTurns:
    """A second question with an image of its own, asked on the cache that the first answer left."""

    MORE = tokens(14, "image", 15, 16, 3)

    def second(self, first: dict[str, Tensor], answered: Tensor, more: list[int], images: Tensor | None) -> dict:
        rows, new = answered.shape[0], answered.shape[1] - first["input_ids"].shape[1]
        blocks = torch.tensor([[-1] * new + [1] * len(more)]).expand(rows, -1)
        return {
            "input_ids": torch.cat([answered, torch.tensor([more]).expand(rows, -1)], 1),
            "attention_mask": torch.nn.functional.pad(first["attention_mask"], (0, new + len(more)), value=1),
            "prompt_block_ids": torch.cat([first["prompt_block_ids"], blocks], 1),
            **({} if images is None else {"pixel_values": images}),
        }

    def cache(self, model, kind: str):
        config = model.config.text_config
        return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("text", ["llama", "phi3", *WINDOWED])
    def test_continued_on_the_cache(self, text, kind):
        model, first = tiny_model(text=text), prompts(0)
        cache = self.cache(model, kind)
        answered, _ = generate(model, first, cache=cache)
        second = self.second(first, answered, self.MORE, torch.cat([IMAGES[:2], pictures(1, seed=5)]))
        uncached, uncached_logits = generate(model, second, use_cache=False)
        found, logits = generate(model, second, cache=cache)
        assert torch.equal(found, uncached)
        assert_same(logits, uncached_logits)
        assert_same(logits, stock_steps(model, second, found))

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_the_cache_goes_by_either_of_its_names(self, name):
        """That of transformers 5.24 and the one before it, in forward and in generate, under any release."""
        model, first = tiny_model(), prompts(0)
        cache = self.cache(model, "dynamic")
        answered, _ = generate(model, first, **{name: cache})
        assert cache.get_seq_length() == answered.shape[1] - 1
        with torch.no_grad():
            whole = model(answered, first["pixel_values"], prompt_block_ids=pad_blocks(first, answered)).logits[:, -1:]
            last = model(answered[:, -1:], **{name: cache}).logits
        assert_same(last, whole)

    def test_later_images_do_not_see_earlier_turns_and_earlier_ones_not_later(self):
        model, first = tiny_model(), prompts(0)
        answered, _ = generate(model, first)
        images = torch.cat([IMAGES[:2], pictures(1, seed=5)])
        second = self.second(first, answered, self.MORE, images)
        _, logits = generate(model, second)
        one_block = second | {"prompt_block_ids": torch.zeros_like(second["input_ids"])}
        _, leaking = generate(model, one_block)
        assert (logits - leaking).abs().max() > 1e-2

    def test_a_third_turn_about_no_new_image(self):
        model, first = tiny_model(), prompts(0)
        cache = self.cache(model, "dynamic")
        images = torch.cat([IMAGES[:2], pictures(1, seed=5)])
        answered, _ = generate(model, first, cache=cache)
        second = self.second(first, answered, self.MORE, images)
        answered, _ = generate(model, second, cache=cache)
        third = self.second(second, answered, [14, 17, 18, 3], images)
        third["prompt_block_ids"][:, -4:] = 2
        found, logits = generate(model, third, cache=cache)
        assert_same(logits, stock_steps(model, third, found))

    def test_only_what_is_new_may_be_passed(self):
        model, first = tiny_model(), prompts(0)
        cache = self.cache(model, "dynamic")
        answered, _ = generate(model, first, cache=cache)
        picture = pictures(1, seed=5)
        second = self.second(first, answered, self.MORE, torch.cat([IMAGES[:2], picture]))
        _, wanted_logits = generate(model, second)
        _, logits = generate(model, second | {"pixel_values": picture}, cache=cache)
        assert_same(logits, wanted_logits)

    def test_a_chat_as_the_processor_gives_it(self, make_model, processor, picture):
        model = make_model()
        chat = [user(picture(10), "what is this ?")]
        first = processor.apply_chat_template(chat, add_generation_prompt=True, **TOKENIZE)
        cache = self.cache(model, "dynamic")
        answer = processor.tokenizer("a red one<|endoftext|>")["input_ids"]
        start = first["input_ids"].shape[1]
        answered = model.generate(
            **first,
            cache=cache,
            max_new_tokens=len(answer),
            prefix_allowed_tokens_fn=lambda _, ids: [answer[len(ids) - start]],
        )
        chat += [assistant("a red one"), user("and", picture(200), "this ?")]
        second = processor.apply_chat_template(chat, add_generation_prompt=True, **TOKENIZE)
        assert torch.equal(second["input_ids"][:, : answered.shape[1]], answered)
        assert cache.get_seq_length() == answered.shape[1] - 1
        found, logits = generate(model, second, cache=cache)
        uncached, uncached_logits = generate(model, second, use_cache=False)
        assert torch.equal(found, uncached)
        assert_same(logits, uncached_logits)
        assert processor.image_token_id == IMAGE
        assert_same(logits, stock_steps(model, second, found))

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_a_batch_of_chats(self, kind):
        model, first = tiny_model(), prompts(0, 2)
        cache = self.cache(model, kind)
        answered, _ = generate(model, first, cache=cache)
        images = torch.cat([IMAGES[:2], pictures(1, seed=5), IMAGES[2:], pictures(1, seed=6)])
        second = self.second(first, answered, self.MORE, images)
        found, logits = generate(model, second, cache=cache)
        assert_same(logits, stock_steps(model, second, found))


class TestModes:
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
    def test_beams_keep_each_row_with_its_images(self, options):
        model, inputs = tiny_model(), prompts(0, 2)
        out = model.generate(
            **inputs,
            num_beams=3,
            num_return_sequences=2,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
            **options,
        )
        for row, prompt in enumerate((0, 2)):
            for sequence, score in zip(
                out.sequences.view(2, 2, -1)[row], out.sequences_scores.view(2, 2)[row], strict=True
            ):
                alone = prompts(prompt)
                sequence = sequence[-alone["input_ids"].shape[1] - STEPS :][None]
                steps = torch.log_softmax(stock_steps(model, alone, sequence), -1)
                wanted = steps[0].gather(1, sequence[0, -STEPS:, None]).sum()
                assert score.item() == pytest.approx(wanted.item(), abs=1e-4)
        greedy, logits = generate(model, inputs)
        greedy_scores = torch.log_softmax(logits, -1).gather(2, greedy[:, -STEPS:, None]).sum((1, 2))
        assert (out.sequences_scores.view(2, 2)[:, 0] >= greedy_scores - 1e-4).all()

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_sampling_several_answers_a_prompt(self, use_cache):
        model, inputs = tiny_model(), prompts(0, 1, 2)
        torch.manual_seed(3)
        sequences, logits = generate(
            model, inputs, do_sample=True, temperature=3.0, num_return_sequences=2, use_cache=use_cache
        )
        for row in range(3):
            pair = slice(2 * row, 2 * row + 2)
            for sequence, steps in zip(sequences[pair], logits[pair], strict=True):
                alone = prompts(row)
                sequence = sequence[-alone["input_ids"].shape[1] - STEPS :][None]
                assert_same(steps, stock_steps(model, alone, sequence)[0])
        assert not torch.equal(sequences[0], sequences[1])
        torch.manual_seed(3)
        again, _ = generate(model, inputs, do_sample=True, temperature=3.0, num_return_sequences=2)
        assert torch.equal(again, sequences)

    def test_prompt_lookup_is_greedy(self):
        model, inputs = tiny_model(), prompts(0)
        greedy, logits = generate(model, inputs)
        found, found_logits = generate(model, inputs, prompt_lookup_num_tokens=3)
        assert torch.equal(found, greedy)
        assert_same(found_logits, logits)

    @pytest.mark.parametrize("same", [True, False])
    def test_assisted_decoding_is_greedy(self, same):
        model, assistant, inputs = tiny_model(), tiny_model(), prompts(0)
        assistant.generation_config.assistant_confidence_threshold = 0.0
        if not same:
            torch.nn.init.normal_(assistant.get_output_embeddings().weight)
        greedy, _ = generate(model, inputs)
        calls = []
        with model.register_forward_pre_hook(lambda *_: calls.append(1)):
            found, _ = generate(model, inputs, assistant_model=assistant)
        assert torch.equal(found, greedy)
        assert (len(calls) == 1) == same, "an assistant that sees the images as the model does guesses all of it"

    def test_embeddings_in_place_of_text(self):
        model = tiny_model()
        ids = torch.tensor([PROMPTS[1]])
        wanted = model.generate(input_ids=ids, max_new_tokens=STEPS, min_new_tokens=STEPS)[:, -STEPS:]
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=STEPS, min_new_tokens=STEPS), wanted)

    def test_text_alone_is_the_language_model(self):
        model, ids = tiny_model(), torch.tensor([PROMPTS[1]])
        assert isinstance(model.model.language_model, LlamaModel)
        wanted = stock_language_model(model).generate(input_ids=ids, max_new_tokens=STEPS, suppress_tokens=[IMAGE])
        assert torch.equal(model.generate(ids, max_new_tokens=STEPS), wanted)

    def test_it_stops_at_the_end_of_the_answer(self):
        model, inputs = tiny_model(), prompts(0, 2)
        model.generation_config.eos_token_id = int(generate(model, inputs)[0][0, -STEPS + 2])
        out = model.generate(**inputs, max_new_tokens=STEPS)
        answer = out[0, inputs["input_ids"].shape[1] :]
        end = (answer == model.generation_config.eos_token_id).nonzero()[0]
        assert (answer[int(end) + 1 :] == PAD).all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_placeholder_is_never_an_answer(use_cache):
    model, inputs = tiny_model(), prompts(0)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
        head.bias[IMAGE] = 1e4
    out = model.generate(**inputs, max_new_tokens=STEPS, use_cache=use_cache)
    assert not (out[:, inputs["input_ids"].shape[1] :] == IMAGE).any()


@pytest.mark.parametrize(("length", "fits"), [(127, True), (128, False), (200, False)])
def test_a_prompt_must_leave_room_in_the_context(length, fits):
    model, ids = tiny_model(), torch.full((1, length), 7)
    if fits:
        assert model.generate(ids, max_new_tokens=1).shape == (1, length + 1)
    else:
        with pytest.raises(ValueError, match=rf"the prompt has {length} tokens, the model's context is 128"):
            model.generate(ids, max_new_tokens=1)


def test_missing_images_are_noticed():
    inputs = prompts(0)
    with pytest.raises(ValueError, match=r"1 image\(s\) need 3 placeholders .* found 6"):
        generate(tiny_model(), inputs | {"pixel_values": IMAGES[:1]})
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"0 image\(s\) need 0 placeholders .* found 6"):
        generate(tiny_model(), inputs)
