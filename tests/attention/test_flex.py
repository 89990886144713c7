from __future__ import annotations

import torch
from hypothesis import given, settings
from layouts import layouts, make_layout
from torch.nn.functional import scaled_dot_product_attention

from aki.attention import dense_mask, get_rule
from aki.attention.flex import block_mask, compiled_for_cpu
from aki.layout import SequenceLayout

RULE = get_rule("mma")


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_blocks_and_function_are_those_of_the_dense_mask(layout):
    agree(layout)


def test_several_blocks_of_each_kind():
    row = [("text", 40), ("image", 300), ("text", 150), ("answer", 77)]
    agree(make_layout([(0, [row], False), (130, [row[:2]], True)]))


def agree(layout):
    (batch, length), ours, allowed = layout.shape, block_mask(RULE, layout), dense_mask(RULE, layout)
    assert ours.shape == (batch, 1, length, length)
    for b in range(batch):
        for row, start in enumerate(range(0, length, 128)):
            blocks = allowed[b, start : start + 128].split(128, dim=1)
            every = {i for i, block in enumerate(blocks) if block.shape == (128, 128) and block.all()}
            some = {i for i, block in enumerate(blocks) if block.any()} - every
            count, full = int(ours.kv_num_blocks[b, 0, row]), int(ours.full_kv_num_blocks[b, 0, row])
            assert set(ours.kv_indices[b, 0, row, :count].tolist()) == some
            assert set(ours.full_kv_indices[b, 0, row, :full].tolist()) == every
    index = torch.arange(length)
    assert torch.equal(ours.mask_mod(torch.arange(batch)[:, None, None], 0, index[:, None], index), allowed)


@torch._dynamo.config.patch(recompile_limit=1)
def test_another_length_is_compiled_too(recwarn):
    """Left to itself, torch gives up compiling after some lengths, and holds the scores of all pairs."""
    for length in (160, 288):
        drawn = make_layout([(0, [[("image", length - 8), ("text", 5), ("answer", 3)]], False)])
        names = ("document", "modality", "media_item", "prompt_block")
        # Tensors of their own, as build_layout makes them: torch's compiler fails on views of one.
        layout = SequenceLayout(*(getattr(drawn, name).contiguous() for name in names))
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 1, 2, length, 16)
        out = compiled_for_cpu()(query, key, value, block_mask=block_mask(RULE, layout))
        wanted = scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(RULE, layout)[:, None])
        torch.testing.assert_close(out, wanted)
    assert not [str(one.message) for one in recwarn if "without torch.compile" in str(one.message)]
