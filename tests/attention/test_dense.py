import copy

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, StaticCache

from aki.attention import Rule, dense_mask, get_rule, language_model_masks
from aki.compat import CACHE, given_cache

every_rule = pytest.mark.parametrize("rule", oracle.NAMES)

WINDOW = 4
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
TEXT_CONFIGS = {
    "llama": {"model_type": "llama"},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3 sliding": {"model_type": "phi3", "sliding_window": WINDOW},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 sliding": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1} | TWO_KINDS,
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2"} | TWO_KINDS,
    "gemma3": {"model_type": "gemma3_text"} | TWO_KINDS,
}
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "pad_token_id": 0,
}


def text_config(name: str, implementation: str = "sdpa") -> PreTrainedConfig:
    sizes = TEXT_CONFIGS[name] | SIZES
    return AutoConfig.for_model(**sizes, attn_implementation=implementation)


def windows(config: PreTrainedConfig) -> dict[str | None, int | None]:
    """The window of each kind of layer, by the words of the configuration; None for the kind: all are the same."""
    if getattr(config, "layer_types", None):
        return {kind: WINDOW if kind == "sliding_attention" else None for kind in config.layer_types}
    return {None: getattr(config, "sliding_window", None)}


def expected(rule: str, row: oracle.Row, seen: int, key_positions: list[int | None], window: int | None):
    """The oracle's rows for what comes after `seen` tokens; keys stand where the cache has them, None is an empty slot.

    What is in the cache is seen causally; so is what the call brings, by the rule; the window looks back only.
    """
    call = row[seen:]
    visible = oracle.mask(rule, call)

    def sees(q: int, position: int | None) -> bool:
        if position is None or row[position].is_padding:
            return False
        if window is not None and position <= q + seen - window:
            return False
        return visible[q][position - seen] if position >= seen else True

    return [[sees(q, position) for position in key_positions] for q in range(len(call))]


def fill(cache: Cache, seen: int, batch: int) -> None:
    """Put `seen` tokens into every layer; a key holds its position plus one, so that an empty slot is 0."""
    keys = torch.arange(1.0, seen + 1).expand(batch, 2, seen)[..., None].repeat(1, 1, 1, 4)
    for layer in range(2):
        cache.update(keys, keys, layer)


def key_positions(cache: Cache | None, layer: int, seen: int, length: int, batch: int) -> list[int | None]:
    """Where the keys stand that this layer's attention will get, read off the keys themselves."""
    keys = torch.arange(seen + 1.0, seen + length + 1).expand(batch, 2, length)[..., None].repeat(1, 1, 1, 4)
    if cache is not None:
        keys, _ = copy.deepcopy(cache).update(keys, keys, layer)
    return [None if key == 0 else int(key) - 1 for key in keys[0, 0, :, 0].tolist()]


def check_masks(rule: str, batch: oracle.Batch, config: PreTrainedConfig, cache: str | None, seen: int) -> None:
    rows, (count, total) = batch.rows, batch.layout.shape
    seen = min(seen, total - 1) if cache else 0
    past = {None: None, "dynamic": DynamicCache(config=config), "lazy": DynamicCache()}.get(cache)
    if cache == "static":
        past = StaticCache(config=config, max_cache_len=total + 2)
    if past is not None and seen:
        fill(past, seen, count)
    call = oracle.Batch([row[seen:] for row in rows], batch.tokens_per_item, batch.packed)
    masks = language_model_masks(
        get_rule(rule),
        call.layout,
        config,
        torch.zeros(count, total - seen, 8),
        batch.attention_mask,
        past,
        batch.position_ids,
    )
    kinds = windows(config)
    masks = masks if isinstance(masks, dict) else {None: masks}
    assert masks.keys() == kinds.keys()
    for kind, mask in masks.items():
        layer = 0 if kind is None else config.layer_types.index(kind)
        keys = key_positions(past, layer, seen, total - seen, count)
        wanted = torch.tensor([expected(rule, row, seen, keys, kinds[kind]) for row in rows])[:, None]
        assert mask.shape == wanted.shape
        if config._attn_implementation == "sdpa":
            assert mask.dtype == torch.bool
            assert torch.equal(mask, wanted), kind
        else:
            assert torch.equal(mask, torch.where(wanted, 0.0, torch.finfo(torch.float32).min)), kind


def told(**options):
    return st.booleans().flatmap(lambda packed: oracle.batches(packed=packed, **options))


@every_rule
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_without_a_cache(name, implementation, rule):
    config = text_config(name, implementation)

    @given(batch=told())
    @settings(max_examples=15)
    def check(batch):
        check_masks(rule, batch, config, None, 0)

    check()
    assert config._attn_implementation == implementation


@every_rule
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_with_a_cache(name, cache, rule):
    config = text_config(name)

    # `seen` 0 is a prefill into an empty cache; what is cached is more or less than a window.
    @given(batch=oracle.batches(packed=False), seen=st.integers(0, 9))
    @settings(max_examples=25)
    def check(batch, seen):
        check_masks(rule, batch, config, cache, seen)

    check()


@given(batch=oracle.batches(packed=False), seen=st.integers(0, 9), implementation=st.sampled_from(["sdpa", "eager"]))
@settings(max_examples=25)
def test_with_a_cache_that_makes_its_layers_as_they_come(batch, seen, implementation):
    check_masks("mma", batch, text_config("qwen2 sliding", implementation), "lazy", seen)


def test_a_window_by_hand():
    """[image][q q q q] with a window of 2: the picture sees all of its question, the text two tokens back."""
    row = [oracle.Token(0, modality=1, item=0, block=0)] + [oracle.Token(0, block=0)] * 4
    layout = oracle.Batch([row], 1, False).layout
    config = text_config("mistral")
    config.sliding_window = 2
    mask = language_model_masks(get_rule("mma"), layout, config, torch.zeros(1, 5, 8), None, None, None)
    assert ["".join(".x"[seen] for seen in line) for line in mask[0, 0].tolist()] == [
        "xxxxx",
        "xx...",
        ".xx..",
        "..xx.",
        "...xx",
    ]


def test_what_a_rule_closes_behind_is_taken_away_and_the_cache_stays_open():
    """A rule under which a token sees itself and the one after it; two tokens are cached."""
    ahead = Rule("ahead", lambda layout, b, q, k: (k == q) | (k == q + 1))
    config, layout = text_config("llama"), oracle.Batch([[oracle.Token(0)] * 3], 1, False).layout
    past = DynamicCache(config=config)
    fill(past, 2, 1)
    mask = language_model_masks(ahead, layout, config, torch.zeros(1, 3, 8), None, past, None)
    assert ["".join(".x"[seen] for seen in line) for line in mask[0, 0].tolist()] == [
        "xxxx.",
        "xx.xx",
        "xx..x",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_masks_have_the_dtype_of_the_embeddings_and_its_minimum(dtype):
    layout = oracle.Batch([[oracle.Token(0)] * 3], 1, False).layout
    embeds = torch.zeros(1, 3, 8, dtype=dtype)
    mask = language_model_masks(get_rule("causal"), layout, text_config("llama", "eager"), embeds, None, None, None)
    assert mask.dtype == dtype
    assert mask.unique().tolist() == [torch.finfo(dtype).min, 0]


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_an_implementation_that_takes_no_mask_is_refused_in_a_sentence(implementation):
    layout = oracle.Batch([[oracle.Token(0)] * 3], 1, False).layout
    config = text_config("llama")
    config._attn_implementation_internal = implementation
    with pytest.raises(
        ValueError, match=rf"'mma' needs a mask.*{implementation}.*attn_implementation='sdpa' or 'eager'"
    ):
        language_model_masks(get_rule("mma"), layout, config, torch.zeros(1, 3, 8), None, None, None)


# transformers has no sdpa for Gemma 2.
IMPLEMENTATIONS = [
    (name, way) for name in TEXT_CONFIGS for way in ("sdpa", "eager") if (name, way) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_under_causal_a_language_model_computes_what_it_computes_alone(name, implementation):
    """With a prefill of 5 tokens after 6 cached, padded on the left; transformers' own forward is the reference."""
    config = text_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    ids = torch.randint(1, 40, (2, 11))
    attention_mask = torch.ones(2, 11, dtype=torch.long)
    attention_mask[0, :3] = 0

    def second_logits(masks) -> torch.Tensor:
        with torch.no_grad():
            past = given_cache(model(ids[:, :6], attention_mask=attention_mask[:, :6], use_cache=True))
            return model(ids[:, 6:], attention_mask=masks(past), **{CACHE: past}).logits

    layout = oracle.Batch([[oracle.Token(0)] * 5] * 2, 1, False).layout
    embeds = torch.zeros(2, 5, 8)
    ours = second_logits(
        lambda past: language_model_masks(get_rule("causal"), layout, model.config, embeds, attention_mask, past, None)
    )
    torch.testing.assert_close(ours, second_logits(lambda past: attention_mask))


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


@every_rule
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_broadcast_no_vmap_and_no_loop_over_samples(name, rule, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("torch.vmap was used")

    monkeypatch.setattr(torch, "vmap", forbidden)
    turn = [oracle.Token(0, modality=1, item=0, block=0)] + [oracle.Token(0, block=0)] * 3

    def operations(batch: int) -> int:
        layout = oracle.Batch([turn] * batch, 1, False).layout
        with CountOperations() as count:
            dense_mask(get_rule(rule), layout)
            language_model_masks(
                get_rule(rule),
                layout,
                text_config(name),
                torch.zeros(batch, 4, 8),
                torch.ones(batch, 4, dtype=torch.long),
                None,
                None,
            )
        return count.operations

    assert operations(1) == operations(9)
