"""What users bring: LLaVA-style JSON, JSON lines of messages, captions in a folder, any data set of `datasets`."""

import json
from pathlib import Path

import datasets
import pytest
from fixtures.make import write
from PIL import Image

from aki.data.augment import Augment
from aki.data.plain import plain_messages
from aki.data.report import BadSample
from aki.data.sources import SourceError, open_source


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.jpg")
    return folder


@pytest.fixture
def opened(tmp_path, pictures):
    def open_one(kind, annotations, **options):
        given = {"images": pictures, "cache": tmp_path / "cache", **options}
        return open_source(kind, annotations=annotations, **given)

    return open_one


def contents(sample):
    """(role, image's name or text) of each part."""
    return [
        (message["role"], Path(part["image"]).name if part["type"] == "image" else part["text"])
        for message in sample.messages
        for part in message["content"]
    ]


def bad(source, index):
    with pytest.raises(BadSample) as error:
        source[index]
    return error.value


def turns(*texts):
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(texts)]


def test_llava_conversations_and_pairs(opened, tmp_path):
    entries = [
        {"id": "x", "image": "a.jpg", "conversations": turns("<image>\nQ1", "A1", "Q2", "A2")},
        {"id": "y", "conversations": turns("no picture", "A")},
        {"id": "z", "image": ["a.jpg", "b.jpg"], "conversations": turns("<image><image>\nboth?", "A")},
        {"id": "s", "conversations": [{"from": "system", "value": "Be brief."}, *turns("Q", "A")]},
    ]
    write(tmp_path / "chats.json", entries)
    whole = opened("llava_conversations", tmp_path / "chats.json")
    assert [contents(sample) for sample in whole] == [
        [("user", "a.jpg"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")],
        [("user", "no picture"), ("assistant", "A")],
        [("user", "a.jpg"), ("user", "b.jpg"), ("user", "both?"), ("assistant", "A")],
        [("system", "Be brief."), ("user", "Q"), ("assistant", "A")],
    ]
    pairs = opened("llava_pairs", tmp_path / "chats.json")
    assert [sample.id for sample in pairs] == ["x-0", "x-1", "y-0", "z-0", "s-0"]
    assert contents(pairs[1]) == [("user", "a.jpg"), ("user", "Q2"), ("assistant", "A2")]


def test_llava_entries_out_of_form_are_bad(opened, tmp_path):
    entries = [
        {"id": "fine", "conversations": turns("Q", "A")},
        {"id": "odd", "conversations": turns("Q", "A", "Q")},
        {"id": "none", "conversations": []},
        {"id": "who", "conversations": [{"from": "robot", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"id": "lost", "conversations": turns("<image>\nQ", "A")},
        {"id": "silent", "image": "a.jpg", "conversations": turns("Q", "")},
        {"id": "mute", "image": "a.jpg", "conversations": turns("<image>\n", "A")},
    ]
    write(tmp_path / "chats.json", entries)
    source = opened("llava_conversations", tmp_path / "chats.json")
    assert len(source) == 7
    reasons = [bad(source, index).reason for index in range(1, 7)]
    assert reasons == ["malformed entry"] * 4 + ["empty text"] * 2


def test_18_each_picture_stands_at_its_mark(opened, tmp_path):
    """Issue 12, entry 18: in its turn, and where there are no marks all of them first."""
    two = ["a.jpg", "b.jpg"]
    entries = [
        {"id": "turns", "image": two, "conversations": turns("<image>\nQ1", "A1", "Q2\n<image>", "A2", "Q3", "A3")},
        {"id": "within", "images": two, "conversations": turns("Is <image> like <image>?", "A")},
        {"id": "later", "image": "a.jpg", "conversations": turns("Q1", "A1", "<image>\nQ2", "A2")},
        {"id": "none", "images": two, "conversations": turns("Q1", "A1", "Q2", "A2")},
        {"id": "few", "image": two, "conversations": turns("<image>\nQ", "A")},
        {"id": "many", "image": "a.jpg", "conversations": turns("<image>\nQ", "A", "<image>\nQ", "A")},
        {"id": "answer", "image": "a.jpg", "conversations": turns("Q", "<image>")},
        {"id": "two lists", "image": "a.jpg", "images": ["b.jpg"], "conversations": turns("Q", "A")},
        {"id": "video", "video": "a.mp4", "conversations": turns("Q", "A")},
    ]
    write(tmp_path / "chats.json", entries)
    whole = opened("llava_conversations", tmp_path / "chats.json")
    first, second = ("user", "a.jpg"), ("user", "b.jpg")
    one, two, three = ([("user", f"Q{n}"), ("assistant", f"A{n}")] for n in (1, 2, 3))
    assert contents(whole[0]) == [first, *one, two[0], second, two[1], *three]
    compared = [("user", "Is"), first, ("user", "like"), second, ("user", "?"), ("assistant", "A")]
    assert contents(whole[1]) == compared
    assert contents(whole[2]) == [*one, first, *two]
    assert contents(whole[3]) == [first, second, *one, *two]
    assert [bad(whole, index).reason for index in range(4, 9)] == ["malformed entry"] * 5
    pairs = opened("llava_pairs", tmp_path / "chats.json")
    assert [contents(pairs[index]) for index in range(8)] == [
        [first, *one],
        [first, two[0], second, two[1]],
        [first, second, *three],
        compared,
        one,
        [first, *two],
        [first, second, *one],
        [first, second, *two],
    ]


@pytest.mark.parametrize("folder", [False, True])
def test_19_what_stands_in_a_csv_file_is_the_answer(opened, tmp_path, folder):
    """Issue 12, entry 19: also what pandas takes for nothing, for a number or for a truth value."""
    answers = ["None", "NA", "null", "nan", "n/a", "", "007", "1.50", "True", "1e3", "-", "2009-07-04", " x"]
    path = tmp_path / "table" / "data.csv"
    path.parent.mkdir()
    for chosen in (answers, ["007", "1.50"], ["True", "False"], ["NA", "null"]):
        path.write_text(
            "key,photo,q,a\n" + "".join(f"0{i},,Q,{answer}\n" for i, answer in enumerate(chosen)), "utf-8-sig"
        )
        columns = {"id": "key", "image": "photo", "question": "q", "answer": "a"}
        source = opened("datasets", path.parent if folder else path, columns=columns)
        read = [bad(source, i).reason if not answer else source[i].answer for i, answer in enumerate(chosen)]
        assert read == [answer or "empty text" for answer in chosen]
        assert source[0].id == "00"
        assert contents(source[0])[0] == ("user", "Q")


def test_19_numbers_in_other_files(opened, tmp_path):
    """Issue 12, entry 19: a column of numbers was refused row for row."""
    for name, answer in (("ints", 7), ("floats", 7.5)):
        datasets.Dataset.from_dict({"q": [3], "a": [answer]}).to_parquet(tmp_path / f"{name}.parquet")
        sample = opened("datasets", tmp_path / f"{name}.parquet", columns={"question": "q", "answer": "a"})[0]
        assert (sample.question, sample.answer) == ("3", str(answer))


def test_20_a_byte_order_mark_is_no_part_of_a_caption(opened, pictures):
    """Issue 12, entry 20: it was learned."""
    (pictures / "a.txt").write_text("A red square.", "utf-8-sig")
    assert opened("captions", pictures, images=None)[0].answer == "A red square."
    (pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": "red"}), "utf-8-sig")
    assert opened("captions", pictures, images=None)[0].answer == "red"


def test_20_half_of_a_surrogate_pair_is_a_bad_sample_to_every_reader(opened, tmp_path):
    """Issue 12, entry 20: a list of JSON was lost as a whole, a line of JSON alone."""
    texts = ["fine", "half \ud800", "\udc00 half", "a pair \U0001f600", "fine \\ud800"]
    chats = [turns("Q", text) for text in texts]
    (tmp_path / "list.json").write_text(json.dumps([{"id": "x", "conversations": chat} for chat in chats]))
    roles = ("user", "assistant")
    lines = [
        {"messages": [{"role": role, "content": turn["value"]} for role, turn in zip(roles, chat, strict=True)]}
        for chat in chats
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for kind, name in (("llava_conversations", "list.json"), ("messages", "lines.jsonl")):
        source = opened(kind, tmp_path / name)
        assert [source[index].answer for index in (0, 3, 4)] == [texts[index] for index in (0, 3, 4)]
        assert [bad(source, index).reason for index in (1, 2)] == ["malformed entry"] * 2


def test_22_postscript_is_no_picture_of_a_folder(opened, pictures):
    """Issue 12, entry 22: a file that Pillow would open by another program is none of the pictures."""
    (pictures / "c.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (pictures / "c.txt").write_text("A caption.")
    source = opened("captions", pictures, images=None)
    assert [bad(source, index).reason for index in range(3)] == ["empty text", "empty text", "missing image"]


def test_messages_in_every_form(opened, tmp_path):
    def image(**part):
        return {"role": "user", "content": [part, {"type": "text", "text": "Q"}]}

    answer = {"role": "assistant", "content": "A"}
    data_url = "data:image/png;base64,AAAA"
    lines = [
        {"id": "one", "messages": [{"role": "user", "content": "Q"}, answer]},
        {"messages": [image(type="image", image="a.jpg"), answer]},
        {"messages": [image(type="image", path="a.jpg"), answer]},
        {"messages": [image(type="image_url", image_url={"url": "a.jpg"}), answer]},
        {"messages": [image(type="image"), answer], "images": ["a.jpg"]},
        {"messages": [image(type="image"), answer, image(type="image"), answer], "images": ["a.jpg", "b.jpg"]},
        {"messages": [image(type="image", image=data_url), answer]},
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = opened("messages", tmp_path / "chats.jsonl")
    assert len(source) == 7
    assert contents(source[0]) == [("user", "Q"), ("assistant", "A")]
    for index in (1, 2, 3, 4):
        assert contents(source[index]) == [("user", "a.jpg"), ("user", "Q"), ("assistant", "A")]
    assert [name for _, name in contents(source[5])] == ["a.jpg", "Q", "A", "b.jpg", "Q", "A"]
    assert source[6].messages[0]["content"][0]["image"] == data_url
    assert [source[index].id for index in (0, 1)] == ["one", "chats.jsonl:2"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"messages": [', "malformed entry", "line 2 is not JSON"),
        ("[]", "malformed entry", "list indices"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "malformed entry", "'robot'"),
        ('{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "malformed entry", "'video'"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "malformed entry",
            "more pictures than its images",
        ),
        ('{"messages": [], "images": ["a.jpg"]}', "malformed entry", "1 of 1 images"),
        ('{"messages": []}', "empty text", "does not end with an answer"),
        ('{"messages": [{"role": "user", "content": "Q"}]}', "empty text", "does not end with an answer"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "empty text", "role assistant"),
    ],
)
def test_a_bad_line_is_a_bad_sample_that_names_it(opened, tmp_path, line, reason, detail):
    good = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(good) + "\n" + line + "\n" + json.dumps(good) + "\n")
    source = opened("messages", tmp_path / "chats.jsonl")
    assert len(source) == 3
    error = bad(source, 1)
    assert error.reason == reason
    assert detail in error.detail
    assert source[2].answer == "A"


@pytest.mark.parametrize("indent", [None, 2])
def test_one_list_of_chats_is_read_as_lines_are(opened, tmp_path, indent):
    """As LLaMA-Factory writes its files."""
    messages = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    chats = [{"messages": messages, "images": [name]} for name in ("a.jpg", "b.jpg")]
    (tmp_path / "chats.json").write_text("\n" + json.dumps(chats, indent=indent))
    source = opened("messages", tmp_path / "chats.json")
    assert [contents(source[i]) for i in range(len(source))] == [
        [("user", name), ("user", "Q"), ("assistant", "A")] for name in ("a.jpg", "b.jpg")
    ]
    assert source[1].id == "chats.json:2"


def test_messages_may_not_point_outside_either(opened, tmp_path):
    part = {"type": "image", "image": "../chats.jsonl"}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    assert bad(opened("messages", tmp_path / "chats.jsonl"), 0).reason == "path outside the image root"


def test_captions_beside_their_pictures(opened, pictures):
    (pictures / "a.txt").write_text("A red square.\n")
    (pictures / "orphan.txt").write_text("nothing to see")
    (pictures / "more").mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "more" / "a.png")
    (pictures / "more" / "a.txt").write_text("Black.")
    source = opened("captions", pictures, images=None)
    assert len(source) == 4
    assert [contents(source[index]) for index in (0, 3)] == [
        [("user", "a.jpg"), ("assistant", "A red square.")],
        [("user", "a.png"), ("assistant", "Black.")],
    ]
    assert source[3].id == "more/a.png"
    assert bad(source, 1).reason == "empty text"
    assert "no caption" in bad(source, 1).detail
    assert bad(source, 2).reason == "missing image"
    Image.new("RGB", (8, 8)).save(pictures / "more" / "new.png")
    assert len(opened("captions", pictures, images=None)) == 5, "a new picture is seen"


def test_captions_in_a_metadata_file(opened, pictures):
    lines = [{"file_name": "a.jpg", "text": "red"}, {"file_name": "../x.jpg", "text": "x"}, {"file_name": "b.jpg"}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = opened("captions", pictures, images=None)
    assert contents(source[0]) == [("user", "a.jpg"), ("assistant", "red")]
    assert [bad(source, index).reason for index in (1, 2)] == ["path outside the image root", "malformed entry"]


@pytest.mark.parametrize("how", ["disk", "parquet", "csv"])
def test_a_data_set_by_path_with_a_column_mapping(opened, tmp_path, how):
    values = {"photo": ["a.jpg", "none.jpg"], "q": ["Q1", "Q2"], "a": ["A1", "A2"], "key": [7, 8]}
    data = datasets.Dataset.from_dict(values)
    path = tmp_path / ("data" if how == "disk" else f"data.{how}")
    {"disk": data.save_to_disk, "parquet": data.to_parquet, "csv": data.to_csv}[how](str(path))
    columns = {"image": "photo", "question": "q", "answer": "a", "id": "key"}
    source = opened("datasets", path, columns=columns)
    assert contents(source[0]) == [("user", "a.jpg"), ("user", "Q1"), ("assistant", "A1")]
    assert source[0].id == "7"
    error = bad(source, 1)
    assert (error.reason, error.id) == ("missing image", "8")


def test_a_data_set_with_pictures_in_it_decodes_none(opened, tmp_path):
    features = datasets.Features({"shots": datasets.List(datasets.Image()), "answer": datasets.Value("string")})
    picture = Image.new("RGB", (8, 8), "red")
    data = datasets.Dataset.from_dict({"shots": [[picture, picture], []], "answer": ["A", "B"]}, features=features)
    data.to_parquet(tmp_path / "data.parquet")
    columns = {"image": "shots", "answer": "answer"}
    source = opened("datasets", tmp_path / "data.parquet", columns=columns)
    images = [part["image"] for part in source[0].messages[0]["content"]]
    assert [type(image) for image in images] == [bytes, bytes]
    assert bad(source, 1).reason == "empty text", "neither picture nor question"
    flipped = opened("datasets", tmp_path / "data.parquet", columns=columns, augment=Augment(flip=True))
    assert flipped[0].messages[0]["content"][0]["image"].size == (8, 8)


def test_a_data_set_of_messages(opened, tmp_path):
    messages = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "A"}]})
    data = datasets.Dataset.from_dict({"chat": [messages], "images": [["b.jpg"]]})
    data.save_to_disk(tmp_path / "data")
    source = opened("datasets", tmp_path / "data", columns={"messages": "chat", "image": "images"})
    assert contents(source[0]) == [("user", "b.jpg"), ("user", "Q"), ("assistant", "A")]


def test_wrong_columns_and_paths_are_sentences(opened, tmp_path):
    datasets.Dataset.from_dict({"q": ["Q"], "a": ["A"]}).to_parquet(tmp_path / "data.parquet")
    path = tmp_path / "data.parquet"
    for columns in ({"answer": "b"}, {"question": "q"}, {"answer": "a", "picture": "q"}):
        with pytest.raises(SourceError, match=r"columns should map answer or messages.*\(a, q\)|\(q, a\)"):
            opened("datasets", path, columns=columns)
    with pytest.raises(SourceError, match="cannot be opened by `datasets`"):
        opened("datasets", tmp_path / "data.xyz", columns={"answer": "a"})
    with pytest.raises(SourceError, match="columns should be a mapping"):
        opened("datasets", path, columns=["a"])
    with pytest.raises(SourceError, match=r"missing a required .*'columns'"):
        opened("datasets", path)


def test_a_data_set_that_holds_nothing_or_something_else_is_a_sentence(opened, tmp_path):
    def says(name):
        with pytest.raises(SourceError) as error:
            opened("datasets", tmp_path / name, columns={"answer": "a"})
        return str(error.value)

    datasets.Dataset.from_dict({"a": []}).save_to_disk(tmp_path / "folder")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "heads.csv").write_text("q,a\n")
    (tmp_path / "torn.json").write_text('{"a":')
    (tmp_path / "table.xlsx").touch()
    assert "holds no rows" in says("folder")
    assert "holds no rows" in says("empty.jsonl")
    assert "no data" in says("heads.csv")
    assert "JSON parse error" in says("torn.json")
    assert "none of .parquet, .json" in says("table.xlsx")


def test_messages_with_marks_in_their_texts():
    """The form of LLaMA-Factory and ms-swift: a mark in the text for each of the images beside it."""
    asked = {"role": "user", "content": "<image>\nwhat is it? and <image>?"}
    (found,) = plain_messages([asked], ["a.png", "b.png"])
    assert found["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "what is it? and "},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "?"},
    ]
    with pytest.raises(ValueError, match="more pictures than its images"):
        plain_messages([asked], ["a.png"])
    with pytest.raises(ValueError, match="1 of 3 images have no image part"):
        plain_messages([asked], ["a.png", "b.png", "c.png"])
    (text,) = plain_messages([asked], [])
    assert text["content"] == [{"type": "text", "text": asked["content"]}], "no images: text, which is then refused"


def test_all_answers_that_people_gave(opened, tmp_path):
    chat = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "2"}]
    lines = [{"messages": chat, "answers": ["2", "two"]}, {"messages": chat}, {"messages": chat, "answers": ["2", " "]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = opened("messages", tmp_path / "chats.jsonl")
    assert [source[i].golds for i in range(2)] == [("2", "two"), ("2",)]
    assert bad(source, 2).reason == "empty text"
    table = datasets.Dataset.from_dict({"q": ["how many?"], "a": ["2"], "all": [["2", "two"]]})
    table.to_parquet(tmp_path / "table.parquet")
    columns = {"question": "q", "answer": "a", "answers": "all"}
    assert opened("datasets", tmp_path / "table.parquet", columns=columns)[0].golds == ("2", "two")
