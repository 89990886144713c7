"""The whole path of each of the twelve columns, with models whose scores are known before."""

import pytest
from datasets import load_dataset
from draw_benchmarks import ANSWERS, BENCHMARKS
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from tenacity import wait_none

from aki.evaluation.run import Evaluation, evaluate, task_manager
from aki.evaluation.suite import PAPER, columns, load_task

JUDGED = {"LLaVA-W", "MathV-mini", "MM-Vet"}


class Scripted(lmms):
    """Answers each row right or wrong as `right(number of the row)` says."""

    is_simple = False

    def __init__(self, right, answers=ANSWERS):
        super().__init__()
        self.right, self.answers, self.prompts = right, answers, {}

    def generate_until(self, requests):
        answers = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            self.prompts.setdefault(task, []).append(doc_to_messages(self.task_dict[task][split][doc_id]))
            answers.append(self.answers[task][doc_id][0 if self.right(doc_id) else 1])
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


ALL_RIGHT = {column.name: 100.0 for column in PAPER} | {"MME-P": 400.0, "MME-C": 200.0}
# A pair of MME with one of two right has accuracy 50 and 0 for both right. Of the three ADE20K rows two are right and
# the one COCO row is not: (2/3 + 0) / 2. The rest is what half means.
HALF = {column.name: 50.0 for column in PAPER} | {"MME-P": 100.0, "MME-C": 50.0, "CV-Bench 2D": 100 / 3}


@pytest.mark.parametrize(
    ("right", "wanted"),
    [
        (lambda row: True, ALL_RIGHT),
        (lambda row: False, dict.fromkeys(ALL_RIGHT, 0.0)),
        (lambda row: row % 2 == 0, HALF),
    ],
    ids=["all right", "all wrong", "half"],
)
def test_the_score_known_before_comes_out(right, wanted, benchmarks, judge, tmp_path):
    results = evaluate(Evaluation("paper", PAPER, tmp_path, benchmarks), Scripted(right), "scripted")
    scores = {name: entry["score"] for name, entry in results["columns"].items()}
    assert scores == pytest.approx(wanted)
    rows = {column.task: len(ANSWERS[column.task]) for column in PAPER}
    assert {entry["task"]: entry["rows"] for entry in results["columns"].values()} == rows
    assert results["settings"]["judge"] == "stand-in"


def test_without_a_judge_the_judged_columns_are_empty_and_say_so(benchmarks, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    results = evaluate(Evaluation("paper", PAPER, tmp_path, benchmarks), Scripted(lambda row: True), "scripted")
    empty = {name for name, entry in results["columns"].items() if entry["score"] is None}
    assert empty == JUDGED
    for name in JUDGED:
        assert "no judge model is set: set OPENAI_API_KEY" in results["columns"][name]["note"]


@pytest.mark.parametrize(
    ("task", "then"),
    [
        ("llava_in_the_wild", "I would rather not say."),
        ("llava_in_the_wild", None),
        ("mathvista_testmini_format", None),
        ("mmvet", None),
        ("mmvet", "I would rather not say."),
        ("mmvet", "10"),  # which lmms-eval would ask again without end
    ],
)
def test_a_judge_that_fails_half_way_leaves_the_column_empty(task, then, benchmarks, judge, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(judge, "patience", 3)  # the first question only looks whether it is there
    monkeypatch.setattr(judge, "then", then)
    # Wrong answers: MathVista's right ones are letters and numbers, some of which need no judge.
    scripted = Scripted(lambda row: False, {task: [("", "It may be so.")] * 4})
    only = columns("paper", [task])
    (entry,) = evaluate(Evaluation("paper", only, tmp_path, benchmarks), scripted, "scripted")["columns"].values()
    assert entry["score"] is None
    assert "the judge gave no score for 2 of 4 answers; run again" in entry["note"]


def test_a_judge_that_is_not_there_is_said_before_anything_runs(benchmarks, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "patience", 0)
    scripted = Scripted(lambda row: True)
    with pytest.raises(ValueError, match=r"the judge stand-in does not answer \(.*400.*\): mend OPENAI_API_KEY"):
        evaluate(Evaluation("paper", PAPER, tmp_path, benchmarks), scripted, "scripted")
    assert not scripted.prompts
    only = columns("paper", ["pope"])
    results = evaluate(Evaluation("paper", only, tmp_path, benchmarks), scripted, "scripted")
    assert results["columns"]["POPE"]["score"] == 100
    assert results["settings"]["judge"] is None, "nobody was asked"


def test_questions_come_as_in_training(benchmarks, judge, tmp_path):
    """The instruction before the question, the pictures where the question has them."""
    scripted = Scripted(lambda row: True)
    results = evaluate(Evaluation("paper", PAPER, tmp_path, benchmarks), scripted, "scripted")
    texts = {
        task: ["".join(part["text"] for part in chat[0]["content"] if part["type"] == "text") for chat in chats]
        for task, chats in scripted.prompts.items()
    }
    short, letter = (
        "Answer the question using a single word or phrase. ",
        "Answer with the option's letter from the given choices directly. ",
    )
    assert texts["mme"][0] == short + "Is there a existence in this image?"
    assert texts["pope"][0] == short + "Is there a 0 in the image?"
    assert texts["mmvet"][0] == "What is x in 0?"
    assert texts["llava_in_the_wild"][0] == "Tell me about 0."
    assert texts["realworldqa"][2].endswith("Please answer directly with a single word or number.")
    for task in ("mmbench_en_dev_static", "seedbench", "cv_bench_2d", "cv_bench_3d"):
        assert all(text.startswith(letter.strip()) and text.count(letter.strip()) == 1 for text in texts[task]), task
    assert texts["mathvista_testmini_format"][1].startswith(letter)
    kinds = [[part["type"] for part in chat[0]["content"]] for chat in scripted.prompts["mmmu_val"]]
    assert kinds[:3] == [["text", "image", "text"], ["text", "image", "text", "image", "text"], ["image", "text"]]
    asked = [letter, letter, short, letter]
    assert all(text.startswith(sentence) for text, sentence in zip(texts["mmmu_val"], asked, strict=True))
    first = {entry["task"]: entry["prompt"]["first"] for entry in results["columns"].values()}
    assert first["mme"] == texts["mme"][0]


def test_no_data_is_said_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"pope has no data at .*lmms-lab-encoder/POPE: put a copy"):
        evaluate(Evaluation("paper", columns("paper", ["pope"]), tmp_path, tmp_path), Scripted(bool), "scripted")


def test_data_that_cannot_be_had_are_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(ConfigurableTask.download.retry, "wait", wait_none())
    (tmp_path / "lmms-lab-encoder/POPE").mkdir(parents=True)
    (column,) = columns("paper", ["pope"])
    with pytest.raises(ValueError, match=r"pope could not load its data from .*lmms-lab-encoder/POPE: .*"):
        load_task(task_manager(), column, tmp_path)
    asked = []

    def hub(**arguments):
        asked.append(arguments)
        raise ConnectionError("the hub is away")

    monkeypatch.setattr("datasets.load_dataset", hub)
    with pytest.raises(ValueError, match=r"pope could not load its data from lmms-lab-encoder/POPE: the hub is away"):
        load_task(task_manager(), column, None)
    assert asked[0]["path"] == "lmms-lab-encoder/POPE"
    assert "token" not in asked[0], "nobody needs a login to the hub for public data"


def test_data_saved_to_disk_are_the_same_data(benchmarks, tmp_path):
    for path, name in (("lmms-lab-encoder/POPE", None), ("nyu-visionx/CV-Bench", "3D")):
        load_dataset(str(benchmarks / path), name).save_to_disk(tmp_path / path / (name or ""))
    only = columns("paper", ["pope", "cv_bench_3d"])
    found = [
        evaluate(Evaluation("paper", only, tmp_path / "out", data), Scripted(lambda row: row != 1), "scripted")
        for data in (benchmarks, tmp_path)
    ]
    assert found[0] == found[1]
    # POPE asks yes, yes, no, no: one of two found, nothing found that is not there: 2 * 1 * .5 / 1.5.
    scores = {name: entry["score"] for name, entry in found[0]["columns"].items()}
    assert scores == pytest.approx({"POPE": 200 / 3, "CV-Bench 3D": 75})


def test_unknown_suites_and_tasks():
    with pytest.raises(ValueError, match=r"no suite 'papers'; there are paper, digits"):
        columns("papers")
    with pytest.raises(ValueError, match=r"has no task 'popes'; it has cv_bench_2d,"):
        columns("paper", ["popes"])


def test_the_twelve_columns_have_their_data_drawn():
    assert {column.task for column in PAPER} == set(BENCHMARKS)
    assert len(PAPER) == 12
