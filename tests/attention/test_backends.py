"""The backends inside AKI, against the dense mask through transformers' own sdpa and eager."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from test_merged import largest_allocation
from transformers import AutoConfig

from aki import AkiConfig, AkiForConditionalGeneration
from aki.attention.choice import announce, choose
from aki.attention.kernels import _announce as announce_kernel
from aki.attention.kernels import choose_kernel
from aki.attention.rectangles import plan_parts
from aki.attention.rules import RULES, Rule, get_rule
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
    text = AutoConfig.for_model(
        language_model,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100, "max_position_embeddings": 512},
        **{"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1},
        **sizes,
    )
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
@pytest.mark.parametrize("rule", ["causal", "mma"])
def test_merged_gives_the_logits_of_the_dense_mask(language_model, padding, rule):
    inputs = batch(padding) | {"attention_rule": rule}
    with torch.no_grad():
        ours = build("merged", language_model, **MODELS[language_model])(**inputs).logits
        theirs = build("eager", language_model, **MODELS[language_model])(**inputs).logits
    assert differs(ours, theirs, inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("padding", ["left", "right"])
def test_flex_gives_the_logits_of_the_dense_mask(padding):
    flex, dense = build("flex"), build("eager")
    # One length after the other: a kernel compiled for the first must not be used for the second.
    for length in (LENGTH, LENGTH - 2):
        inputs = batch(padding)
        inputs |= {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask", "prompt_block_ids")}
        with torch.no_grad():
            ours, theirs = flex(**inputs).logits, dense(**inputs).logits
        assert differs(ours, theirs, inputs["attention_mask"]) < 1e-5


def test_flex_refuses_to_train_on_the_cpu():
    with pytest.raises(ValueError, match="no backward on the CPU"):
        build("flex")(**batch("right"))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_after_a_merged_prefill(cache):
    inputs = batch("left")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    assert torch.equal(build("merged").generate(**inputs, **options), build("sdpa").generate(**inputs, **options))


def gradients(model: AkiForConditionalGeneration, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    labels = inputs["input_ids"].masked_fill((inputs["prompt_block_ids"] >= 0) | (inputs["attention_mask"] == 0), -100)
    loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours: AkiForConditionalGeneration, theirs: AkiForConditionalGeneration, tolerance: float = 1e-6):
    (our_loss, our_gradients), (loss, wanted) = gradients(ours, batch("right")), gradients(theirs, batch("right"))
    assert our_loss == pytest.approx(float(loss), rel=max(tolerance, 1e-6))
    assert our_gradients.keys() == wanted.keys()
    worst = max(float((our_gradients[name] - gradient).abs().max()) for name, gradient in wanted.items())
    assert worst < tolerance * max(1.0, *(float(gradient.abs().max()) for gradient in wanted.values()))


def test_training_gives_the_gradients_of_the_dense_mask():
    same_gradients(build("merged"), build("sdpa"))


def test_gradient_checkpointing_changes_nothing():
    ours = build("merged")
    ours.gradient_checkpointing_enable()
    same_gradients(ours, build("merged"))


def test_a_compiled_language_model_changes_nothing():
    ours = build("merged")
    ours.model.language_model.forward = torch.compile(ours.model.language_model.forward, backend="aot_eager")
    same_gradients(ours, build("merged"))


def test_under_autocast_it_is_as_near_as_the_dense_mask():
    inputs = batch("right")
    with torch.no_grad():
        exact = build("sdpa")(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (build(name)(**inputs).logits for name in ("merged", "sdpa"))
    ours_off, theirs_off = (differs(x, exact, inputs["attention_mask"]) for x in (ours, theirs))
    assert 0 < ours_off < 1.5 * theirs_off


@pytest.mark.parametrize("implementation", ["merged", "sdpa"])
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


def test_merged_refuses_dropout_in_a_sentence():
    model = build("merged", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="attention_dropout to 0"):
        gradients(model, batch("right"))


def chosen(requested, ids, rule="mma", dtype=torch.float32, device="cpu", **layout):
    layout = build_layout(ids, {1: IMAGE}, PATCHES, **layout)
    rule = rule if isinstance(rule, Rule) else get_rule(rule)
    parts = None if rule.rectangles is None else plan_parts(layout, rule.rectangles(layout))
    return choose(requested, rule, ids.shape, parts, device=torch.device(device), dtype=dtype, heads=8)


def picture_and_text(length: int) -> torch.Tensor:
    ids = torch.full((1, length), 5)
    ids[:, : length // 2] = IMAGE
    return ids


def test_auto_takes_the_dense_mask_for_short_batches_and_merged_for_long():
    for dtype in (torch.float32, torch.bfloat16):
        choices = [chosen("auto", picture_and_text(length), dtype=dtype).backend for length in (64, 256, 2048, 8192)]
        assert choices == ["dense", "dense", "merged", "merged"]


def test_auto_takes_merged_for_packed_rows_whose_documents_are_short():
    position_ids = torch.arange(256).repeat(16)[None]
    assert chosen("auto", torch.full((1, 4096), 5), "causal", position_ids=position_ids).backend == "merged"


def test_auto_takes_no_mask_where_none_is_needed():
    assert "needs no mask" in str(chosen("auto", torch.full((2, 4096), 5)))


def test_a_rule_that_is_not_causal_plus_rectangles_is_dense_or_flex():
    free = Rule("free", RULES["causal"].allows, RULES["causal"].far)
    assert chosen("auto", picture_and_text(4096), free).backend == "dense"
    assert "not causal plus rectangles" in chosen("merged", picture_and_text(4096), free).reason
    assert chosen("auto", picture_and_text(4096), free, device="cuda").backend == "flex"


def test_a_choice_is_logged_once(caplog):
    choice = chosen("auto", picture_and_text(2048))
    announce.cache_clear()
    with caplog.at_level(logging.INFO, "aki.attention.choice"):
        announce(choice)
        announce(choice)
    assert [record.getMessage() for record in caplog.records] == [str(choice)]
    assert "merged attention: merged is expected to take 0." in str(choice)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "name"),
    [
        ("cpu", torch.float64, 10, "aten flash, CPU"),
        ("cuda", torch.bfloat16, 64, "aten flash, CUDA"),
        ("cuda", torch.float16, 60, "aten efficient, CUDA"),
        ("cuda", torch.float16, 264, "aten efficient, CUDA"),
        ("cuda", torch.float32, 64, "aten efficient, CUDA"),
    ],
)
def test_the_kernel_goes_by_device_dtype_and_width_and_says_why(caplog, device, dtype, width, name):
    announce_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "aki.attention"):
        kernels = [choose_kernel(stand_in(device, dtype, width)) for _ in range(2)]
    assert {kernel.name for kernel in kernels} == {name}
    assert [record.getMessage() for record in caplog.records] == [
        f"merged attention is computed by {name}: {kernels[0].reason}"
    ]


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float64), ("mps", torch.float32)])
def test_where_there_is_no_kernel_a_sentence_names_another_way(device, dtype):
    with pytest.raises(ValueError, match=f"no kernel for {dtype} on '{device}': load .* attn_implementation='sdpa'"):
        choose_kernel(stand_in(device, dtype, 64))


def stand_in(device, dtype, width):
    """For a tensor on a device that this machine lacks."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 8, width))


@pytest.mark.parametrize("implementation", ["merged", "auto"])
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
def test_no_mask_is_made_on_the_way_to_merged_attention(device):
    model, inputs = build("merged").to(device), {name: x.to(device) for name, x in batch("right").items()}
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    assert seen[0].dtype == torch.int64
    squares, rectangles = 3, 1 + (2 + 1)
    assert seen[0].shape == (1, 1, squares + rectangles, 7)
