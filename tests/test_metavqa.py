"""Meta-VQA: the rules give the published split, one rule at a time and all together, and damaged files are named."""

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from conftest import copied
from vqa_official import ANNOTATIONS, QUESTIONS, SUBSETS, Writer, official, synthetic_split

from hyperlatent.cli import main
from hyperlatent.data.metavqa import group_by_question, make_split, read_split, select_questions, split_task, tasks_of_split
from hyperlatent.data.named_tasks import load_named_tasks
from hyperlatent.data.vqa_files import FILES, Annotation, read_annotations, read_rows

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = Path(os.environ.get("HYPERLATENT_METAVQA") or ROOT.parent / "shared" / "metavqa")
published = pytest.mark.skipif(not (PUBLISHED / "meta_train.json").exists(), reason="the published split is not beside the checkout")
SPLIT = ("meta_train.json", "meta_test.json")


def prepare(*options) -> int:
    return main(["prepare", "metavqa", *map(str, options)])


def write_split(folder: Path, split: tuple[dict, dict]) -> Path:
    folder.mkdir()
    for name, tasks in zip(SPLIT, split):
        (folder / name).write_text(json.dumps(tasks))
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """Official files, and under `expected` the split that they were constructed from."""
    folder, split = tmp_path_factory.mktemp("vqa"), synthetic_split()
    official(split[0] | split[1]).write(folder)
    write_split(folder / "expected", split)
    return folder


@pytest.fixture
def copy(sample, tmp_path) -> Path:
    """The sample's files, to be damaged."""
    return copied(sample.glob("*.json"), tmp_path)


# ---- the split


@published
@pytest.mark.timeout(120)
def test_the_published_split_comes_out_byte_for_byte(tmp_path):
    train, test = read_split(PUBLISHED)
    writer = official(train | test)
    for subset in SUBSETS:  # two raters are enough here
        for row in writer.annotations[subset]:
            row["answers"] = row["answers"][:2]
    writer.write(tmp_path / "vqa")
    assert prepare("--vqa-root", tmp_path / "vqa", "--out", tmp_path / "out", "--prompts", PUBLISHED / "prompt_meta.json") == 0
    for name in SPLIT:
        assert (tmp_path / "out" / name).read_bytes() == (PUBLISHED / name).read_bytes()
    tasks = load_named_tasks(tmp_path / "out")
    assert [t.question for t in tasks] == [*train, *test]
    assert [sum(t.split == s for t in tasks) for s in ("meta-train", "meta-validation", "meta-test")] == [783, 87, 373]
    assert sum(len(t.support) + len(t.query) for t in tasks if t.split != "meta-test") == 74_512
    assert sum(len(t.support) + len(t.query) for t in tasks if t.split == "meta-test") == 29_600
    assert "the bowl is white" in tasks[0].prompts and not any("{}" in prompt for t in tasks for prompt in t.prompts)


@pytest.mark.parametrize("zipped", [False, True])
def test_the_rules_give_the_split_back(sample, zipped, tmp_path):
    root = sample
    if zipped:
        root = tmp_path / "zips"
        root.mkdir()
        for kind, (file, archive) in FILES.items():
            for subset, part in zip(SUBSETS, ("Train", "Val")):
                with zipfile.ZipFile(root / archive.format(part), "w", zipfile.ZIP_DEFLATED) as outer:
                    outer.write(sample / file.format(subset), file.format(subset))
    assert prepare("--vqa-root", root, "--out", tmp_path / "out", "--split-only") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(SPLIT)
    for name in SPLIT:
        assert (tmp_path / "out" / name).read_bytes() == (sample / "expected" / name).read_bytes()


def test_a_finished_split_can_be_used_instead_of_the_files(sample, tmp_path):
    assert prepare("--split-root", sample / "expected", "--out", tmp_path / "a", "--validation-share", 0) == 0
    assert prepare("--vqa-root", sample, "--out", tmp_path / "b", "--validation-share", 0) == 0
    assert (tmp_path / "a" / "tasks.json").read_bytes() == (tmp_path / "b" / "tasks.json").read_bytes()
    assert {task.split for task in load_named_tasks(tmp_path / "a")} == {"meta-train", "meta-test"}


# ---- the rules, one by one


def asked(question: str, **counts: int) -> list[Annotation]:
    """Annotations of one question: so many pictures for each answer."""
    names = (f"COCO_train2014_{i:012d}" for i in range(1000))
    return [Annotation(question, next(names), answer, "other") for answer, n in counts.items() for _ in range(n)]


def kept(annotations) -> dict:
    """Question -> answer -> number of pictures."""
    chosen = select_questions(group_by_question(annotations))
    return {question: {answer: len(pictures) for answer, pictures in answers.items()} for question, answers in chosen.items()}


@pytest.mark.parametrize("counts, stays", [
    ({"a": 19, "b": 2}, {"a": 19, "b": 2}), ({"a": 18, "b": 2}, None),  # more than 20
    ({"a": 20, "b": 1}, None), ({"a": 19, "b": 2, "c": 1}, {"a": 19, "b": 2}), ({"a": 19, "b": 1, "c": 1, "d": 1}, None),
    ({"a": 40}, None), ({"a": 40, "b": 1}, None),  # at least two answers
])
def test_size(counts, stays):
    assert kept(asked("why?", **counts)).get("why?") == stays


@pytest.mark.parametrize("question, stays", [
    ("red or blue?", False), ("or", False), ("color of the door?", True), ("this or?", True), ("Or this?", True), ("red/or blue?", True)])
def test_the_word_or(question, stays):
    assert (question in kept(asked(question, a=20, b=20))) == stays


@pytest.mark.parametrize("answer_type, stays", [("other", True), ("number", True), ("yes/no", False)])
def test_answer_type(answer_type, stays):
    rows = [row._replace(answer_type=answer_type) for row in asked("why?", a=20, b=20)]
    assert ("why?" in kept(rows)) == stays


def test_the_question_is_taken_as_it_is():
    rows = asked("Why?", a=20, b=20) + asked("why?", a=20, b=20) + asked("why? ", a=10, b=10)
    assert list(kept(rows)) == ["Why?", "why?"]


def test_a_picture_counts_once_the_first_time():
    rows = asked("why?", a=20, b=20)
    again = [rows[0]._replace(answer="b"), rows[1], rows[2]._replace(answer="c"), rows[3]._replace(answer="c")]
    assert kept(rows + again) == kept(rows)
    first = [rows[0]._replace(answer="once"), rows[1]._replace(answer="yes", answer_type="yes/no")]
    assert kept(first + rows) == {"why?": {"a": 19, "b": 20}}  # also if the first answer is then dropped; other types do not count
    assert kept(rows + [rows[0]._replace(question="who?")]) == kept(rows)


@pytest.mark.parametrize("n", range(2, 60))
def test_support_is_70_percent_of_each_answer(n):
    task = split_task({"a": [f"{i}" for i in range(n)], "b": ["x", "y"]})
    support = [pair for pair in task["train"] if pair[1] == "a"]
    assert len(support) == round(0.7 * n) and sorted(task["train"] + task["test"]) == sorted(
        [[f"{i}", "a"] for i in range(n)] + [["x", "b"], ["y", "b"]])
    assert [pair[1] for pair in task["train"]] == ["a"] * len(support) + ["b"]


def test_the_order_of_appearance_decides_the_split():
    questions = [f"why {i}?" for i in range(20)]
    train, test = make_split([row for q in questions for row in asked(q, a=11, b=11)])
    assert (len(train), len(test)) == (14, 6) and sorted([*train, *test]) == sorted(questions)
    other, _ = make_split([row for q in reversed(questions) for row in asked(q, a=11, b=11)])
    assert set(other) != set(train)


@pytest.mark.parametrize("share, validation", [(0.0, 0), (0.1, 1), (0.5, 7)])
def test_validation_is_the_end_of_meta_train(share, validation):
    split = make_split([row for i in range(20) for row in asked(f"why {i}?", a=11, b=11)])
    tasks = tasks_of_split(split, validation_share=share)
    assert [t.split for t in tasks] == (["meta-train"] * (14 - validation) + ["meta-validation"] * validation + ["meta-test"] * 6)
    assert [t.question for t in tasks] == [*split[0], *split[1]]


# ---- damaged files


def cut_short(file: Path):
    file.write_bytes(file.read_bytes()[:-1000])


def emptied(file: Path):
    file.write_bytes(b"")


def not_utf8(file: Path):
    file.write_bytes(file.read_bytes().replace(b"mscoco", b"msc\xf6co"))


def changed(key: str, change):
    def damage(file: Path):
        content = json.loads(file.read_text())
        rows = content[next(k for k in ("questions", "annotations") if k in content)]
        change(rows, rows[5], key)
        file.write_text(json.dumps(content))
    return damage


def without_list(file: Path):
    file.write_text('{"info": {}}')


DROP, TEXT = lambda rows, row, key: row.pop(key), lambda rows, row, key: row.update({key: str(row[key])})
TWICE, NUMBER = lambda rows, row, key: rows.append(dict(row)), lambda rows, row, key: row.update({key: 7})
LIST = lambda rows, row, key: rows.__setitem__(5, [1])
DAMAGES = [
    (ANNOTATIONS, cut_short, "cut short"), (QUESTIONS, cut_short, "cut short"), (ANNOTATIONS, emptied, "cut short"),
    (QUESTIONS, not_utf8, "UTF8"), (ANNOTATIONS, without_list, "no list of annotations"), (QUESTIONS, Path.unlink, "is in"),
    *((ANNOTATIONS, changed(key, DROP), f"{key} = None in row 6")
      for key in ("question_id", "image_id", "multiple_choice_answer", "answer_type")),
    *((QUESTIONS, changed(key, DROP), f"{key} = None in row 6") for key in ("question_id", "image_id", "question")),
    (ANNOTATIONS, changed("image_id", TEXT), "image_id = '"), (QUESTIONS, changed("question", NUMBER), "question = 7"),
    (ANNOTATIONS, changed("", LIST), "[1] in row 6"), (QUESTIONS, changed("", TWICE), "listed twice"),
    (ANNOTATIONS, changed("", TWICE), "two answers"), (ANNOTATIONS, changed("question_id", NUMBER), "no question"),
    (ANNOTATIONS, changed("image_id", NUMBER), "another picture"),
]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name, damage, message", DAMAGES)
def test_damage_is_one_line_and_nothing_is_written(copy, capsys, subset, name, damage, message):
    file = copy / name.format(subset)
    damage(file)
    assert prepare("--vqa-root", copy, "--out", copy / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and file.name in error
    assert not (copy / "out").exists()


@pytest.mark.parametrize("spoil, message", [
    (lambda b: b[:200], "damaged zip"), (lambda b: b.replace(b"annotations.json", b"annotationz.json"), "no item named"),
    (lambda b: b[:400] + bytes(8) + b[408:], "damaged"), (lambda b: b"", "damaged zip")])
def test_damaged_zip(copy, capsys, spoil, message):
    file = copy / ANNOTATIONS.format("val2014")
    archive = copy / "v2_Annotations_Val_mscoco.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as outer:
        outer.write(file, file.name)
    file.unlink()
    archive.write_bytes(spoil(archive.read_bytes()))
    assert prepare("--vqa-root", copy, "--out", copy / "out") == 1
    error = capsys.readouterr().err
    assert archive.name in error and error.count("\n") == 1 and (message in error or "cut short" in error)


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"), ("[]", "no JSON object"), ('{"why?": "because"}', "one {}"), ('{"why?": "{} or {}"}', "one {}"),
    ('{"why?": 1}', "1")])
def test_damaged_prompts(sample, tmp_path, capsys, text, message):
    (tmp_path / "prompts.json").write_text(text)
    assert prepare("--split-root", sample / "expected", "--prompts", tmp_path / "prompts.json", "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--vqa-root", "x", "--split-root", "y"]])
def test_one_place_for_the_questions(options, tmp_path, capsys):
    assert prepare(*options, "--out", tmp_path / "out") == 1
    assert "either --vqa-root or --split-root" in capsys.readouterr().err


# ---- size


def test_rows_are_streamed(tmp_path):
    writer = Writer()
    for i in range(4000):
        writer.add(f"COCO_train2014_{i:012d}", f"question {i}?", "red")
    writer.write(tmp_path)
    assert (tmp_path / ANNOTATIONS.format("train2014")).stat().st_size > 2.5e6
    fields = {"question_id": int}
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(tmp_path, "annotations", "train2014", fields)) == 4000
        assert tracemalloc.get_traced_memory()[1] < 1.5e6  # a list of all rows takes 12 MB
    finally:
        tracemalloc.stop()


def test_annotations_are_in_the_files_order(sample):
    images = [row.image for row in read_annotations(sample)]
    rows = [(subset, row) for subset in SUBSETS for row in json.loads((sample / ANNOTATIONS.format(subset)).read_text())["annotations"]]
    assert images == [f"COCO_{subset}_{row['image_id']:012d}" for subset, row in rows]
