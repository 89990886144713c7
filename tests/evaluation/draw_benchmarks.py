"""Draws a handful of rows for each of the twelve benchmarks, in the hub data sets' columns, types and file layout.

The cards of the data sets on the hub say which columns and types (MME, MMBench, MMMU, MathVista); where no card was at
hand, what lmms-eval's tasks read does. `python tests/evaluation/draw_benchmarks.py FOLDER` writes them for a look.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures
from PIL import ImageDraw

S = Value("string")
LETTERS = "ABCD"


def picture(text: str, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Pictures.Image:
    drawn = Pictures.new(mode, size, 255 if mode == "L" else "white")
    ImageDraw.Draw(drawn).text((4, 4), text, fill=0 if mode == "L" else "black")
    return drawn


def strings(*names: str) -> dict[str, Value]:
    return dict.fromkeys(names, S)


def mme():
    features = Features(strings("question_id") | {"image": Image()} | strings("question", "answer", "category"))
    rows = []
    for category, name in (("existence", "a.jpg"), ("count", "b.jpg"), ("commonsense_reasoning", "c.png")):
        for answer in ("Yes", "No"):
            question = f"Is there a {category} in this image? Please answer yes or no."
            row = {"question_id": f"{category}/{name}", "image": picture(category), "question": question}
            rows.append(row | {"answer": answer, "category": category})
    return features, rows, [(row["answer"], {"Yes": "No", "No": "Yes"}[row["answer"]]) for row in rows]


def mmbench():
    texts = ("question", "hint", "answer", *LETTERS, "category")
    features = Features(
        {"index": Value("int64")}
        | strings(*texts)
        | {"image": Image()}
        | strings("source", "L2-category", "comment", "split")
    )
    rows = []
    for index, answer in enumerate("ABCA"):
        options = {letter: f"thing {letter.lower()}{index}" for letter in LETTERS}
        options["D"] = "nan" if index == 0 else options["D"]
        row = {"index": 200 + index, "question": f"What is shown in {index}?", "hint": "nan" if index else "A drawing."}
        row |= options | {"answer": answer, "category": "object_localization", "image": picture(str(index), (32, 60))}
        rows.append(row | {"source": "drawn", "L2-category": "finegrained", "comment": "nan", "split": "dev"})
    return features, rows, [(row["answer"], "C" if row["answer"] != "C" else "A") for row in rows]


def seedbench():
    choices = [f"choice_{letter.lower()}" for letter in LETTERS]
    features = Features(
        strings("answer", *choices, "data_id", "data_type", "question", "question_id")
        | {"question_type_id": Value("int16"), "image": Sequence(Image()), "segment": Sequence(Value("int64"))}
    )
    rows = []
    for number, answer in enumerate("BDAC"):
        row = {"answer": answer} | {choice: f"{choice} of {number}" for choice in choices}
        row |= {"data_id": f"{number}_{number}", "data_type": "image", "question": f"How many lines has {number}?"}
        row |= {"question_id": str(number), "question_type_id": 1 + number, "image": [picture(str(number))]}
        rows.append(row | {"segment": []})
    # Videos stand in the same split, as frames; here before the last image.
    frames = [picture(f"frame {i}", (32, 32)) for i in range(8)]
    video = rows[0] | {"data_id": "clip.webm", "data_type": "video", "image": frames, "segment": [0, 8]}
    right = [(row["answer"], "A" if row["answer"] != "A" else "B") for row in rows]
    return features, [*rows[:3], video | {"question_id": "9"}, rows[3]], right


def llava_in_the_wild():
    features = Features(
        strings("question_id", "question", "category", "image_id", "gpt_answer", "caption") | {"image": Image()}
    )
    rows = []
    for number, category in enumerate(("conv", "detail", "complex", "conv")):
        row = {"question_id": str(number), "question": f"Tell me about {number}.", "category": category}
        row |= {"image_id": f"00{number}", "gpt_answer": f"It is drawing {number}.", "caption": f"A {number}."}
        rows.append(row | {"image": picture(str(number))})
    return features, rows, [(row["gpt_answer"], "I cannot say.") for row in rows]


def mmmu():
    images = {f"image_{i}": Image() for i in range(1, 8)}
    features = Features(
        strings("id", "question", "options", "explanation")
        | images
        | strings("img_type", "answer", "topic_difficulty", "question_type", "subfield")
    )
    asked = [
        ("Art", "Who drew <image 1>?", ["Ann", "Bob", "Cid", "Dee"], "B", 1),
        ("Art", "Compare <image 1> with <image 2>.", ["same", "other", "both", "none"], "A", 2),
        ("Math", "<image 1> How many lines?", [], "7", 1),
        ("Math", "Which is longer?", ["<image 1>", "<image 2>"], "B", 2),
    ]
    rows = []
    for number, (subject, question, options, answer, count) in enumerate(asked):
        row = {"id": f"validation_{subject}_{number + 1}", "question": question, "options": repr(options)}
        row |= {f"image_{i}": picture(f"{number}.{i}") if i <= count else None for i in range(1, 8)}
        row |= {"explanation": "", "img_type": "['Diagrams']", "answer": answer, "topic_difficulty": "Easy"}
        rows.append(row | {"question_type": "multiple-choice" if options else "open", "subfield": subject})
    return features, rows, [("B", "A"), ("A", "B"), ("7", "8"), ("B", "A")]


def mathvista():
    about = strings("category", "context", "grade") | {"img_height": Value("int64"), "img_width": Value("int64")}
    about |= strings("language") | {"skills": Sequence(S)} | strings("source", "split", "task")
    features = Features(
        strings("pid", "question", "image")
        | {"decoded_image": Image(), "choices": Sequence(S), "unit": S, "precision": Value("float64")}
        | strings("answer", "question_type", "answer_type")
        | {"metadata": about, "query": S}
    )
    asked = [
        ("How many bars?", None, "3", "free_form", "integer", None),
        ("Which is the angle?", ["30", "45", "60"], "45", "multi_choice", "text", None),
        ("What is the mean?", None, "1.5", "free_form", "float", 1.0),
        ("Is it round?", ["yes", "no"], "no", "multi_choice", "text", None),
    ]
    rows = []
    for number, (question, choices, answer, kind, type_, precision) in enumerate(asked):
        row = {"pid": str(number + 1), "question": question, "image": f"images/{number + 1}.jpg"}
        row |= {"decoded_image": picture(str(number), mode="L"), "choices": choices, "unit": None}
        row |= {"precision": precision, "answer": answer, "question_type": kind, "answer_type": type_}
        metadata = {"category": "general-vqa", "context": "bar chart", "grade": "daily life", "img_height": 48}
        metadata |= {"img_width": 64, "language": "english", "skills": ["arithmetic reasoning"], "source": "drawn"}
        rows.append(row | {"metadata": metadata | {"split": "testmini", "task": "drawn"}, "query": question})
    return features, rows, [("3", "4"), ("B", "C"), ("1.5", "2.5"), ("B", "A")]


def pope():
    features = Features(
        strings("id", "question_id", "question", "answer", "image_source") | {"image": Image()} | strings("category")
    )
    rows = []
    for number, answer in enumerate(("yes", "yes", "no", "no")):
        row = {"id": str(number), "question_id": str(number + 1), "question": f"Is there a {number} in the image?"}
        row |= {"answer": answer, "image_source": f"COCO_val2014_{number:012}", "image": picture(str(number))}
        rows.append(row | {"category": "random"})
    return features, rows, [(row["answer"], {"yes": "no", "no": "yes"}[row["answer"]]) for row in rows]


def mmvet():
    features = Features(
        strings("question_id") | {"image": Image()} | strings("image_source", "question", "answer", "capability")
    )
    rows = []
    for number, capability in enumerate(("ocr", "rec,know,gen", "ocr,math", "rec")):
        row = {"question_id": f"v1_{number}", "image": picture(str(number)), "image_source": f"v1_{number}.png"}
        rows.append(row | {"question": f"What is x in {number}?", "answer": f"x={number}", "capability": capability})
    return features, rows, [(row["answer"], "nothing") for row in rows]


def realworldqa():
    features = Features({"image": Image()} | strings("image_path", "question", "answer"))
    letter = "Please answer directly with only the letter of the correct option and nothing else."
    word = "Please answer directly with a single word or number."
    rows = []
    for number, answer in enumerate(("A", "C", "Yes", "2")):
        options = "\nA. left\nB. right\nC. ahead\n" + letter if answer in LETTERS else "\n" + word
        row = {"image": picture(str(number), (96, 54)), "image_path": f"{number}.webp"}
        rows.append(row | {"question": f"Where does road {number} lead?{options}", "answer": answer})
    return features, rows, [("A", "B"), ("C", "B"), ("Yes", "No"), ("2", "3")]


def cv_bench(kind: str, sources: tuple[str, ...]):
    features = Features(
        {"idx": Value("int32"), "type": S, "task": S, "image": Image(), "question": S, "choices": Sequence(S)}
        | strings("answer", "prompt", "filename", "source", "source_dataset", "source_filename", "target_class")
        | {"target_size": Value("int64"), "bbox": Sequence(Sequence(Value("float64")))}
    )
    rows = []
    for number, (source, answer) in enumerate(zip(sources, "ABBA", strict=True)):
        question = f"How many lines are in drawing {number}?"
        row = {"idx": number, "type": kind, "task": "Count" if kind == "2D" else "Depth", "question": question}
        row |= {"image": picture(str(number)), "choices": ["1", "2"], "answer": f"({answer})"}
        row |= {"prompt": f"{question} Select from the following choices.\n(A) 1\n(B) 2", "filename": f"{number}.png"}
        row |= {"source": source, "source_dataset": f"{source} val", "source_filename": f"{number}.jpg"}
        rows.append(row | {"target_class": None, "target_size": None, "bbox": [[0.0, 0.0, 4.0, 4.0]]})
    return features, rows, [(row["answer"], {"(A)": "(B)", "(B)": "(A)"}[row["answer"]]) for row in rows]


BENCHMARKS = {
    # lmms-eval's task: hub path, configuration, split, what draws it
    "mme": ("lmms-lab-encoder/MME", "default", "test", mme),
    "mmbench_en_dev_static": ("lmms-lab-encoder/MMBench", "en", "dev", mmbench),
    "seedbench": ("lmms-lab-encoder/SEED-Bench", "default", "test", seedbench),
    "llava_in_the_wild": ("lmms-lab-encoder/llava-bench-in-the-wild", "default", "train", llava_in_the_wild),
    "mmmu_val": ("lmms-lab-encoder/MMMU", "default", "validation", mmmu),
    "mathvista_testmini_format": ("AI4Math/MathVista", "default", "testmini", mathvista),
    "pope": ("lmms-lab-encoder/POPE", "default", "test", pope),
    "mmvet": ("lmms-lab-encoder/MMVet", "default", "test", mmvet),
    "realworldqa": ("lmms-lab-encoder/RealWorldQA", "default", "test", realworldqa),
    "cv_bench_2d": ("nyu-visionx/CV-Bench", "2D", "test", lambda: cv_bench("2D", ("ADE20K",) * 3 + ("COCO",))),
    "cv_bench_3d": ("nyu-visionx/CV-Bench", "3D", "test", lambda: cv_bench("3D", ("Omni3D",) * 4)),
}

ANSWERS = {task: draw()[2] for task, (_, _, _, draw) in BENCHMARKS.items()}
"""For each task a right and a wrong answer to each row that is asked."""


def write_benchmarks(folder: Path) -> None:
    """Each data set as a hub repository: parquet files, and a card that says which belong to which configuration."""
    cards: dict[str, list[dict]] = {}
    for path, configuration, split, draw in BENCHMARKS.values():
        features, rows, _ = draw()
        file = f"data/{configuration}-{split}.parquet"
        (folder / path / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(folder / path / file)
        entry = {"config_name": configuration, "data_files": [{"split": split, "path": file}]}
        cards.setdefault(path, []).append(entry)
    for path, configurations in cards.items():
        card = yaml.safe_dump({"configs": configurations})
        (folder / path / "README.md").write_text(f"---\n{card}---\n")


if __name__ == "__main__":
    write_benchmarks(Path(sys.argv[1]))
