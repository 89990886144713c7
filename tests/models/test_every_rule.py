"""Every rule in a whole model: against a stock language model that is given the oracle's mask and positions."""

import oracle
import pytest
import torch
from model_builders import (
    IMAGE,
    PAD,
    TEXT,
    assert_same,
    enlarge,
    pad,
    pictures,
    stock_language_model,
    tiny_model,
    tokens,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

from aki import AkiConfig, AkiForConditionalGeneration
from aki.compat import given_cache
from aki.layout import grid_rings

every_rule = pytest.mark.parametrize("rule", oracle.NAMES)

SIDE, STEPS = 3, 5
PER_PICTURE = SIDE * SIDE
PROMPTS = [
    # two pictures, one of them first; none; one, after text
    tokens("image", 7, "image", 8, 9, 3, per_image=PER_PICTURE),
    tokens(5, 6, 7, 3),
    tokens(5, 6, 7, "image", 12, 13, 3, per_image=PER_PICTURE),
]
IMAGES = pictures(3)
MORE = tokens(14, "image", 15, 16, 3, per_image=PER_PICTURE)
SECOND_IMAGE = pictures(1, seed=5)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def model(request) -> AkiForConditionalGeneration:
    made = tiny_model(text=request.param)
    sizes = made.config.connector_config.to_dict() | {"num_latents": PER_PICTURE}
    config = AkiConfig(
        vision_config=made.config.vision_config,
        text_config=TEXT[request.param](),
        connector_config=sizes,
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    made = AkiForConditionalGeneration(config)
    enlarge(made)
    return made.eval()


def prompts() -> dict[str, Tensor]:
    return {
        "input_ids": pad(PROMPTS, PAD, "left"),
        "attention_mask": pad([[1] * len(row) for row in PROMPTS], 0, "left"),
        "prompt_block_ids": pad([[0] * len(row) for row in PROMPTS], -1, "left"),
        "pixel_values": IMAGES,
    }


def described(ids: list[int], attention: list[int], blocks: list[int]) -> oracle.Row:
    rings, row, seen = grid_rings(SIDE, SIDE).tolist(), [], 0
    for token, real, block in zip(ids, attention, blocks, strict=True):
        if not real:
            row.append(oracle.PADDING)
        elif token == IMAGE:
            row.append(oracle.Token(0, 1, seen // PER_PICTURE, block, ring=rings[seen % PER_PICTURE]))
            seen += 1
        else:
            row.append(oracle.Token(0, block=block))
    return row


def stock(model: AkiForConditionalGeneration, rule: str, inputs: dict, sequences: Tensor) -> Tensor:
    """The logits that predict what was generated, from transformers' own model with everything made by hand."""
    start = inputs["input_ids"].shape[1]
    context, new = sequences[:, :-1], sequences.shape[1] - 1 - start
    attention = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    blocks = torch.nn.functional.pad(inputs["prompt_block_ids"], (0, new), value=-1)
    rows = [described(*row) for row in zip(context.tolist(), attention.tolist(), blocks.tolist(), strict=True)]
    config, language_model = model.config.text_config, stock_language_model(model, "sdpa")
    seen = oracle.masks(rule, rows)[:, None] | torch.eye(context.shape[1], dtype=torch.bool)
    index = torch.arange(context.shape[1])
    window = getattr(config, "sliding_window", None) if getattr(config, "layer_types", None) else None
    near = seen & (index > index[:, None] - window) if window else seen
    masks = {"full_attention": seen, "sliding_attention": near} if window else seen
    plain = (attention.cumsum(1) - 1).clamp(min=0)
    positions = torch.tensor([oracle.ring_positions(row) for row in rows]) if rule == "concentric" else plain
    with torch.no_grad():
        embeds = model.get_input_embeddings()(context)
        embeds = embeds.masked_scatter(
            (context == IMAGE)[..., None], model.get_image_features(inputs["pixel_values"]).pooler_output
        )
        logits = language_model(inputs_embeds=embeds, attention_mask=masks, position_ids=positions).logits
    return logits[:, start - 1 :]


def generate(model, rule: str, inputs: dict, **options) -> tuple[Tensor, Tensor]:
    length = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    how = length | {"return_dict_in_generate": True, "output_logits": True, "attention_rule": rule}
    out = model.generate(**inputs, **how | options)
    return out.sequences, torch.stack(out.logits, 1)


@every_rule
def test_every_step_equals_the_stock_model_with_and_without_a_cache(model, rule):
    inputs = prompts()
    sequences, logits = generate(model, rule, inputs)
    assert_same(logits, stock(model, rule, inputs, sequences))
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        again, again_logits = generate(model, rule, inputs, **options)
        assert torch.equal(again, sequences)
        assert_same(again_logits, logits)


@every_rule
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn_on_the_cache_equals_one_without(model, rule, kind):
    inputs = {name: value[:1] for name, value in prompts().items()} | {"pixel_values": IMAGES[:2]}
    config = model.config.text_config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=80)
    answered, _ = generate(model, rule, inputs, cache=cache)
    new = answered.shape[1] - inputs["input_ids"].shape[1]
    added = torch.tensor([[-1] * new + [1] * len(MORE)])
    second = {
        "input_ids": torch.cat([answered, torch.tensor([MORE])], 1),
        "attention_mask": torch.ones(1, answered.shape[1] + len(MORE), dtype=torch.long),
        "prompt_block_ids": torch.cat([inputs["prompt_block_ids"], added], 1),
        "pixel_values": torch.cat([IMAGES[:2], SECOND_IMAGE]),
    }
    uncached, uncached_logits = generate(model, rule, second, use_cache=False)
    found, logits = generate(model, rule, second, cache=cache)
    assert torch.equal(found, uncached)
    assert_same(logits, uncached_logits)
    assert_same(logits, stock(model, rule, second, found))


def test_rings_are_seen_in_the_logits(model):
    """Else all of this would also hold for a model without positions."""
    inputs = {name: value[:1] for name, value in prompts().items()} | {"pixel_values": IMAGES[:2]}
    _, concentric = generate(model, "concentric", inputs)
    _, causal = generate(model, "causal", inputs)
    assert (concentric - causal).abs().max() > 1e-2


def test_packed_documents_keep_their_own_rings(model):
    rows = [torch.tensor([tokens(*parts, per_image=PER_PICTURE)]) for parts in ((5, "image", 6, 7), ("image", 8, 9))]
    packed = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    blocks = torch.zeros_like(packed)
    with torch.no_grad():
        both = model(packed, IMAGES[:2], position_ids=positions, prompt_block_ids=blocks, attention_rule="concentric")
        alone = [
            model(row, IMAGES[i : i + 1], prompt_block_ids=torch.zeros_like(row), attention_rule="concentric").logits
            for i, row in enumerate(rows)
        ]
    assert_same(both.logits, torch.cat(alone, 1))


class TestOwnPositions:
    def test_forward_on_a_cache_takes_them_and_refuses_to_guess(self, model):
        ids = torch.tensor([PROMPTS[2]])
        with torch.no_grad():
            whole = model(ids, IMAGES[:1], attention_rule="concentric", use_cache=True)
            first = model(ids[:, :-2], IMAGES[:1], attention_rule="concentric", use_cache=True)
            with pytest.raises(ValueError, match="pass position_ids"):
                model(ids[:, -2:], cache=given_cache(first), attention_rule="concentric")
            positions = model.positions_by_rule(ids, attention_rule="concentric")
            rest = model(
                ids[:, -2:],
                cache=given_cache(first),
                position_ids=positions[:, -2:],
                attention_rule="concentric",
            )
        assert_same(rest.logits, whole.logits[:, -2:])
        assert model.positions_by_rule(ids, attention_rule="mma") is None

    def test_latents_that_are_no_square_are_refused(self):
        with pytest.raises(ValueError, match=r"latents .* rules with rings, 3 is none: 1 or 4"):
            tiny_model()(torch.tensor([[IMAGE] * 3 + [5]]), IMAGES[:1], attention_rule="concentric")

    @pytest.mark.parametrize("latents", [9, 16, 36, 144])
    def test_latents_are_a_square(self, latents):
        model = tiny_model()
        model.config.connector_config.num_latents = latents
        ids = torch.tensor([[5, *[IMAGE] * latents, 6]])
        side = int(latents**0.5)
        layout = model.layout(ids, attention_rule="concentric")
        assert torch.equal(layout.ring[0, 1:-1], grid_rings(side, side))
        assert int(model.positions_by_rule(ids, attention_rule="concentric")[0, -1]) == 1 + -(-side // 2)

    def test_patches_keep_their_grid_also_an_oblong_one(self):
        model = tiny_model(connector="mlp")
        model.config.vision_config.image_size = (24, 40)
        layout = model.layout(torch.tensor([[IMAGE] * 15]), attention_rule="concentric")
        assert torch.equal(layout.ring[0], grid_rings(3, 5))


def test_prefix_opens_text_alone(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        prefix, causal = (model(ids, attention_rule=rule).logits for rule in ("prefix", "causal"))
        assert (prefix - causal).abs()[0, 0].max() > 1e-2
        assert_same(prefix[:, -1], model(ids, attention_rule="prefix", use_cache=False).logits[:, -1])
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds, attention_rule="prefix").logits, prefix)


class TestPieces:
    """A rule that numbers tokens or opens text, on a part of the prompt."""

    def test_a_prefill_in_pieces_is_refused(self, model):
        inputs = prompts()
        for rule in ("concentric", "prefix", "mma"):
            with pytest.raises(
                ValueError, match=rf"the rule '{rule}' needs the prompt whole, and prefill_chunk_size=3"
            ):
                model.generate(**inputs, attention_rule=rule, max_new_tokens=2, prefill_chunk_size=3)

    @pytest.mark.parametrize("rule", ["causal", "mma", "concentric"])
    def test_text_in_pieces_is_the_whole_where_nothing_opens(self, model, rule):
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        how = {"attention_rule": rule, "max_new_tokens": 3, "min_new_tokens": 3}
        if rule == "concentric":
            with pytest.raises(ValueError, match="prefill_chunk_size=2 cuts it into pieces"):
                model.generate(ids, **how, prefill_chunk_size=2)
            return
        assert torch.equal(model.generate(ids, **how, prefill_chunk_size=2), model.generate(ids, **how))

    @pytest.mark.parametrize("rule", ["concentric", "prefix"])
    def test_new_ids_alone_behind_a_cache_are_refused(self, model, rule):
        ids = torch.tensor([PROMPTS[2]])
        with torch.no_grad():
            cache = given_cache(model(ids, IMAGES[:1], attention_rule=rule, use_cache=True))
        mask = torch.ones(1, ids.shape[1] + 3, dtype=torch.long)
        with pytest.raises(ValueError, match=rf"the rule '{rule}' needs all tokens, .* none are given"):
            model.generate(
                torch.tensor([[7, 8, 9]]),
                attention_mask=mask,
                cache=cache,
                attention_rule=rule,
                max_new_tokens=2,
            )

    def test_prefix_is_refused_where_the_cache_ends_within_a_prompt(self, model):
        ids = torch.tensor([PROMPTS[2]])
        more = torch.tensor([[7, 8]])
        blocks = torch.zeros(1, ids.shape[1] + 2, dtype=torch.long)
        with torch.no_grad():
            first = model(ids, IMAGES[:1], attention_rule="prefix", use_cache=True)

            def continued(blocks):
                return model(more, cache=given_cache(first), prompt_block_ids=blocks, attention_rule="prefix")

            for given in (None, blocks[:, -2:]):
                with pytest.raises(ValueError, match="pass the prompt_block_ids of all tokens so far"):
                    continued(given)
            with pytest.raises(ValueError, match="the cache ends in the middle of one"):
                continued(blocks)
            blocks[:, -2:] = 1
            found = continued(blocks).logits
            whole = model(
                torch.cat([ids, more], 1), IMAGES[:1], prompt_block_ids=blocks, attention_rule="prefix"
            ).logits
        assert_same(found, whole[:, -2:])
