"""The backends inside AKI, against the dense mask through transformers' own sdpa and eager."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from test_segment_attention import largest_allocation
from transformers import AutoConfig

from aki import AkiConfig, AkiForConditionalGeneration
from aki.attention import RULES, Rule
from aki.attention.backends import attention
from aki.attention.choice import announce, choose, unfit
from aki.attention.kernels import no_kernel, segment_attention
from aki.attention.segments import decode, segments
from aki.compat import CACHE
from aki.layout import build_layout
from aki.training.trainer import guard_batch

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
IMAGE, PATCHES, LENGTH = 99, 16, 60
MODELS = {
    "llama": {},
    "phi3": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


def build(implementation: str, language_model: str = "llama", **sizes) -> AkiForConditionalGeneration:
    torch.manual_seed(0)
    usual = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "max_position_embeddings": 512},
        **{"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1},
    }
    text = AutoConfig.for_model(language_model, **usual | sizes)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = AutoConfig.for_model("siglip_vision_model", image_size=32, patch_size=8, **small)
    config = AkiConfig(
        vision_config=vision, text_config=text, connector_config={"connector": "mlp"}, image_token_id=IMAGE
    )
    return AkiForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


def batch(padding: str) -> dict[str, torch.Tensor]:
    """A row with one picture, a row with two, and a row of text, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (3, LENGTH), generator=generator)
    ids[0, 6:22] = ids[1, 5:21] = ids[1, 25:41] = IMAGE
    mask, blocks = torch.ones_like(ids), torch.zeros_like(ids)
    blocks[:, 50:] = -1
    if padding == "right":
        mask[1, 55:] = mask[2, 20:] = 0
    else:
        mask[0, :3] = mask[2, :40] = 0
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "prompt_block_ids": blocks, "pixel_values": pixels}


def differs(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> float:
    return float(((ours.float() - theirs.float()).abs().amax(-1) * mask).max())


@pytest.mark.parametrize("language_model", MODELS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rule", ["causal", "mma", "prefix", "mma+image_bidirectional"])
def test_segments_give_the_logits_of_the_dense_mask(language_model, padding, rule):
    inputs = batch(padding) | {"attention_rule": rule}
    with torch.no_grad():
        ours = build("segments", language_model, **MODELS[language_model])(**inputs).logits
        theirs = build("eager", language_model, **MODELS[language_model])(**inputs).logits
    assert differs(ours, theirs, inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_after_a_prefill_by_segments(cache):
    inputs = batch("left")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    assert torch.equal(build("segments").generate(**inputs, **options), build("sdpa").generate(**inputs, **options))


def gradients(
    model: AkiForConditionalGeneration, inputs: dict, train: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    labels = inputs["input_ids"].masked_fill((inputs["prompt_block_ids"] >= 0) | (inputs["attention_mask"] == 0), -100)
    loss = model.train(train)(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours, theirs, tolerance: float = 1e-6, train: bool = True):
    (our_loss, our_gradients), (loss, wanted) = (gradients(m, batch("right"), train) for m in (ours, theirs))
    assert our_loss == pytest.approx(float(loss), rel=max(tolerance, 1e-6))
    assert our_gradients.keys() == wanted.keys()
    worst = max(float((our_gradients[name] - gradient).abs().max()) for name, gradient in wanted.items())
    assert worst < tolerance * max(1.0, *(float(gradient.abs().max()) for gradient in wanted.values()))


def test_training_gives_the_gradients_of_the_dense_mask():
    same_gradients(build("segments"), build("sdpa"))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # for another name of the same
def test_gradient_checkpointing_changes_nothing():
    ours = build("segments")
    ours.gradient_checkpointing_enable()
    same_gradients(ours, build("segments"))


def test_a_compiled_language_model_changes_nothing():
    ours = build("segments")
    ours.model.language_model.forward = torch.compile(ours.model.language_model.forward, backend="aot_eager")
    same_gradients(ours, build("segments"))


def test_a_causal_model_compiles_whole():
    """Asking for the rule by its name is no part of the graph."""
    model, ids = build("sdpa"), torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    model.config.attention_rule = "causal"
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_under_autocast_it_is_as_near_as_the_dense_mask():
    inputs = batch("right")
    with torch.no_grad():
        exact = build("sdpa")(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (build(name)(**inputs).logits for name in ("segments", "sdpa"))
    ours_off, theirs_off = (differs(x, exact, inputs["attention_mask"]) for x in (ours, theirs))
    assert 0 < ours_off < 1.5 * theirs_off


@pytest.mark.parametrize("implementation", ["segments", "sdpa"])
def test_packed_documents_are_apart(implementation):
    """Positions that restart begin a document: its logits are those that it has alone."""
    model, inputs = build(implementation), batch("right")
    one = {name: inputs[name][:1] for name in ("input_ids", "prompt_block_ids")} | {
        "pixel_values": inputs["pixel_values"][:1]
    }
    two = {name: inputs[name][1:2] for name in ("input_ids", "prompt_block_ids")} | {
        "pixel_values": inputs["pixel_values"][1:]
    }
    packed = {name: torch.cat([one[name], two[name]], 1) for name in ("input_ids", "prompt_block_ids")}
    packed["position_ids"] = torch.arange(LENGTH).repeat(2)[None]
    with torch.no_grad():
        both = model(**packed, pixel_values=inputs["pixel_values"]).logits
        alone = [model(**sample).logits for sample in (one, two)]
    assert (both - torch.cat(alone, 1)).abs().max() < 1e-5


def test_segments_refuse_dropout_where_a_layer_asks_for_it_all_the_same():
    plan = torch.zeros(1, 1, 2, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot compute dropout"):
        attention(None, *torch.zeros(3, 1, 1, 1, 8), plan, dropout=0.1)


def test_what_the_kernels_cannot_takes_the_dense_mask_and_says_why(caplog):
    announce.cache_clear()
    with caplog.at_level(logging.INFO, "aki.attention.choice"):
        same_gradients(build("segments", attention_dropout=0.1).eval(), build("sdpa"), train=False)
    assert "dense attention: it drops out scores" in caplog.text


def test_every_way_to_the_dense_mask_says_its_reason_once(caplog):
    announce.cache_clear()
    inputs, cut = batch("left"), 40
    pictures = {"input_ids": inputs["input_ids"][:1, :cut], "pixel_values": inputs["pixel_values"][:1]}
    with caplog.at_level(logging.INFO, "aki.attention.choice"), torch.no_grad():
        for _ in range(2):
            build("eager")(**inputs)
            build("segments", "gemma3_text", **MODELS["gemma3_text"])(**inputs)
            model = build("segments")
            cache = getattr(model(inputs["input_ids"][:1, :5] % IMAGE, use_cache=True), CACHE)
            model(**pictures, **{CACHE: cache})
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("dense")]
    assert said == [
        "dense attention: attn_implementation is 'eager'",
        "dense attention: the batch is longer than the window of layers of kind sliding_attention",
        "dense attention: tokens are cached",
    ]


ONLY_EAGER = {
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 131072},
}


@pytest.mark.parametrize("implementation", ["segments", "auto"])
@pytest.mark.parametrize("language_model", ONLY_EAGER)
def test_caps_and_sinks_take_the_models_own_eager_attention_and_say_why(language_model, implementation, caplog):
    """Torch's sdpa drops sinks without a word."""
    announce.cache_clear()
    eager = build("eager", language_model, **ONLY_EAGER[language_model])
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    with caplog.at_level(logging.INFO, "aki.attention.choice"):
        made = build(implementation, language_model, **ONLY_EAGER[language_model])
        changed = build("eager", language_model, **ONLY_EAGER[language_model])
        changed.set_attn_implementation({"text_config": implementation})
    assert "'s attention (caps, sinks), its own eager one does" in caplog.text
    with torch.no_grad():
        wanted = eager(**batch("right")).logits
        for ours in (made, changed):
            ours.load_state_dict(eager.state_dict())
            assert differs(ours(**batch("right")).logits, wanted, batch("right")["attention_mask"]) < 1e-6


@pytest.mark.parametrize("asked", [{"softcap": 2.0}, {"s_aux": torch.zeros(2)}])
def test_a_layer_that_asks_for_caps_or_sinks_all_the_same_is_an_error(asked):
    for mask in (None, torch.zeros(1, 1, 2, 7, dtype=torch.int64)):
        with pytest.raises(ValueError, match=f"cannot compute {next(iter(asked))}"):
            attention(None, *torch.zeros(3, 1, 1, 1, 8), mask, **asked)


def second_turn_alone(layout, b, q, k):
    return (k <= q) & ~((layout.prompt_block[b, q] == 1) & (layout.prompt_block[b, k] == 0))


@pytest.mark.parametrize("implementation", ["segments", "auto", "sdpa", "eager"])
def test_a_rule_that_closes_text_holds_where_there_is_no_picture(implementation, monkeypatch):
    monkeypatch.setitem(RULES, "alone", Rule("alone", second_turn_alone))
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "prompt_block_ids": torch.tensor([[0] * 4 + [-1] * 2 + [1] * 3 + [-1] * 3])}
    other = {**inputs, "input_ids": torch.where(inputs["prompt_block_ids"] == 0, 5, ids)}
    model = build(implementation, num_hidden_layers=1)
    with torch.no_grad():
        one, two, causal = (
            model(**given, attention_rule=rule).logits[:, 6:9]
            for given, rule in ((inputs, "alone"), (other, "alone"), (other, "causal"))
        )
    torch.testing.assert_close(one, two)
    assert not torch.allclose(two, causal, atol=1e-3)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"v_head_dim": 4}, "not one width"),
        ({"sliding_window": 16}, "longer than the layers' window"),
    ],
)
def test_a_configuration_says_what_is_unfit(field, reason):
    config = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    assert unfit(config, torch.device("cpu"), torch.float32, 60) is None
    for name, value in field.items():
        setattr(config, name, value)
    assert reason in unfit(config, torch.device("cpu"), torch.float32, 60)


def chosen(requested, ids, rule="mma", dtype=torch.float32, device="cpu", **options):
    layout = build_layout(ids, {1: IMAGE}, PATCHES, **options)
    embeds = SimpleNamespace(device=torch.device(device), dtype=dtype)
    return choose(requested, tuple(segments(rule, layout)), layout, embeds, 8)


def picture_and_text(length: int) -> torch.Tensor:
    ids = torch.full((1, length), 5)
    ids[:, : length // 2] = IMAGE
    return ids


def test_auto_takes_the_dense_mask_for_short_batches_and_segments_for_long():
    for dtype in (torch.float32, torch.bfloat16):
        choices = [chosen("auto", picture_and_text(length), dtype=dtype).backend for length in (64, 256, 2048, 8192)]
        assert choices == ["dense", "dense", "segments", "segments"]


def test_auto_takes_segments_for_packed_rows_whose_documents_are_short():
    position_ids = torch.arange(256).repeat(16)[None]
    assert chosen("auto", torch.full((1, 4096), 5), "causal", position_ids=position_ids).backend == "segments"


def test_auto_takes_no_mask_where_none_is_needed():
    assert "needs no mask" in str(chosen("auto", torch.full((2, 4096), 5)))


def test_a_choice_is_logged_once(caplog):
    choice = chosen("auto", picture_and_text(2048))
    announce.cache_clear()
    with caplog.at_level(logging.INFO, "aki.attention.choice"):
        announce(choice)
        announce(choice)
    assert [record.getMessage() for record in caplog.records] == [str(choice)]
    assert "segments attention: segments are expected to take 0." in str(choice)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "reason"),
    [
        ("cpu", torch.float64, 10, None),
        ("cuda", torch.bfloat16, 64, None),
        ("cuda", torch.float16, 60, "no heads of width 60"),
        ("cuda", torch.float16, 264, "no heads of width 264"),
        ("cuda", torch.float32, 64, "half precision, and this is torch.float32"),
        ("mps", torch.float32, 64, "no kernel for 'mps'"),
    ],
)
def test_where_there_is_no_kernel_the_reason_is_said(device, dtype, width, reason):
    found = no_kernel(torch.device(device), dtype, width)
    assert found is None if reason is None else reason in found


def test_keys_and_values_of_two_widths_are_refused_in_a_sentence():
    query, key, value = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"keys have the width 8, values 4.*attn_implementation='sdpa'"):
        segment_attention(query, key, value, torch.zeros(1, 1, 0, 7, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("implementation", ["segments", "auto"])
def test_a_training_step_holds_nothing_of_length_by_length(implementation):
    """Guard, layout, plan, rotary embeddings and all: the largest allocation is smaller than a boolean mask."""
    length, answer = 2048, 1900
    model = build(implementation).train()
    ids = torch.full((1, length), 5)
    ids[:, : PATCHES * 2] = IMAGE
    blocks = torch.where(torch.arange(length)[None] < answer, 0, -1)
    inputs = {"input_ids": ids, "prompt_block_ids": blocks, "pixel_values": torch.randn(2, 3, 32, 32)}
    labels = ids.masked_fill(blocks == 0, -100)

    def step():
        guard_batch(model, inputs | {"labels": labels})
        model(**inputs, labels=labels).loss.backward()

    assert largest_allocation(step) < length * length
    model.set_attn_implementation({"text_config": "sdpa"})
    assert largest_allocation(step) >= length * length


@pytest.mark.parametrize("device", DEVICES)
def test_no_mask_is_made_on_the_way_to_segments(device):
    model, inputs = build("segments").to(device), {name: x.to(device) for name, x in batch("right").items()}
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    assert seen[0].dtype == torch.int64
    # Row by row: before, at and behind its pictures; two pictures with text between them; text alone.
    assert [segment.row for segment in decode(seen[0])] == [0, 0, 0, 1, 1, 1, 1, 1, 2]
