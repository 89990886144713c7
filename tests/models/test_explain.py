"""What the image read, against transformers' own attention, the definition of the rules, and maps known by hand."""

import copy

import numpy as np
import pytest
import torch
from model_builders import IMAGE, PATCH, PER_IMAGE, PIXELS, TEXT, tiny_model, user, who_sees_whom
from PIL import Image
from torch import nn

import aki
from aki import plots
from aki.attention import RULES, dense_mask, get_rule
from aki.models.explain import attention_weights, chat_inputs, explain
from aki.models.patches import region_read
from aki.models.rule import rule_of, ruled
from aki.models.words import words_of

QUESTION = "what is this red zebra?"  # its tokenizer cuts "zebra" into several tokens


def inputs_of(processor, picture, question=QUESTION):
    return dict(chat_inputs(processor, [user(picture, question)]))


def seen(inputs, rule):
    blocks = inputs["prompt_block_ids"] if rule == "mma" else torch.full_like(inputs["input_ids"], -1)
    return who_sees_whom(inputs["input_ids"], inputs["attention_mask"], blocks)[0]


@pytest.mark.parametrize("backend", ["sdpa", "eager", "segments", "auto"])
@pytest.mark.parametrize("rule", ["mma", "causal"])
def test_rows_sum_to_1_and_hidden_pairs_are_zero(make_model, processor, picture, backend, rule):
    model = make_model(attention_rule=rule)
    model.set_attn_implementation({"text_config": backend})
    inputs = inputs_of(processor, picture())
    with torch.no_grad():
        before = model(**inputs).logits
    weights = attention_weights(model, inputs)
    length = inputs["input_ids"].shape[1]
    assert weights.shape == (2, length, length)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, length))
    for layer in weights:
        assert torch.equal(layer > 0, seen(inputs, rule))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before), "the backend was not put back"
    assert model.config.text_config._attn_implementation == backend


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_shows_what_it_lets_be_seen(make_model, make_processor, picture, rule):
    """dense_mask is held against the definitions in attention/test_rules.py."""
    processor = make_processor()
    processor.image_seq_length = 4
    model = make_model(connector="mlp", attention_rule=rule)
    inputs = inputs_of(processor, picture())
    weights = attention_weights(model, inputs)
    layout = model.layout(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], prompt_block_ids=inputs["prompt_block_ids"]
    )
    assert torch.equal(weights[0] > 0, dense_mask(get_rule(rule), layout)[0])
    found = model.explain(picture(), QUESTION, processor=processor, max_new_tokens=3)
    prompt = inputs["input_ids"].shape[1]
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, prompt:]
    assert found.answer == processor.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_weights_are_those_of_the_layers(make_model, processor, picture):
    """Llama's softmax(q k / sqrt(d)), computed by hand from what the first layer is given."""
    model = make_model()
    inputs = inputs_of(processor, picture())
    layer = model.model.language_model.layers[0].self_attn
    given = {}
    layer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    weights = attention_weights(model, inputs)[0]
    x, (cos, sin) = given["hidden_states"][0], given["position_embeddings"]
    heads, width = 4, layer.head_dim

    def rotated(projected, count):
        y = projected.unflatten(-1, (count, width)).transpose(0, 1)
        turned = torch.cat([-y[..., width // 2 :], y[..., : width // 2]], dim=-1)
        return y * cos[0] + turned * sin[0]

    with torch.no_grad():
        query, key = rotated(layer.q_proj(x), heads), rotated(layer.k_proj(x), 2).repeat_interleave(2, 0)
    scores = (query @ key.transpose(1, 2) / width**0.5).masked_fill(~seen(inputs, "mma"), float("-inf"))
    torch.testing.assert_close(weights, scores.softmax(-1).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("connector", ["mlp", "perceiver_resampler"])
def test_arrays_are_cut_out_of_the_weights(make_model, make_processor, picture, connector):
    per_image = {"mlp": (PIXELS // PATCH) ** 2, "perceiver_resampler": PER_IMAGE}[connector]
    processor = make_processor()
    processor.image_seq_length = per_image
    model = make_model(connector=connector)
    found = model.explain(picture(), QUESTION, processor=processor, max_new_tokens=5)
    prompt = inputs_of(processor, picture())
    length = prompt["input_ids"].shape[1]
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert found.answer == processor.tokenizer.decode(answer[0, length:], skip_special_tokens=True).strip()
    assert found.question_words == ["what", "is", "this", "red", "zebra", "?"]

    prompt["prompt_block_ids"] = nn.functional.pad(prompt["prompt_block_ids"], (0, answer.shape[1] - length), value=-1)
    whole = prompt | {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    weights = attention_weights(model, whole).numpy()
    media = np.flatnonzero(answer[0].numpy() == IMAGE)
    assert len(media) == per_image
    # The template writes <|user|><image>...question<|assistant|>. A space that is a token of its own is in no word.
    question = [p for p in range(media[-1] + 1, length - 1) if processor.tokenizer.decode([answer[0, p]]).strip()]
    assert len(question) > 6, "no word is made of several tokens"
    wanted = weights[:, media][:, :, question].sum(-1)
    np.testing.assert_allclose(found.media_to_question.sum(1), wanted, rtol=1e-5)
    assert (found.media_to_question > 0).all()
    text = [p for p in range(length, answer.shape[1]) if answer[0, p] not in processor.tokenizer.all_special_ids]
    if len(found.answer_words) == 1:
        looked = weights[:, [p - 1 for p in text]][:, :, media].mean(1)
        np.testing.assert_allclose(found.answer_to_media[:, 0], looked, rtol=1e-5)
    assert found.question_maps.shape == (2, 6, PIXELS // PATCH, PIXELS // PATCH)
    np.testing.assert_allclose(found.answer_maps.sum((2, 3)), found.answer_to_media.sum(2), rtol=1e-5)


def test_an_answer_word_looked_from_the_token_before_it(make_model, processor, picture):
    model = make_model()
    answer_ids = processor.tokenizer(" red one", return_tensors="pt")["input_ids"][0]
    found = model.explain(picture(), QUESTION, processor=processor, answer_ids=answer_ids)
    assert found.answer_words == ["red", "one"]
    prompt = inputs_of(processor, picture())
    length = prompt["input_ids"].shape[1]
    ids = torch.cat([prompt["input_ids"], answer_ids[None]], 1)
    prompt["prompt_block_ids"] = nn.functional.pad(prompt["prompt_block_ids"], (0, len(answer_ids)), value=-1)
    weights = attention_weights(model, prompt | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    media = (ids[0] == IMAGE).nonzero()[:, 0]
    # The first word's first token comes from the last of the prompt.
    first = len(processor.tokenizer(" red")["input_ids"])
    wanted = weights[:, length - 1 : length - 1 + first][:, :, media].mean(1)
    np.testing.assert_allclose(found.answer_to_media[:, 0], wanted.numpy(), rtol=1e-5)


def test_causal_hides_the_question_from_the_image(make_model, processor, picture):
    model = make_model()
    found = model.explain(picture(), QUESTION, processor=processor, attention_rule="causal", max_new_tokens=3)
    assert found.rule == "causal"
    assert not found.media_to_question.any()
    assert model.config.attention_rule == "mma", "the rule was not put back"
    wanted = model.generate(
        **inputs_of(processor, picture()), attention_rule="causal", max_new_tokens=3, do_sample=False
    )
    new = wanted[0, inputs_of(processor, picture())["input_ids"].shape[1] :]
    assert found.answer == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


class Shuffled(nn.Module):
    """A connector whose embedding i is made of feature 3 - i, and a quarter of feature i."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features):
        return self.inner(features)

    def feature_weights(self, features):
        return (0.75 * torch.eye(4).flip(1) + 0.25 * torch.eye(4))[None]


def test_maps_go_through_the_connector(make_model, make_processor, picture):
    processor = make_processor()
    processor.image_seq_length = 4
    model = make_model(connector="mlp")
    plain = model.explain(picture(), QUESTION, processor=processor, max_new_tokens=2)
    np.testing.assert_array_equal(plain.media_to_patches.reshape(4, 4), np.eye(4))
    np.testing.assert_allclose(plain.question_maps.reshape(2, 6, 4), plain.media_to_question)
    model.model.connector = Shuffled(model.model.connector)
    shuffled = model.explain(picture(), QUESTION, processor=processor, max_new_tokens=2)
    flat = plain.media_to_question
    np.testing.assert_allclose(shuffled.question_maps.reshape(2, 6, 4), 0.75 * flat[..., ::-1] + 0.25 * flat, rtol=1e-5)


def test_latents_that_copy_one_patch_show_that_patch():
    """Keys that are the features themselves and queries that fit one each: the weights are known."""
    model = tiny_model()
    resampler, width = model.model.connector, model.config.vision_config.hidden_size
    features = 40 * torch.eye(4, width)[None]
    for layer in resampler.layers:
        attention = next(layer.children())
        attention.norm_media = attention.norm_latents = nn.Identity()
        inner = attention.to_q.out_features
        copy_first = torch.zeros(inner, width)
        # Both heads see the first four components, which is where the features are.
        for head in range(2):
            copy_first[4 * head : 4 * head + 4, :4] = torch.eye(4)
        with torch.no_grad():
            attention.to_q.weight.copy_(copy_first)
            attention.to_kv.weight.copy_(torch.cat([copy_first, 0 * copy_first]))
            attention.to_out.weight.zero_()
        list(layer.children())[1][3].weight.data.zero_()
    with torch.no_grad():
        resampler.latents.zero_()
        resampler.latents[:, :4] = torch.tensor([[0, 0, 9.0, 0], [9.0, 0, 0, 0], [9.0, 9.0, 0, 0]])
        weights = resampler.feature_weights(features)[0]
    wanted = torch.tensor([[0, 0, 1.0, 0], [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(weights, wanted, atol=1e-5, rtol=0)


def test_weights_of_the_resampler_give_its_output():
    """Attention by its own weights is the attention that it computes."""
    model = tiny_model()
    attention = next(model.model.connector.layers[0].children())
    features, latents = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    with torch.no_grad():
        one_head = copy.deepcopy(attention)
        one_head.num_heads = 1
        both = torch.cat([one_head.norm_media(features), one_head.norm_latents(latents)], dim=1)
        values = one_head.to_kv(both).chunk(2, -1)[1]
        by_hand = one_head.to_out(one_head.weights(features, latents) @ values)
        torch.testing.assert_close(by_hand, one_head(features, latents), atol=1e-4, rtol=1e-4)
        rows = model.model.connector.feature_weights(features).sum(-1)
    torch.testing.assert_close(rows, torch.ones(2, PER_IMAGE))


def test_a_saved_model_finds_its_processor(make_model, processor, picture, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="was not loaded from a folder"):
        model.explain(picture(), QUESTION)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = aki.AkiForConditionalGeneration.from_pretrained(tmp_path)
    loaded.train()
    found = loaded.explain(picture(), QUESTION, max_new_tokens=2)
    assert loaded.training, "the mode was not put back"
    wanted = explain(model, processor, picture(), QUESTION, max_new_tokens=2)
    np.testing.assert_allclose(found.question_maps, wanted.question_maps, rtol=1e-5)


def test_wrong_inputs_are_sentences(make_model, processor, picture, tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="the question is empty"):
        explain(model, processor, picture(), "  ")
    with pytest.raises(ValueError, match="there is no picture at"):
        explain(model, processor, tmp_path / "none.png", QUESTION)
    with pytest.raises(ValueError, match="no attention rule"):
        explain(model, processor, picture(), QUESTION, attention_rule="mna")
    assert rule_of(model) == "mma"


def test_a_failure_puts_everything_back(make_model, processor, picture):
    model = make_model()
    handle = model.model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), ruled(model, processor, "causal"):
        attention_weights(model, inputs_of(processor, picture()))
    handle.remove()
    assert (rule_of(model), model.config.text_config._attn_implementation) == ("mma", "sdpa")


@pytest.mark.parametrize("text", [name for name in TEXT if name not in ("llama", "gpt2")])
def test_every_language_model_gives_its_weights(text, make_model, processor, picture):
    model = make_model(text)
    inputs = inputs_of(processor, picture())
    window = getattr(model.config.text_config, "sliding_window", None)
    ids, attention, blocks = (inputs[name] for name in ("input_ids", "attention_mask", "prompt_block_ids"))
    full = who_sees_whom(ids, attention, blocks)[0]
    within = who_sees_whom(ids, attention, blocks, window)[0]
    weights = attention_weights(model, inputs)
    kinds = getattr(model.config.text_config, "layer_types", None) or ["sliding_attention"] * 2
    for layer, kind in zip(weights, kinds, strict=True):
        torch.testing.assert_close(layer.sum(-1), torch.ones(len(layer)))
        assert torch.equal(layer > 0, full if kind == "full_attention" else within)


class TestWords:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("is there a red 3?", ["is", "there", "a", "red", "3", "?"]),
            ("Österreich, one-two", ["Österreich", ",", "one", "-", "two"]),
            ("日本 is", ["日", "本", "is"]),
            ("", []),
        ],
    )
    def test_words_hold_all_of_their_tokens(self, tokenizer, text, wanted):
        ids = tokenizer(text)["input_ids"]
        words = words_of(tokenizer, ids, list(range(len(ids))))
        assert [word.text for word in words] == wanted
        for word in words:
            # Spaces and neighbours of a token aside, its tokens spell the word.
            assert word.text in tokenizer.decode([ids[p] for p in word.positions])

    def test_the_question_is_the_last_of_what_is_written_alike(self, tokenizer):
        ids = tokenizer("what is this ? no what is this ?")["input_ids"]
        words = words_of(tokenizer, ids, list(range(len(ids))), "what is this ?")
        assert [word.text for word in words] == ["what", "is", "this", "?"]
        assert min(words[0].positions) >= len(ids) // 2


def test_a_crop_of_the_middle_is_what_is_shown(processor):
    class Cropping:
        do_center_crop, crop_size = True, {"height": 100, "width": 100}

    class Processor:
        image_processor = Cropping()

    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    shown = region_read(picture, Processor())
    assert shown.size == (100, 100)
    assert shown.getcolors() == [(10000, (0, 0, 255))]
    assert region_read(picture, processor) is picture


class TestPlots:
    @pytest.fixture
    def explained(self, make_model, processor, picture):
        model = make_model()
        rules = ("causal", "mma")
        return [explain(model, processor, picture(), QUESTION, attention_rule=rule, max_new_tokens=2) for rule in rules]

    def test_overlay_is_lit_where_the_map_is_large(self):
        white = Image.new("RGB", (40, 20), "white")
        shown = np.asarray(plots.overlay(white, np.array([[0.0, 0.2], [0.1, 0.0]]), side=80)).astype(int)
        assert shown.shape == (40, 80, 3)
        left_top, right_top, left_bottom = shown[5, 5], shown[5, 75], shown[35, 5]
        assert right_top[0] > left_bottom[0] > left_top[0]
        # Orange: more red than blue, half as much at half the value.
        assert right_top[0] - right_top[2] > left_bottom[0] - left_bottom[2] > 0 == left_top[0] - left_top[2]
        assert (np.asarray(plots.overlay(white, np.zeros((2, 2)))) == round(255 * 0.45)).all()

    def test_words_are_drawn_for_each_rule(self, explained):
        one, both = plots.words(explained[1:]), plots.words(explained)
        assert both.height > 1.5 * one.height
        colours = np.asarray(both.convert("RGB")).astype(int)
        orange = (colours[..., 0] - colours[..., 2]) > 60
        # The image tokens of causal attention, in the upper row, read nothing.
        assert not orange[: both.height // 2].any()
        assert orange[both.height // 2 :].any()

    def test_layers_and_words_are_looked_up(self, explained):
        e = explained[1]
        np.testing.assert_allclose(plots.word_map(e, 2), e.question_maps.mean(0)[2])
        np.testing.assert_array_equal(plots.word_map(e, 2, layer=1), e.question_maps[1, 2])
        with pytest.raises(ValueError, match="no word 6"):
            plots.word_map(e, 6)
        with pytest.raises(ValueError, match="no layer 2"):
            plots.word_map(e, 0, layer=2)
        with pytest.raises(ValueError, match="no words"):
            plots.words([])
