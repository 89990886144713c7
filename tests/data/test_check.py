"""Reading everything once, and drawing samples, against files whose faults are known."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.make import write_sources
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from streams import captions, collator

from aki.apps.sheet import COLOURS, Shown, as_seen, draw_sheet, lay_out, parts, token_kinds
from aki.cli import main
from aki.data.check import Checked, check_source, table, total
from aki.data.schema import Sample, assistant, user
from aki.data.shards import ShardSet, open_shards
from aki.data.sources import open_source
from aki.training.recipe import load_recipe
from aki.training.view import stage_view

SFT = "aki-4b/sft"


@pytest.fixture
def faulty(tmp_path) -> Path:
    """The fixtures with four faults: a picture of VQAv2 and RefCOCO is gone, one of GQA is torn."""
    write_sources(tmp_path)
    (tmp_path / "coco/train2014/COCO_train2014_000000000025.jpg").unlink()
    (tmp_path / "gqa/images/2354787.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    return tmp_path


def rows_of(printed: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_check_reads_everything_once_and_ends_with_a_sentence_where_too_much_is_bad(faulty, capsys):
    arguments = ["data", "check", SFT, "--tiny", "--root", str(faulty), "--cache", str(faulty / "cache")]
    with pytest.raises(SystemExit):
        main([*arguments, "--workers", "0"])
    said = capsys.readouterr()
    rows = rows_of(said.out)
    sizes = dict.fromkeys(["vqav2", "gqa", "vsr", "aokvqa", "refcoco", "refcoco+", "refcocog", "visual_genome"], 4)
    sizes |= {"ocrvqa": 6, "scienceqa": 3, "llava_instruct": 8}
    assert {name: int(row[0]) for name, row in rows.items() if name in sizes} == sizes
    assert rows["all"][:2] == [str(sum(sizes.values())), "5"]
    assert rows["vqav2"][1:3] == ["1", "missing image 1"]
    assert rows["gqa"][1:3] == ["1", "broken image 1"]
    assert rows["vsr"][1:3] == ["0", "-"]
    assert "refcoco+, missing image: 1: there is no COCO_train2014_000000000025.jpg" in said.out
    assert "5 of 49 samples of all sources could not be used, more than the share of 1.00%" in said.err
    assert "vqav2/25000: there is no COCO_train2014_000000000025.jpg" in said.err


def test_check_of_digits_and_of_a_part(capsys):
    main(["data", "check", "digits", "--stage", "sft", "--limit", "70", "--workers", "0"])
    row = rows_of(capsys.readouterr().out)["digits"]
    assert row[:4] == ["70", "0", "-", "0"]
    shortest, median, most, longest = map(int, row[4:8])
    view = stage_view(load_recipe("digits"), "sft")
    (_, scenes), *_ = view.sources
    lengths = [
        view.collator([scenes[i]])["input_ids"].shape[1] for i in np.linspace(0, len(scenes), 70, False).astype(int)
    ]
    assert [shortest, longest] == [min(lengths), max(lengths)]
    assert shortest < median <= most <= longest


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_read_once_whoever_reads(faulty, workers):
    entry = next(entry for entry in write_sources(faulty) if entry["kind"] == "llava_instruct")
    source = open_source(**entry, cache=faulty / "cache")
    checked = check_source("llava", source, collator(2000), workers)
    assert checked.report.drawn == len(source) == sum(checked.lengths.values()) == checked.images == 8
    assert checked.lengths == Counter(collator(2000).encode(sample)[0]["input_ids"].shape[1] for sample in source)
    assert check_source("llava", source, collator(2000), workers, limit=3).report.drawn == 3


@pytest.mark.parametrize(("workers", "limit"), [(0, 0), (2, 0), (0, 7), (2, 7)])
def test_shards_are_read_once(tmp_path, workers, limit):
    shards = open_shards("kale", captions(tmp_path, shards=3, size=5))
    assert isinstance(shards, ShardSet)
    tells = replace(collator(), template="caption")
    checked = check_source("kale", shards, tells, workers, limit)
    assert checked.report.drawn == (limit or 15)
    assert checked.images == (limit or 15)


def test_a_shortened_sample_is_counted(tmp_path):
    whole = collator().encode(Sample([user(None, "a"), assistant("b b b")], "s", "1"))[0]
    tight = replace(collator(), max_length=whole["input_ids"].shape[1] - 1)
    samples = [Sample([user(None, "a"), assistant(text)], "s", text) for text in ("b b b", "b")]
    checked = check_source("s", samples, tight)
    assert checked.row[:5] == ["s", "2", "0", "-", "1"]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=80))
def test_shares_of_lengths(lengths):
    checked = Checked("x", lengths=Counter(lengths))
    for share in (0, 0.5, 0.95, 1):
        assert checked.length(share) == np.quantile(lengths, share, method="inverted_cdf")


def test_the_table_is_whole_without_samples():
    printed = table([Checked("a"), Checked("b")])
    assert rows_of(printed)["all"] == ["0", "0", "-", "0", "0", "0", "0", "0", "-"]
    assert total([]).report.drawn == 0


def test_show_draws_what_training_sees(faulty, capsys):
    sheet = faulty / "sheet.png"
    arguments = ["--tiny", "--root", str(faulty), "--cache", str(faulty / "cache"), "--n", "4", "--picture", str(sheet)]
    main(["data", "show", SFT, *arguments])
    assert "4 samples of sft" in capsys.readouterr().out
    colours = {colour for _, colour in Image.open(sheet).convert("RGB").getcolors(1 << 24)}
    for name in ("prompt", "media", "label"):
        assert tuple(bytes.fromhex(COLOURS[name][1:])) in colours, f"no {name} is drawn"


def test_what_cannot_be_looked_at_is_a_sentence(faulty, capsys):
    for arguments, sentence in (
        (["show", SFT, "--root", str(faulty)], "holds no processor"),
        (["check", SFT, "--root", str(faulty / "nowhere"), "--tiny"], "nowhere"),
        (["show", "digits", "--picture", str(faulty)], "names no picture file"),
        (["show", "digits", "--n", "0"], "nothing to draw"),
        (["check", "digits", "--limit", "-1"], "--limit is a number of samples"),
        (["show", "digits", "--stage", "sft", "--sft.batch", "3"], "--sft.batch"),
    ):
        with pytest.raises(SystemExit):
            main(["data", *arguments])
        assert sentence in capsys.readouterr().err


def test_the_kind_of_every_token_and_its_text():
    tells = collator()
    picture = Image.new("RGB", (24, 24), (200, 100, 0))
    row, _ = tells.encode(Sample([user(picture, "a"), assistant("1"), user(None, "a"), assistant("2")], "s", "1"))
    kinds = token_kinds(row, tells.processor)
    labels = row["labels"][0] != -100
    assert [kind == "label" for kind in kinds] == labels.tolist()
    assert kinds.count("media") == tells.processor.image_seq_length == 9
    runs = parts(row, tells.processor)
    assert [kind for _, kind in runs] == ["prompt", "media", "prompt", "label", "prompt", "label"]
    assert [text.strip() for text, _ in runs] == [
        "<|user|>", "<image> x 9", "a<|assistant|>", "1<|endoftext|>", "<|user|> a<|assistant|>", "2<|endoftext|>"
    ]  # fmt: skip
    seen = as_seen(row["pixel_values"], tells.processor)
    assert seen.shape == (24, 24, 3)
    assert np.abs(seen.astype(int) - (200, 100, 0)).max() <= 1


def test_two_pictures_are_shown_side_by_side_and_none_is_said(tmp_path):
    tells = collator()
    assert as_seen(torch.zeros(2, 3, 24, 24), tells.processor).shape == (24, 48, 3)
    row, _ = tells.encode(Sample([user(None, "a"), assistant("1")], "s", "1"))
    draw_sheet([Shown("s/1", row)], tells.processor, "causal", tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").width > 100


@given(
    st.lists(st.tuples(st.text("ab <|>\n", max_size=60), st.sampled_from(["prompt", "label"])), min_size=1, max_size=5)
)
def test_texts_are_laid_out_whole_within_their_lines(runs):
    pieces = lay_out(runs, columns=12, lines=1000)
    # Words longer than a line are cut to it, and only they.
    for piece in pieces:
        assert piece.column + len(piece.text) <= 12
    places = [(piece.line, piece.column) for piece in pieces]
    assert places == sorted(set(places))
    said = "".join("".join(text.split()) for text, _ in runs)
    shown = "".join(piece.text for piece in pieces)
    assert len(shown) <= len(said)
    if all(len(word) <= 12 for text, _ in runs for word in text.split()):
        assert shown == said


def test_of_long_texts_the_middle_is_left_out():
    pieces = lay_out([("\n".join(f"line{i}" for i in range(50)), "prompt"), ("\nanswer", "label")], lines=10)
    assert [piece.text for piece in pieces] == [
        "line0", "line1", "line2", "line3", "line4", "…", "line47", "line48", "line49", "answer"
    ]  # fmt: skip
    assert [piece.line for piece in pieces] == list(range(10))
    assert pieces[-1].part == "label"


def test_the_mask_is_the_rules_own_also_where_it_goes_by_rings(tmp_path):
    tells = collator()
    row, _ = tells.encode(Sample([user(Image.new("RGB", (24, 24)), "a"), assistant("1")], "s", "1"))
    closed = tuple(bytes.fromhex("e8b4b4"))
    drawn = {}
    for rule in ("mma", "concentric"):
        draw_sheet([Shown("s/1", row)], tells.processor, rule, tmp_path / f"{rule}.png")
        picture = Image.open(tmp_path / f"{rule}.png").convert("RGB")
        mask = picture.crop((0, 0, picture.width, int(picture.height * 0.7)))  # without the legend
        drawn[rule] = {colour for _, colour in mask.getcolors(1 << 24)}
    assert closed in drawn["concentric"], "an inner ring is closed to the outer one"
    assert closed not in drawn["mma"]
