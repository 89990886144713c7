"""The paper's prompt (section 3) to the character and, with tokenizers made for the test, to the token."""

import pytest
import torch
from model_builders import PER_IMAGE, PIXELS, TOKENIZE, assistant, user
from phi_tokenizers import NEWLINE, ROLES, SYSTEM_TOKENS, phi_tokenizer, words
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki import AkiProcessor
from aki.models.answers import labels_from_prompt_blocks
from aki.models.templates import AKI, CAPTION
from aki.prompts.blocks import AnswerMarks

SYSTEM_TURN = (
    "<|system|>\nA chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.<|end|>\n"
)
IMAGES = ["<image>"] * PER_IMAGE
SPOKEN = "what is this ? and that no yes it a red one cat alpha beta gamma delta"


def processor_with(*, swallows: bool = True) -> AkiProcessor:
    """Its `<|assistant|>` is not the 32001 of Phi-3: nothing may know that number."""
    vocabulary = ["<unk>", "<s>", "</s>", NEWLINE, "▁", "▁▁", *words(SYSTEM_TURN[11:-8]), *words(SPOKEN)]
    vocabulary = list(dict.fromkeys([*vocabulary, "<|endoftext|>", *ROLES]))
    tokenizer = phi_tokenizer(vocabulary, swallows=swallows)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|endofchunk|>"]})
    size = {"height": PIXELS, "width": PIXELS}
    return AkiProcessor(
        SiglipImageProcessorPil(size=size), tokenizer, PER_IMAGE, chat_template={"default": AKI, "caption": CAPTION}
    )


@pytest.fixture(scope="module", params=[True, False], ids=["swallows", "keeps the newline"])
def swallows(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def processor(swallows) -> AkiProcessor:
    return processor_with(swallows=swallows)


def newline(swallows: bool) -> list[str]:
    return [] if swallows else ["▁", NEWLINE]


def spelled(tokens: str, swallows: bool) -> list[str]:
    """A sequence written for a tokenizer that swallows; one that doesn't has a newline after each role token.

    There the text follows the newline, and not the blank that begins a text.
    """
    out: list[str] = []
    for token in tokens.replace("SYSTEM", SYSTEM_TOKENS).replace("IMAGE", " ".join(IMAGES)).split():
        after_role = bool(out) and out[-1] in ROLES and not swallows
        blanks = newline(swallows) if after_role else []
        out += [*blanks, token.removeprefix("▁") if after_role else token]
    return out


def tokens_of(processor: AkiProcessor, chat: list, **options) -> list[str]:
    out = processor.apply_chat_template(chat, **TOKENIZE, **options)
    return processor.tokenizer.convert_ids_to_tokens(out["input_ids"][0])


def learned(processor: AkiProcessor, chat: list, **options) -> list[str]:
    """The tokens that are labels."""
    out = processor.apply_chat_template(chat, **TOKENIZE, **options)
    labels = labels_from_prompt_blocks(
        out["input_ids"], out["attention_mask"], out["prompt_block_ids"], processor.image_token_id
    )
    return processor.tokenizer.convert_ids_to_tokens(labels[labels != -100])


class TestCharacters:
    def test_inference(self, processor, picture):
        text = processor.apply_chat_template([user(picture(), "what is this ?")], add_generation_prompt=True)
        assert text == f"<s> {SYSTEM_TURN}<|user|>\n<image>\nwhat is this ?<|end|>\n<|assistant|>\n"

    def test_training(self, processor, picture):
        text = processor.apply_chat_template([user(picture(), "what is this ?"), assistant("a red one")])
        turn = "<|user|>\n<image>\nwhat is this ?<|end|>\n<|assistant|>\na red one<|endoftext|>"
        assert text == f"<s>{SYSTEM_TURN}{turn}"

    def test_without_an_image(self, processor):
        chat = [{"role": "user", "content": "what is this ?"}, {"role": "assistant", "content": "no"}]
        turn = "<|user|>\nwhat is this ?<|end|>\n<|assistant|>\n"
        assert processor.apply_chat_template(chat) == f"<s>{SYSTEM_TURN}{turn}no<|endoftext|>"
        asked = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
        assert asked == f"<s> {SYSTEM_TURN}{turn}"

    def test_questions_stay_as_they_are(self, processor, picture):
        question = " Options:\nA. {{ 'x' }}\n\nB. <p> & \"q\" \\n {% x %}\n"
        text = processor.apply_chat_template([user(picture(), question)], add_generation_prompt=True)
        assert text == f"<s> {SYSTEM_TURN}<|user|>\n<image>\n{question}<|end|>\n<|assistant|>\n"

    def test_a_system_message_of_ones_own(self, processor):
        chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "yes ?"}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert text == "<s> <|system|>\nbe brief<|end|>\n<|user|>\nyes ?<|end|>\n<|assistant|>\n"

    def test_turns_and_images(self, processor, picture):
        chat = [
            user(picture(), picture(), "what is this ?"),
            assistant("no"),
            user("and", picture()),
            assistant("yes"),
            user("a", picture(), "one ?"),
        ]
        first = "<|user|>\n<image>\n<image>\nwhat is this ?<|end|>\n<|assistant|>\nno<|endoftext|>"
        second = "<|user|>\nand\n<image><|end|>\n<|assistant|>\nyes<|endoftext|>"
        third = "<|user|>\na\n<image>\none ?<|end|>\n<|assistant|>\n"
        asked = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert asked == f"<s> {SYSTEM_TURN}{first}{second}{third}"
        assert processor.apply_chat_template(chat[:4]) == f"<s>{SYSTEM_TURN}{first}{second}"

    def test_a_tokenizer_without_bos(self, make_processor):
        text = make_processor(AKI).apply_chat_template([user("yes ?")], add_generation_prompt=True)
        assert text == f"{SYSTEM_TURN}<|user|>\nyes ?<|end|>\n<|assistant|>\n"

    def test_a_caption(self, processor, picture):
        text = processor.apply_chat_template([user(picture()), assistant(" \n a cat\n")], chat_template="caption")
        assert text == "<s><image>a cat<|endofchunk|><|endoftext|>"


class TestTokens:
    """Written by hand. `<image>` does not swallow the newline after it, so a text begins there: with a blank."""

    # `<s> ` is BOS and a text of one blank, to which the tokenizer adds its own.
    ASKED = f"SYSTEM <|user|> IMAGE ▁ {NEWLINE} what ▁is ▁this ▁? <|end|> <|assistant|>"

    def test_inference(self, processor, swallows, picture):
        found = tokens_of(processor, [user(picture(), "what is this ?")], add_generation_prompt=True)
        assert found == spelled(f"<s> ▁▁ {self.ASKED}", swallows) + newline(swallows)

    def test_training(self, processor, swallows, picture):
        chat = [user(picture(), "what is this ?"), assistant("a red one")]
        assert tokens_of(processor, chat) == spelled(f"<s> {self.ASKED} ▁a ▁red ▁one <|endoftext|>", swallows)

    def test_what_is_learned(self, processor, swallows, picture):
        chat = [user(picture(), "what is this ?"), assistant("a red one")]
        answer = "▁a ▁red ▁one" if swallows else f"▁ {NEWLINE} a ▁red ▁one"
        assert learned(processor, chat) == [*answer.split(), "<|endoftext|>"]

    def test_the_tokenizer_would_put_the_same_bos(self, processor, picture):
        chat = [user(picture(), "what is this ?"), assistant("no")]
        text = processor.apply_chat_template(chat).removeprefix("<s>").replace("<image>", "<image>" * PER_IMAGE)
        ids = [processor.tokenizer.bos_token_id, *processor.tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert processor.apply_chat_template(chat, **TOKENIZE)["input_ids"][0].tolist() == ids

    def test_the_prompt_ends_with_the_token_that_starts_the_answer(self, processor, swallows, picture):
        out = processor.apply_chat_template([user(picture(), "no")], **TOKENIZE, add_generation_prompt=True)
        after = len(newline(swallows))
        length = out["input_ids"].shape[1]
        assert out["prompt_block_ids"].tolist() == [[0] * (length - after) + [-1] * after]
        assert out["input_ids"][0, length - after - 1] == processor.answer_token_id != 32001

    def test_two_turns(self, processor, swallows, picture):
        chat = [user(picture(), "what is this ?"), assistant("no"), user("and", picture()), assistant("yes")]
        second = f"<|user|> ▁and ▁ {NEWLINE} IMAGE <|end|> <|assistant|> ▁yes <|endoftext|>".replace("▁ ", "")
        wanted = spelled(f"<s> {self.ASKED} ▁no <|endoftext|> {second}", swallows)
        assert tokens_of(processor, chat) == wanted
        answers = (["▁no"], ["▁yes"]) if swallows else (["▁", NEWLINE, "no"], ["▁", NEWLINE, "yes"])
        assert learned(processor, chat) == [*answers[0], "<|endoftext|>", *answers[1], "<|endoftext|>"]
        blocks = processor.apply_chat_template(chat, **TOKENIZE)["prompt_block_ids"][0]
        assert torch.unique_consecutive(blocks).tolist() == [0, -1, 1, -1]

    def test_later_turns_begin_with_what_was_said(self, processor, picture):
        """The cache of the first turn serves the second: its prompt is the first, the answer, and more."""
        chat = [user(picture(), "what is this ?"), assistant("no"), user("and that ?")]
        first = tokens_of(processor, chat[:1], add_generation_prompt=True)
        second = tokens_of(processor, chat, add_generation_prompt=True)
        assert second[: len(first)] == first
        assert second.count("<s>") == 1

    def test_an_answer_that_is_begun(self, processor, swallows, picture):
        """It goes on from the very prompt to which it is the answer."""
        chat = [user(picture(), "what is this ?"), assistant("a red")]
        prompt = tokens_of(processor, chat[:1], add_generation_prompt=True)
        begun = ["▁a" if swallows else "a", "▁red"]
        assert tokens_of(processor, chat, continue_final_message=True) == prompt + begun
        for chats in (chat, [chat, chat]):
            out = processor.apply_chat_template(chats, **TOKENIZE, continue_final_message=True)
            after = len(newline(swallows)) + len(begun)
            wanted = [0] * (len(prompt) - len(newline(swallows))) + [-1] * after
            assert out["prompt_block_ids"].tolist() == [wanted] * len(out["input_ids"])

    def test_a_caption(self, processor, picture):
        chat = [user(picture()), assistant(" a cat ")]
        wanted = ["▁a", "▁cat", "<|endofchunk|>", "<|endoftext|>"]
        assert tokens_of(processor, chat, chat_template="caption") == ["<s>", *IMAGES, *wanted]
        assert learned(processor, chat, chat_template="caption") == wanted

    def test_answers_are_found_by_their_marks_too(self, processor, picture):
        """The other way of the package to find prompts, for processors of other models, agrees."""
        chat = [user(picture(), "what is this ?"), assistant("no"), user("and that ?"), assistant("yes")]
        out = processor.apply_chat_template(chat, **TOKENIZE)
        marked = AnswerMarks.of(processor).blocks(out["input_ids"], out["attention_mask"])
        starts = out["input_ids"] == processor.answer_token_id
        assert torch.equal(marked[starts], out["prompt_block_ids"][starts])
        assert torch.unique_consecutive(marked).tolist() == [0, -1, 1, -1]
