"""The design's rules in plain Python, token by token, and sequences drawn to try them on.

Written from the text of the rules alone: no tensors, no code of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from aki.layout import SequenceLayout

IGNORE = -100


@dataclass(frozen=True)
class Token:
    """What a token is; padding has document -1, text has modality 0, item and ring -1, an answer has block -1."""

    document: int
    modality: int = 0
    item: int = -1
    block: int = -1
    labelled: bool = False
    ring: int = -1

    @property
    def is_padding(self) -> bool:
        return self.document == -1


PADDING = Token(-1)
Row = list[Token]


def causal(row: Row, q: int, k: int) -> bool:
    return k <= q


def mma(row: Row, q: int, k: int) -> bool:
    if k <= q:
        return True
    query, key = row[q], row[k]
    if query.modality == 0:
        return False
    if key.modality == query.modality:
        return False
    return query.block != -1 and query.block == key.block


def concentric(row: Row, q: int, k: int) -> bool:
    if row[q].item != -1 and row[q].item == row[k].item:
        return row[k].ring <= row[q].ring
    return k <= q


def prefix(row: Row, q: int, k: int) -> bool:
    return k <= q or row[q].block == row[k].block != -1


def image_bidirectional(row: Row, q: int, k: int) -> bool:
    return k <= q or row[q].item == row[k].item != -1


RULES: dict[str, Callable[[Row, int, int], bool]] = {
    "causal": causal,
    "mma": mma,
    # These rows mark no scopes, where the two are one; rows that do are in attention/test_scopes.py.
    "mma_scoped": mma,
    "concentric": concentric,
    "prefix": prefix,
    "image_bidirectional": image_bidirectional,
}
NAMES = (*RULES, "mma+image_bidirectional")
"""`a+b` is the union."""


def ring_positions(row: Row) -> list[int]:
    """A picture's token stands at its start plus its ring, what follows at start plus the number of rings."""
    positions, following = [], {}
    for p, token in enumerate(row):
        after = following.get(token.document, 0)
        if token.is_padding:
            positions.append(0)
        elif token.item == -1:
            positions.append(after)
            following[token.document] = after + 1
        else:
            own = [other.ring for other in row if other.item == token.item]
            positions.append(after + token.ring)
            if p + 1 == len(row) or row[p + 1].item != token.item:
                following[token.document] = after + max(own) + 1
    return positions


def sees(rule: str, row: Row, q: int, k: int) -> bool:
    """The rule within one document; padding is never a key, and as a query keeps its causal row."""
    if row[k].is_padding:
        return False
    if row[q].is_padding:
        return k <= q
    return row[q].document == row[k].document and any(RULES[part](row, q, k) for part in rule.split("+"))


def mask(rule: str, row: Row) -> list[list[bool]]:
    return [[sees(rule, row, q, k) for k in range(len(row))] for q in range(len(row))]


def masks(rule: str, rows: list[Row]) -> torch.Tensor:
    """(batch, length, length) bool."""
    return torch.tensor([mask(rule, row) for row in rows])


def learned_of(visible: list[list[bool]], layers: int | None = None) -> list[set[int]]:
    """The positions whose input each position learns of through so many layers; None: until nothing changes."""
    known = [{q} for q in range(len(visible))]
    while layers is None or layers > 0:
        deeper = [
            set.union(known[q], *(known[k] for k in range(len(visible)) if visible[q][k])) for q in range(len(visible))
        ]
        if deeper == known:
            break
        known, layers = deeper, None if layers is None else layers - 1
    return known


def supervised(row: Row) -> list[int]:
    """The positions that are trained to predict the token after them, padding or not; the model takes media out."""
    return [q for q in range(len(row) - 1) if row[q + 1].labelled and row[q + 1].modality == 0]


def influence(visible: list[list[bool]], row: Row, layers: int = 3) -> torch.Tensor:
    """By the gradients of a small attention network: does the loss at q change with the token at p? (length, length).

    Whatever the loss doesn't train is a row without a True.
    """
    found = torch.zeros(len(row), len(row), dtype=torch.bool)
    if len(row) == 1:
        return found
    generator = torch.Generator().manual_seed(0)
    mask, width = torch.tensor(visible), 3
    tokens = torch.randn(len(row), width, generator=generator, dtype=torch.float64).requires_grad_()
    hidden = tokens
    for _ in range(layers):
        query, value = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
        weights = (hidden @ query @ hidden.T).tanh().masked_fill(~mask, -torch.inf)
        # The first token's row of left padding has no key.
        weights = weights.masked_fill(~mask.any(1, keepdim=True), 0).softmax(-1) * mask
        hidden = hidden + (weights @ hidden @ value).tanh()
    labels = torch.tensor([0 if row[q].labelled and row[q].modality == 0 else IGNORE for q in range(1, len(row))])
    losses = torch.nn.functional.cross_entropy(hidden[:-1], labels, reduction="none", ignore_index=IGNORE)
    every = torch.eye(len(row) - 1, dtype=torch.float64)
    (gradients,) = torch.autograd.grad(losses, tokens, every, is_grads_batched=True)
    found[:-1] = (gradients != 0).any(-1)
    return found


def blocks_from_labels(row: Row) -> list[int]:
    """Maximal runs of unlabelled tokens within one document, numbered from 0; media count as unlabelled."""
    blocks, count, open_in = [], 0, None
    for token in row:
        unlabelled = not token.is_padding and (not token.labelled or token.modality != 0)
        if not unlabelled:
            open_in = None
        elif open_in != token.document:
            open_in, count = token.document, count + 1
        blocks.append(count - 1 if unlabelled else -1)
    return blocks


@dataclass(frozen=True)
class Batch:
    """Rows of equal length and how they are told to a model: ids 10 and up are text, 0 padding, 1 and 2 media."""

    rows: list[Row]
    tokens_per_item: int
    packed: bool

    def tensor(self, read: Callable[[Token], int]) -> torch.Tensor:
        return torch.tensor([[read(token) for token in row] for row in self.rows])

    @property
    def layout(self) -> SequenceLayout:
        return SequenceLayout(
            document=self.tensor(lambda t: t.document),
            modality=self.tensor(lambda t: t.modality),
            media_item=self.tensor(lambda t: t.item),
            prompt_block=self.tensor(lambda t: t.block),
            ring=self.tensor(lambda t: t.ring),
        )

    @property
    def input_ids(self) -> torch.Tensor:
        text = 10 + torch.arange(len(self.rows) * len(self.rows[0])).reshape(len(self.rows), -1) % 7
        media, padding = self.tensor(lambda t: t.modality), self.tensor(lambda t: t.is_padding).bool()
        return torch.where(media > 0, media, text).masked_fill(padding, 0)

    @property
    def labels(self) -> torch.Tensor:
        """Also on media tokens, where they are to be ignored."""
        return torch.where(self.tensor(lambda t: t.labelled).bool(), self.input_ids, IGNORE)

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """None for packed rows: with a mask, transformers does not look for documents."""
        return None if self.packed else self.tensor(lambda t: not t.is_padding).long()

    @property
    def position_ids(self) -> torch.Tensor | None:
        """Restarting with each document; None where there is only one."""
        if not self.packed:
            return None
        starts = [
            [row.index(next(t for t in row if t.document == token.document)) for token in row] for row in self.rows
        ]
        return torch.arange(len(self.rows[0])) - torch.tensor(starts)

    @property
    def media_token_ids(self) -> dict[int, int]:
        return {1: 1, 2: 2}


@st.composite
def turns(draw, modalities: int) -> list[tuple[str, int]]:
    """One document: prompts and answers in turn, each perhaps empty, pictures anywhere (touching, first, last)."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        kinds = st.sampled_from(["text", "media"])
        for kind in draw(st.lists(kinds, max_size=4)):
            amount = draw(st.integers(1, 3)) if kind == "text" else draw(st.integers(1, modalities))
            parts.append((kind, amount))
        parts.append(("answer", draw(st.integers(0, 3))))
    return parts


@st.composite
def batches(
    draw,
    modalities: int = 2,
    max_rows: int = 3,
    packed: bool | None = None,
    free_labels: bool = True,
    tokens_per_item: int | None = None,
    rings: Sequence[int] | None = None,
) -> Batch:
    """Batches of several turns, documents and pictures, padded left or right, and with padding anywhere inside.

    Args:
        modalities: kinds of media.
        packed: True: several documents a row and no padding; False: one document a row, padded; None: both at once,
            which only a layout made by hand can say.
        free_labels: labels anywhere; else on the answers only.
        tokens_per_item, rings: of an item, and those of its tokens; any if absent.
    """
    tokens_per_item = tokens_per_item or draw(st.integers(1, 3))
    rings = rings or draw(st.lists(st.integers(0, 2), min_size=tokens_per_item, max_size=tokens_per_item))
    side = draw(st.sampled_from(["left", "right"]))
    holes = not packed and draw(st.booleans())
    restart_blocks = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        row: Row = []
        item = block = 0
        for document in range(1 if packed is False else draw(st.integers(1, 3))):
            block = 0 if restart_blocks else block
            captions = draw(st.booleans()) and draw(st.booleans())
            start = len(row)
            for kind, amount in draw(turns(modalities)):
                place = -1 if captions else block
                if kind == "text":
                    row += [Token(document, block=place)] * amount
                elif kind == "answer":
                    row += [Token(document, labelled=True)] * amount
                    block += 1
                else:
                    row += [Token(document, modality=amount, item=item, block=place, ring=ring) for ring in rings]
                    item += 1
            if len(row) == start:
                row.append(Token(document, block=-1 if captions else block))
        if holes:
            hole = draw(st.integers(0, len(row)))
            row[hole:hole] = [PADDING] * draw(st.integers(1, 2))
        rows.append(row)
    length = max(len(row) for row in rows)
    for i, row in enumerate(rows):
        if packed:
            # No padding: the last document goes on.
            row += [Token(row[-1].document, labelled=True)] * (length - len(row))
        else:
            padding = [PADDING] * (length - len(row))
            rows[i] = padding + row if side == "left" else row + padding
    if free_labels:
        rows = [[replace(token, labelled=draw(st.booleans())) for token in row] for row in rows]
    return Batch(rows, tokens_per_item, bool(packed))
