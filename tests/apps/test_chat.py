"""Chats of several turns: what is said is what `generate` says of the same messages."""

import json
import os
import shutil
import sys
from time import monotonic

import pexpect
import pytest
from PIL import Image

from aki.apps.chat import Chat, answer
from aki.apps.loading import load
from aki.apps.streaming import Answer
from aki.cli import main

QUESTION = "how many digits are red?"


def generated(chat, messages, tokens=12, **options):
    inputs = chat.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = chat.model.generate(**inputs, **options, max_new_tokens=tokens, do_sample=False)
    return chat.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "path": str(i)} for i in images), {"type": "text", "text": text}],
    }


def test_turns_and_pictures_are_what_generate_gets(chat, scene, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (9, 30), "blue").save(other)
    chat.add_image(scene)
    first = chat.ask(QUESTION)
    second = chat.ask("and green?")
    chat.add_image(other)
    chat.add_image(scene)
    third = chat.ask("and here?")
    turns = [user(QUESTION, scene)]
    assert first == generated(chat, turns)
    turns += [{"role": "assistant", "content": first}, user("and green?")]
    assert second == generated(chat, turns)
    turns += [{"role": "assistant", "content": second}, user("and here?", other, scene)]
    assert third == generated(chat, turns)
    assert len({first, second, third}) == 3
    chat.reset()
    assert chat.ask("and green?") == generated(chat, [user("and green?")])


def test_another_rule_answers_as_that_rule(chat, scene):
    chat.set_rule("causal")
    chat.add_image(scene)
    assert chat.ask(QUESTION) == generated(chat, [user(QUESTION, scene)], attention_rule="causal")
    assert chat.rule == "causal"
    with pytest.raises(ValueError, match="Did you mean 'mma'"):
        chat.set_rule("mna")
    assert chat.rule == "causal"


def test_one_answer_by_another_rule_leaves_the_model_as_it_was(chat, scene):
    said = answer(chat.model, chat.processor, QUESTION, scene, max_new_tokens=12, attention_rule="causal")
    assert said == generated(chat, [user(QUESTION, scene)], attention_rule="causal")
    assert chat.rule == "mma"


def test_what_was_refused_is_no_turn(chat, scene, tmp_path):
    chat.add_image(scene)
    for wrong in ("  ", "what? " * 300, "what \udcff"):
        with pytest.raises(ValueError, match=r"empty|context|UTF-8"):
            chat.ask(wrong)
    with pytest.raises(ValueError, match="there is no picture"):
        chat.add_image(tmp_path / "none.png")
    assert chat.messages == []
    assert len(chat.pending) == 1
    assert chat.ask(QUESTION) == generated(chat, [user(QUESTION, scene)])


def test_saved_chats_are_chats(chat, scene, tmp_path):
    chat.add_image(scene)
    chat.ask(QUESTION)
    chat.ask("and green?")
    chat.save(tmp_path / "chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved["rule"] == "mma"
    # They go into a processor as they are.
    assert generated(chat, saved["messages"][:-1]) == saved["messages"][-1]["content"][0]["text"]


def test_an_interrupted_answer_keeps_what_was_said_and_frees_the_model(chat, scene):
    chat.max_new_tokens = 150
    chat.add_image(scene)
    pieces = []

    def interrupt(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTION, interrupt)
    said = "".join(pieces).strip()
    assert chat.messages[-1]["content"][0]["text"] == said
    assert generated(chat, [user(QUESTION, scene)]).startswith(said)
    chat.max_new_tokens = 12
    turns = [user(QUESTION, scene), {"role": "assistant", "content": said}, user("and green?")]
    assert chat.ask("and green?") == generated(chat, turns)


def test_an_answer_that_is_stopped_ends_early(chat):
    said = Answer(chat.model, chat.processor, [user(QUESTION)], max_new_tokens=200)
    next(iter(said))
    start = monotonic()
    said.stop()
    assert 0 < len(said.ids) < 200
    assert monotonic() - start < 5


def test_ids_are_those_of_generate(chat, scene):
    said = Answer(chat.model, chat.processor, [user(QUESTION, scene)], max_new_tokens=12)
    text = "".join(said)
    assert chat.processor.decode(said.ids, skip_special_tokens=True).strip() == text.strip()
    assert len(said.ids) == 12


class TestUnlocked:
    @pytest.fixture(scope="class")
    def llava(self, model_folder, tmp_path_factory):
        """A tiny LLaVA with random weights, saved as the Hub has them."""
        from transformers import AutoConfig, AutoModelForImageTextToText, LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        tokenizer = load(model_folder)[1].tokenizer
        text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
        vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=image_id)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
        model.generation_config.eos_token_id = None
        size = {"height": 16, "width": 16}
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
        processor = LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
            chat_template=tokenizer_template(),
        )
        folder = tmp_path_factory.mktemp("llava")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    def test_needs_to_be_asked_for(self, llava):
        with pytest.raises(ValueError, match=r"type 'llava', not an AKI model: .* --unlock"):
            load(llava)

    def test_chats_by_rule(self, llava, scene):
        from aki import lock

        chat = Chat(*load(llava, unlock=True), max_new_tokens=8)
        assert chat.rule == "mma"
        said = {}
        for rule in ("mma", "causal"):
            chat.reset()
            chat.set_rule(rule)
            chat.add_image(scene)
            said[rule] = chat.ask(QUESTION)
        content = [{"type": "image", "image": Image.open(scene)}, {"type": "text", "text": QUESTION}]
        lock(chat.model)
        assert said["causal"] == generated(chat, [{"role": "user", "content": content}], tokens=8)
        assert said["mma"] != said["causal"]

    def test_explains_through_its_grid(self, llava, scene):
        from aki import explain, lock

        model, processor = load(llava, unlock=True)
        model.config.attention_rule = "mma"
        found = explain(model, processor, scene, QUESTION, max_new_tokens=3)
        assert found.question_words == ["how", "many", "digits", "are", "red", "?"]
        assert found.question_maps.shape == (2, 6, 2, 2)
        assert (found.media_to_question > 0).all()
        causal = explain(model, processor, scene, QUESTION, max_new_tokens=3, attention_rule="causal")
        assert not causal.media_to_question.any()
        lock(model)
        locked = explain(model, processor, scene, QUESTION, max_new_tokens=3)
        assert locked.rule == "causal"
        assert locked.answer == causal.answer
        opened = explain(model, processor, scene, QUESTION, max_new_tokens=3, attention_rule="mma")
        assert opened.answer == found.answer
        assert not hasattr(model.config, "attention_rule"), "a locked model was left unlocked"


def tokenizer_template():
    return (
        "{%- for message in messages -%}{{ '<|' + message.role + '|>' }}"
        "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
        "{%- for part in message.content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}"
        "{%- endif -%}{%- if message.role == 'assistant' -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
    )


@pytest.mark.parametrize(("terminal", "shown"), [(True, "[31mred"), (False, "\x1b[31mred")])
def test_a_terminal_gets_no_control_characters(model_folder, terminal, shown, monkeypatch, capsys):
    monkeypatch.setattr(Chat, "ask", lambda self, question, emit: emit("\x1b[31mred"))
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    main(["chat", str(model_folder), "what?"])
    assert capsys.readouterr().out == shown + "\n"


class TestTerminal:
    """At a real terminal: a pseudo-terminal under the command."""

    @pytest.fixture
    def aki(self, model_folder, tmp_path):
        running = []

        def start(*arguments, folder=model_folder):
            environment = os.environ | {"TERM": "xterm", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
            child = pexpect.spawn(
                sys.executable,
                ["-m", "aki", "chat", str(folder), *arguments],
                env=environment,
                cwd=tmp_path,
                timeout=60,
                encoding="utf-8",
                dimensions=(40, 200),
            )
            running.append(child)
            child.expect("/help lists commands")
            child.expect("> ")
            return child

        yield start
        for child in running:
            child.close(force=True)

    def test_a_whole_session(self, aki, chat, scene, tmp_path):
        child = aki("--max-new-tokens", "12")

        def says(line, *expected):
            child.sendline(line)
            child.expect_exact(line)
            for text in expected:
                child.expect_exact(text)
            child.expect("> ")

        says("/save", "nothing was said yet")
        says("/image none.png", "aki: there is no picture at none.png.")
        says("/image http://127.0.0.1:1/none.png", "could not be fetched: ", "Connection refused")
        says(f"/image '{scene}'", "24 x 24 pixels, picture for the next question")
        first = generated(chat, [user(QUESTION, scene)])
        says(QUESTION, first)
        turns = [user(QUESTION, scene), {"role": "assistant", "content": first}, user("and green?")]
        says("and green?", generated(chat, turns))
        for _ in range(2):
            says("/save out.json", "2 turns in out.json")
        assert len(json.loads((tmp_path / "out.json").read_text())["messages"]) == 4
        (tmp_path / "own.txt").write_text("mine")
        says("/save own.txt", "aki: own.txt is there already")
        says("/save nowhere/out.json", "aki: nowhere/out.json cannot be written: No such file or directory.")
        assert (tmp_path / "own.txt").read_text() == "mine"
        says("/reset", "forgotten")
        # Arrow up, six lines back (twice the same is one): the question again, without the picture.
        child.send("\x1b[A" * 6)
        child.expect_exact(QUESTION)
        child.sendline("")
        child.expect_exact(generated(chat, [user(QUESTION)]))
        child.expect("> ")
        says("/rule mna", "Did you mean 'mma'?")
        says("/rule causal", "rule causal")
        says("/reset", "forgotten")
        says(f"/image {scene}", "24 x 24")
        says(QUESTION, generated(chat, [user(QUESTION, scene)], attention_rule="causal"))
        says("/frobnicate", "there is no command /frobnicate")
        says("/help", "Ctrl-C stops an answer")
        child.sendline("/quit")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0

    def test_ctrl_c_stops_an_answer_and_not_the_session(self, aki, chat, model_folder, tmp_path):
        # An answer that is minutes long: however busy the machine is, the interrupt finds it unfinished.
        folder = shutil.copytree(model_folder, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = 100_000
        (folder / "config.json").write_text(json.dumps(config))
        first = generated(chat, [user("what?")], 6, attention_rule="causal").split()[0]
        child = aki("--max-new-tokens", "90000", "--rule", "causal", folder=folder)
        child.sendline("what?")
        child.expect_exact(first)
        # As a person would: again, where a busy machine's first one was lost.
        for _ in range(20):
            child.sendintr()
            if child.expect_exact(["(stopped)", pexpect.TIMEOUT], timeout=3) == 0:
                break
        assert child.after == "(stopped)"
        child.expect("> ")
        child.send("half a line")
        # Between the prompt and its first read, Python keeps an interrupt until the next key.
        child.expect_exact("half a line")
        child.sendintr()
        child.expect_exact("Ctrl-D or /quit leaves")
        child.expect("> ")
        child.sendline("/rule")
        child.expect_exact("rule causal")
        child.sendeof()
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
