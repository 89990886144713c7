"""Where answers are in a tokenised chat, for the template styles that are in use."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

import aki
from aki.data.tokenizer import train_tokenizer
from aki.prompts.blocks import AnswerMarks

LOOP = "{%- for message in messages -%}"
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}",
    "llava": LOOP + "{%- if message.role == 'user' -%}USER: {{ message.content }} {{ '' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + message.content }}</s>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}",
    "mistral": LOOP + "{%- if message.role == 'user' -%}[INST]{{ message.content }}[/INST]"
    "{%- else -%}{{ message.content }}</s>{%- endif -%}{%- endfor -%}",
    "no end": LOOP + "{%- if message.role == 'user' -%}### Human: {{ message.content }}"
    "{%- else -%}{{ '### Assistant: ' + message.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}### Assistant:{%- endif -%}",
}
SPECIAL = ["<pad>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
TEXTS = ["what is in the picture? a red digit. USER: ASSISTANT: assistant user how many ### Human: Assistant: "] * 20


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, vocab_size=330)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece cuts: the space before a word belongs to its token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    letters = list("\n#:?abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], initial_alphabet=letters)
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    return fast


@pytest.fixture(params=["byte_level", "metaspace"])
def tokenizer(request):
    return {"byte_level": byte_level, "metaspace": metaspace}[request.param]()


def rendered(tokenizer, chat: list[str], **kwargs) -> str:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)]
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


@pytest.mark.parametrize("template", TEMPLATES)
def test_blocks_are_what_stands_between_answers(tokenizer, template):
    tokenizer.chat_template = TEMPLATES[template]
    marks = AnswerMarks.of(tokenizer)
    chat = ["<image> what is in the picture?", "a red digit", "how many", "a digit"]
    ids = torch.tensor([tokenizer(rendered(tokenizer, chat), add_special_tokens=False)["input_ids"]])
    blocks = marks.blocks(ids)[0]
    assert blocks.max() == 1
    answers = [decoded(tokenizer, ids[0][run]) for run in runs(blocks < 0)]
    assert [answer.replace("</s>", "").replace("<|im_end|>", "").strip() for answer in answers] == [chat[1], chat[3]]
    assert all(("</s>" in a or "<|im_end|>" in a) == (template != "no end") for a in answers), "the end is learned"
    # What is a prompt at inference is the same in training.
    asked = rendered(tokenizer, chat[:3], add_generation_prompt=True)
    prompt = torch.tensor([tokenizer(asked, add_special_tokens=False)["input_ids"]])
    blank = decoded(tokenizer, prompt[0][-1:]) == ""
    length = prompt.shape[1] - blank
    assert torch.equal(marks.blocks(prompt)[0, :length], blocks[:length])
    assert torch.equal(prompt[0, :length], ids[0, :length])


def runs(inside: torch.Tensor) -> list[list[int]]:
    found: list[list[int]] = []
    for i in inside.nonzero().flatten().tolist():
        if found and found[-1][-1] == i - 1:
            found[-1].append(i)
        else:
            found.append([i])
    return found


@pytest.mark.parametrize(
    "name", ["gemma3", "glm4moe", "llama3", "llava_next", "phi3_5", "qwen2_5_vl", "qwen3_vl", "smolvlm"]
)
def test_answers_are_those_that_trl_marks(tokenizer, name):
    """TRL ships the templates of well-known models with generation tags around the answers."""
    trl = pytest.importorskip("trl")
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja").read_text()
    tokenizer.add_tokens(sorted(set(re.findall(r"<\|?\w+\|?>", template))), special_tokens=True)
    tokenizer.chat_template = template
    texts = ["what is in the picture?", "a red digit", "how many", "a digit"]
    as_parts = "'type'" in template or ".type" in template
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}] if as_parts else text}
        for i, text in enumerate(texts)
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    chat = tokenizer.apply_chat_template(messages, **options)
    answers = AnswerMarks.of(tokenizer).blocks(torch.tensor([chat["input_ids"]]))[0] < 0
    tokens = tokenizer.convert_ids_to_tokens(chat["input_ids"])
    marked = [bool(mark) for mark in chat["assistant_masks"]]
    assert any(marked)
    # White space after the end of an answer may be either's.
    differing = {token for token, a, m in zip(tokens, answers.tolist(), marked, strict=True) if a != m}
    assert differing <= {"Ċ", "Ġ", "▁", "\n"}


def test_what_stands_before_the_last_answer_alone_is_answer():
    """Templates of models that reason begin a thought there and in the generation prompt, not before other answers."""
    tokenizer = byte_level()
    thought = "{%- if loop.last and message.role == 'assistant' -%}{{ ' is there ' }}{%- endif -%}"
    template = TEMPLATES["chatml"].replace("{{ message.content }}", thought + "{{ message.content }}")
    tokenizer.chat_template = template.replace("assistant\n{%- endif", "assistant{{ ' is there ' }}{%- endif")
    chat = ["how many", "a red digit", "is it", "a digit"]
    ids = torch.tensor([tokenizer(rendered(tokenizer, chat))["input_ids"]])
    blocks = AnswerMarks.of(tokenizer).blocks(ids)[0]
    answers = [decoded(tokenizer, ids[0][run]).replace("<|im_end|>", "").strip() for run in runs(blocks < 0)]
    assert answers == ["a red digit", "is there a digit"]


def test_a_question_that_ends_in_a_picture_is_answered_too():
    """LLaVA's template writes a blank after the question's words, and where there are none a picture and a new line."""
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES["llava"]
    ids = torch.tensor([tokenizer("USER: <image>\nASSISTANT: a red digit</s>", add_special_tokens=False)["input_ids"]])
    blocks = AnswerMarks.of(tokenizer).blocks(ids)[0]
    assert [decoded(tokenizer, ids[0][run]) for run in runs(blocks < 0)] == ["a red digit</s>"]


def test_padding_is_no_prompt():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES["chatml"]
    marks = AnswerMarks.of(tokenizer)
    texts = [rendered(tokenizer, chat) for chat in (["how many", "a red digit"], ["is", "a"])]
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    blocks = marks.blocks(batch["input_ids"], batch["attention_mask"])
    assert (blocks[batch["attention_mask"] == 0] == -1).all()
    for row, text in enumerate(texts):
        alone = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        assert torch.equal(blocks[row][batch["attention_mask"][row] == 1], marks.blocks(alone)[0])


def test_templates_that_mark_nothing_are_refused():
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="no chat template"):
        aki.write_prompt_blocks(tokenizer)
    tokenizer.chat_template = LOOP + "{{ message.content }} {%- endfor -%}"
    with pytest.raises(ValueError, match="writes nothing between"):
        aki.write_prompt_blocks(tokenizer)


class TextProcessor(ProcessorMixin):
    """Whose template takes the words of a message as a string, as Phi-4-multimodal's does, or else as parts."""

    def __init__(self, tokenizer):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    def apply_chat_template(self, chat, **kwargs):
        return self.tokenizer.apply_chat_template(chat, **kwargs)


def test_words_as_strings_and_as_parts():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES["chatml"]
    wanted = AnswerMarks.of(tokenizer)
    assert AnswerMarks.of(TextProcessor(tokenizer)) == wanted
    tokenizer.chat_template = TEMPLATES["chatml"].replace("message.content", "message.content[0].text")
    assert AnswerMarks.of(TextProcessor(tokenizer)) == wanted
    assert AnswerMarks.of(tokenizer) == wanted


def test_a_collator_that_hides_its_processor_is_refused():
    with pytest.raises(ValueError, match=r"write_prompt_blocks\(collator, processor\)"):
        aki.write_prompt_blocks(lambda samples: samples)


@pytest.fixture
def collator():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES["chatml"]

    def collate(chats):
        texts = [rendered(tokenizer, chat) for chat in chats]
        batch = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        batch["labels"] = batch["input_ids"].clone()
        return batch

    return aki.write_prompt_blocks(collate, tokenizer)


def test_a_wrapped_collator_learns_answers_only(collator):
    batch = collator([["how many", "a red digit"], ["what is in the picture?", "a"]])
    learned, real = batch["labels"] != -100, batch["attention_mask"] == 1
    assert torch.equal(learned & real, (batch["prompt_block_ids"] < 0) & real)
    assert learned.any(1).all()


def test_an_answer_that_was_cut_off_is_an_error(collator):
    with pytest.raises(ValueError, match="no answer was found"):
        collator([["how many"]])


QUOTES = {
    "llava": "The log says USER: is ASSISTANT: a digit. what is there?",
    "no end": "The log says ### Human: is ### Assistant: a digit. what is there?",
}


@pytest.mark.parametrize("template", QUOTES)
def test_28_a_question_that_quotes_the_mark_of_answers(tokenizer, template):
    """Issue 12, entry 28: the messages decide; ids alone are refused, because part of the question was learned."""
    tokenizer.chat_template = TEMPLATES[template]
    chat = [QUOTES[template], f"is there? {QUOTES[template]}", "how many", "a digit"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)]
    writer = aki.write_prompt_blocks(tokenizer)
    batch = writer.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")
    ids, blocks = batch["input_ids"][0], batch["prompt_block_ids"][0]
    answers = [decoded(tokenizer, ids[run]).replace("</s>", "").strip() for run in runs(blocks < 0)]
    assert [answer.replace(" ", "") for answer in answers] == [chat[1].replace(" ", ""), "adigit"]
    with pytest.raises(ValueError, match="row 0 has more answers than questions"):
        AnswerMarks.of(tokenizer).blocks(batch["input_ids"])

    def collate(samples):
        batch = tokenizer(["".join(rendered(tokenizer, chat))], add_special_tokens=False, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].clone()}

    wrapped = aki.write_prompt_blocks(collate, tokenizer)
    assert torch.equal(wrapped([{"messages": messages}])["prompt_block_ids"][0], blocks)
    assert torch.equal(wrapped([{"prompt": messages[:3], "completion": messages[3:]}])["prompt_block_ids"][0], blocks)
    with pytest.raises(ValueError, match="more answers than questions"):
        wrapped([chat])


def test_29_an_answer_that_was_cut_off_beside_a_whole_one_is_the_same_error(collator):
    """Issue 12, entry 29: the row was not learned, without a word."""
    with pytest.raises(ValueError, match="no answer was found in row 1 of 2"):
        collator([["how many", "a red digit"], ["how many"]])
