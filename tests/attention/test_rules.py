import oracle
import pytest
import torch
from hypothesis import given, settings

from aki.attention import RULES, Rule, dense_mask, get_rule
from aki.attention.rules import ring_positions
from aki.attention.segments import far
from aki.layout import SequenceLayout, build_layout, grid_rings

every_rule = pytest.mark.parametrize("name", oracle.NAMES)


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
    last = far(get_rule(name), layout)
    assert last.shape == layout.shape
    for row, visible, found in zip(batch.rows, oracle.masks(name, batch.rows).tolist(), last.tolist(), strict=True):
        for q, token in enumerate(row):
            if not token.is_padding:
                assert found[q] == max(k for k in range(len(row)) if visible[q][k])


def rows_of(rule: str, **columns: list[int]) -> list[str]:
    """The mask of one row as text: `x` is seen."""
    length = len(columns["modality"])
    columns = {"document": [0] * length, "media_item": [-1] * length, "prompt_block": [0] * length} | columns
    columns = {"ring": [-1] * length} | columns
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


# Positions 1 to 4 are a 2 x 2 picture, or with an inner ring a row of four whose second token lies within.
PICTURE = {"modality": [0, 1, 1, 1, 1, 0, 0], "media_item": [-1, 0, 0, 0, 0, -1, -1]}


def test_concentric_by_hand():
    """Later tokens of the same or an outer ring are seen, earlier tokens of an inner ring are not."""
    assert rows_of("concentric", **PICTURE, ring=[-1, 1, 0, 1, 0, -1, -1]) == [
        "x......",
        "xxxxx..",
        "x.x.x..",
        "xxxxx..",
        "x.x.x..",
        "xxxxxx.",
        "xxxxxxx",
    ]


def test_prefix_and_image_bidirectional_by_hand():
    prompt_and_answer = PICTURE | {"prompt_block": [0, 0, 0, 0, 0, 0, -1]}
    assert rows_of("prefix", **prompt_and_answer) == ["xxxxxx."] * 6 + ["xxxxxxx"]
    picture = ["x......"] + ["xxxxx.."] * 4 + ["xxxxxx.", "xxxxxxx"]
    assert rows_of("image_bidirectional", **prompt_and_answer) == picture
    with_question = ["x......"] + ["xxxxxx."] * 5 + ["xxxxxxx"]
    assert rows_of("mma+image_bidirectional", **prompt_and_answer) == with_question


def rings_by_peeling(height: int, width: int) -> list[int]:
    """Take the border away, again and again."""
    left, rings, ring = {(r, c) for r in range(height) for c in range(width)}, {}, 0
    while left:
        border = {(r, c) for r, c in left if not {(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)} <= left}
        corners = {(r, c) for r, c in left if (r, c) not in border and not {(r - 1, c - 1), (r + 1, c + 1)} <= left}
        rings |= dict.fromkeys(border | corners, ring)
        left, ring = left - border - corners, ring + 1
    return [rings[r, c] for r in range(height) for c in range(width)]


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 5), (2, 2), (3, 3), (3, 4), (4, 4), (5, 3), (12, 12), (7, 9)]
)
def test_rings_are_borders_taken_away(height, width):
    rings = grid_rings(height, width).tolist()
    assert rings == rings_by_peeling(height, width)
    assert max(rings) + 1 == -(-min(height, width) // 2)


def test_the_papers_grid_and_positions():
    """Two pictures of 4 x 4 tokens: two rings each, so text behind a picture goes on two positions after its start."""
    ids = torch.tensor([[5, *[9] * 16, 6, *[9] * 16, 7, 8]])
    layout = build_layout(ids, {1: 9}, 16, prompt_block_ids=torch.zeros_like(ids), grids={1: (4, 4)})
    rings = [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert layout.ring[0].tolist() == [-1, *rings, -1, *rings, -1, -1]
    assert ring_positions(layout)[0].tolist() == [0, *[1 + r for r in rings], 3, *[4 + r for r in rings], 6, 7]


@given(batch=oracle.batches())
@settings(max_examples=200)
def test_ring_positions_are_those_of_the_design(batch):
    found = ring_positions(batch.layout).tolist()
    for row, positions, wanted in zip(batch.rows, found, map(oracle.ring_positions, batch.rows), strict=True):
        assert [p for p, token in zip(positions, row, strict=True) if not token.is_padding] == [
            p for p, token in zip(wanted, row, strict=True) if not token.is_padding
        ]
        assert min(positions) >= 0


def test_concentric_without_rings_is_a_sentence():
    layout = SequenceLayout(*torch.zeros(4, 1, 3, dtype=torch.long).unbind(0))
    with pytest.raises(ValueError, match="'concentric' needs to know on which ring"):
        dense_mask(get_rule("concentric"), layout)


@every_rule
def test_padding_is_no_key_and_keeps_its_causal_row(name):
    assert rows_of(name, document=[-1, 0, 0, -1], modality=[0, 0, 0, 0], prompt_block=[-1, 0, 1, -1]) == [
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
        ring=torch.tensor([[-1, 0, 1, -1, -1, 0]]),
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


def test_a_union_has_what_its_parts_have():
    rule = get_rule("mma+prefix+image_bidirectional")
    assert rule.name == "mma+prefix+image_bidirectional"
    assert rule.changes_text
    assert rule.positions is None
    assert get_rule("mma+concentric").positions is ring_positions
    with pytest.raises(ValueError, match=r"no attention rule 'image_bidirectiona'.*Did you mean 'image_bidirectional'"):
        get_rule("mma+image_bidirectiona")


def within(distance):
    return lambda layout, b, q, k: (k <= q) & (q - k < distance)


def media_near(layout, b, q, k):
    return (k <= q) & ((layout.modality[b, q] == 0) | (q - k < 50))


def media_by_themselves(layout, b, q, k):
    media = (layout.modality[b, q] != 0) & (layout.modality[b, k] != 0)
    return torch.where(media, q == k, k <= q)


@pytest.mark.parametrize(
    "allows",
    [
        within(3),
        within(30_000),
        media_near,
        media_by_themselves,
        lambda layout, b, q, k: k <= q + 1,
        lambda layout, b, q, k: k < q,
        lambda layout, b, q, k: (k <= q) & ((k < 8) | (q - k < 100)),
    ],
)
def test_a_rule_that_runs_are_not_enough_for_is_told_so_when_it_is_asked_for(monkeypatch, allows):
    """A plugin's, say: segments and the guard would take it for another."""
    monkeypatch.setitem(RULES, "mine", Rule("mine", allows))
    with pytest.raises(ValueError, match=r"runs are not enough for the rule 'mine': .* Give the layout a field"):
        get_rule("mine")


@pytest.mark.parametrize(
    ("allows", "changes"),
    [
        (
            lambda layout, b, q, k: (k <= q) & ~((layout.prompt_block[b, q] == 1) & (layout.prompt_block[b, k] == 0)),
            True,
        ),
        (lambda layout, b, q, k: (k <= q) & ~((layout.modality[b, q] == 0) & (layout.modality[b, k] != 0)), False),
        (lambda layout, b, q, k: (k <= q) | (layout.prompt_block[b, k] == 0), True),
    ],
)
def test_a_rule_changes_text_where_it_closes_some_or_opens_it(allows, changes):
    assert Rule("mine", allows).changes_text == changes


def test_an_unknown_rule_is_a_sentence_with_the_nearest():
    with pytest.raises(ValueError, match=r"no attention rule 'mm'; there are .*causal.*mma.*Did you mean 'mma'\?"):
        get_rule("mm")
    with pytest.raises(ValueError, match=r"no attention rule 'zzz'") as error:
        get_rule("zzz")
    assert "Did you mean" not in str(error.value)
