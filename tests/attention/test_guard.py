from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from aki import AkiConfig, AkiForConditionalGeneration
from aki.attention import LeakError, NothingOpensError, Rule, check_no_leak, get_rule, reach
from aki.layout import IGNORE_INDEX, SequenceLayout, grid_rings, number_runs

every_rule = pytest.mark.parametrize("name", oracle.NAMES)


def verdict(name: str, batch: oracle.Batch) -> str:
    try:
        check_no_leak(get_rule(name), batch.layout, batch.labels)
    except LeakError as error:
        return "opens nothing" if "opens nothing" in str(error) else "leaks"
    return "passes"


def true_verdict(name: str, batch: oracle.Batch) -> str:
    """By the gradients of a loss through an attention network under the oracle's mask."""
    later = torch.ones(len(batch.rows[0]), len(batch.rows[0]), dtype=torch.bool).triu(1)
    masks = [oracle.mask(name, row) for row in batch.rows]
    of_loss = torch.stack([oracle.influence(mask, row) for mask, row in zip(masks, batch.rows, strict=True)])
    if (of_loss & later).any():
        return "leaks"
    media = any(token.modality != 0 for row in batch.rows for token in row)
    opened = any(max(known[q]) > q for known in map(oracle.learned_of, masks) for q in range(len(known)))
    return "opens nothing" if name != "causal" and media and of_loss.any() and not opened else "passes"


def test_a_rule_that_takes_something_away_is_no_rule_that_opens_nothing():
    """Where it takes nothing away either, a model would not be trained by it."""

    def answers_apart(layout, b, q, k):
        answer = (layout.prompt_block[b, q] < 0) & (layout.modality[b, q] == 0)
        return (k <= q) & ~(answer & (layout.modality[b, k] != 0))

    rule = Rule("apart", answers_apart)
    layout = SequenceLayout(*torch.tensor([[[0] * 4], [[1, 0, 0, 0]], [[0, -1, -1, -1]], [[0, 0, -1, -1]]]))
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 5, 6]])
    check_no_leak(rule, layout, labels)
    with pytest.raises(NothingOpensError, match="'apart' opens nothing"):
        check_no_leak(rule, replace(layout, prompt_block=layout.prompt_block.clamp(min=0)), labels)


@every_rule
@given(batch=oracle.batches())
@settings(max_examples=100)
def test_the_verdict_is_that_of_the_losss_gradients(name, batch):
    assert verdict(name, batch) == true_verdict(name, batch)


@given(batch=oracle.batches())
@settings(max_examples=100)
def test_what_the_loss_trains_is_what_the_oracle_says(batch):
    for row in batch.rows:
        trained = oracle.influence(oracle.mask("causal", row), row).any(1)
        assert trained.nonzero()[:, 0].tolist() == oracle.supervised(row)


@pytest.mark.parametrize("longer", [0, 1])
def test_padding_between_prompt_and_answer_is_trained_too(longer):
    """Entry 27 of the faults found by use: the row that predicts the first token of the answer is padding."""
    prompt = [oracle.Token(0, block=0), oracle.Token(0, 1, 0, 0), oracle.Token(0, block=0)]
    answer = [oracle.Token(0, block=0 if i < longer else -1, labelled=True) for i in range(3)]
    batch = oracle.Batch([[*prompt, oracle.PADDING, oracle.PADDING, *answer]], 1, False)
    assert verdict("mma", batch) == true_verdict("mma", batch) == ("leaks" if longer else "passes")


def test_a_label_on_padding_is_trained_too():
    """Entry 27 again: padding is never seen, but a loss may ask for it."""
    row = [oracle.Token(0, 1, 0, 0), oracle.Token(0, block=0), replace(oracle.PADDING, labelled=True)]
    batch = oracle.Batch([[*row, oracle.Token(0, block=0)]], 1, False)
    assert verdict("mma", batch) == true_verdict("mma", batch) == "leaks"


@given(batch=oracle.batches(free_labels=False))
@settings(max_examples=200)
def test_labels_on_answers_alone_never_leak(batch):
    assert verdict("mma", batch) != "leaks"
    assert verdict("causal", batch) == "passes"


@every_rule
@given(batch=oracle.batches())
@settings(max_examples=100)
def test_reach_passes_a_token_exactly_where_the_fixpoint_does(name, batch):
    found = reach(get_rule(name), batch.layout).tolist()
    for row, reached in zip(batch.rows, found, strict=True):
        learned = oracle.learned_of(oracle.mask(name, row))
        for q, token in enumerate(row):
            if not token.is_padding:
                # A rule that contains causal attention: exactly; concentric: an upper bound.
                assert reached[q] >= max(learned[q]) or reached[q] > q
                if name != "concentric":
                    assert (reached[q] > q) == (max(learned[q]) > q)
                    assert reached[q] <= max(learned[q])


def conversation(*parts: tuple[str, int], longer: int = 0) -> tuple[SequenceLayout, torch.Tensor]:
    """A row of prompts (`text`), images and `answer`s with its labels; `longer` moves the ends of blocks."""
    modality, block, labels = [], [], []
    turn = 0
    for kind, length in parts:
        modality += [int(kind == "image")] * length
        block += [-1 if kind == "answer" else turn] * length
        labels += [5 if kind == "answer" else IGNORE_INDEX] * length
        turn += kind == "answer"
    for end in [i for i in range(1, len(block)) if block[i] == -1 != block[i - 1]]:
        block[end : end + longer] = [block[end - 1]] * longer
    values = torch.tensor([modality])
    item = number_runs(values == 1)
    layout = SequenceLayout(torch.zeros_like(values), values, item, torch.tensor([block]), ring=item.clamp(max=0))
    return layout, torch.tensor([labels])


def test_the_right_block_passes_and_one_token_more_is_caught():
    parts = ("text", 2), ("image", 3), ("text", 4), ("answer", 3)
    check_no_leak(get_rule("mma"), *conversation(*parts))
    with pytest.raises(LeakError):
        check_no_leak(get_rule("mma"), *conversation(*parts, longer=1))


def test_the_message_names_rule_row_and_path():
    layout, labels = conversation(("text", 2), ("image", 3), ("text", 4), ("answer", 3), longer=1)
    fine, fine_labels = conversation(("text", 2), ("image", 3), ("text", 4), ("answer", 3))
    two = SequenceLayout(
        *(
            torch.cat([getattr(part, field) for part in (fine, layout)])
            for field in ("document", "modality", "media_item", "prompt_block")
        )
    )
    with pytest.raises(LeakError) as error:
        check_no_leak(get_rule("mma"), two, torch.cat([fine_labels, labels]))
    message = str(error.value)
    assert "rule 'mma' leaks in row 1" in message
    assert "position 8 is trained to predict token 9" in message
    assert "it sees the media token at 2, which sees up to token 9" in message
    assert "block 0" in message
    assert "attention_rule='causal'" in message


def test_a_leak_in_a_later_turn_is_caught():
    parts = ("image", 2), ("text", 2), ("answer", 2), ("image", 2), ("text", 2), ("answer", 2)
    check_no_leak(get_rule("mma"), *conversation(*parts))
    layout, labels = conversation(*parts)
    layout.prompt_block[0, 10] = 1
    with pytest.raises(LeakError, match=r"position 9 .* media token at 6, which sees up to token 10\..*block 1"):
        check_no_leak(get_rule("mma"), layout, labels)


def test_a_block_that_comes_back_after_the_answer_is_caught():
    """Block 0 goes on in the second turn: the picture would carry the second question back into the first answer."""
    layout, labels = conversation(("image", 2), ("text", 2), ("answer", 2), ("text", 2), ("answer", 2))
    check_no_leak(get_rule("mma"), layout, labels)
    layout.prompt_block[0, 6:8] = 0
    with pytest.raises(LeakError):
        check_no_leak(get_rule("mma"), layout, labels)


def test_captions_under_mma_are_refused_in_words_that_help():
    layout, labels = conversation(("text", 1), ("image", 3), ("answer", 5))
    with pytest.raises(LeakError) as error:
        check_no_leak(get_rule("mma"), layout, labels)
    message = str(error.value)
    assert "'mma' opens nothing" in message
    assert "captions" in message
    assert "attention_rule='causal'" in message
    check_no_leak(get_rule("causal"), layout, labels)


def test_text_alone_is_no_caption():
    check_no_leak(get_rule("mma"), *conversation(("text", 2), ("answer", 5)))


def test_labels_on_images_and_padding_are_ignored():
    layout, labels = conversation(("text", 2), ("image", 3), ("text", 2), ("answer", 1), ("text", 2))
    layout.document[0, -2:] = -1
    layout.prompt_block[0, -2:] = -1
    labels[0, 2:5] = labels[0, -2:] = 5
    check_no_leak(get_rule("mma"), layout, labels)


class Count(TorchDispatchMode):
    """Counts operations and the elements of the largest tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@every_rule
def test_the_cost_is_linear_with_many_documents_turns_and_rows(name):
    rule = get_rule(name)  # which is tried when it is first asked for

    def cost(batch: int, documents: int) -> Count:
        turn = ("image", 2), ("text", 3), ("answer", 3)
        one, one_labels = conversation(*turn * 2)
        length = one.shape[1]
        repeated = {
            field: getattr(one, field).repeat(batch, documents) for field in ("modality", "media_item", "prompt_block")
        }
        document = torch.arange(documents).repeat_interleave(length).repeat(batch, 1)
        # Numbered over the whole row, as blocks and items are.
        repeated["prompt_block"] += torch.where(repeated["prompt_block"] >= 0, 2 * document, 0)
        repeated["media_item"] += torch.where(repeated["media_item"] >= 0, 2 * document, 0)
        repeated["ring"] = repeated["media_item"].clamp(max=0)
        layout, labels = SequenceLayout(document=document, **repeated), one_labels.repeat(batch, documents)
        with Count() as count:
            check_no_leak(rule, layout, labels)
        assert count.largest <= 4 * batch * documents * length
        return count

    assert cost(2, 10).operations == cost(2, 5_000).operations == cost(1_000, 10).operations


PER_IMAGE = 2
RINGS = grid_rings(3, 3).tolist()
"""Where a rule has rings, pictures have them: of nine latents."""


def per_image(rule: str) -> int:
    return len(RINGS) if rule == "concentric" else PER_IMAGE


def random_model(text: dict, latents: int) -> AkiForConditionalGeneration:
    """A tiny AKI of two layers whose weights are large enough for every influence to show, in double precision."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = AkiConfig(
        vision_config={"model_type": "siglip_vision_model", "num_hidden_layers": 1, "image_size": 4, "patch_size": 2}
        | sizes,
        text_config={"num_hidden_layers": 2, "vocab_size": 20, "head_dim": 8, "num_key_value_heads": 2} | sizes | text,
        connector_config={"num_latents": latents, "depth": 1, "num_heads": 2, "head_dim": 8},
        image_token_id=1,
    )
    model = AkiForConditionalGeneration(config).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "embed" not in name else 1.0)
    return model


MODELS = {
    "llama": {"model_type": "llama", "pad_token_id": 0},
    # One sliding and one full layer; a window wide enough for what is drawn, so that the rule alone decides.
    "gemma3": {
        "model_type": "gemma3_text",
        "pad_token_id": 0,
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(scope="module", params=MODELS)
def models(request) -> dict[int, AkiForConditionalGeneration]:
    return {latents: random_model(MODELS[request.param], latents) for latents in (PER_IMAGE, len(RINGS))}


def moved(model: AkiForConditionalGeneration, rule: str, batch: oracle.Batch) -> list[set[int]]:
    """For each position of a one-row batch: the positions whose token, when changed, changes its logits.

    A changed media position means another picture there; all positions of that picture change together.
    """
    ids, layout = batch.input_ids, batch.layout
    length, media = ids.shape[1], ids == 1
    items = int(layout.media_item.max()) + 1
    pictures = torch.randn(items, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    all_ids, all_pictures = ids.repeat(length + 1, 1), pictures.repeat(length + 1, 1, 1, 1, 1)
    for p in range(length):
        if media[0, p]:
            all_pictures[p + 1, layout.media_item[0, p]] *= -1
        else:
            all_ids[p + 1, p] = 2

    def spread(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.repeat(length + 1, 1)

    with torch.no_grad():
        logits = model(
            input_ids=all_ids,
            pixel_values=all_pictures.flatten(0, 1) if items else None,
            attention_mask=spread(batch.attention_mask),
            position_ids=spread(batch.position_ids),
            prompt_block_ids=spread(layout.prompt_block),
            attention_rule=rule,
            # transformers tells packed documents apart only without a cache.
            use_cache=False,
        ).logits
    changed = (logits[1:] - logits[:1]).abs().amax(-1) > 1e-9
    return [set(changed[:, q].nonzero()[:, 0].tolist()) for q in range(length)]


def one_row(rule: str, packed: bool):
    rings = RINGS if rule == "concentric" else None
    drawn = oracle.batches(modalities=1, max_rows=1, packed=packed, tokens_per_item=per_image(rule), rings=rings)
    # A picture changes as a whole, so what padding within it learns of could not be told apart.
    return drawn.filter(lambda batch: all(in_one_piece(batch.rows[0], token.item) for token in batch.rows[0]))


def in_one_piece(row: oracle.Row, item: int) -> bool:
    places = [i for i, token in enumerate(row) if token.item == item]
    return item == -1 or places[-1] - places[0] == len(places) - 1


@every_rule
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_learns_of_exactly_what_the_rule_says_and_the_guard_knows(models, name, packed):
    model = models[per_image(name)]

    @given(batch=one_row(name, packed))
    @settings(max_examples=25)
    def check(batch):
        (row,) = batch.rows
        known, found = oracle.learned_of(oracle.mask(name, row), layers=2), moved(model, name, batch)
        for q, token in enumerate(row):
            if not token.is_padding:
                whole_pictures = {
                    p for p in range(len(row)) for k in known[q] if p == k or row[p].item == row[k].item != -1
                }
                assert found[q] == whole_pictures
        future = any(p > q and row[p].item == -1 for q in oracle.supervised(row) for p in found[q])
        assert (verdict(name, batch) == "leaks") == future

    check()


def test_pictures_are_read_with_the_question_under_mma_and_without_it_under_causal(models):
    model = models[PER_IMAGE]
    """The hidden states of the picture, as the last layer has them, when the question behind it changes."""
    ids = torch.tensor([[10, 1, 1, 11, 12, 13]])
    other = torch.tensor([[10, 1, 1, 11, 2, 13]])
    picture = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()

    def picture_states(input_ids: torch.Tensor, rule: str) -> torch.Tensor:
        with torch.no_grad():
            out = model(input_ids, picture, attention_rule=rule, output_hidden_states=True)
        return out.hidden_states[-1][0, 1:3]

    assert torch.equal(picture_states(ids, "causal"), picture_states(other, "causal"))
    assert ((picture_states(ids, "mma") - picture_states(other, "mma")).abs().amax(-1) > 1e-3).all()
