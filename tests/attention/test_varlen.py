"""The calls that a GPU would be given, on a stand-in in plain torch with the contract of FlashAttention's varlen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import layouts, make_layout, scoped_layouts
from oracle import NAMES
from test_segment_attention import agree
from varlen_stand_in import CALLS, KERNEL

from aki.attention import kernels, varlen
from aki.attention.segments import segments


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(varlen, "FLASH", KERNEL)
    monkeypatch.setattr(kernels, "_is_cpu", lambda query: False)
    CALLS.clear()


@pytest.mark.usefixtures("stand_in")
class TestOnTheStandIn:
    @settings(max_examples=60)
    @given(st.one_of(layouts(), scoped_layouts()), st.sampled_from(NAMES), st.sampled_from([1, 2, 4]))
    def test_output_and_gradients_are_the_rules_own(self, layout, rule, key_heads):
        agree(layout, rule, torch.float32, key_heads=key_heads)

    @settings(max_examples=15)
    @given(layouts())
    def test_half_precision(self, layout):
        agree(layout, "mma", torch.bfloat16)

    def test_packed_rows_take_one_call_under_mma_and_two_under_prefix(self):
        document = [("image", 5), ("text", 3), ("answer", 2)]
        layout = make_layout([(0, [document] * 4, False), (3, [document] * 3, False)])
        agree(layout, "mma", torch.float32)
        assert CALLS == [True]
        agree(layout, "prefix", torch.float32)
        assert CALLS == [True, True, False]


def calls_of(rule, layout):
    batch, length = layout.shape
    return varlen.calls(tuple(segments(rule, layout)), (batch, length, length), torch.device("cpu"))


def test_what_is_all_there_is_in_order_is_not_copied():
    document = [("text", 2), ("image", 5), ("text", 3), ("answer", 2)]
    (causal,), (mma,) = (calls_of(rule, make_layout([(0, [document] * 2, False)])) for rule in ("causal", "mma"))
    assert causal.queries is None
    assert causal.keys is None
    assert causal.edges[0].tolist() == causal.edges[1].tolist() == [0, 12, 24]
    assert mma.queries is None
    assert mma.keys[2:12].tolist() == [7, 8, 9, 0, 1, 2, 3, 4, 5, 6]
    assert mma.edges[1].tolist() == [0, 2, 12, 24, 26, 36, 48]


def test_keys_of_a_static_caches_room_are_stepped_over():
    document = [("text", 3), ("answer", 2)]
    found = tuple(segments("causal", make_layout([(0, [document], False)] * 2)))
    (call,) = varlen.calls(found, (2, 5, 8), torch.device("cpu"))
    assert call.keys.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
