"""What a prompt opens, against the rule's mask token by token; where it may be cut; what its blocks are called."""

from types import SimpleNamespace

import pytest
import torch
from folders import llava
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoProcessor
from varlen_stand_in import CALLS, KERNEL

from aki.attention import varlen
from aki.attention.rules import get_rule
from aki.layout import SequenceLayout, number_runs
from aki.vllm import steps
from aki.vllm.prompts import Prompt, PromptReader, openings
from aki.vllm.rows import Rows
from aki.vllm.steps import Steps

RULES = ["causal", "mma", "prefix", "image_bidirectional", "mma+image_bidirectional"]
KINDS = st.lists(st.tuples(st.sampled_from(["text", "image", "audio", "answer"]), st.integers(1, 4)), max_size=7)


def layout_of(kinds: list[tuple[str, int]]) -> SequenceLayout:
    """One row, and two tokens of text behind it."""
    flat = [kind for kind, count in [*kinds, ("text", 2)] for _ in range(count)]
    modality = torch.tensor([[{"image": 1, "audio": 3}.get(kind, 0) for kind in flat]])
    prompt = torch.tensor([[kind != "answer" for kind in flat]])
    item = number_runs(modality > 0, torch.diff(modality, prepend=modality[:, :1]) != 0)
    return SequenceLayout(torch.zeros_like(modality), modality, item, number_runs(prompt))


def mask_of(rule: str, layout: SequenceLayout) -> torch.Tensor:
    place = torch.arange(layout.shape[1])
    return get_rule(rule).sees(layout, torch.zeros((), dtype=torch.long), place[:, None], place[None, :])


@given(st.sampled_from(RULES), KINDS, st.integers(0, 9))
def test_openings_are_the_rule_s_mask(rule, kinds, cached):
    layout = layout_of(kinds)
    expected = mask_of(rule, layout)
    length = layout.shape[1]
    found = torch.ones(length, length).tril().bool()
    for opening in openings(get_rule(rule), layout):
        first = max(opening.first, cached)
        if first >= opening.stop:
            found[opening.first : opening.stop] = expected[opening.first : opening.stop]
            continue
        found[opening.first : first] = expected[opening.first : first]
        rows = Rows(slice(first - cached, opening.stop - cached), slice(0, length - cached), cached, 0, opening, first)
        keys = [key for span in rows.keys for key in range(*span)]
        found[first : opening.stop] = False
        found[first : opening.stop, keys] = rows.mask(None, torch.device("cpu"))
    assert torch.equal(found, expected)


@settings(max_examples=60)
@given(st.sampled_from(RULES), st.lists(KINDS, min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.data())
def test_on_a_gpu_a_step_s_rows_take_one_call_of_each_kind(rule, chats, key_heads, data):
    """Several requests, some behind a cached prefix; heads in groups; against attention under the rule's mask."""
    layouts = [layout_of(kinds) for kinds in chats]
    generator = torch.Generator().manual_seed(0)
    whole, rows, past, expected, offset = [], [], {}, [], 0
    for row, layout in enumerate(layouts):
        length, mask = layout.shape[1], mask_of(rule, layout)
        # A step begins where no earlier row sees a later key, as cuts do.
        cached = data.draw(st.sampled_from([at for at in range(length) if not mask[:at, at:].any()]))
        shape = ((length, 4, 8), (length, key_heads, 8), (length, key_heads, 8))
        query, key, value = (torch.randn(one, generator=generator) for one in shape)
        whole.append((query[cached:], key[cached:], value[cached:]))
        if cached:
            past[row] = key[:cached], value[:cached]
        tokens = slice(offset, offset + length - cached)
        for opening in openings(get_rule(rule), layout):
            first = max(opening.first, cached)
            if first < opening.stop:
                queries = slice(offset + first - cached, offset + opening.stop - cached)
                rows.append(Rows(queries, tokens, cached, row, opening, first))
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        expected.append(out[0].transpose(0, 1)[cached:])
        offset += length - cached
    query, key, value = (torch.cat(parts) for parts in zip(*whole, strict=True))
    output = torch.zeros_like(query)
    impl = SimpleNamespace(scale=8**-0.5)
    layer = SimpleNamespace(impl=impl, sliding_window=None, layer_name="layer")
    one = Steps(None, list)
    one.rows, one.pages = rows, {"layer": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "takes_segments", lambda *_: True)
        patch.setattr(steps, "read", lambda pages, layer, cache, row, count: past[row])
        patch.setattr(varlen, "FLASH", KERNEL)
        CALLS.clear()
        one.redo(layer, query, key, value, None, SimpleNamespace(block_table=range(len(layouts))), output)
    assert sorted(CALLS) == sorted({not one.opening.whole for one in rows})
    opened = torch.zeros(len(query), dtype=torch.bool)
    for found in rows:
        opened[found.queries] = True
    torch.testing.assert_close(output[opened], torch.cat(expected)[opened])
    assert not output[~opened].any()


def test_a_window_holds_behind_a_row_and_not_ahead_of_it():
    layout = layout_of([("text", 3), ("image", 4), ("text", 3)])
    (opening,) = openings(get_rule("mma"), layout)
    rows = Rows(slice(3, 7), slice(0, 12), 0, 0, opening, 3)
    shown = rows.mask(2, torch.device("cpu"))
    keys = [key for span in rows.keys for key in range(*span)]
    for row in range(4):
        seen = {keys[i] for i in shown[row].nonzero()[:, 0].tolist()}
        assert seen == {2 + row, 3 + row} | set(range(7, 12))


@given(st.sampled_from(RULES), KINDS, st.data())
def test_no_row_before_a_cut_sees_a_key_behind_it(rule, kinds, data):
    layout = layout_of(kinds)
    length = layout.shape[1]
    prompt = Prompt(tuple(range(length)), (), tuple(openings(get_rule(rule), layout)))
    mask = mask_of(rule, layout)
    legal = [at for at in range(length + 1) if not mask[:at, at:].any()]
    start = data.draw(st.sampled_from(legal))
    stop = data.draw(st.integers(start, length))
    assert prompt.cut(start, stop) == max(at for at in legal if at <= stop)
    whole = prompt.cut(start, stop, whole=True)
    inside = [o for o in prompt.openings if o.stop > start]
    assert whole == (stop if not inside or stop >= max(o.reach for o in inside) else start)


@given(st.sampled_from(RULES), KINDS, st.integers(1, 6), st.integers(0, 60))
def test_two_prompts_whose_blocks_have_one_name_see_the_same_ahead(rule, kinds, size, changed):
    layout = layout_of(kinds)
    length = layout.shape[1]
    opened, mask = tuple(openings(get_rule(rule), layout)), mask_of(rule, layout)
    ids = list(range(100, 100 + length))
    other = [*ids]
    other[changed % length] = 7
    one, two = Prompt(tuple(ids), (), opened), Prompt(tuple(other), (), opened)
    for start in range(0, length - size + 1, size):
        stop = start + size
        seen_ahead = mask[start:stop, stop:].any(0).nonzero()[:, 0] + stop
        differ = [i for i in seen_ahead.tolist() if ids[i] != other[i]]
        assert (one.seen_ahead(start, stop) != two.seen_ahead(start, stop)) == bool(differ)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = llava(tmp_path_factory.mktemp("llava"))
    processor = AutoProcessor.from_pretrained(folder)
    return PromptReader(AutoConfig.from_pretrained(folder), "mma", processor.tokenizer), processor.tokenizer


def read(reader, text: str, pictures: list[int], tokens: int = 4):
    """A prompt in which each <image> of `pictures` stands for an embedding, repeated; others are what a user wrote."""
    model, tokenizer = reader
    ids, items, seen = [], [], 0
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token == model.media_token_ids[1]:
            if seen in pictures:
                items.append((torch.arange(len(ids), len(ids) + tokens), f"picture {seen}"))
                ids += [token] * (tokens - 1)
            seen += 1
        ids.append(token)
    return model.read(ids, items), ids


def test_a_placeholder_that_a_user_wrote_is_text(reader):
    prompt, _ = read(reader, "<|user|><image>count <image> them<|end|><|assistant|>", [0])
    assert [(o.first, o.stop) for o in prompt.openings] == [(1, 5)]


def test_a_picture_sees_its_own_turn_and_no_answer(reader):
    text = "<|user|><image>one<|end|><|assistant|>two<|end|><|user|><image>three<|end|><|assistant|>"
    prompt, ids = read(reader, text, [0, 1])
    first, second = prompt.openings
    answer = [i for i, token in enumerate(ids) if token == reader[1].convert_tokens_to_ids("<|assistant|>")]
    assert first.reach == answer[0] + 1
    assert second.reach == len(ids)


def test_text_that_spells_a_mark_is_no_mark(reader):
    model, tokenizer = reader
    spelled = tokenizer("<|end|><|assistant|>two<|end|>", split_special_tokens=True, add_special_tokens=False)[
        "input_ids"
    ]
    user, image, end, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<image>", "<|end|>", "<|assistant|>"])
    ids = [user, image, image, *spelled, end, assistant]
    (opening,) = model.read(ids, [(torch.arange(1, 3), "picture")]).openings
    assert opening.ahead == ((3, len(ids)),)


def test_marks_in_a_raw_prompt_that_make_no_sense_are_no_error(reader):
    prompt, _ = read(
        reader, "<|user|><image>one<|end|><|assistant|><|assistant|>two<|end|><|assistant|><|assistant|>", [0]
    )
    assert len(prompt.openings) == 1


def test_the_model_of_an_adapter_is_asked_for_its_rule(reader, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"auto_mapping": {"attention_rule": "prefix"}}')
    assert reader[0].rule_for(str(tmp_path)).name == "prefix"
    assert reader[0].rule_for(None).name == "mma"
