"""Fingerprints change with what a score depends on, and with nothing else."""

import datasets
import pytest
from PIL import Image

from aki.evaluation.answers import AnswerCache
from aki.evaluation.fingerprints import data_fingerprint, model_fingerprint

FEATURES = datasets.Features(
    {
        "question": datasets.Value("string"),
        "image": datasets.Image(),
        "frames": datasets.Sequence(datasets.Image()),
        "about": {"source": datasets.Value("string")},
    }
)


def rows(level=7, question="how many?", frame=9, source="drawn"):
    def picture(value):
        return Image.new("RGB", (4, 4), (value,) * 3)

    row = {"question": question, "image": picture(level), "frames": [picture(1), picture(frame)]}
    return datasets.Dataset.from_list([row | {"about": {"source": source}}] * 2, features=FEATURES)


def test_data_are_their_rows_wherever_they_lie(tmp_path):
    wanted = data_fingerprint(rows())
    assert data_fingerprint(rows()) == wanted
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        rows().to_parquet(tmp_path / name / "test.parquet")
        loaded = datasets.load_dataset(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))["test"]
        assert data_fingerprint(loaded) == wanted


@pytest.mark.parametrize("change", [{"level": 8}, {"question": "which?"}, {"frame": 8}, {"source": "real"}])
def test_another_row_is_another_fingerprint(change):
    assert data_fingerprint(rows(**change)) != data_fingerprint(rows())
    assert data_fingerprint(rows().select([0])) != data_fingerprint(rows())


def test_pictures_beside_their_table_count(tmp_path):
    found = []
    for level in (7, 7, 8):
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / "one.png")
        features = datasets.Features({"image": datasets.Image()})
        found.append(
            data_fingerprint(datasets.Dataset.from_list([{"image": str(tmp_path / "one.png")}], features=features))
        )
    assert found[0] == found[1] != found[2]


def test_a_model_is_its_weights_and_words(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    wanted = model_fingerprint(str(tmp_path))
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("good")
    assert model_fingerprint(str(tmp_path)) == wanted
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert model_fingerprint(str(tmp_path)) != wanted
    assert model_fingerprint("hub/model", "abc") == "hub/model@abc"


def test_answers_are_read_whole_from_every_process(tmp_path):
    first, second = AnswerCache(tmp_path, 0), AnswerCache(tmp_path, 1)
    first.add({"a": "one\nline\u2028two", "b": ""})
    second.add({"c": "three"})
    with (tmp_path / "answers-1.jsonl").open("a") as file:
        file.write('{"key": "d", "ans')
    AnswerCache(tmp_path, 1).add({"e": "five"})
    again = AnswerCache(tmp_path, 2)
    assert again.known == {"a": "one\nline\u2028two", "b": "", "c": "three", "e": "five"}
    assert again.get("d") is None
    nothing = AnswerCache(None)
    nothing.add({"a": "one"})
    assert nothing.get("a") is None
