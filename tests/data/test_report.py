import json
import pickle

import pytest

from aki.data.report import EXAMPLES, MIN_DRAWN, BadSample, DataReport, Reason, TooManyBadSamples


def report(max_share=0.01, **sources):
    """Each source as (good, bad)."""
    made = DataReport(max_share)
    for name, (good, bad) in sources.items():
        for _ in range(good):
            made.used(name)
        for number in range(bad):
            made.skip(BadSample(Reason.MISSING_IMAGE, f"there is no {number}.jpg.", name, str(number)))
    return made


def test_counts_by_source_and_reason():
    made = report(vqa=(7, 2), gqa=(3, 0))
    made.skip(BadSample("broken image", "x", "vqa", "9"))
    made.used("gqa", shortened=True)
    counts = made.to_dict()
    assert (counts["drawn"], counts["skipped"]) == (14, 3)
    assert counts["sources"]["vqa"]["skipped"] == {"missing image": 2, "broken image": 1}
    assert counts["sources"]["vqa"]["drawn"] == 10
    assert counts["sources"]["vqa"]["examples"]["missing image"] == ["0: there is no 0.jpg.", "1: there is no 1.jpg."]
    assert counts["sources"]["gqa"]["shortened"] == 1
    assert made.summary() == "3 of 14 samples skipped: vqa missing image 2, vqa broken image 1"


def test_parts_from_workers_add_up_to_the_whole(tmp_path):
    whole, merged = report(a=(5, 3), b=(2, 1)), DataReport()
    for part in (report(a=(2, 3)), report(b=(2, 1)), report(a=(3, 0))):
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert merged.to_dict() == whole.to_dict()
    merged.write(tmp_path / "data_report.json")
    read = json.loads((tmp_path / "data_report.json").read_text())
    assert DataReport.from_dict(read) == whole
    # What is merged in stays what it was.
    part = report(a=(0, 1))
    merged.merge(part)
    merged.merge(report(a=(0, 1)))
    assert part == report(a=(0, 1))


def test_examples_are_few_and_each_is_kept_once():
    made = report(a=(0, 40))
    for _ in range(3):
        made.merge(report(a=(0, 2)))
    assert len(made.to_dict()["sources"]["a"]["examples"]["missing image"]) == EXAMPLES
    twice = report(a=(0, 1))
    twice.merge(report(a=(0, 1)))
    assert twice.sources["a"].examples == {"missing image": ["0: there is no 0.jpg."]}
    assert twice.skipped == 2


@pytest.mark.parametrize(
    ("good", "bad", "ends"),
    [
        (0, 10, False),  # ten of the first thousand may be bad, wherever they stand
        (0, 11, True),
        (990, 10, False),
        (989, 11, True),
        (9900, 100, False),
        (9899, 101, True),
    ],
)
def test_the_share_ends_the_run(good, bad, ends):
    made = report(a=(good, bad))
    if not ends:
        made.check()
        return
    with pytest.raises(TooManyBadSamples) as error:
        made.check()
    message = str(error.value)
    assert f"{bad} of {good + bad} samples" in message
    assert "1.00%" in message
    assert "'missing image' in a" in message
    assert "a/0: there is no 0.jpg.; a/1: there is no 1.jpg." in message


def test_one_broken_source_ends_the_run_however_small_its_share_of_all():
    assert MIN_DRAWN == 1000
    with pytest.raises(TooManyBadSamples, match="20 of 1000 samples of b could not"):
        report(a=(50_000, 0), b=(980, 20)).check()


def test_the_worst_is_named():
    made = report(a=(900, 4), b=(900, 3))
    for number in range(30):
        made.skip(BadSample("broken image", f"{number} is torn.", "b", str(number)))
    with pytest.raises(TooManyBadSamples, match=r"Most are 'broken image' in b \(30\), for instance b/0: 0 is torn."):
        made.check()


def test_a_share_of_everything_is_exact_when_everything_was_read():
    report(a=(99, 1)).check(complete=True)
    with pytest.raises(TooManyBadSamples, match="2 of 100"):
        report(a=(98, 2)).check(complete=True)
    with pytest.raises(TooManyBadSamples, match=r"1 of 1000 .* 0\.00%"):
        report(0.0, a=(999, 1)).check()


def test_a_bad_sample_survives_the_way_from_a_worker():
    bad = pickle.loads(pickle.dumps(BadSample(Reason.EMPTY_TEXT, "nothing", "vqa", "7")))
    assert (bad.reason, bad.detail, bad.source, bad.id) == ("empty text", "nothing", "vqa", "7")
    assert str(bad) == "vqa/7: empty text: nothing"
