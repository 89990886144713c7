"""Many documents in a few calls, on a kernel put together from the CPU's: what a GPU's would be given."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import layouts, make_layout
from test_merged import agree, plan_of

from aki.attention import merged
from aki.attention.kernels import CPU_FLASH, Kernel, Varlen
from aki.attention.rectangles import decode_plan
from aki.attention.varlen import make_rounds


def sequences(query_edges, key_edges, longest_query, longest_key):
    """Slices of each sequence; the arguments' own contract is checked on the way."""
    assert query_edges.dtype == key_edges.dtype == torch.int32
    assert len(query_edges) == len(key_edges)
    cuts = [torch.stack([edges[:-1], edges[1:]], 1).tolist() for edges in (query_edges, key_edges)]
    assert longest_query == max(stop - start for start, stop in cuts[0])
    assert longest_key == max(stop - start for start, stop in cuts[1])
    return [(slice(*q), slice(*k)) for q, k in zip(*cuts, strict=True)]


def heads_first(*tensors):
    return [x.transpose(0, 1)[None] for x in tensors]


def forward(query, key, value, *rest):
    *edges, is_causal, scale = rest
    CALLS.append(is_causal)
    out = torch.full_like(query, torch.nan)
    lse = query.new_full((query.shape[1], query.shape[0]), torch.nan, dtype=torch.float32)
    for q, k in sequences(*edges):
        part, part_lse = CPU_FLASH.forward(*heads_first(query[q], key[k], value[k]), is_causal, scale)
        out[q], lse[:, q] = part[0].transpose(0, 1), part_lse[0].float()
    return out, lse


def backward(grad, query, key, value, out, lse, *rest):
    *edges, is_causal, scale = rest
    gradients = [torch.zeros_like(x) for x in (query, key, value)]
    for q, k in sequences(*edges):
        shares = CPU_FLASH.backward(
            *heads_first(grad[q], query[q], key[k], value[k], out[q]), lse[:, q][None].contiguous(), is_causal, scale
        )
        for gradient, own, share in zip(gradients, (q, k, k), shares, strict=True):
            gradient[own] = share[0].transpose(0, 1)
    return tuple(gradients)


CALLS: list[bool] = []
FAKE = Kernel("varlen", "a test", CPU_FLASH.forward, CPU_FLASH.backward, varlen=Varlen(forward, backward))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(merged, "choose_kernel", lambda query: FAKE)
    CALLS.clear()


@pytest.mark.usefixtures("fake")
class TestOnTheFake:
    @settings(max_examples=40)
    @given(layouts(), st.sampled_from(["causal", "mma"]), st.sampled_from([1, 2, 4]))
    def test_output_and_gradients_are_the_rules_own(self, layout, rule, key_heads):
        assume(len(decode_plan(plan_of(rule, layout))) > 0)
        agree(layout, rule, torch.float32, key_heads=key_heads)

    @settings(max_examples=15)
    @given(layouts())
    def test_half_precision(self, layout):
        agree(layout, "mma", torch.bfloat16)

    def test_packed_rows_take_two_calls(self):
        document = [("image", 5), ("text", 3), ("answer", 2)]
        layout = make_layout([(0, [document] * 4, False), (3, [document] * 3, False)])
        agree(layout, "mma", torch.float32)
        assert CALLS == [True, False]


def test_parts_of_a_round_share_no_query():
    document = [("image", 3), ("text", 2), ("image", 2), ("text", 2)]
    parts = tuple(decode_plan(plan_of("mma", make_layout([(0, [document] * 2, False)]))))
    squares, *rectangles = make_rounds(parts, 18, 18, torch.device("cpu"))
    assert squares.is_causal
    assert len(squares.query_edges) == 3
    # The first image sees two stretches of text that lie apart; all else goes into the first round.
    assert [len(one.query_edges) - 1 for one in rectangles] == [4, 2]
    for one in (squares, *rectangles):
        assert len(one.queries.unique()) == len(one.queries)
