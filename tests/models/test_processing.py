"""Chats to model inputs: where each prompt block begins and ends, by hand."""

import copy
import json
import sys
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from model_builders import PER_IMAGE, PIXELS, TOKENIZE, assistant, user
from transformers import AutoProcessor

import aki
from aki import AkiProcessor
from aki.models.answers import labels_from_prompt_blocks
from aki.models.images import ImageError
from aki.training.model import build_model
from aki.training.recipe import load_recipe

EOS = "<|endoftext|>"
IMAGES = "<image>" * PER_IMAGE
PADDED = {"padding": True}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def spell(processor, *parts: tuple[str, int]) -> tuple[list[int], list[int]]:
    """(input_ids, prompt_block_ids) of texts that each are of one block."""
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
    blocks = [[block] * len(part) for part, (_, block) in zip(ids, parts, strict=True)]
    return list(chain.from_iterable(ids)), list(chain.from_iterable(blocks))


def check(processor, chat, *parts: tuple[str, int], **options) -> dict:
    out = processor.apply_chat_template(chat, **TOKENIZE, **options)
    ids, blocks = spell(processor, *parts)
    assert processor.tokenizer.convert_ids_to_tokens(out["input_ids"][0]) == processor.tokenizer.convert_ids_to_tokens(
        ids
    )
    assert out["prompt_block_ids"].tolist() == [blocks]
    assert out["prompt_block_ids"].dtype == torch.int64
    assert set(out) <= {"input_ids", "attention_mask", "pixel_values", "prompt_block_ids"}
    return out


class TestPromptBlocks:
    def test_one_turn(self, processor, picture):
        out = check(
            processor,
            [user(picture(), "what is this ?"), assistant("a red one")],
            (f"<|user|>{IMAGES}what is this ?<|assistant|>", 0),
            (f"a red one{EOS}", -1),
        )
        assert out["pixel_values"].shape == (1, 3, PIXELS, PIXELS)

    def test_a_prompt_to_be_answered(self, processor, picture):
        chat = [user(picture(), "what is this ?")]
        prompt = f"<|user|>{IMAGES}what is this ?"
        check(processor, chat, (f"{prompt}<|assistant|>", 0), add_generation_prompt=True)
        check(processor, chat, (prompt, 0))

    def test_two_turns_with_an_image_each(self, processor, picture):
        chat = [
            user(picture(10), "what is this ?"),
            assistant("a red one"),
            user("and", picture(20), "this ?"),
            assistant("no"),
        ]
        parts = [
            (f"<|user|>{IMAGES}what is this ?<|assistant|>", 0),
            (f"a red one{EOS}", -1),
            (f"<|user|>and{IMAGES}this ?<|assistant|>", 1),
            (f"no{EOS}", -1),
        ]
        out = check(processor, chat, *parts)
        first, second = out["pixel_values"].mean((1, 2, 3)).tolist()
        assert (first, second) == pytest.approx((10 / 127.5 - 1, 20 / 127.5 - 1), abs=1e-5)
        check(processor, chat[:3], *parts[:3], add_generation_prompt=True)

    def test_a_system_message_belongs_to_the_first_prompt(self, processor, picture):
        check(
            processor,
            [system("be brief"), user(picture(), "what is this ?"), assistant("no")],
            (f"<|system|>be brief<|user|>{IMAGES}what is this ?<|assistant|>", 0),
            (f"no{EOS}", -1),
        )

    def test_text_alone(self, processor):
        chat = [{"role": "user", "content": "and this ?"}, {"role": "assistant", "content": "no"}]
        out = check(processor, chat, ("<|user|>and this ?<|assistant|>", 0), (f"no{EOS}", -1))
        assert "pixel_values" not in out

    def test_a_caption_has_no_prompt_but_its_image(self, processor, picture):
        check(
            processor,
            [user(picture()), assistant("  a red one ")],
            (IMAGES, 0),
            (f"a red one<|endofchunk|>{EOS}", -1),
            chat_template="caption",
        )

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_batch(self, processor, picture, side):
        chats = [
            [user(picture(10), "what is this ?"), assistant("no"), user(picture(20), "and this ?"), assistant("no")],
            [user("and this ?"), assistant("yes it is")],
            [user(picture(30), "this ?"), assistant("a red one")],
        ]
        spelled = [
            spell(
                processor,
                (f"<|user|>{IMAGES}what is this ?<|assistant|>", 0),
                (f"no{EOS}", -1),
                (f"<|user|>{IMAGES}and this ?<|assistant|>", 1),
                (f"no{EOS}", -1),
            ),
            spell(processor, ("<|user|>and this ?<|assistant|>", 0), (f"yes it is{EOS}", -1)),
            spell(processor, (f"<|user|>{IMAGES}this ?<|assistant|>", 0), (f"a red one{EOS}", -1)),
        ]
        out = processor.apply_chat_template(chats, **TOKENIZE, processor_kwargs=PADDED | {"padding_side": side})
        length = max(len(ids) for ids, _ in spelled)
        for row, (ids, blocks) in enumerate(spelled):
            gap = length - len(ids)
            before, after = (gap, 0) if side == "left" else (0, gap)
            assert out["attention_mask"][row].tolist() == [0] * before + [1] * len(ids) + [0] * after
            assert out["prompt_block_ids"][row].tolist() == [-1] * before + blocks + [-1] * after
            pad = [processor.tokenizer.pad_token_id]
            assert out["input_ids"][row].tolist() == pad * before + ids + pad * after
        levels = out["pixel_values"].mean((1, 2, 3))
        torch.testing.assert_close(levels, torch.tensor([10.0, 20, 30]) / 127.5 - 1, atol=1e-5, rtol=0)

    def test_an_answer_that_is_begun(self, processor, picture):
        chat = [user(picture(), "what is this ?"), assistant("no"), user("and this ?"), assistant("yes it")]
        out = check(
            processor,
            chat,
            (f"<|user|>{IMAGES}what is this ?<|assistant|>", 0),
            (f"no{EOS}", -1),
            ("<|user|>and this ?<|assistant|>", 1),
            ("yes it", -1),
            continue_final_message=True,
        )
        assert out["pixel_values"].shape[0] == 1

    def test_answers_that_are_begun_in_a_batch(self, processor, picture):
        chats = [[user(picture(), "what is this ?"), assistant("yes it")], [user("this ?"), assistant("a red")]]
        spelled = [
            spell(processor, (f"<|user|>{IMAGES}what is this ?<|assistant|>", 0), ("yes it", -1)),
            spell(processor, ("<|user|>this ?<|assistant|>", 0), ("a red", -1)),
        ]
        out = processor.apply_chat_template(chats, **TOKENIZE, continue_final_message=True, processor_kwargs=PADDED)
        for row, (ids, blocks) in enumerate(spelled):
            assert out["input_ids"][row, -len(ids) :].tolist() == ids
            assert out["prompt_block_ids"][row, -len(ids) :].tolist() == blocks
            assert (out["prompt_block_ids"][row, : -len(ids)] == -1).all()

    def test_the_masks_of_answers_may_be_asked_for(self, processor):
        out = processor.apply_chat_template(
            [user("this ?"), assistant("no")], **TOKENIZE, return_assistant_tokens_mask=True
        )
        assert torch.equal(out["assistant_masks"] == 0, out["prompt_block_ids"] == 0)

    def test_an_unknown_word_is_not_the_answer_token(self, make_processor):
        plain = make_processor()
        plain.tokenizer.unk_token = "<|system|>"
        processor = AkiProcessor(
            plain.image_processor, plain.tokenizer, PER_IMAGE, plain.chat_template, answer_token="<|nobody|>"
        )
        assert processor.answer_token_id is None
        check(processor, [user("this ?"), assistant("no")], ("<|user|>this ?<|assistant|>", 0), (f"no{EOS}", -1))


PHI = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ '\n' }}"
    "{{ m.content[0].text }}{{ eos_token }}{% endgeneration %}{% else %}<|user|>\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI_OUTSIDE = PHI.replace("{% generation %}{{ '\n' }}", "\n{% generation %}")
assert PHI_OUTSIDE != PHI


class TestWhiteSpaceAfterTheAnswerToken:
    """Paper, section 3: swallowed by Phi-3's role tokens; where a tokenizer keeps it, it belongs to the answer."""

    PROMPT = f"<|user|>\n{IMAGES}\nwhat is this ?<|assistant|>"

    @pytest.mark.parametrize("template", [PHI, PHI_OUTSIDE], ids=["within the tags", "before them"])
    @pytest.mark.parametrize("swallows", [True, False])
    def test_training(self, make_processor, picture, swallows, template):
        processor = make_processor(template, flags={"rstrip": swallows})
        newline = "" if swallows else "\n"
        chat = [user(picture(), "what is this ?"), assistant("a red one")]
        out = processor.apply_chat_template(chat, **TOKENIZE)
        ids, blocks = out["input_ids"][0].tolist(), out["prompt_block_ids"][0].tolist()
        start = processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
        cut = ids.index(start) + 1
        assert blocks == [0] * cut + [-1] * (len(ids) - cut)
        assert ids[cut:] == processor.tokenizer(f"{newline}a red one{EOS}", add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize("template", [PHI, PHI_OUTSIDE], ids=["within the tags", "before them"])
    @pytest.mark.parametrize("swallows", [True, False])
    def test_inference(self, make_processor, picture, swallows, template):
        processor = make_processor(template, flags={"rstrip": swallows})
        chat = [user(picture(), "what is this ?")]
        after = [] if swallows else [("\n", -1)]
        check(processor, chat, (self.PROMPT, 0), *after, add_generation_prompt=True)

    @pytest.mark.parametrize("template", [PHI, PHI_OUTSIDE], ids=["within the tags", "before them"])
    @pytest.mark.parametrize("swallows", [True, False])
    def test_an_answer_that_is_begun(self, make_processor, picture, swallows, template):
        processor = make_processor(template, flags={"rstrip": swallows})
        chat = [user(picture(), "what is this ?"), assistant("a red")]
        answer = "a red" if swallows else "\na red"
        check(processor, chat, (self.PROMPT, 0), (answer, -1), continue_final_message=True)


def test_labels_are_the_answers(processor, picture):
    chats = [
        [user(picture(), "what is this ?"), assistant("no"), user("and this ?"), assistant("yes it is")],
        [user("this ?"), assistant("no")],
    ]
    out = processor.apply_chat_template(chats, **TOKENIZE, processor_kwargs=PADDED)
    inputs = [out[name] for name in ("input_ids", "attention_mask", "prompt_block_ids")]
    labels = labels_from_prompt_blocks(*inputs, processor.image_token_id)
    prompts = [f"<|user|>{IMAGES}what is this ?<|assistant|>", "<|user|>and this ?<|assistant|>"]
    sizes = [len(processor.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    first, second = (processor.tokenizer(f"{answer}{EOS}")["input_ids"] for answer in ("no", "yes it is"))
    assert labels[0].tolist() == [-100] * sizes[0] + first + [-100] * sizes[1] + second
    assert labels[1].tolist() == [-100] * (labels.shape[1] - len(first)) + first


def test_labels_leave_out_images_and_padding():
    ids = torch.tensor([[0, 2, 2, 5, 6]])
    labels = labels_from_prompt_blocks(ids, torch.tensor([[0, 1, 1, 1, 1]]), torch.full_like(ids, -1), 2)
    assert labels.tolist() == [[-100, -100, -100, 5, 6]]


class TestSaving:
    def test_nothing_is_lost(self, processor, picture, tmp_path):
        processor.save_pretrained(tmp_path)
        chat = [user(picture(), "what is this ?"), assistant("a red one")]
        for load in (AkiProcessor, AutoProcessor):
            again = load.from_pretrained(tmp_path)
            assert type(again) is aki.AkiProcessor
            assert again.image_seq_length == PER_IMAGE
            assert again.chat_template == processor.chat_template
            for template in (None, "caption"):
                before = processor.apply_chat_template(chat, chat_template=template, **TOKENIZE)
                after = again.apply_chat_template(chat, chat_template=template, **TOKENIZE)
                assert before.keys() == after.keys()
                assert all(torch.equal(before[name], after[name]) for name in before)

    def test_names_of_tokens_and_one_template(self, make_processor, tmp_path):
        processor = make_processor(PHI, image_token="<|system|>", answer_token="<|user|>")
        processor.save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)
        assert again.chat_template == PHI
        assert (again.image_token, again.answer_token) == ("<|system|>", "<|user|>")
        assert again.image_token_id == processor.image_token_id
        assert "image_seq_length" in json.loads((tmp_path / "processor_config.json").read_text())


class TestText:
    """Without a chat: `image_token` once an image."""

    def test_placeholders_are_written_out(self, processor, picture):
        out = processor(images=[picture(), picture()], text="a<image>b<image>", return_tensors="pt")
        assert out["input_ids"].tolist() == [processor.tokenizer(f"a{IMAGES}b{IMAGES}")["input_ids"]]
        assert out["pixel_values"].shape[0] == 2

    @pytest.mark.parametrize("nested", [True, False])
    def test_texts_with_and_without_images(self, processor, picture, nested):
        images = [[], [picture()], [picture(), picture()]] if nested else [picture()] * 3
        out = processor(images=images, text=["no", "a<image>", "<image>b<image>"], padding=True, return_tensors="pt")
        assert (out["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, PER_IMAGE, 2 * PER_IMAGE]
        assert out["pixel_values"].shape[0] == 3

    @pytest.mark.parametrize("images", [[], [[]], [[], []], ([], [])])
    def test_23_lists_without_images_are_as_no_images(self, processor, images):
        """Issue 12, entry 23: they gave `pixel_values` of the shape (0,)."""
        text = ["what", "and what"][: len(images) or 1]
        out = processor(images=images, text=text, padding=True, return_tensors="pt")
        assert out.keys() == processor(text=text, padding=True, return_tensors="pt").keys()
        with pytest.raises(ValueError, match=r"<image> tokens in the (prompts|text)"):
            processor(images=images, text=["<image> what", *text[1:]])

    def test_anything_that_opens(self, processor, picture, tmp_path):
        picture().save(tmp_path / "a.png")
        images = [tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture()), (tmp_path / "a.png").read_bytes()]
        out = processor(images=images, text="<image>" * 4, return_tensors="pt")
        assert (out["pixel_values"] == out["pixel_values"][0]).all()

    @pytest.mark.parametrize(
        ("text", "count"), [("<image> what", 2), ("<image><image> what", 1), ("what", 1), ("<image> what", 0)]
    )
    def test_more_or_fewer_images_than_placeholders(self, processor, picture, text, count):
        with pytest.raises(ValueError, match=r"<image> tokens in the text and [0-9] image"):
            processor(images=[picture()] * count or None, text=text)

    def test_images_of_another_text(self, processor, picture):
        with pytest.raises(ValueError, match=r"text 0 names 1 image\(s\) and has 2"):
            processor(images=[[picture(), picture()], [picture()]], text=["<image>", "<image><image>"])


class TestBadInput:
    @pytest.mark.parametrize("tokenize", [True, False])
    @pytest.mark.parametrize("chat", [[], [[]], [[{"role": "user", "content": "this ?"}], []]])
    def test_an_empty_chat(self, processor, chat, tokenize):
        with pytest.raises(ValueError, match="the chat is empty"):
            processor.apply_chat_template(chat, tokenize=tokenize, return_dict=tokenize)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "  \n",
            None,
            [],
            [{"type": "text", "text": " "}],
            [{"type": "image", "image": "X"}, {"type": "text", "text": ""}],
        ],
    )
    def test_an_empty_question(self, processor, picture, content):
        if isinstance(content, list):
            content = [part | {"image": picture()} if part["type"] == "image" else part for part in content]
        with pytest.raises(ValueError, match="the question is empty"):
            processor.apply_chat_template([{"role": "user", "content": content}], **TOKENIZE)

    def test_a_part_of_an_unknown_type_is_not_lost(self, processor):
        content = [{"type": "imgae", "image": "X"}, {"type": "text", "text": "this ?"}]
        with pytest.raises(ValueError, match="a part of type 'imgae'"):
            processor.apply_chat_template([{"role": "user", "content": content}], **TOKENIZE)

    def test_an_image_part_without_an_image(self, processor):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this ?"}]}]
        with pytest.raises(ValueError, match="the image part of a message has no image"):
            processor.apply_chat_template(chat, **TOKENIZE)

    def test_a_placeholder_typed_by_hand_is_text(self, processor):
        ids = processor.apply_chat_template([user("this <image> ?")], **TOKENIZE)["input_ids"][0]
        assert processor.image_token_id not in ids
        assert "this <image> ?" in processor.tokenizer.decode(ids)
        with pytest.raises(ValueError, match=r"found 1 <image> tokens in the text and 0 image\(s\)"):
            processor(text="this <image> ?", return_tensors="pt")

    def test_an_image_that_is_not_there(self, processor, tmp_path):
        with pytest.raises(ImageError, match=r"there is no picture at .*nothing\.png"):
            processor.apply_chat_template([user(tmp_path / "nothing.png", "this ?")], **TOKENIZE)

    @pytest.mark.parametrize("begun", [False, True])
    def test_a_template_that_marks_no_answers(self, make_processor, begun):
        processor = make_processor("{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}{% endfor %}")
        chat = [user("what is this ?"), assistant("no"), user("and this ?"), assistant("yes")]
        with pytest.raises(ValueError, match=r"no answer was found in chat 0: .* \{% generation %\}"):
            processor.apply_chat_template(chat, **TOKENIZE, continue_final_message=begun)
        assert (processor.apply_chat_template(chat[:1], **TOKENIZE)["prompt_block_ids"] == 0).all()

    def test_a_tokenizer_without_the_image_token(self, processor):
        with pytest.raises(ValueError, match=r"does not know the image token '<picture>'"):
            AkiProcessor(processor.image_processor, processor.tokenizer, image_token="<picture>")


@pytest.mark.parametrize("form", ["image", "url", "path", "base64", "image_url", "image_url string"])
def test_every_form_of_an_image_part(processor, picture, tmp_path, form):
    import base64

    path = tmp_path / "a.png"
    picture().save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    data_url = f"data:image/png;base64,{encoded}"
    part = {
        "image": {"type": "image", "image": picture()},
        "url": {"type": "image", "url": data_url},
        "path": {"type": "image", "path": str(path)},
        "base64": {"type": "image", "base64": encoded},
        "image_url": {"type": "image_url", "image_url": {"url": data_url}},
        "image_url string": {"type": "image_url", "image_url": data_url},
    }[form]
    text = {"type": "text", "text": "this ?"}
    out = processor.apply_chat_template([{"role": "user", "content": [part, text]}], **TOKENIZE)
    wanted = processor.apply_chat_template([user(picture(), "this ?")], **TOKENIZE)
    assert all(torch.equal(out[name], wanted[name]) for name in wanted)


def test_what_is_passed_is_left_alone(processor, picture):
    chat = [user(picture(), "what is this ?"), assistant("yes it")]
    before, options = copy.deepcopy(chat), {"padding": True}
    processor.apply_chat_template(chat, **TOKENIZE, processor_kwargs=options)
    processor.apply_chat_template(chat, **TOKENIZE, processor_kwargs=options, continue_final_message=True)
    assert options == {"padding": True}
    assert chat == before


def test_text_alone_is_rendered_as_transformers_does(processor, picture):
    rendered = processor.apply_chat_template([user(picture(), "this ?")], add_generation_prompt=True)
    assert rendered == "<|user|><image>this ?<|assistant|>"
    ids = processor.apply_chat_template([user("this ?")], tokenize=True)
    assert ids == [processor.tokenizer("<|user|>this ?")["input_ids"]]


def test_the_model_takes_what_the_processor_gives(processor):
    assert set(processor.model_input_names) >= {"input_ids", "attention_mask", "pixel_values", "prompt_block_ids"}


def test_threads_do_not_write_over_each_others_answers(request):
    """transformers keeps where answers stand in the compiled template, which all threads share."""
    from concurrent.futures import ThreadPoolExecutor

    recipe = load_recipe("digits")
    _, processor = build_model(recipe)
    chats = [
        [
            {"role": "user", "content": [{"type": "text", "text": "what " * (number % 5 + 1)}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red " * (number % 7 + 1)}]},
        ]
        for number in range(400)
    ]

    def blocks(chat):
        return processor.apply_chat_template(chat, tokenize=True, return_dict=True)["prompt_block_ids"]

    alone = [blocks(chat) for chat in chats]
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(blocks, chats)) == alone
