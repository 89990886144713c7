"""Hierarchical inputs: the scopes that a row's tokens open and close, and `mma_scoped` over them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor
from unlock_families import llava

import aki
from aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from aki.attention import check_no_leak, dense_mask, get_rule, reach
from aki.attention.guard import LeakError
from aki.attention.segments import far
from aki.data.tokenizer import train_tokenizer
from aki.layout import END_SCOPE_TOKEN, IMAGE, SCOPE_TOKEN, VIDEO, build_layout
from aki.models.templates import SHORT
from aki.prompts.scopes import SCOPE_PARTS, check_scopes

OPEN, CLOSE, PICTURE, CLIP = 1, 2, 3, 4
SCOPED, MMA = get_rule("mma_scoped"), get_rule("mma")


def layout_of(rows: list[list[int]], scoped: bool = True, **kwargs):
    ids = torch.tensor(rows)
    scopes = (OPEN, CLOSE) if scoped else None
    return build_layout(ids, {IMAGE: PICTURE, VIDEO: CLIP}, None, scope_token_ids=scopes, **kwargs)


def paths(row: list[int]) -> list[tuple[int, ...]]:
    """For each token the scopes that it stands in, outermost first: a parser with a stack."""
    stack: list[int] = []
    found, opened = [], 0
    for token in row:
        if token == OPEN:
            opened += 1
            stack.append(opened)
        found.append(tuple(stack))
        if token == CLOSE and stack:
            stack.pop()
    return found


def oracle(row: list[int], blocks: list[int]) -> list[list[bool]]:
    path, media = paths(row), {PICTURE, CLIP}

    def sees(q: int, k: int) -> bool:
        if k <= q:
            return True
        other = row[k] != row[q] if row[k] in media else True
        above = path[q][: len(path[k])] == path[k]
        return row[q] in media and other and blocks[q] == blocks[k] != -1 and above

    return [[sees(q, k) for k in range(len(row))] for q in range(len(row))]


rows = st.integers(1, 24).flatmap(
    lambda length: st.lists(
        st.tuples(
            st.lists(st.sampled_from([OPEN, CLOSE, PICTURE, CLIP, 9, 9]), min_size=length, max_size=length),
            st.lists(st.sampled_from([0, 0, 0, 1, -1]), min_size=length, max_size=length).map(sorted),
        ),
        min_size=1,
        max_size=3,
    )
)


@given(rows)
def test_scopes_are_those_of_a_parser(drawn):
    layout = layout_of([row for row, _ in drawn])
    for (row, _), scope, end in zip(drawn, layout.scope.tolist(), layout.scope_end.tolist(), strict=True):
        found = paths(row)
        assert scope == [path[-1] if path else 0 for path in found]
        for i, path in enumerate(found):
            within = [p[-1] for p in found if p and (not path or p[: len(path)] == path)]
            assert end[i] == max(within, default=0)


@given(rows)
def test_mask_equals_the_oracles(drawn):
    blocks = torch.tensor([b for _, b in drawn])
    layout = layout_of([row for row, _ in drawn], prompt_block_ids=blocks)
    wanted = torch.tensor([oracle(row, b) for row, b in drawn])
    assert torch.equal(dense_mask(SCOPED, layout), wanted)


@given(rows)
def test_far_is_the_last_that_the_mask_shows(drawn):
    blocks = torch.tensor([b for _, b in drawn])
    layout = layout_of([row for row, _ in drawn], prompt_block_ids=blocks)
    mask = dense_mask(SCOPED, layout)
    position = torch.arange(mask.shape[-1])
    last = torch.where(mask, position, -1).amax(-1)
    assert torch.equal(far(SCOPED, layout), last)
    assert torch.equal(reach(SCOPED, layout), last.cummax(1).values)


@given(rows)
def test_one_scope_is_mma(drawn):
    blocks = torch.tensor([b for _, b in drawn])
    plain = [[9 if token in (OPEN, CLOSE) else token for token in row] for row, _ in drawn]
    for layout in (layout_of(plain, prompt_block_ids=blocks), layout_of(plain, False, prompt_block_ids=blocks)):
        assert torch.equal(dense_mask(SCOPED, layout), dense_mask(MMA, layout))
        assert torch.equal(far(SCOPED, layout), far(MMA, layout))
    wrapped = [[OPEN, *row, CLOSE] for row in plain]
    around = torch.nn.functional.pad(blocks, (1, 1), mode="replicate")
    layout = layout_of(wrapped, prompt_block_ids=around)
    assert torch.equal(dense_mask(SCOPED, layout), dense_mask(MMA, layout))


def test_a_figure_sees_its_caption_and_the_question_and_no_other_caption():
    #       [  image     caption ]    [   image     caption ]     question
    row = [OPEN, PICTURE, 10, CLOSE, OPEN, PICTURE, 11, CLOSE, 12, 13]
    mask = dense_mask(SCOPED, layout_of([row]))[0]
    assert mask[1].tolist() == [True, True, True, True, False, False, False, False, True, True]
    assert mask[5].tolist() == [True] * 10


@pytest.fixture
def processor():
    tokenizer = train_tokenizer(["a red digit on the left", "what is it?"] * 5, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|scope|>", "<|/scope|>"]})
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    return AkiProcessor(images, tokenizer, image_seq_length=2, chat_template=SHORT)


def figure(caption: str) -> dict:
    picture = {"type": "image", "image": Image.new("RGB", (16, 16))}
    return {"type": "scope", "content": [picture, {"type": "text", "text": caption}]}


def test_a_document_with_figures_through_model_and_processor(processor):
    content = [figure("a red digit"), figure("on the left"), {"type": "text", "text": "what is it?"}]
    chat = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat, **options)
    ids = inputs["input_ids"]
    opened, closed = (processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|scope|>", "<|/scope|>"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AkiConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **sizes},
        connector_config={"connector": "perceiver_resampler", "num_latents": 2, "depth": 1},
        image_token_id=processor.image_token_id,
        scope_token_ids=[opened, closed],
        attention_rule="mma_scoped",
    )
    model = AkiForConditionalGeneration(config).eval()
    mask = dense_mask(SCOPED, model.layout(ids, prompt_block_ids=inputs["prompt_block_ids"]))[0]
    first_end, second_start = (ids[0] == closed).nonzero()[0], (ids[0] == opened).nonzero()[1]
    second_end = (ids[0] == closed).nonzero()[1]
    picture = int((ids[0] == processor.image_token_id).nonzero()[0])
    seen = mask[picture]
    assert seen[picture + 2 : first_end + 1].all(), "its own caption"
    assert not seen[second_start : second_end + 1].any(), "not the other figure's"
    assert seen[second_end + 1 :].all(), "the question"
    with torch.no_grad():
        scoped = model(**inputs).logits
        assert not torch.allclose(scoped, model(**inputs, attention_rule="mma").logits, atol=1e-4)


def test_a_table_is_a_scope_of_rows_of_cells(processor):
    cells = [[[{"type": "text", "text": word}] for word in row] for row in (("a", "red"), ("digit", "on"))]
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "table", "rows": cells}]}])
    marks = text.replace("<|scope|>", "[").replace("<|/scope|>", "]").removeprefix("<|user|>")
    assert marks == "[[[a][red]][[digit][on]]]"


def test_a_string_is_a_part_of_text(processor):
    """A table of plain cells, and a scope of plain words."""

    def written(*parts):
        return processor.apply_chat_template([{"role": "user", "content": list(parts)}])

    words = {"type": "text", "text": "a red digit"}
    table = {"type": "table", "rows": [["a red digit", [words]], [words, ["a red digit"]]]}
    as_parts = {"type": "table", "rows": [[[words], [words]], [[words], [words]]]}
    assert written(table) == written(as_parts)
    assert written({"type": "scope", "content": "a red digit"}) == written({"type": "scope", "content": [words]})


@pytest.mark.parametrize("rows", [None, "a red digit", ["a red digit"]])
def test_a_table_without_rows_is_an_error(processor, rows):
    with pytest.raises(ValueError, match="the table part of a message has no rows"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "table", "rows": rows}]}])


def test_scopes_that_the_tokenizer_does_not_know_are_an_error(processor):
    processor.tokenizer = train_tokenizer(["what is it?"] * 5, vocab_size=300)
    with pytest.raises(ValueError, match="add them as special tokens"):
        processor.apply_chat_template([{"role": "user", "content": [figure("a red digit")]}])


@pytest.fixture
def scoped_processor():
    """LLaVA's own, whose tokenizer knows scopes."""
    tokenizer = train_tokenizer(["a red digit on the left", "what is it?"] * 5, vocab_size=300)
    tokenizer.add_tokens([SCOPE_TOKEN, END_SCOPE_TOKEN], special_tokens=True)
    images = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, chat_template=SHORT, **options)


def scoped_llava(processor):
    model = llava().model
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    model.config.image_token_id = processor.image_token_id
    return model


DOCUMENT = [figure("a red digit"), figure("on the left"), {"type": "text", "text": "what is it?"}]


def test_unlocked_models_read_scopes_too(scoped_processor):
    """Logits equal those of the stock model under the oracle's mask; the wrapped processor writes the scopes."""
    model, writer = scoped_llava(scoped_processor), aki.write_prompt_blocks(scoped_processor)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = writer.apply_chat_template([{"role": "user", "content": DOCUMENT}], **options)
    ids = inputs["input_ids"]
    opened, closed = (scoped_processor.tokenizer.convert_tokens_to_ids(t) for t in (SCOPE_TOKEN, END_SCOPE_TOKEN))
    names = {opened: OPEN, closed: CLOSE, scoped_processor.image_token_id: PICTURE}
    row = [names.get(token, 9) for token in ids[0].tolist()]
    assert row.count(OPEN) == row.count(CLOSE) == 2
    mask = torch.tensor(oracle(row, [0] * len(row)))[None, None]
    with torch.no_grad():
        wanted = model(**{**inputs, "attention_mask": mask}).logits
        mma = aki.unlock(model)(**inputs).logits
        for given in (scoped_processor, writer):
            scoped = aki.unlock(model, given, rule="mma_scoped")(**inputs).logits
            torch.testing.assert_close(scoped, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mma, wanted, atol=1e-3)
    cached, uncached = (model.generate(**inputs, max_new_tokens=4, use_cache=c, do_sample=False) for c in (True, False))
    assert torch.equal(cached, uncached)


def test_unlocked_models_say_what_scopes_need(scoped_processor, processor):
    model = llava().model
    with pytest.raises(ValueError, match="pass unlock the processor"):
        aki.unlock(model, rule="mma_scoped")
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        aki.unlock(model, scoped_processor, rule="mma_scoped")
    processor.tokenizer = train_tokenizer(["what is it?"] * 5, vocab_size=300)
    with pytest.raises(ValueError, match="add them as special tokens"):
        aki.write_prompt_blocks(processor).apply_chat_template([{"role": "user", "content": DOCUMENT}])


def test_a_template_that_takes_pictures_out_of_scopes_is_an_error(scoped_processor):
    """As LLaVA's, which writes all images first."""
    images = "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    texts = "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    scoped_processor.chat_template = (
        "{% for message in messages %}<|" + "{{ message.role }}|>" + images + texts + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    writer = aki.write_prompt_blocks(scoped_processor)
    without_scopes = DOCUMENT[-1:] + DOCUMENT[0]["content"]
    assert "<image>" in writer.apply_chat_template([{"role": "user", "content": without_scopes}])
    with pytest.raises(ValueError, match="keeps the parts of a message in order"):
        writer.apply_chat_template([{"role": "user", "content": DOCUMENT}])


def test_a_template_without_pictures_keeps_audio_in_its_scopes(scoped_processor):
    """As Qwen2-Audio's: what the chat does not show says nothing about the template."""
    scoped_processor.chat_template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'audio' %}<audio>"
        "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    opened, closed = SCOPE_PARTS
    check_scopes([[{"role": "user", "content": [opened, {"type": "audio"}, closed]}]], scoped_processor)
    with pytest.raises(ValueError, match="keeps the parts of a message in order"):
        check_scopes([[{"role": "user", "content": [opened, {"type": "image"}, closed]}]], scoped_processor)


def test_a_leak_through_a_scope_is_found():
    row = [OPEN, PICTURE, 10, CLOSE, 12, 13]
    labels = torch.tensor([[-100, -100, 10, 2, -100, -100]])
    layout = layout_of([row], prompt_block_ids=torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(LeakError, match="mma_scoped"):
        check_no_leak(SCOPED, layout, labels)
