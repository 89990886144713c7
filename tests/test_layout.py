import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aki.layout import IGNORE_INDEX, IMAGE, SequenceLayout, build_layout, number_runs

FIELDS = ("document", "modality", "media_item", "prompt_block")

# One document a row with padding, or several without: what a model can be told.
told_batches = st.booleans().flatmap(lambda packed: oracle.batches(packed=packed))


def built(batch: oracle.Batch, **given) -> SequenceLayout:
    return build_layout(
        batch.input_ids,
        batch.media_token_ids,
        batch.tokens_per_item,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        **given,
    )


@given(batch=told_batches, training=st.booleans())
@settings(max_examples=150)
def test_with_prompt_blocks_the_layout_is_what_was_drawn(batch, training):
    layout = built(batch, prompt_block_ids=batch.layout.prompt_block, labels=batch.labels, training=training)
    for field in FIELDS:
        assert torch.equal(getattr(layout, field), getattr(batch.layout, field)), field


@given(batch=told_batches, training=st.booleans())
@settings(max_examples=150)
def test_with_labels_blocks_are_runs_of_unlabelled_tokens(batch, training):
    layout = built(batch, labels=batch.labels, training=training)
    assert layout.prompt_block.tolist() == [oracle.blocks_from_labels(row) for row in batch.rows]
    for field in FIELDS[:-1]:
        assert torch.equal(getattr(layout, field), getattr(batch.layout, field)), field


@given(batch=told_batches)
@settings(max_examples=50)
def test_without_both_the_whole_input_is_one_block(batch):
    layout = built(batch)
    assert torch.equal(layout.prompt_block, torch.where(layout.is_padding, -1, 0))
    with pytest.raises(ValueError, match="prompt_block_ids"):
        built(batch, training=True)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def test_the_papers_prompt_by_hand():
    """<s> [image image] question <|assistant|> answer </s>, then padding; the image is id 9, labelled by mistake."""
    layout = build_layout(
        ids(1, 9, 9, 5, 6, 7, 2, 0, 0),
        {IMAGE: 9},
        2,
        attention_mask=ids(1, 1, 1, 1, 1, 1, 1, 0, 0),
        labels=ids(-100, 9, 9, -100, -100, 7, 2, -100, -100),
        training=True,
    )
    assert layout.document.tolist() == [[0, 0, 0, 0, 0, 0, 0, -1, -1]]
    assert layout.modality.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert layout.media_item.tolist() == [[-1, 0, 0, -1, -1, -1, -1, -1, -1]]
    assert layout.prompt_block.tolist() == [[0, 0, 0, 0, 0, -1, -1, -1, -1]]
    assert layout.is_padding.tolist() == [[False] * 7 + [True] * 2]
    assert layout.is_media.tolist() == [[False, True, True] + [False] * 6]
    assert layout.shape == (1, 9)


def test_touching_images_are_two_items():
    layout = build_layout(ids(9, 9, 9, 9, 5, 9, 9), {IMAGE: 9}, 2)
    assert layout.media_item.tolist() == [[0, 0, 1, 1, -1, 2, 2]]


def test_two_kinds_of_media():
    layout = build_layout(ids(8, 8, 9, 9, 5), {IMAGE: 9, 2: 8}, 2)
    assert layout.modality.tolist() == [[2, 2, 1, 1, 0]]
    assert layout.media_item.tolist() == [[0, 0, 1, 1, -1]]


def test_documents_are_where_positions_restart():
    layout = build_layout(ids(4, 4, 4, 4, 4, 4), {IMAGE: 9}, 2, position_ids=ids(0, 1, 2, 0, 0, 1))
    assert layout.document.tolist() == [[0, 0, 0, 1, 2, 2]]


def test_positions_that_start_late_or_are_shared_by_all_rows():
    layout = build_layout(torch.full((2, 4), 4), {IMAGE: 9}, 2, position_ids=ids(7, 8, 0, 1))
    assert layout.document.tolist() == [[0, 0, 1, 1]] * 2


def test_with_an_attention_mask_positions_make_no_documents():
    """As transformers has it: left-padded positions stand still, which is no new document."""
    layout = build_layout(ids(0, 0, 4, 4), {IMAGE: 9}, 2, attention_mask=ids(0, 0, 1, 1), position_ids=ids(0, 0, 0, 1))
    assert layout.document.tolist() == [[-1, -1, 0, 0]]


def test_a_run_of_prompt_ends_with_its_document():
    layout = build_layout(
        ids(4, 4, 4, 4), {IMAGE: 9}, 2, position_ids=ids(0, 1, 0, 1), labels=ids(-100, -100, -100, 4), training=True
    )
    assert layout.prompt_block.tolist() == [[0, 0, 1, -1]]


def test_blocks_on_padding_are_dropped():
    layout = build_layout(ids(0, 4, 4), {IMAGE: 9}, 2, attention_mask=ids(0, 1, 1), prompt_block_ids=ids(0, 0, -1))
    assert layout.prompt_block.tolist() == [[-1, 0, -1]]


def test_runs():
    inside = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    assert number_runs(inside).tolist() == [[0, 0, -1, 1, -1], [-1, 0, 0, 0, 0]]
    breaks = torch.tensor([[False] * 5, [True, False, False, True, False]])
    assert number_runs(inside, breaks).tolist() == [[0, 0, -1, 1, -1], [-1, 0, 0, 1, 1]]


def test_the_label_that_is_not_learned_is_torchs():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX
