import oracle
import pytest
import torch
from hypothesis import given, settings

from aki.attention import RULES, Rule, dense_mask, get_rule
from aki.layout import SequenceLayout

every_rule = pytest.mark.parametrize("name", sorted(RULES))


@every_rule
@given(batch=oracle.batches())
@settings(max_examples=150)
def test_a_rule_is_the_designs_rule_everywhere(name, batch):
    assert torch.equal(dense_mask(get_rule(name), batch.layout), oracle.masks(name, batch.rows))


@every_rule
@given(batch=oracle.batches())
@settings(max_examples=100)
def test_far_is_the_last_that_is_seen(name, batch):
    layout = batch.layout
    far = get_rule(name).far(layout)
    assert far.shape == layout.shape
    for row, visible, found in zip(batch.rows, oracle.masks(name, batch.rows).tolist(), far.tolist(), strict=True):
        for q, token in enumerate(row):
            if not token.is_padding:
                assert found[q] == max(k for k in range(len(row)) if visible[q][k])


def rows_of(rule: str, **columns: list[int]) -> list[str]:
    """The mask of one row as text: `x` is seen."""
    length = len(columns["modality"])
    columns = {"document": [0] * length, "media_item": [-1] * length, "prompt_block": [0] * length} | columns
    layout = SequenceLayout(**{name: torch.tensor([values]) for name, values in columns.items()})
    return ["".join("x" if seen else "." for seen in row) for row in dense_mask(get_rule(rule), layout)[0].tolist()]


def test_mma_by_hand():
    """Paper, section 1: [system][image image][question][answer-start | answer answer]."""
    assert rows_of("mma", modality=[0, 1, 1, 0, 0, 0, 0], prompt_block=[0, 0, 0, 0, 0, -1, -1]) == [
        "x......",
        "xx.xx..",
        "xxxxx..",
        "xxxx...",
        "xxxxx..",
        "xxxxxx.",
        "xxxxxxx",
    ]


def test_mma_over_two_turns_and_two_kinds_of_media_by_hand():
    """[image][question | answer][audio][image][question]: a picture sees its own turn's question, and the audio."""
    assert rows_of("mma", modality=[1, 0, 0, 2, 1, 0], prompt_block=[0, 0, -1, 1, 1, 1]) == [
        "xx....",
        "xx....",
        "xxx...",
        "xxxxxx",
        "xxxxxx",
        "xxxxxx",
    ]


@every_rule
def test_padding_is_no_key_and_keeps_its_causal_row(name):
    assert rows_of(name, document=[-1, 0, 0, -1], modality=[0, 0, 0, 0], prompt_block=[-1, 0, 0, -1]) == [
        "....",
        ".x..",
        ".xx.",
        ".xx.",
    ]


@every_rule
def test_one_entry_and_the_whole_mask_are_the_same_lines(name):
    layout = SequenceLayout(
        document=torch.tensor([[0, 0, 0, 0, 1, 1]]),
        modality=torch.tensor([[0, 1, 1, 0, 0, 1]]),
        media_item=torch.tensor([[-1, 0, 0, -1, -1, 1]]),
        prompt_block=torch.tensor([[0, 0, 0, 0, 1, 1]]),
    )
    rule, whole = get_rule(name), dense_mask(get_rule(name), layout)
    for q in range(6):
        for k in range(6):
            entry = rule.sees(layout, torch.tensor(0), torch.tensor(q), torch.tensor(k))
            assert entry.shape == ()
            assert bool(entry) == bool(whole[0, q, k])


def test_rules_are_found_by_name():
    assert {"causal", "mma"} <= RULES.keys()
    for name, rule in RULES.items():
        assert isinstance(rule, Rule)
        assert get_rule(name) is rule
        assert rule.name == name


def test_an_unknown_rule_is_a_sentence_with_the_nearest():
    with pytest.raises(ValueError, match=r"no attention rule 'mm'; there are .*causal.*mma.*Did you mean 'mma'\?"):
        get_rule("mm")
    with pytest.raises(ValueError, match=r"no attention rule 'zzz'") as error:
        get_rule("zzz")
    assert "Did you mean" not in str(error.value)
