from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import by_definition, layouts, make_layout, scoped_layouts
from oracle import NAMES
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from aki.attention import dense_mask, get_rule
from aki.attention.kernels import segment_attention
from aki.attention.segments import encode, segments

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
PRECISIONS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SCALE = 0.3
ONE_TURN = [(0, [[("text", 3), ("image", 40), ("text", 9), ("answer", 12)]], False)]


def tensors(layout, heads=4, key_heads=2, width=16, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, width), (key_heads, width), (key_heads, width)]
    batch, length = layout.shape
    made = [torch.randn(batch, length, h, w, generator=generator, dtype=torch.float64) for h, w in shapes]
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in made]


def plan_of(rule, layout):
    return encode(segments(rule, layout))


def output_and_gradients(function, inputs, weight):
    out = function(*inputs)
    return out, *torch.autograd.grad((out * weight.to(out)).sum(), inputs)


def agree(layout, rule, dtype=torch.float64, device="cpu", key_heads=2):
    inputs = tensors(layout, key_heads=key_heads, dtype=dtype, device=device)
    plan = plan_of(rule, layout)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight.masked_fill(layout.is_padding[:, None, :, None], 0)
    got = output_and_gradients(lambda q, k, v: segment_attention(q, k, v, plan, SCALE), inputs, weight)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    wanted = output_and_gradients(lambda q, k, v: by_definition(get_rule(rule), layout, q, k, v, SCALE), exact, weight)
    tolerance = PRECISIONS[dtype]
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours.detach().double().cpu() - theirs.detach()).abs().max() <= tolerance * max(
            1.0, float(theirs.detach().abs().max())
        )


@settings(max_examples=150, deadline=None)
@given(st.one_of(layouts(), scoped_layouts()), st.sampled_from(NAMES), st.sampled_from([1, 2, 4]))
def test_output_and_gradients_are_the_rules_own_in_float64(layout, rule, key_heads):
    agree(layout, rule, key_heads=key_heads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=25, deadline=None)
@given(layout=layouts())
def test_lower_precisions(device, dtype, layout):
    agree(layout, "mma", dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "rule"), [(torch.bfloat16, "mma"), *((torch.float32, name) for name in NAMES)])
def test_lengths_past_the_kernels_tiles(device, dtype, rule):
    """Squares and rectangles; what a document of up to 512 tokens has as a mask."""
    row = [("text", 5), ("image", 400), ("text", 90), ("image", 60), ("text", 30), ("answer", 40)]
    agree(make_layout([(0, [row], False), (7, [row[:4]], False)]), rule, dtype, device)


def test_nothing_but_padding_gives_zeros_and_no_gradient():
    layout = make_layout([(4, [], False)])
    inputs = tensors(layout)
    out, *gradients = output_and_gradients(
        lambda q, k, v: segment_attention(q, k, v, plan_of("mma", layout), SCALE), inputs, torch.ones(())
    )
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


def test_keys_beyond_the_queries_are_not_seen():
    """A static cache has room for tokens that do not exist yet."""
    layout = make_layout(ONE_TURN)
    query, key, value = tensors(layout)
    plan = plan_of("mma", layout)
    room = torch.full((1, 2, 30, 16), torch.nan, dtype=key.dtype)
    longer = segment_attention(query, torch.cat([key, room], 2), torch.cat([value, room], 2), plan, SCALE)
    assert torch.equal(longer, segment_attention(query, key, value, plan, SCALE))


def test_activation_checkpointing_recomputes_the_same():
    layout = make_layout(ONE_TURN)
    plan, inputs, weight = plan_of("mma", layout), tensors(layout), torch.ones(())
    plain = output_and_gradients(lambda q, k, v: segment_attention(q, k, v, plan, SCALE), inputs, weight)
    again = output_and_gradients(
        lambda q, k, v: checkpoint(segment_attention, q, k, v, plan, SCALE, use_reentrant=False), inputs, weight
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_operator_keeps_torchs_contract():
    """Schema, shapes and strides without data, autograd registration and tracing, as torch itself checks them."""
    for row in (ONE_TURN, [(2, [[("image", 5), ("text", 3)]], False)]):
        layout = make_layout(row)
        torch.library.opcheck(torch.ops.aki.segment_attention, (*tensors(layout), plan_of("mma", layout), SCALE))


def test_compiled_whole_and_not_again_for_another_layout():
    compiled = torch.compile(segment_attention, fullgraph=True, backend="aot_eager")
    layout = make_layout(ONE_TURN)
    other = make_layout([(0, [[("image", 30), ("text", 4), ("image", 8), ("text", 10), ("answer", 12)]], False)])
    assert layout.shape == other.shape
    for one, stance in ((layout, "default"), (other, "fail_on_recompile")):
        inputs, plan = tensors(one), plan_of("mma", one)
        weight = torch.ones(())
        # The number of calls in a plan may differ from batch to batch.
        torch._dynamo.mark_dynamic(plan, 2)
        with torch.compiler.set_stance(stance):
            got = output_and_gradients(lambda q, k, v, plan=plan: compiled(q, k, v, plan, SCALE), inputs, weight)
        wanted = output_and_gradients(
            lambda q, k, v, plan=plan: segment_attention(q, k, v, plan, SCALE), inputs, weight
        )
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_no_tensor_of_length_by_length_exists():
    """The largest allocation of forward and backward, kernels' own included, is smaller than a boolean mask."""
    length = 2048
    layout = make_layout([(0, [[("image", 1152), ("text", 256), ("answer", 640)]], False)])
    inputs = tensors(layout, heads=2, key_heads=2, dtype=torch.float32)
    plan = plan_of("mma", layout)
    assert largest_allocation(lambda: segment_attention(*inputs, plan, SCALE).sum().backward()) < length * length

    def dense():
        allowed = dense_mask(get_rule("mma"), layout)
        torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=allowed[:, None]).sum().backward()

    assert largest_allocation(dense) >= length * length


def test_memory_is_linear_in_the_length_up_to_16384():
    """Four times the tokens take four times the memory at its highest, and that is less than a boolean mask."""
    peaks = {}
    for length in (4096, 16384):
        pictures, prompt = length * 9 // 16, length // 8
        row = [("image", pictures), ("text", prompt), ("answer", length - pictures - prompt)]
        layout = make_layout([(0, [row], False)])
        inputs = tensors(layout, heads=1, key_heads=1, dtype=torch.float32)
        plan = plan_of("mma", layout)
        steps = allocations(lambda inputs=inputs, plan=plan: segment_attention(*inputs, plan, SCALE).sum().backward())
        peaks[length] = max(itertools.accumulate(steps))
    assert peaks[16384] < 4.1 * peaks[4096]
    assert peaks[16384] < 16384**2 / 8


def largest_allocation(function) -> int:
    return max(allocations(function))


def allocations(function) -> list[int]:
    """Bytes taken, and given back (negative), in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
