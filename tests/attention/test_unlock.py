"""Every family that `unlock` is verified on; `docs/unlock.md` is made from what these tests say.

The oracle is a plain loop over pairs of tokens, written from the design's text, and handed to the stock model as masks.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from unlock_chats import chat, types
from unlock_families import FAMILIES, IMAGE_ID, MODALITY_OF, ROWS, Family, pixels

import aki

NEW_TOKENS = 6


@functools.cache
def built(name: str) -> Family:
    return FAMILIES[name]()


@pytest.fixture(params=FAMILIES)
def family(request):
    family = built(request.param)
    yield family
    aki.lock(family.model)
    family.model.eval().zero_grad()
    family.model.set_attn_implementation("sdpa")


def oracle(family: Family, ids: Tensor, real: Tensor, windowed: bool, prompt: Tensor) -> Tensor:
    """(batch, 1, length, length) bool: the family's own mask, and what mma opens ahead in the prompt.

    Behind, a window stays a window: the rule adds to the model's mask only what the model could never see.
    """
    batch, length = ids.shape
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        kind = [MODALITY_OF.get(i, 0) for i in ids[b].tolist()]
        for q in range(length):
            for k in range(length):
                own = k <= q and (not windowed or q - k < (family.window or length))
                if family.own == "image":
                    between = range(min(q, k), max(q, k) + 1)
                    own = own or (k > q and all(kind[i] for i in between))
                elif family.own == "prefix":
                    own = True
                both = bool(prompt[b, q]) and bool(prompt[b, k])
                opened = k > q and kind[q] != 0 and kind[k] != kind[q] and both
                mask[b, 0, q, k] = (own or opened) and bool(real[b, k])
    return mask


def stock_with_masks(family: Family, inputs: dict[str, Tensor], prompt: Tensor) -> Tensor:
    """Logits of the stock model, given the oracle's mask, one a layer type."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    full = oracle(family, ids, real, False, prompt)
    config = family.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    masks: Tensor | dict[str, Tensor]
    if len(kinds) > 1:
        masks = {kind: oracle(family, ids, real, kind == "sliding_attention", prompt) for kind in kinds}
    else:
        masks = oracle(family, ids, real, True, prompt) if family.window else full
    inputs = {**inputs, "attention_mask": masks}
    if family.own != "causal":
        inputs.pop(family.token_types)
    if family.mrope:
        inputs["position_ids"] = positions(family, {**inputs, "attention_mask": real.long()})
    with torch.no_grad():
        return family.model(**inputs).logits


def positions(family: Family, inputs: dict[str, Tensor]) -> Tensor:
    """The position ids that the stock model computes from its 2-D mask."""
    seen = {}
    handle = family.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        family.model(**inputs)
    handle.remove()
    return seen["position_ids"]


def logits(family: Family, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return family.model(**inputs).logits


def test_logits_equal_those_under_the_oracles_mask(family):
    inputs = chat(family, pad="left")
    real = inputs["attention_mask"].bool()
    wanted = stock_with_masks(family, inputs, prompt=real)
    causal = logits(family, inputs)
    aki.unlock(family.model)
    given = logits(family, inputs)
    torch.testing.assert_close(given[real], wanted[real], atol=1e-4, rtol=1e-4)
    if family.own != "prefix":
        assert not torch.allclose(given[real], causal[real], atol=1e-2), "the rule should change something"


def test_with_labels_the_prompt_is_what_is_not_learned(family):
    inputs = chat(family, answer=3, pad="right")
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = real.sum(1, keepdim=True)
    prompt = torch.arange(ids.shape[1]) < ends - 3
    if family.own == "prefix":
        pytest.skip("with token types PaliGemma's own mask is bidirectional over the prompt: the rule adds nothing")
    wanted = stock_with_masks(family, inputs, prompt)
    aki.unlock(family.model)
    given = logits(family, {**inputs, "labels": ids.masked_fill(prompt | ~real, -100)})
    torch.testing.assert_close(given[real], wanted[real], atol=1e-4, rtol=1e-4)


def test_without_media_bit_for_bit(family):
    ids = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types(family, ids)}
    inputs["attention_mask"][1, :3] = 0
    stock = logits(family, inputs)
    aki.unlock(family.model)
    assert torch.equal(logits(family, inputs), stock)


def test_locked_bit_for_bit(family):
    inputs = chat(family, pad="left")
    stock = logits(family, inputs)
    hooks = [len(module._forward_pre_hooks) for module in family.model.modules()]
    aki.unlock(family.model)
    logits(family, inputs)
    aki.lock(family.model)
    assert torch.equal(logits(family, inputs), stock)
    assert [len(module._forward_pre_hooks) for module in family.model.modules()] == hooks


# What the stock model gets wrong too: it raises, or answers otherwise than with a cache, before this release.
STOCK_FAILS_BEFORE = {("Gemma 3", "static"): "5.17", ("PaliGemma, prefix", "uncached"): "5.18"}


@pytest.mark.parametrize("kind", ["uncached", "static"])
def test_cached_generation_equals(request, family, kind):
    name = request.node.callspec.params["family"]
    if Version(transformers.__version__) < Version(STOCK_FAILS_BEFORE.get((name, kind), "0")):
        pytest.skip(f"transformers {transformers.__version__} itself cannot generate {kind} with {name}")
    how = {"uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}[kind]
    inputs = chat(family, pad="left")
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    aki.unlock(family.model)
    cached = family.model.generate(**inputs, **options)
    other = family.model.generate(**inputs, **options, **how)
    assert torch.equal(cached.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(other.logits), torch.stack(cached.logits), atol=1e-4, rtol=1e-4)
    # The first token comes from the prompt alone, which a plain forward sees in the same way.
    torch.testing.assert_close(cached.logits[0], logits(family, inputs)[:, -1], atol=1e-4, rtol=1e-4)


def test_train_step_gives_finite_gradients_to_every_weight_that_trains(family):
    model = family.model
    inputs = chat(family, answer=3, pad="right")
    real = inputs["attention_mask"].bool()
    prompt = torch.arange(real.shape[1]) < real.sum(1, keepdim=True) - 3
    inputs["labels"] = inputs["input_ids"].masked_fill(prompt | ~real, -100)

    def trained() -> dict[str, Tensor]:
        model.train().zero_grad()
        model(**inputs).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = trained()
    aki.unlock(model)
    unlocked = trained()
    assert unlocked.keys() == stock.keys()
    assert all(gradient.isfinite().all() for gradient in unlocked.values())
    if family.own != "prefix":
        assert any(not torch.allclose(unlocked[name], stock[name]) for name in stock)


def test_answers_are_never_seen_by_what_comes_before(family):
    inputs = chat(family, answer=3)
    ids = inputs["input_ids"]
    start = ids.shape[1] - 3
    labels = ids.clone()
    labels[:, :start] = -100
    changed = ids.clone()
    changed[:, start:] = (changed[:, start:] - 3 + 5) % 16 + 3
    aki.unlock(family.model)
    if family.own == "prefix":
        inputs["token_type_ids"] = (labels != -100).long()
    first = logits(family, {**inputs, "labels": labels})
    second = logits(family, {**inputs, "input_ids": changed, "labels": labels})
    assert not torch.equal(ids, changed)
    torch.testing.assert_close(first[:, :start], second[:, :start], atol=1e-5, rtol=1e-5)


def test_eager_equals_sdpa(family):
    inputs = chat(family, pad="left")
    real = inputs["attention_mask"].bool()
    aki.unlock(family.model)
    sdpa = logits(family, inputs)
    family.model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(family, inputs)[real], sdpa[real], atol=1e-4, rtol=1e-4)


def test_the_page_shows_every_family():
    page = (Path(__file__).parents[2] / "docs" / "unlock.md").read_text()
    assert [name for name in FAMILIES if f"\n| {name} | yes |" not in page] == [], "run docs/unlock_table.py"


def test_images_that_touch_and_are_wider_than_the_window():
    """Gemma 3 takes them for one. Behind, its window holds among their tokens too."""
    family = FAMILIES["Gemma 3"]()
    family.runs, family.media = [(IMAGE_ID, 8)], {"pixel_values": pixels(2 * ROWS, 3, 16, 16)}
    inputs = chat(family, pad="left")
    real = inputs["attention_mask"].bool()
    wanted = stock_with_masks(family, inputs, prompt=real)
    aki.unlock(family.model)
    torch.testing.assert_close(logits(family, inputs)[real], wanted[real], atol=1e-4, rtol=1e-4)


def test_says_when_the_models_own_mask_is_joined(family, caplog):
    with caplog.at_level(logging.WARNING, logger="aki"):
        aki.unlock(family.model)
    assert ("window" in caplog.text) == (family.window is not None)
    if family.own != "causal":
        assert "masks of its own" in caplog.text


def test_a_rule_that_numbers_tokens_in_its_own_way_is_refused():
    with pytest.raises(aki.attention.CannotUnlock, match="'concentric' also numbers the tokens"):
        aki.unlock(FAMILIES["LLaVA"]().model, rule="concentric")


def test_prefix_opens_text_without_pictures_too():
    model, ids = FAMILIES["LLaVA"]().model.eval(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        stock = model(ids).logits
        opened = aki.unlock(model, rule="prefix")(ids).logits
        assert (opened - stock)[0, 0].abs().max() > 1e-4
        with pytest.raises(ValueError, match="needs input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        assert torch.equal(aki.lock(model)(ids).logits, stock)
