"""Tables against numbers worked out by hand, and what a reader is warned of."""

import csv
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

from aki.cli import main
from aki.evaluation.table_formats import as_csv, latex, markdown, radar
from aki.evaluation.tables import PAPERS, differences, paper_tables, read_results

COLUMNS = ["MME-P", "MME-C", "MMB", "SEED-I", "LLaVA-W", "MMMU", "MathV-mini", "POPE", "MM-Vet", "RealWorldQA"]
COLUMNS += ["CV-Bench 2D", "CV-Bench 3D"]


def write(folder, name, scores, rule="mma", settings=None, **of_columns):
    """results.json with scores; `of_columns` changes fields of a column, its name with _ for space and dash."""
    columns = {}
    for column in COLUMNS:
        entry = {"score": scores.get(column, 50.0), "best": 100, "split": "test", "note": "", "rows": 4, "of": 4}
        entry |= {
            "task": column.lower(),
            "metric": "acc",
            "prompt": {"first": "?", "fingerprint": "p"},
            "decoding": {"max_new_tokens": 16},
            "data": "d",
        }
        columns[column] = entry | of_columns.get(column.replace("-", "_").replace(" ", "_"), {})
    known = {"rule": rule, "dtype": "bfloat16", "backend": "auto", "seed": 1234, "versions": {"torch": "2.13"}}
    record = {"name": name, "scorer": "lmms-eval", "settings": known | (settings or {}), "columns": columns}
    (folder / name).mkdir()
    (folder / name / "results.json").write_text(json.dumps(record))
    return folder / name


def cells(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return dict(zip(COLUMNS, [cell.strip() for cell in line.strip("|").split("|")][1:], strict=True))


@pytest.fixture
def rows(tmp_path):
    paths = [
        write(tmp_path, "causal", {"MMB": 40.0, "POPE": 80.0, "MM-Vet": None}, "causal", MM_Vet={"note": "no judge"}),
        write(tmp_path, "cca", {"MMB": 44.0, "POPE": 80.0, "MM-Vet": 20.0}, "concentric"),
        write(tmp_path, "mma", {"MMB": 50.0, "POPE": 81.0, "MM-Vet": 25.0}, "mma"),
    ]
    return [read_results(path) for path in paths]


def test_best_second_and_improvements(rows):
    first, second = paper_tables("paper", rows)
    text = markdown(first)
    assert cells(text, "mma")["MMB"] == "**50.0**"
    assert cells(text, "cca")["MMB"] == "<u>44.0</u>"
    assert cells(text, "causal")["MMB"] == "40.0"
    assert cells(text, "causal")["POPE"] == cells(text, "cca")["POPE"] == "<u>80.0</u>"
    assert cells(text, "causal")["MM-Vet"] == "-"
    assert "causal has no MM-Vet: no judge." in text
    assert cells(text, "mma over causal, %")["MMB"] == "+25.0"
    assert cells(text, "mma over cca, %")["MMB"] == "+13.6"  # 6 / 44
    assert cells(text, "mma over causal, %")["MM-Vet"] == "-"
    # The paper's rows are ranked among themselves: 71.8 and 67.4.
    assert cells(text, "MMA†")["MMB"] == "**71.8**"
    assert cells(text, "CCA†")["MMB"] == "<u>67.4</u>"
    assert "† as printed; another scorer (VLMEvalKit" in text
    assert cells(markdown(second), "AKI-4B†")["CV-Bench 3D"] == "71.8"
    assert cells(markdown(second), "mma")["MMB"] == "**50.0**"


def test_improvements_of_the_papers_rows():
    """(MMA - CCA) / CCA and (MMA - causal) / causal of the printed scores, by a pocket calculator."""
    text = markdown(paper_tables("paper", [])[0])
    over_cca = [+12.5, +29.5, +6.5, +2.8, +10.4, +7.8, +3.1, +1.0, +4.1, -0.8, +3.2, +2.1]
    over_causal = [+11.2, +22.2, +10.6, +4.7, +26.8, +19.9, +9.1, +3.6, +24.3, +3.4, +27.9, +18.0]
    wanted = {column: f"{value:+.1f}" for column, value in zip(COLUMNS, over_cca, strict=True)}
    assert cells(text, "MMA† over CCA†, %") == wanted
    wanted = {column: f"{value:+.1f}" for column, value in zip(COLUMNS, over_causal, strict=True)}
    assert cells(text, r"MMA† over (I&T)PT + (I&T)SFT†, %") == wanted


def test_improvements_are_over_the_same_kind_of_model(tmp_path):
    paths = [
        write(tmp_path, "llava", {"MMB": 10.0}, "causal", {"model_type": "llava"}),
        write(tmp_path, "causal", {"MMB": 40.0}, "causal", {"model_type": "aki"}),
        write(tmp_path, "mma", {"MMB": 50.0}, "mma", {"model_type": "aki"}),
        write(tmp_path, "mma again", {"MMB": 44.0}, "mma", {"model_type": "aki"}),
    ]
    table = paper_tables("paper", [read_results(path) for path in paths])[0]
    ours = {label: values["MMB"] for label, values in table.improvements.items() if "†" not in label}
    assert ours == pytest.approx({"mma over causal, %": 25, "mma again over causal, %": 10})


def test_the_papers_rows_are_the_papers():
    """Sums over rows and columns of the printed table, so that no digit is lost or in another's place."""
    first, second = yaml.safe_load(PAPERS.read_text())["paper"]["tables"]
    printed = list(first["rows"].values())
    assert [round(sum(row), 1) for row in printed] == [1970.0, 1985.6, 1668.9, 1624.0, 1947.8, 1885.0, 1990.0, 2228.4]
    assert [round(sum(column), 1) for column in zip(*printed, strict=True)] == [
        9491.0,
        2057.2,
        428.5,
        461.5,
        361.2,
        243.3,
        193.0,
        618.3,
        189.5,
        380.4,
        404.5,
        471.3,
    ]
    assert round(sum(second["rows"]["AKI-4B"]), 1) == 2463.2


def test_latex_and_csv_hold_the_same(rows):
    table = paper_tables("paper", rows)[0]
    tex = latex(table)
    assert r"mma & 50.0 & 50.0 & \textbf{50.0} &" in tex
    assert r"MMA$^\dagger$ over CCA$^\dagger$, \%" in tex
    assert r"(I\&T)PT + (I\&T)SFT$^\dagger$" in tex
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {12}
    read = {row["row"]: row for row in csv.DictReader(as_csv(table).splitlines())}
    assert float(read["MMA†"]["MME-P"]) == 1363.7
    assert read["causal"]["MM-Vet"] == ""
    assert read["causal"]["scorer"] == "lmms-eval"


def test_names_are_escaped(tmp_path):
    name = r"50%_of #1 {a|b} ~x^2 \y & $z*"
    table = paper_tables("paper", [read_results(write(tmp_path, name, {"MMB": None}))])[0]
    (line,) = [line for line in latex(table).splitlines() if line.startswith("50")]
    escaped = r"50\%\_of \#1 \{a\textbar{}b\} \textasciitilde{}x\textasciicircum{}2 \textbackslash{}y \& \$z$^*$"
    assert line.startswith(escaped + " & 50.0 &")
    # Also in the notes, which stand below the table.
    assert rf"{escaped} has no MMB: no score." in latex(table).partition(r"\end{tabular}")[2]
    (line,) = [line for line in markdown(table).splitlines() if line.startswith("| 50")]
    assert line.startswith(r"| 50%\_of #1 {a\|b} ~x^2 \\y & $z\* | 50.0 |")
    assert name in {row["row"] for row in csv.DictReader(as_csv(table).splitlines())}
    radar(table.rows, table.columns, tmp_path / "name.png")


def test_the_picture_has_gaps_where_scores_are_missing(rows, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    radar(rows, COLUMNS, tmp_path / "gaps.png")
    monkeypatch.undo()
    plt.close(drawn[0])
    lines = drawn[0].axes[0].lines
    assert [line.get_label() for line in lines] == ["causal", "cca", "mma"]
    shares = dict(zip(COLUMNS, lines[0].get_ydata()[:12], strict=True))
    assert np.isnan(shares.pop("MM-Vet"))
    assert shares["MMB"] == pytest.approx(0.8)
    assert not np.isnan(list(shares.values())).any()


def test_a_column_is_compared_with_the_first_row_that_has_it(tmp_path):
    asked = {"prompt": {"first": "?", "fingerprint": "another"}}
    paths = [write(tmp_path, name, {}, MM_Vet=asked if name == "three" else {}) for name in ("one", "two", "three")]
    record = json.loads((paths[0] / "results.json").read_text())
    record["columns"]["MM-Vet"] = {"score": None, "note": "no judge", "split": "test"}
    (paths[0] / "results.json").write_text(json.dumps(record))
    rows = [read_results(path) for path in paths]
    text = markdown(paper_tables("paper", rows)[0])
    assert [cells(text, row.name)["MM-Vet"] for row in rows] == ["-", "50.0", "50.0‡"]
    assert differences(rows) == ["MM-Vet: prompt differs between two, three"]


def test_what_differs_is_said_and_marked(tmp_path):
    paths = [
        write(tmp_path, "one", {}),
        write(
            tmp_path,
            "two",
            {},
            settings={"dtype": "float32", "seed": 1, "versions": {"torch": "2.12"}},
            POPE={"prompt": {"first": "!", "fingerprint": "q"}},
            MMMU={"split": "dev"},
            MMB={"data": "e"},
            SEED_I={"rows": 2},
            MME_P={"decoding": {"max_new_tokens": 8}},
            RealWorldQA={"metric": "flexible_match"},
        ),
    ]
    rows = [read_results(path) for path in paths]
    text = markdown(paper_tables("paper", rows)[0])
    marked = {column: text_ for column, text_ in cells(text, "two").items() if text_ != "50.0"}
    assert marked == {
        "POPE": "50.0‡",
        "MMMU": r"50.0\*",
        "MMB": "50.0§",
        "SEED-I": r"50.0\*",
        "MME-P": "50.0‡",
        "RealWorldQA": "50.0¶",
    }
    assert differences(rows) == [
        "dtype differs: one bfloat16, two float32",
        "seed differs: one 1234, two 1",
        "versions.torch differs: one 2.13, two 2.12",
        "MME-P: decoding differs between one, two",
        "MMB: data differs between one, two",
        "MMMU: split differs between one, two",
        "POPE: prompt differs between one, two",
        "RealWorldQA: metric differs between one, two",
    ]
    assert differences(rows[:1]) == []


@pytest.mark.parametrize("name", ["dtype", "rule", "backend", "seed", "judge", "unlocked", "batch_size", "limit"])
def test_every_setting_is_compared(name, tmp_path):
    rows = [read_results(write(tmp_path, f"r{value}", {}, settings={name: value})) for value in (1, 2)]
    assert differences(rows) == [f"{name} differs: r1 1, r2 2"]


def test_the_command_writes_all_and_warns(rows, tmp_path, capsys):
    main(["table", *(str(tmp_path / row.name) for row in rows), "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "warning: rule differs: causal causal, cca concentric, mma mma" in said.err
    assert "| mma |" in said.out
    endings = {path.name for path in (tmp_path / "out").iterdir()}
    assert endings == {f"table{n}.{ending}" for n in (1, 2) for ending in ("md", "tex", "csv", "png")}


def test_wrong_inputs_get_a_sentence(rows, tmp_path):
    with pytest.raises(ValueError, match=r"nothing/results.json holds no results|nothing holds no results"):
        read_results(tmp_path / "nothing")
    whole = json.dumps(rows[0].record)
    broken = ["", "[]", whole[:-9], '{"columns": {}}', whole.replace('"score": 50.0', '"score": "high"', 1)]
    broken += [json.dumps(rows[0].record | change) for change in ({"columns": []}, {"columns": {"POPE": 5}})]
    broken += [json.dumps(rows[0].record | {"settings": None})]
    for text in broken:
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results.json holds no results of `aki eval` \("):
            read_results(tmp_path)
    with pytest.raises(ValueError, match=r"no tables of 'llava'; there are those of paper"):
        paper_tables("llava", rows)
    with pytest.raises(ValueError, match="two results are named causal: give each its own"):
        paper_tables("paper", [rows[0], rows[0]])
    record = rows[0].record | {"columns": {"exists": {"score": 50.0, "rows": 1, "of": 1}}}
    (tmp_path / "results.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="the results of causal have no column of the tables of paper"):
        paper_tables("paper", [read_results(tmp_path)])
