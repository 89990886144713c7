"""The paper's eleven sources over fixtures in their released formats; expected texts are written out by hand."""

import json
import pickle
import re
from pathlib import Path

import pyarrow
import pytest
from fixtures.make import COCO_IDS, SCENES, write
from PIL import Image

from aki.data.augment import Augment
from aki.data.report import BadSample
from aki.data.sources import SOURCES, SourceError, open_source

ELEVEN = list(SOURCES)[:11]
SHORT = "Answer the question using a single word or phrase. "


def image(sample, message=0):
    parts = [part["image"] for part in sample.messages[message]["content"] if part["type"] == "image"]
    return parts[0] if parts else None


def texts(source):
    return [(sample.question, sample.answer) for sample in source]


def test_the_fixtures_are_of_all_eleven(released):
    assert list(released) == ELEVEN


@pytest.mark.parametrize("kind", ELEVEN)
def test_every_source_yields_a_question_with_its_image_first_and_an_answer(opened, kind):
    source = opened(kind)
    for sample in source:
        assert [message["role"] for message in sample.messages] == ["user", "assistant"]
        asked = [part["type"] for part in sample.messages[0]["content"]]
        assert asked == (["image", "text"] if image(sample) else ["text"])
        assert image(sample) or kind == "scienceqa"
        assert image(sample) is None or Image.open(image(sample)).size == (96, 64)
        assert sample.source == kind
        assert sample.id
    assert len({sample.id for sample in source}) == len(source) == len(list(source))


def test_vqav2(opened):
    source = opened("vqav2")
    assert source[0].golds == (source[0].answer,) * 10
    assert texts(source) == [(SHORT + "What color is the square?", scene.right) for scene in SCENES]
    names = [Path(image(sample)).name for sample in source]
    assert names == [f"COCO_train2014_{coco_id:012}.jpg" for coco_id in COCO_IDS]
    assert [sample.id for sample in source] == ["9000", "25000", "30000", "581857000"]


def test_gqa(opened):
    source = opened("gqa")
    question = SHORT + "Which color is the disc to the left of the square?"
    assert texts(source) == [(question, scene.left) for scene in SCENES]
    assert Path(image(source[3])).name == "2354789.jpg"
    assert source[0].id == "02930152"


def test_vsr(opened):
    source = opened("vsr")
    end = " Please answer yes or no."
    assert texts(source) == [
        (SHORT + "Is the disc at the left side of the square?" + end, "yes"),
        (SHORT + "Is this disc right of the square?" + end, "no"),
        (SHORT + "Does the square contain the disc?" + end, "no"),
        (SHORT + "Is the square touching the disc?" + end, "no"),  # "is not touching" is true
    ]
    folders = [Path(image(sample)).parent.name for sample in source]
    assert folders == ["train2017", "val2017", "train2017", "train2017"]


def test_ocrvqa_takes_its_training_split_and_every_question_of_a_book(opened):
    source = opened("ocrvqa")
    assert [sample.id for sample in source] == [f"140518200{book}-{n}" for book in (0, 1) for n in (0, 1, 2)]
    assert texts(source)[:2] == [
        (SHORT + "Who wrote this book?", "A. Author"),
        (SHORT + "What is the title of this book?", "The green square"),
    ]
    assert [Path(image(source[i])).suffix for i in (0, 3)] == [".jpg", ".png"]


OPTIONS = re.compile(r"(?P<letter>[A-Z])\. (?P<text>[^\n]*)\n")


def test_aokvqa_asks_by_letter_with_shuffled_options(opened):
    source = opened("aokvqa")
    orders = set()
    for sample, scene in zip(source, SCENES, strict=True):
        head, options = sample.question.split("Options:\n")
        assert head == (
            "Answer with the option's letter from the given choices directly. "
            "What is the colour of the thing that could roll?\n"
        )
        shown = [match.group("letter", "text") for match in OPTIONS.finditer(options)]
        assert "".join(f"{letter}. {text}\n" for letter, text in shown) == options
        assert sorted(text for _, text in shown) == ["blue", "green", "orange", "red"]
        assert [letter for letter, _ in shown] == ["A", "B", "C", "D"]
        assert dict(shown)[sample.answer] == scene.left
        orders.add(tuple(text for _, text in shown))
    assert len(orders) > 1
    assert Path(image(source[0])).parent.name == "train2017"


def test_scienceqa_gives_the_hint_and_reads_problems_without_a_picture(opened):
    source = opened("scienceqa")
    assert [sample.id for sample in source] == ["1", "2", "3"], "the training split alone"
    head = "Answer with the option's letter from the given choices directly. Which shape has four corners?\nContext: "
    assert source[0].question.startswith(head + "N/A\nOptions:\nA. ")
    assert source[1].question.startswith(head + "Corners are where sides meet.\nOptions:\nA. ")
    assert [image(sample) is None for sample in source] == [False, True, False]
    assert Path(image(source[2])).parts[-3:] == ("train", "3", "image.png")
    for sample in source:
        assert dict(m.group("letter", "text") for m in OPTIONS.finditer(sample.question))[sample.answer] == "the square"


@pytest.mark.parametrize("kind", ["refcoco", "refcoco+", "refcocog", "visual_genome"])
def test_regions_are_shares_of_the_picture_with_three_decimals(opened, kind):
    source = opened(kind)
    # Scene 2: x 54, y 12, 30 x 30 pixels, in 96 x 64.
    wanted = "Provide a short description for this region. <bbox>[0.562, 0.188][0.875, 0.656]</bbox>"
    phrase = "a orange square" if kind == "visual_genome" else "the orange square"
    assert texts(source)[2] == (wanted, phrase)
    assert Path(image(source[2])).name == ("3.jpg" if kind == "visual_genome" else "COCO_train2014_000000000030.jpg")


def test_llava_pairs_have_the_picture_each_and_the_mark_taken_out(opened):
    source = opened("llava_instruct")
    assert texts(source)[:2] == [
        ("What is on the left?", "A red disc is on the left."),
        ("And on the right?", "A green square."),
    ]
    assert image(source[0]) == image(source[1])
    assert Path(image(source[0])).parts[-2:] == ("train2017", "000000000009.jpg")


def test_options_follow_seed_source_id_and_epoch_alone(opened):
    def orders(epoch=0, **options):
        source = opened("aokvqa", **options)
        return [source.sample(index, epoch).question for index in reversed(range(4))][::-1]

    assert orders() == orders() == [sample.question for sample in opened("aokvqa")]
    assert orders(seed=1) != orders()
    assert orders(name="another") != orders()
    assert orders(epoch=1) != orders()


def test_the_second_opening_parses_nothing(released, tmp_path, monkeypatch):
    options = {**released["vqav2"], "cache": tmp_path}
    kind = SOURCES["vqav2"]
    parse, parsed = kind.parse, []
    monkeypatch.setattr(kind, "parse", lambda self, entry: (parsed.append(entry), parse(self, entry))[1])
    first = texts(open_source(**options))
    assert len(parsed) == 4
    assert texts(open_source(**options)) == first
    assert len(parsed) == 4
    assert open_source(**options).rows.cache_files, "rows are mapped from a file"


def test_a_changed_annotation_file_is_parsed_anew(tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "1.jpg")
    path = tmp_path / "questions.json"
    for answer in ("red", "green"):
        write(path, {"7": {"imageId": "1", "question": "What?", "answer": answer}})
        source = open_source("gqa", annotations=path, images=tmp_path, cache=tmp_path / "cache")
        assert source[0].answer == answer


def test_an_entry_that_cannot_be_parsed_is_a_bad_sample_in_its_place(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    good = {"imageId": "1", "question": "What?", "answer": "x"}
    entries = {"a": good, "b": {"imageId": "1"}, "c": {**good, "answer": 3}, "d": [], "e": {**good, "answer": " "}}
    write(tmp_path / "q.json", entries)
    source = open_source("gqa", annotations=tmp_path / "q.json", images=tmp_path, cache=tmp_path / "cache")
    assert len(source) == 5
    assert source[0].answer == "x"
    reasons = []
    for index in range(1, 5):
        with pytest.raises(BadSample) as error:
            source[index]
        reasons.append((error.value.reason, error.value.source, error.value.id))
    assert reasons == [
        ("malformed entry", "gqa", "entry 1"),
        ("malformed entry", "gqa", "entry 2"),
        ("malformed entry", "gqa", "entry 3"),
        ("empty text", "gqa", "e"),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": {"imageId"', "valid JSON"),
        ("not json", "valid JSON"),
        ("{}", "no samples"),
        ('{"a": {"question": "What?"}}', "imageId"),
        ("[1, 2]", "no samples"),
    ],
)
def test_a_file_of_another_format_is_one_sentence(tmp_path, text, why):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(SourceError, match=f"q.json.*{why}"):
        open_source("gqa", annotations=tmp_path / "q.json", images=tmp_path, cache=tmp_path / "cache")


def test_wrong_names_and_options_are_sentences(released, tmp_path):
    with pytest.raises(SourceError, match=r"no source of the kind 'vqa2'. Did you mean 'vqav2'"):
        open_source("vqa2", annotations=tmp_path)
    with pytest.raises(SourceError, match=r"no annotations at .*train_balanced_questions.json"):
        open_source("gqa", annotations=tmp_path, images=tmp_path)
    with pytest.raises(SourceError, match=r"no folder of images at .*nowhere"):
        open_source(**{**released["gqa"], "images": tmp_path / "nowhere"})
    with pytest.raises(SourceError, match=r"'gqa' has wrong options.*columns"):
        open_source(**released["gqa"], columns={})
    with pytest.raises(SourceError, match=r"region_descriptions.json and image_data.json, or these 2"):
        open_source("visual_genome", annotations=released["gqa"]["annotations"] + "/train_balanced_questions.json")
    with pytest.raises(IndexError):
        open_source(**released["gqa"])[4]


@pytest.mark.parametrize("name", ["../secret", "/SECRET", "sub/../../secret", "link", "missing", "", "http://x/y"])
def test_names_in_annotations_do_not_reach_outside_the_image_root(tmp_path, name):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for secret in ("secret.jpg", "SECRET.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / secret)
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    Image.new("RGB", (8, 8)).save(root / "fine.jpg")
    name = name.replace("/SECRET", f"{tmp_path}/SECRET")
    entries = [{"imageId": name, "question": "Q", "answer": "A"}, {"imageId": "fine", "question": "Q", "answer": "A"}]
    write(tmp_path / "q.json", dict(enumerate(entries)))
    source = open_source("gqa", annotations=tmp_path / "q.json", images=root, cache=tmp_path / "cache")
    with pytest.raises(BadSample) as error:
        source[0]
    missing = name in ("missing", "", "http://x/y")
    assert error.value.reason == ("missing image" if missing else "path outside the image root")
    assert Path(image(source[1])) == (root / "fine.jpg").resolve()


def test_several_image_folders_are_looked_through_in_order_and_links_between_them_followed(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for root in (one, two):
        root.mkdir()
    Image.new("RGB", (8, 8)).save(two / "5.jpg")
    (one / "6.jpg").symlink_to(two / "5.jpg")
    write(tmp_path / "q.json", {i: {"imageId": i, "question": "Q", "answer": "A"} for i in ("5", "6")})
    source = open_source("gqa", annotations=tmp_path / "q.json", images=[one, two], cache=tmp_path / "cache")
    assert image(source[0]) == image(source[1]) == str((two / "5.jpg").resolve())


def test_boxes_outside_the_picture_and_unknown_pictures_are_bad(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    place = {"image_id": 1, "phrase": "it", "y": 2, "width": 4, "height": 4}
    regions = [
        {**place, "region_id": 1, "x": 6},
        {**place, "region_id": 2, "x": 8},
        {**place, "region_id": 3, "x": 0, "image_id": 5},
    ]
    write(tmp_path / "region_descriptions.json", [{"id": 1, "regions": regions}])
    write(tmp_path / "image_data.json", [{"image_id": 1, "width": 8, "height": 8}])
    source = open_source("visual_genome", annotations=tmp_path, images=tmp_path, cache=tmp_path / "cache")
    assert source[0].question.endswith("<bbox>[0.750, 0.250][1.000, 0.750]</bbox>"), "cut at the edge"
    with pytest.raises(BadSample, match=r"nothing of the box"):
        source[1]
    with pytest.raises(BadSample, match=r"no image 5"):
        source[2]


def test_vqa_answers_are_found_by_id_and_their_lack_is_counted(opened, tmp_path, released):
    files = Path(released["vqav2"]["annotations"])
    questions = json.loads((files / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())
    questions["questions"].append({"image_id": 9, "question": "More?", "question_id": 1})
    write(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", questions)
    answers = files / "v2_mscoco_train2014_annotations.json"
    both = [tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", answers]
    source = opened("vqav2", annotations=both, cache=tmp_path / "cache")
    assert len(source) == 5
    with pytest.raises(BadSample, match=r"vqav2/1: malformed entry: the question has no annotation"):
        source[4]


@pytest.mark.parametrize("kind", ELEVEN)
def test_augmentation_is_off_unless_asked_for(opened, kind):
    assert all(isinstance(image(sample), str | None) for sample in opened(kind))


def test_an_augmented_region_is_where_the_picture_has_it(opened):
    """The square's colour is found in the changed picture inside the changed box, and hardly anywhere else."""
    views = set()
    for seed in range(6):
        source = opened("refcoco", seed=seed, augment=Augment(flip=True, crop=0.6))
        for sample, scene in zip(source, SCENES, strict=True):
            picture = image(sample)
            numbers = re.findall(r"\d\.\d{3}", sample.question)
            x1, y1, x2, y2 = (float(n) * side for n, side in zip(numbers, picture.size * 2, strict=True))
            colour = Image.new("RGB", (1, 1), scene.right).getpixel((0, 0))
            inside = [
                (x, y)
                for x in range(picture.width)
                for y in range(picture.height)
                if sum(abs(a - b) for a, b in zip(picture.getpixel((x, y)), colour, strict=True)) < 80
            ]
            assert min(x for x, _ in inside) == pytest.approx(x1, abs=2)
            assert max(x for x, _ in inside) + 1 == pytest.approx(x2, abs=2)
            assert min(y for _, y in inside) == pytest.approx(y1, abs=2)
            assert max(y for _, y in inside) + 1 == pytest.approx(y2, abs=2)
            views.add((picture.size, x1 < picture.width / 3))
    assert len(views) > 12, "crops and flips differ"


@pytest.mark.parametrize("caption", [" ", ".", "?!", None])
def test_a_vsr_caption_without_words_is_no_question(tmp_path, caption):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    lines = [{"image_link": "http://x/train2017/1.jpg", "caption": text, "label": 1} for text in ("It is.", caption)]
    (tmp_path / "vsr.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source("vsr", annotations=tmp_path / "vsr.jsonl", images=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(BadSample) as error:
        source[1]
    assert error.value.reason == "empty text"


SHORT_GQA = {"question": "Q", "answer": "A"}
BESIDE_A_GOOD_ONE = {
    "a name too long for a file system": ("gqa", {"1": SHORT_GQA | {"imageId": "x" * 300}}, "missing image"),
    "more options than letters": (
        "aokvqa",
        [{"image_id": 1, "question": "Q", "question_id": "q", "choices": list("ab") * 14, "correct_choice_idx": 0}],
        "malformed entry",
    ),
    "options that are no list": (
        "aokvqa",
        [{"image_id": 1, "question": "Q", "question_id": "q", "choices": "ab", "correct_choice_idx": 0}],
        "malformed entry",
    ),
    "an annotation of no picture": ("refcoco", [{"id": 1, "bbox": [0, 0, 4, 4]}], "malformed entry"),
    "a picture without a name": ("refcoco", [{"id": 1, "image_id": 1, "bbox": [0, 0, 4, 4]}], "malformed entry"),
    "a picture without width": ("refcoco", [{"id": 1, "image_id": 2, "bbox": [0, 0, 4, 4]}], "malformed entry"),
    "half of a surrogate pair": ("vsr", [{"caption": "It is \ud800."}], "malformed entry"),
}


@pytest.mark.parametrize("name", BESIDE_A_GOOD_ONE)
def test_one_broken_entry_does_not_take_the_others_with_it(tmp_path, name):
    kind, bad, reason = BESIDE_A_GOOD_ONE[name]
    for place in ("1.jpg", "train2017/000000000001.jpg"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place)
    file = tmp_path / "annotations"
    if kind == "gqa":
        write(file, {"0": SHORT_GQA | {"imageId": "1"}} | bad)
    elif kind == "aokvqa":
        write(file, [bad[0] | {"choices": ["a", "b"]}, *bad])
    elif kind == "refcoco":
        whole = {"id": 0, "file_name": "1.jpg", "caption": "it", "width": 8, "height": 8}
        images = [whole, {"id": 1, "width": 8, "height": 8}, {**whole, "id": 2, "width": 0}, {}]
        write(file, {"images": images, "annotations": [{"id": 0, "image_id": 0, "bbox": [0, 0, 4, 4]}, *bad]})
    else:
        good = {"image_link": "http://x/train2017/000000000001.jpg", "caption": "It is.", "label": 1}
        file.write_text("\n".join(json.dumps(good | more) for more in ({}, *bad)))
    source = open_source(kind, annotations=file, images=tmp_path, cache=tmp_path / "cache")
    assert source[0].answer
    with pytest.raises(BadSample) as error:
        source[1]
    assert error.value.reason == reason
    assert len(source) == 2


def test_answers_and_sizes_may_be_lacking(tmp_path):
    """In the second of two files."""
    for name in ("COCO_train2014_000000000001.jpg", "1.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    questions = [{"question_id": number, "image_id": 1, "question": "Q"} for number in (1, 2)]
    write(tmp_path / "q.json", {"questions": questions})
    write(tmp_path / "a.json", {"annotations": [{"question_id": 1, "multiple_choice_answer": "A"}, {"question_id": 2}]})
    region = {"image_id": 1, "phrase": "it", "x": 0, "y": 0, "width": 4, "height": 4}
    regions = [{**region, "region_id": 1}, {**region, "region_id": 2, "image_id": 2}]
    write(tmp_path / "r.json", [{"id": 1, "regions": regions}, {"id": 2}])
    write(tmp_path / "i.json", [{"image_id": 1, "width": 8, "height": 8}, {"image_id": 2}, {}])
    for kind, files, bad in (("vqav2", ("q.json", "a.json"), 1), ("visual_genome", ("r.json", "i.json"), 2)):
        annotations = [tmp_path / name for name in files]
        source = open_source(kind, annotations=annotations, images=tmp_path, cache=tmp_path / "cache")
        assert source[0].answer in ("A", "it")
        assert len(source) == 1 + bad
        for index in range(1, len(source)):
            with pytest.raises(BadSample, match="malformed entry"):
                source[index]


def test_a_circle_of_links_is_a_missing_image(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "a.jpg")
    write(tmp_path / "q.json", {"1": SHORT_GQA | {"imageId": "a"}})
    source = open_source("gqa", annotations=tmp_path / "q.json", images=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(BadSample, match="missing image"):
        source[0]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    text = json.dumps({"1": SHORT_GQA | {"imageId": "1"}})
    (tmp_path / "q.json").write_text("\ufeff" + text)
    source = open_source("gqa", annotations=tmp_path / "q.json", images=tmp_path, cache=tmp_path / "cache")
    assert source[0].answer == "A"


def test_a_file_that_is_no_json_is_one_line(tmp_path):
    for broken in (b'{"1": {"imageId"', b"nothing", b'{"1": "\xe9"}', b""):
        (tmp_path / "q.json").write_bytes(broken)
        with pytest.raises(SourceError) as error:
            open_source("gqa", annotations=tmp_path / "q.json", images=tmp_path, cache=tmp_path / "cache")
        assert len(str(error.value).splitlines()) == 1
        assert "b'" not in str(error.value)


def test_rows_stay_in_their_file_and_workers_get_none_of_them(tmp_path):
    """What a worker is sent, and what Arrow holds in memory, are small beside the rows."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    question = "Is this one of the many questions, or is it another one? " * 4
    write(tmp_path / "q.json", {str(i): {"imageId": "1", "question": question, "answer": "A"} for i in range(5000)})
    options = {"annotations": tmp_path / "q.json", "images": tmp_path, "cache": tmp_path / "cache"}
    open_source("gqa", **options)
    held = pyarrow.total_allocated_bytes()
    source = open_source("gqa", **options)
    sent = pickle.dumps(source)
    there = pickle.loads(sent)
    assert there[4999].question.startswith(SHORT + "Is this")
    size = source.rows.data.nbytes
    assert size > 1_000_000
    assert len(sent) < size / 20
    assert pyarrow.total_allocated_bytes() - held < size / 20
