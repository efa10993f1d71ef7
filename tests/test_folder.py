"""Data of one's own: whatever is wrong with a table is told, all of it, with its line, and nothing is written."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperlatent.cli import main
from hyperlatent.data.folder import check_tasks_of, encode_tasks, prepare_folder, read_tasks, with_splits
from hyperlatent.data.table import COLUMNS, Fault, Row, TableError, check_rows, read_rows, to_row
from hyperlatent.errors import ArtifactError, EncoderError, TaskError
from hyperlatent.questions import SPLITS
from hyperlatent.tasks import TaskSet

HEADER = "question,answer,picture"
GOOD = [f"what color is the {shape}?,{('red', 'blue')[i % 2]},{i % 6}.png" for shape in ("ring", "star", "square") for i in range(6)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Six small pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.new("RGB", (64, 64), ("red", "blue")[i % 2]).save(folder / f"{i}.png")
    return folder


def faults_of(content: str | bytes, tmp_path: Path, pictures: Path, name: str = "table.csv", **options) -> list[Fault]:
    """What is wrong with a table; none if it can be used."""
    table = tmp_path / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        read_tasks(table, pictures, **options)
    except TableError as error:
        assert str(error).count("\n") == 0 and str(table) in str(error) and f"line {error.faults[0].line}: " in str(error)
        assert len(error.report.splitlines()) == len(error.faults) and error.faults == sorted(error.faults)
        return error.faults
    return []


def csv_of(lines: list[str], header: str = HEADER) -> str:
    return "\n".join([header, *lines]) + "\n"


# ---- formats


def test_good_table(folder, tmp_path):
    assert faults_of(csv_of(GOOD), tmp_path, folder) == []


@pytest.mark.parametrize("change", [
    lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n"), lambda text: text + "\n\n", lambda text: text.rstrip("\n"),
    lambda text: text.replace("question,answer,picture", ' question , "answer",picture')])  # fmt: skip
def test_harmless_variations(change, folder, tmp_path):
    plain, varied = tmp_path / "plain.csv", tmp_path / "varied.csv"
    plain.write_bytes(csv_of(GOOD).encode())
    varied.write_bytes(change(csv_of(GOOD)).encode())
    assert read_tasks(varied, folder) == read_tasks(plain, folder)


def test_three_formats_give_the_same_tasks(folder, tmp_path):
    import pyarrow.parquet

    records = [dict(zip(HEADER.split(","), line.split(",")), answers=["blue", "red", "green"]) for line in GOOD]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [*HEADER.split(","), "answers"])
    writer.writeheader()
    writer.writerows(record | {"answers": "|".join(record["answers"])} for record in records)
    (tmp_path / "t.csv").write_text(table.getvalue(), newline="")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "t.parquet")
    tasks = [read_tasks(tmp_path / f"t.{kind}", folder) for kind in ("csv", "jsonl", "parquet")]
    assert tasks[0] == tasks[1] == tasks[2] and tasks[0][0].answers == ("blue", "red", "green")


text = st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufffd|", exclude_categories=["Cs", "Cc"]), min_size=1,
               max_size=12).map(str.strip).filter(bool)  # fmt: skip
record = st.fixed_dictionaries(
    {"question": text, "answer": text, "picture": text},
    optional={"kind": text, "split": st.sampled_from(SPLITS), "paraphrases": st.lists(text, unique=True)},
)


@settings(deadline=None, max_examples=60)
@given(st.lists(record, min_size=1, max_size=8))
def test_rows_survive_both_text_formats(tmp_path_factory, records):
    tmp_path = tmp_path_factory.mktemp("rows")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [c for c in COLUMNS if any(c in r for r in records)])
    writer.writeheader()
    writer.writerows({k: "|".join(v) if isinstance(v, list) else v for k, v in r.items()} for r in records)
    (tmp_path / "t.csv").write_bytes(table.getvalue().encode())
    from_json, from_csv = (read_rows(tmp_path / f"t.{kind}") for kind in ("jsonl", "csv"))
    without_lines = lambda rows: [{k: v for k, v in vars(row).items() if k != "line"} for row in rows]
    assert without_lines(from_json[0]) == without_lines(from_csv[0]) and len(from_json[0]) == len(records)
    assert [r["question"] for r in records] == [row.question for row in from_csv[0]]
    assert len(from_json[1]) == len(from_csv[1])


values = st.one_of(text, st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.one_of(text, st.integers()), max_size=3))


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.one_of(st.sampled_from(COLUMNS), text), values, max_size=8))
def test_any_record_is_a_row_or_faults(record):
    made = to_row(7, record)
    if isinstance(made, Row):
        assert made.line == 7 and made.question and made.answer and made.picture and (not made.split or made.split in SPLITS)
    else:
        assert made and all(fault.line == 7 and fault.problem for fault in made)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200), st.sampled_from(["csv", "jsonl", "parquet"]))
def test_any_bytes_are_a_table_or_faults(tmp_path_factory, content, kind):
    path = tmp_path_factory.getbasetemp() / f"bytes.{kind}"
    path.write_bytes(content)
    rows, faults = read_rows(path)
    assert rows or faults
    assert all(fault.line >= 1 for fault in faults)


# ---- faults


@pytest.mark.parametrize("content, expected", [
    (b"", [(1, "empty")]), (b" \n ", [(1, "empty")]), (b"\xff\xfeq\x00", [(1, "UTF-16")]), (b"question,answer,picture\n", [(1, "no row")]),
    ("question;answer;picture\na;b;c", [(1, "commas")]), ("question,anwser,picture\na,b,c", [
        (1, "did you mean 'answer'"), (1, "no column 'answer'")]),
    ("question,answer,picture,answer\na,b,c,d", [(1, "twice")]), ('question,answer,picture\na,"b', [(2, "no valid CSV")])])  # fmt: skip
def test_unreadable_tables(content, expected, folder, tmp_path):
    faults = faults_of(content, tmp_path, folder)
    assert [fault.line for fault in faults] == [line for line, _ in expected]
    assert all(any(words in fault.problem for fault in faults) for _, words in expected), faults


def test_not_utf8_names_every_line(folder, tmp_path):
    lines = csv_of(GOOD).encode().split(b"\n")
    lines[4] = lines[4].replace(b"color", b"colo\xfcr")
    lines[9] = lines[9].replace(b"color", b"colo\xfcr")
    assert {5, 10} <= {fault.line for fault in faults_of(b"\n".join(lines), tmp_path, folder) if "UTF-8" in fault.problem}


@pytest.mark.parametrize("line, problem", [
    ("what color is the ring?,red", "2 cells where the header has 3"), (",red,0.png", "there is no question"),
    ("what color is the ring?,  ,0.png", "there is no answer"), ("what color is the ring?,red,7.png", "'7.png' does not exist"),
    ("what color is the ring?,red,0.png", "repeats line 2"), ("what color is the ring?,blue,0.png", "contradicts line 2")])  # fmt: skip
def test_faulty_lines(line, problem, folder, tmp_path):
    faults = faults_of(csv_of([*GOOD, line]), tmp_path, folder)
    assert [fault.line for fault in faults] == [20] and problem in faults[0].problem


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.integers(0, len(GOOD) - 1), st.sampled_from(["cells", "answer", "split", "prompt", "answers"]), min_size=1))
def test_every_fault_is_reported_in_one_go(tmp_path_factory, damage):
    tmp_path = tmp_path_factory.getbasetemp()
    rows = [[*line.split(","), "", "", ""] for line in GOOD]
    for at, what in damage.items():
        if what == "cells":
            rows[at].append("more")
        elif what == "answer":
            rows[at][1] = ""
        elif what == "split":
            rows[at][3] = "train"
        elif what == "prompt":
            rows[at][4] = "no gap"
        else:
            rows[at][5] = "yes|no"
    (tmp_path / "damaged.csv").write_text(csv_of(map(",".join, rows), f"{HEADER},split,prompt,answers"))
    _, faults = read_rows(tmp_path / "damaged.csv")
    assert {fault.line for fault in faults} == {at + 2 for at in damage}


def rows_of(*lines: tuple, **columns) -> list[Row]:
    return [Row(i, question, answer, f"{i}.png", **columns) for i, (question, answer) in enumerate(lines, 1)]


@pytest.mark.parametrize("rows, line, problem", [
    (rows_of(("q", "a"), ("q", "a"), ("r", "a"), ("r", "a"), ("r", "b"), ("r", "b")), 1, "always answered 'a'"),
    (rows_of(("r", "a"), ("r", "a"), ("r", "b"), ("r", "b"), ("q", "a"), ("q", "b")), 5, "single picture of each answer"),
    (rows_of(("r", "a"), ("r", "a"), ("r", "b"), ("r", "b")), 1, "takes 2 or more"),
    (rows_of(("r", "a"), ("r", "a"), ("r", "b"), ("r", "b"), split="meta-train"), 1, "no question has the split 'meta-test'")])  # fmt: skip
def test_faults_of_whole_questions(rows, line, problem):
    assert [(f.line, problem in f.problem) for f in check_tasks_of(rows)] == [(line, True)]


def test_answer_outside_a_list_given_elsewhere():
    rows = [Row(1, "q", "a", "1", ("a", "b")), Row(2, "q", "c", "2"), Row(3, "q", "b", "3"), Row(4, "q", "b", "4")]
    assert (2, "answer 'c' is not among a, b") in [*check_tasks_of(rows)] and [*check_rows(rows)] == []


def test_a_hundred_faults_are_a_hundred_lines(folder, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(csv_of([*GOOD, *(f"what color is the ring?,red,lost{i}.png" for i in range(100))]))
    out = tmp_path / "out"
    assert main(["prepare", "folder", str(tmp_path / "t.csv"), "--out", str(out), "--pictures", str(folder), "--device", "cpu"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 101 and error[-1].startswith("error: ") and "100 faults" in error[-1] and "nothing was written" in error[-1]
    assert error[0].startswith(f"{tmp_path / 't.csv'}:20: ") and not out.exists() and [*tmp_path.iterdir()] == [tmp_path / "t.csv"]


@pytest.mark.parametrize("name, kind", [("t.xlsx", TaskError), ("t", TaskError), ("lost.csv", ArtifactError)])
def test_what_is_no_table(name, kind, tmp_path):
    if "lost" not in name:
        (tmp_path / name).write_text("x")
    with pytest.raises(kind, match=name):
        read_tasks(tmp_path / name)


# ---- pictures


def test_odd_pictures(tmp_path):
    """Every mode that Pillow reads is a picture; an animation counts by its first frame."""
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        Image.new(mode, (20, 30)).save(tmp_path / f"{mode.replace(';', '')}.png")
    Image.new("CMYK", (20, 30)).save(tmp_path / "cmyk.jpg")
    Image.new("L", (20, 30)).save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("L", (20, 30), 255)])
    names = sorted(path.name for path in tmp_path.iterdir())
    lines = [f"what color is the {shape}?,{('red', 'blue')[i % 2]},{name}" for shape in ("ring", "star") for i, name in enumerate(names)]
    (tmp_path / "t.csv").write_text(csv_of(lines))
    tasks = prepare_folder(tmp_path / "t.csv", tmp_path / "out", device="cpu")
    assert len(tasks.image_features) == len(names) == 9 and tasks.image_features.isfinite().all()
    assert TaskSet.load(tmp_path / "out").source["encoder"] == {"name": "scenes", "pretrained": None}


def test_damaged_pictures(folder, tmp_path):
    whole = (folder / "0.png").read_bytes()
    for name, content in {"zero.png": b"", "cut.png": whole[: len(whole) // 2], "text.jpg": b"no picture"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a folder.png").mkdir()
    names = ["zero.png", "cut.png", "text.jpg", "a folder.png", "../nowhere.png"]
    lines = [f"what color is the moon?,{('red', 'blue')[i % 2]},{name}" for i, name in enumerate(names)]
    faults = faults_of(csv_of([*lines, "what color is the sun?,red,zero.png"]), tmp_path, tmp_path)
    assert [fault.line for fault in faults if "picture" in fault.problem] == [2, 3, 4, 5, 6]
    assert faults[0].problem == "picture 'zero.png' (also in line 7) is an empty file"


# ---- from table to tasks


def test_table_of_known_content(folder, tmp_path):
    lines = [f"is it a {x}?,{a},{i}.png,no|yes,{a} it is,{s},,is this a {x}?|a {x}?" for x, s in (("ring", SPLITS[0]), ("star", SPLITS[2]))
             for i, a in enumerate(["yes", "no"] * 3)]  # fmt: skip
    (tmp_path / "t.csv").write_text(csv_of([line.replace("yes it is", "{} it is").replace("no it is", "{} it is") for line in lines],
                                           f"{HEADER},answers,prompt,split,kind,paraphrases"))  # fmt: skip
    ring, star = read_tasks(tmp_path / "t.csv", folder)
    assert (
        (ring.split, star.split) == (SPLITS[0], SPLITS[2]) and ring.answers == ("no", "yes") and ring.prompts == ("no it is", "yes it is")
    )
    assert ring.paraphrases == ("is this a ring?", "a ring?") and ring.kind == "is"
    assert len(ring.support) == 4 and len(ring.query) == 2  # two thirds of three pictures of each answer
    right = {f"{i}.png": 1 - i % 2 for i in range(6)}
    assert all(right[name] == answer for name, answer in ring.support + ring.query)
    assert len({name for name, _ in ring.support + ring.query}) == 6


@settings(deadline=None)
@given(st.integers(2, 60), st.floats(0, 0.9), st.floats(0, 0.9))
def test_split_leaves_something_to_learn_and_to_test(n, validation, test):
    task = to_task()
    splits = [t.split for t in with_splits([task] * n, validation, test)]
    assert len(splits) == n and splits.count("meta-test") >= 1 and splits.count("meta-train") >= 1


def to_task():
    from hyperlatent.data.folder import task_of

    return task_of(rows_of(("q", "a"), ("q", "a"), ("q", "b"), ("q", "b")))


def test_words_the_encoder_does_not_know(folder, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(csv_of([line.replace("color", "flavour") for line in GOOD]))
    arguments = ["prepare", "folder", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--pictures", str(folder), "--device", "cpu"]
    assert main(arguments) == 1 and "flavour" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tasks_only(folder, tmp_path):
    from hyperlatent.data.named_tasks import load_named_tasks

    (tmp_path / "t.csv").write_text(csv_of(GOOD))
    arguments = ["prepare", "folder", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--pictures", str(folder)]
    assert main([*arguments, "--tasks-only"]) == 0
    assert load_named_tasks(tmp_path / "out") == read_tasks(tmp_path / "t.csv", folder)


def test_an_encoder_of_ones_own(folder, tmp_path):
    class Mine:
        def encode_images(self, paths, progress=False):
            return torch.tensor([[float(path.stem), 1.0] for path in paths])

        def encode_texts(self, texts):
            return torch.tensor([[float(len(text)), 0.0] for text in texts])

    (tmp_path / "t.csv").write_text(csv_of(GOOD))
    tasks = read_tasks(tmp_path / "t.csv", folder)
    taskset = encode_tasks(tasks, folder, Mine(), lambda questions: torch.eye(3)[: len(questions)] if len(questions) == 3 else None)
    number = {name: i for i, name in enumerate(dict.fromkeys(n for t in tasks for n, _ in t.support + t.query))}
    for name, row in number.items():
        assert taskset.image_features[row, 0] == float(Path(name).stem)
    with pytest.raises(EncoderError):
        encode_tasks(tasks, folder, type("E", (), {"unknown_words": lambda self, text: ["word"]})())


def test_from_a_table_to_the_results(folder, tmp_path, capsys):
    """The three commands of a user: prepare, train, evaluate; from another folder, and after the tasks have moved."""
    from test_cli import TINY

    words = "ring star square circle cross triangle".split()
    (tmp_path / "t.csv").write_text(csv_of([f"what color is the {w}?,{('red', 'blue')[i % 2]},{i}.png" for w in words for i in range(6)]))
    assert (
        main(["prepare", "folder", str(tmp_path / "t.csv"), "--out", str(tmp_path / "tasks"), "--pictures", str(folder), "--device", "cpu"])
        == 0
    )
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    run = ["--out", str(tmp_path / "run"), "--config", str(tmp_path / "tiny.json"), "--device", "cpu"]
    assert main(["train", *run, "--tasks", str(tmp_path / "tasks")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tasks"] == str(tmp_path / "tasks")
    (tmp_path / "tasks").rename(tmp_path / "moved")
    assert main(["evaluate", "--out", str(tmp_path / "run")]) == 1
    capsys.readouterr()
    assert main(["evaluate", "--out", str(tmp_path / "run"), "--tasks", str(tmp_path / "moved")]) == 0
    assert "| clip |" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"] == 2
    assert next(row["accuracy"] for row in results["rows"] if row["method"] == "clip") == 1.0  # red and blue pictures
