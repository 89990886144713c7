"""The adapter with tiny models: batches, several pictures, decoding, a kill in the middle, other models, the digits."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import lmms_eval.tasks
import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aki.cli import main
from aki.data.collate import ChatCollator
from aki.data.tokenizer import train_tokenizer
from aki.evaluation.digit_data import held_out
from aki.evaluation.lmms import Aki, decoding_of
from aki.evaluation.suite import PAPER
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.training.scoring import accuracy_by_skill
from aki.training.stages import build_model, write_json


@pytest.fixture
def tiny_aki(tiny_recipe, tmp_path):
    """A folder with a model whose answers vary."""
    return save_loud(tiny_recipe, tmp_path / "tiny")


def save_loud(recipe, folder, context=2048):
    recipe.model.text["max_position_embeddings"] = context
    torch.manual_seed(0)
    model, processor = build_model(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def chats(*contents):
    """Requests for chats of texts and pictures, and the task dictionary that they refer to."""
    docs = [{"content": content} for content in contents]

    def doc_to_messages(doc):
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}
            for part in doc["content"]
        ]
        return [{"role": "user", "content": parts}]

    def request(number, asked):
        text = "".join(part for part in docs[number]["content"] if isinstance(part, str))
        arguments = (text, doc_to_messages, asked, number, "t", "test")
        return Instance("generate_until", arguments, 0, {"task": "t", "doc_id": number, "repeats": 1})

    return docs, request


def picture(level):
    return Image.new("RGB", (24, 24), (level, 255 - level, level // 2))


QUESTIONS = [
    [picture(10), "what is this?"],
    ["no picture at all?"],
    [picture(40), picture(90), "which of the two is brighter, the first or the second?"],
    [picture(200), "is there a red 3?"],
    ["look: ", picture(70), " and ", picture(170), " and ", picture(250), ". how many digits are red?"],
    [picture(120), "read the digit at the top left, then the one at the bottom right, and then add them up."],
]


def test_a_batch_answers_as_each_alone(tiny_aki):
    docs, request = chats(*QUESTIONS)
    asked = {"max_new_tokens": 12}
    answers = {}
    for batch_size in (1, 4, 6):
        model = Aki(tiny_aki, batch_size=batch_size)
        model.task_dict["t"] = {"test": docs}
        answers[batch_size] = model.generate_until([request(i, asked) for i in range(len(docs))])
    assert answers[1] == answers[4] == answers[6]
    assert len(set(answers[1])) > 3, "answers that vary, or nothing would be shown"


def test_the_longest_prompts_come_first_and_answers_in_order(tiny_aki, monkeypatch):
    docs, request = chats(*([f"{'word ' * (i % 5)}{i}"] for i in range(10)))
    model = Aki(tiny_aki, batch_size=3)
    model.task_dict["t"] = {"test": docs}
    lengths = []

    def answer(inputs, requests):
        lengths.append(int(inputs["attention_mask"].sum(1).max()))
        return [request.args[0] for request in requests]

    monkeypatch.setattr(model, "_answer", answer)
    assert model.generate_until([request(i, {}) for i in range(10)]) == [doc["content"][0] for doc in docs]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 4


def test_decoding_is_the_tasks_own():
    assert decoding_of({}) == {"max_new_tokens": 1024, "do_sample": False}
    asked = {"until": ["\n"], "temperature": 0.2, "top_p": 1.0, "num_beams": 1, "do_sample": False, "max_new_tokens": 9}
    assert decoding_of(asked) == {"max_new_tokens": 9, "do_sample": False, "num_beams": 1}
    sampled = {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7}
    assert decoding_of({"temperature": 0.7, "image_aspect_ratio": "original"}) == sampled
    greedy = {"max_new_tokens": 1024, "do_sample": False}
    assert decoding_of({"temperature": 0, "do_sample": True}) == decoding_of({"temperature": None}) == greedy
    assert decoding_of({"max_new_tokens": 16384}, limit=32) == {"max_new_tokens": 32, "do_sample": False}


def test_lengths_and_stops_are_kept_and_differ_within_one_call(tiny_aki):
    docs, request = chats(QUESTIONS[0], QUESTIONS[0], QUESTIONS[0])
    model = Aki(tiny_aki, batch_size=3)
    model.task_dict["t"] = {"test": docs}
    long = model.generate_until([request(0, {"max_new_tokens": 8})])[0]
    stop = long[3:6]
    asked = [{"max_new_tokens": 8}, {"max_new_tokens": 2}, {"max_new_tokens": 8, "until": [stop]}]
    whole, short, stopped = model.generate_until([request(i, own) for i, own in enumerate(asked)])
    assert whole == long
    assert long.startswith(short)
    assert len(short) < len(long)
    assert stopped == long.split(stop)[0].strip()


def test_an_answer_ends_where_the_context_does(tiny_recipe, tmp_path):
    model = Aki(save_loud(tiny_recipe, tmp_path / "short", context=48))
    docs, request = chats(QUESTIONS[0])
    model.task_dict["t"] = {"test": docs}
    assert model.generate_until([request(0, {"max_new_tokens": 16384})])[0]


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(tiny_aki, benchmarks, tmp_path, monkeypatch):
    answered = []
    answer = Aki._answer

    def counting(self, inputs, requests):
        if len(answered) == 2:
            raise Killed
        answered.append([request.doc_id for request in requests])
        return answer(self, inputs, requests)

    arguments = ["eval", str(tiny_aki), "--tasks", "pope", "realworldqa", "--data", str(benchmarks)]
    arguments += ["--batch-size", "2", "--output", str(tmp_path / "out"), "--limit-new-tokens", "4"]
    monkeypatch.setattr(Aki, "_answer", counting)
    with pytest.raises(Killed):
        main(arguments)
    kept = tmp_path / "out/answers/answers-0.jsonl"
    assert len(kept.read_text().splitlines()) == 4
    kept.write_text(kept.read_text()[:-20])  # the kill came in the middle of a line
    answered.clear()
    monkeypatch.setattr(Aki, "_answer", lambda *a: answered.append(len(a[2])) or answer(*a))
    main(arguments)
    assert sum(answered) == 5, "three of the eight answers were kept whole"
    first = json.loads((tmp_path / "out/results.json").read_text())
    answered.clear()
    main(arguments)
    assert answered == []
    assert json.loads((tmp_path / "out/results.json").read_text()) == first
    main([*arguments, "--rule", "causal"])
    assert sum(answered) == 8, "answers under another rule are other answers"


def test_all_twelve_with_a_tiny_model(tiny_aki, benchmarks, judge, tmp_path, capsys):
    where = ["--data", str(benchmarks), "--output", str(tmp_path / "out")]
    main(["eval", str(tiny_aki), *where, "--name", "tiny", "--limit-new-tokens", "6"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["columns"]) == [column.name for column in PAPER]
    for entry in results["columns"].values():
        assert 0 <= entry["score"] <= entry["best"], entry
    settings = results["settings"]
    recorded = {name: settings[name] for name in ("dtype", "rule", "backend", "seed", "judge", "unlocked", "limit")}
    assert recorded == {
        "dtype": "float32",
        "rule": "mma",
        "backend": "sdpa",
        "seed": 1234,
        "judge": "stand-in",
        "unlocked": False,
        "limit": None,
    }
    assert {"aki", "lmms_eval", "torch", "transformers"} <= set(settings["versions"])
    entry = results["columns"]["MME-P"]
    assert entry["decoding"] == {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    assert len(entry["data"]) == len(entry["prompt"]["fingerprint"]) == len(settings["checkpoint"]) == 16
    assert "| MM-Vet |" in capsys.readouterr().out
    main(["table", str(tmp_path / "out"), "--output", str(tmp_path / "tables")])
    assert "| tiny |" in capsys.readouterr().out
    assert Image.open(tmp_path / "tables/table1.png").size[0] > 400


def test_a_row_is_named_as_the_folder_wherever_it_is_called_from(tiny_aki, benchmarks, monkeypatch):
    monkeypatch.chdir(tiny_aki)
    main(["eval", ".", "--tasks", "pope", "--data", str(benchmarks), "--limit", "1", "--limit-new-tokens", "1"])
    results = json.loads(Path("runs/eval/tiny/results.json").read_text())
    assert results["name"] == "tiny"
    assert (results["columns"]["POPE"]["rows"], results["columns"]["POPE"]["of"]) == (1, 4)


def launch(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_score_what_one_does(tiny_aki, benchmarks, tmp_path):
    tasks = ["pope", "seedbench"]
    arguments = ["eval", str(tiny_aki), "--tasks", *tasks, "--data", str(benchmarks), "--limit-new-tokens", "6"]
    two = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    launch("-m", *two, "aki", *arguments, "--output", str(tmp_path / "two"))
    main([*arguments, "--output", str(tmp_path / "one")])
    found = [json.loads((tmp_path / name / "results.json").read_text())["columns"] for name in ("one", "two")]
    assert found[0] == found[1]
    written = [
        sum(len(file.read_text().splitlines()) for file in (tmp_path / name / "answers").iterdir())
        for name in ("one", "two")
    ]
    assert written == [8, 8], "each row is answered once, by one of the two"
    assert len(list((tmp_path / "two/answers").iterdir())) == 2


@pytest.mark.slow
def test_lmms_evals_own_command(tiny_aki, benchmarks, tmp_path):
    """`lmms-eval --model aki`, its task definition with the data path alone changed."""
    definition = tmp_path / "tasks"
    shutil.copytree(Path(lmms_eval.tasks.__path__[0]) / "pope", definition)
    for file in definition.glob("*.yaml"):
        if file.name != "pope.yaml":
            file.unlink()
    text = (definition / "pope.yaml").read_text()
    text = text.replace("lmms-lab-encoder/POPE", str(benchmarks / "lmms-lab-encoder/POPE"))
    (definition / "pope.yaml").write_text(text.replace('task: "pope"', 'task: "pope_here"'))
    arguments = ["--model_args", f"pretrained={tiny_aki}", "--tasks", "pope_here", "--include_path", str(definition)]
    said = launch(
        "-m", "lmms_eval", "--model", "aki", *arguments, "--batch_size", "2", "--gen_kwargs", "max_new_tokens=4"
    )
    assert "|pope_here|" in said
    assert "pope_f1_score" in said


@pytest.fixture
def llava(tmp_path):
    """A folder with a plain Hugging Face model."""
    tokenizer = train_tokenizer(["what is this ? USER: ASSISTANT:"] * 4, vocab_size=320)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**sizes, image_size=24, patch_size=8),
        image_token_index=image_id,
    )
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    model.save_pretrained(tmp_path / "llava")
    template = (
        "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else ' ASSISTANT: ' }}"
        "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{% endfor %}{{ ' ASSISTANT: ' if add_generation_prompt else '' }}"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def test_plain_and_unlocked_models(llava):
    docs, request = chats(*QUESTIONS)
    answers = {}
    for name, arguments in {"plain": {}, "mma": {"unlock": True}, "causal": {"unlock": True, "rule": "causal"}}.items():
        for batch_size in (1, 3):
            model = Aki(llava, batch_size=batch_size, **arguments)
            model.task_dict["t"] = {"test": docs}
            asked = [request(i, {"max_new_tokens": 8}) for i in range(len(docs))]
            answers[name, batch_size] = model.generate_until(asked)
        assert answers[name, 1] == answers[name, 3], name
    assert answers["plain", 1] == answers["causal", 1]
    assert answers["plain", 1] != answers["mma", 1]
    assert model.settings["unlocked"] is True
    assert model.settings["model_type"] == "llava"


def test_arguments_that_do_not_go_together(llava, tiny_aki):
    with pytest.raises(ValueError, match=r"is a llava model: a rule needs unlock=True"):
        Aki(llava, rule="mma")
    with pytest.raises(ValueError, match=r"is an AKI model, which has its rule already"):
        Aki(tiny_aki, unlock=True)
    with pytest.raises(ValueError, match=r"batch_size must be a number from 1 up, it is 'auto'"):
        Aki(tiny_aki, batch_size="auto")
    for name in ("float99", "int8", "nn"):
        with pytest.raises(ValueError, match=f"dtype must be auto or a floating torch dtype .*, it is '{name}'"):
            Aki(tiny_aki, dtype=name)


@pytest.mark.parametrize("option", ["--limit", "--limit-new-tokens"])
@pytest.mark.parametrize("count", ["0", "-1"])
def test_limits_that_leave_nothing(option, count, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "anything", option, count])
    assert f"aki: {option} must be at least 1, it is {count}." in capsys.readouterr().err


def test_without_lmms_eval_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("aki.commands.eval.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["eval", "anything"])
    assert "aki: aki eval needs lmms-eval: pip install 'aki-mma[eval]'." in capsys.readouterr().err


def test_lmms_eval_finds_the_model():
    assert "aki" in {point.name for point in entry_points(group="lmms_eval.models")}
    assert get_model("aki") is Aki


def test_digits_are_scored_as_in_training(tiny_recipe, tmp_path, capsys):
    """A model that learned some: by generating and comparing texts as by one forward over the labels."""
    tiny_recipe.data.test_size = 48
    tiny_recipe.model.text |= {"hidden_size": 32, "intermediate_size": 64}
    folder = tmp_path / "digits"
    torch.manual_seed(0)
    model, processor = build_model(tiny_recipe)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_json(folder / "result.json", {"recipe": {"data": {"grid": 3, "eval_size": 12, "test_size": 48}}})
    scenes, collator = held_out(folder), ChatCollator(processor, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(**collator([scenes[i] for i in range(24)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    model = AkiForConditionalGeneration.from_pretrained(folder).eval()
    wanted = accuracy_by_skill(model, ChatCollator(AkiProcessor.from_pretrained(folder), 128), scenes)
    assert 0.1 < wanted["accuracy"] < 1, wanted
    main(["eval", str(folder), "--suite", "digits", "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    found = {name: entry["score"] / 100 for name, entry in results["columns"].items()}
    assert found == pytest.approx(wanted)
    assert "aki table" not in capsys.readouterr().out, "the paper's tables have no such columns"
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "out"), "--suite", "digits", "--output", str(tmp_path / "again")])


def test_vllm_is_not_told_to_run_the_code_of_a_folder(monkeypatch):
    """lmms-eval's own default is that it does."""

    class Given(Exception):
        pass

    class Stub:
        def __init__(self, **given):
            raise Given(given)

    monkeypatch.setitem(sys.modules, "lmms_eval.models.chat.vllm", SimpleNamespace(VLLM=Stub))
    monkeypatch.delitem(sys.modules, "aki.evaluation.vllm", raising=False)
    with pytest.raises(Given) as given:
        import_module("aki.evaluation.vllm").Vllm("a/model", "mma", "auto", 2)
    assert given.value.args[0]["trust_remote_code"] is False
    assert given.value.args[0]["hf_overrides"] == {"attention_rule": "mma"}
    sys.modules.pop("aki.evaluation.vllm")
