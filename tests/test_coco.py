"""COCO n-way tasks: which objects and pictures are used, and that only the unconditional generator learns from them."""

import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperlatent import stages
from hyperlatent.cli import main
from hyperlatent.config import from_dict
from hyperlatent.data.coco import LARGE, Instance, coco_tasks, read_instances
from hyperlatent.data.named_tasks import load_named_tasks, save_named_tasks
from hyperlatent.errors import TaskError
from hyperlatent.meta import train_hnet
from hyperlatent.questions import Task, number_images
from hyperlatent.settings import Config
from hyperlatent.tasks import TaskSet

CATEGORIES = ["dog", "cat", "zebra", "bus", "kite", "sink"]


def annotation(image: int, category: int, area: float = 20_000.0, iscrowd: int = 0) -> dict:
    outline = [[0.5 * i for i in range(20)]]
    return {"segmentation": outline, "area": area, "iscrowd": iscrowd, "image_id": image, "bbox": [1.0, 2.0, 3.5, 4.0],
            "category_id": category, "id": image * 10 + category}


@pytest.fixture
def files(tmp_path) -> Path:
    """Annotations of both subsets: 50 pictures of each category, in each."""
    for subset in "train2014", "val2014":
        rows = [annotation(i, i % 6) for i in range(300)]
        content = {"info": {}, "images": [{"id": i} for i in range(300)], "annotations": rows,
                   "categories": [{"supercategory": "thing", "id": i, "name": name} for i, name in enumerate(CATEGORIES)]}
        (tmp_path / f"instances_{subset}.json").write_text(json.dumps(content))
    return tmp_path


def change(folder: Path, subset: str, edit) -> None:
    file = folder / f"instances_{subset}.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def pictures(tasks) -> set[str]:
    return {image for task in tasks for image, _ in (*task.support, *task.query)}


# ---- tasks


def test_tasks_are_as_asked_for(files):
    tasks = coco_tasks(read_instances(files), 30, ways=4, pictures_per_way=10)
    assert len({task.question for task in tasks}) == 30 and {task.split for task in tasks} == {"unconditional"}
    for task in tasks:
        assert Counter(label for _, label in task.support) == {i: 7 for i in range(4)}
        assert Counter(label for _, label in task.query) == {i: 3 for i in range(4)}
        assert len(pictures([task])) == 40
        for image, label in (*task.support, *task.query):
            assert CATEGORIES[int(image[-12:]) % 6] == task.answers[label] and task.answers[label] in task.prompts[label]


def test_a_task_depends_on_seed_and_number_only(files):
    instances = read_instances(files)
    assert coco_tasks(instances, 9)[:4] == coco_tasks(instances, 4)
    assert coco_tasks(instances, 4, seed=1) != coco_tasks(instances, 4)


@pytest.mark.parametrize("change, large", [({}, True), ({"area": LARGE}, False), ({"area": LARGE + 1}, True), ({"iscrowd": 1}, False)])
def test_large_objects_that_are_no_crowds(files, change, large):
    def edit(content):
        content["annotations"].append({**annotation(999, 0), **change})
    globals()["change"](files, "train2014", edit)
    (found,) = [one for one in read_instances(files) if one.image.endswith("999")]
    assert found == Instance("COCO_train2014_000000000999", "dog", large)


def test_a_picture_shows_one_of_the_things_only():
    instances = [Instance(f"{c}{i}", c, True) for c in ("dog", "cat", "bus") for i in range(12)]
    instances += [Instance("dog3", "cat", False), Instance("cat4", "dog", True), Instance("dog5", "dog", False)]
    used = pictures(coco_tasks(instances, 40, ways=3, pictures_per_way=8))
    assert not used & {"dog3", "cat4"} and "dog5" in used


def test_excluded_pictures(files):
    instances = read_instances(files)
    excluded = {one.image for one in instances[::3]}
    assert not pictures(coco_tasks(instances, 20, ways=2, pictures_per_way=9, excluded=excluded)) & excluded


@pytest.mark.parametrize("options", [dict(ways=7), dict(ways=1), dict(pictures_per_way=200), dict(pictures_per_way=1)])
def test_too_few(files, options):
    with pytest.raises(TaskError):
        coco_tasks(read_instances(files), 1, **options)


def test_things_that_are_always_seen_together():
    instances = [Instance(f"{i}", category, True) for i in range(30) for category in ("cup", "saucer")]
    with pytest.raises(TaskError, match="without the others"):
        coco_tasks(instances, 1, ways=2, pictures_per_way=5)


# ---- files and command


def test_command_and_zip(files, tmp_path, capsys):
    held_out = Task("why?", ("a", "b"), ("a", "b"), (("COCO_train2014_000000000000", 0), ("COCO_val2014_000000000001", 1)),
                    (("COCO_val2014_000000000002", 0),), split="meta-test")
    seen = replace(held_out, question="?", split="meta-train", query=(("COCO_val2014_000000000009", 0),))
    save_named_tasks(tmp_path / "held", [held_out, seen])
    options = ["--exclude", str(tmp_path / "held"), "--num-tasks", "50", "--ways", "3", "--pictures-per-way", "30"]
    assert main(["prepare", "coco", "--instances", str(files), "--out", str(tmp_path / "a"), *options]) == 0
    zipped = tmp_path / "zip"
    zipped.mkdir()
    with zipfile.ZipFile(zipped / "annotations_trainval2014.zip", "w") as outer:
        for file in files.glob("*.json"):
            outer.write(file, f"annotations/{file.name}")
    assert main(["prepare", "coco", "--instances", str(zipped), "--out", str(tmp_path / "b"), *options]) == 0
    assert load_named_tasks(tmp_path / "a") == load_named_tasks(tmp_path / "b")
    used = pictures(load_named_tasks(tmp_path / "a"))
    assert not used & pictures([held_out]) and "COCO_val2014_000000000009" in used


@pytest.mark.parametrize("edit, message", [
    (lambda c: c["annotations"][7].pop("area"), "area = None in row 8"),
    (lambda c: c["annotations"][7].update(category_id=99), "category 99"),
    (lambda c: c.pop("categories"), "no list of categories"), (lambda c: c["annotations"][7].update(image_id="7"), "image_id = '7'")])
def test_damaged_files(files, tmp_path, capsys, edit, message):
    change(files, "val2014", edit)
    assert main(["prepare", "coco", "--instances", str(files), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and "instances_val2014.json" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_missing_files(tmp_path, capsys):
    assert main(["prepare", "coco", "--instances", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "http://images.cocodataset.org/annotations/annotations_trainval2014.zip" in capsys.readouterr().err


# ---- who learns from them


def mixed(num_labelled: int = 12, num_extra: int = 6, dim: int = 8) -> TaskSet:
    """Tasks with a description, and some without."""
    splits = ["meta-train"] * (num_labelled - 4) + ["meta-validation"] * 2 + ["meta-test"] * 2 + ["unconditional"] * num_extra
    tasks = [Task(f"task {i}", ("a", "b"), ("a", "b"), tuple((f"{i}-{j}", j % 2) for j in range(6)),
                  tuple((f"{i}-{j}", j % 2) for j in range(6, 10)), split=split) for i, split in enumerate(splits)]
    tasks, names = number_images(tasks)
    lots = torch.Generator().manual_seed(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=lots), dim=-1)
    return TaskSet(tasks, unit(len(names), dim), question_features=[unit(1, dim) for _ in tasks],
                   answer_features=[unit(2, dim) for _ in tasks])


def test_only_the_generator_sees_them(tmp_path, monkeypatch):
    fit = {"steps": 3, "batch_size": 4, "warmup": 1, "validate_every": 3}
    mixed().save(tmp_path / "tasks")
    config = from_dict(Config, {
        "tasks": str(tmp_path / "tasks"), "device": "cpu", "base": {"hidden": 4}, "multitask": {"fit": fit},
        "hnet": {"latent_dim": 4, "hidden": [8], "inner": {"steps": 1}, "fit": fit}, "zoo": {"runs": 2, "inner": {"steps": 1}},
        "hyperclip": {"hidden": [8], "fit": fit, "num_inference_steps": 2},
        "hyperldm": {"hidden": 8, "blocks": 1, "fit": fit, "num_inference_steps": 2, "prediction_type": "v_prediction"}})
    seen = []

    def spy(base, tasks, *arguments, **options):
        seen.append([task.split for task in tasks.tasks])
        assert options["num_unconditional"] == 6
        return train_hnet(base, tasks, *arguments, **options)

    monkeypatch.setattr(stages, "train_hnet", spy)
    with stages.opened(tmp_path / "run", config, say=lambda _: None) as chain:
        stages.train(chain)
    assert seen == [["meta-train"] * 8 + ["unconditional"] * 6]
    zoo = stages.load_zoo(stages.load_artifact(tmp_path / "run" / "zoo", "zoo"))
    assert zoo.latents.shape[1] == 8 and len(zoo.phrases) == 8


@pytest.mark.parametrize("method", ["fomaml", "auto_decoder"])
def test_the_share_decides_which_tasks_are_learned(method):
    from hyperlatent.base import CLIPAdapter
    from hyperlatent.settings import AdaptConfig, FitConfig, GeneratorConfig

    tasks, base = mixed(), CLIPAdapter(8, 4)
    some = tasks.subset([i for i, t in enumerate(tasks.tasks) if t.split in ("meta-train", "unconditional")])
    drawn = []

    class Spy:
        __len__ = lambda self: len(some)
        batches, question_phrases, samples_batch = some.batches, some.question_phrases, some.samples_batch

        def batch(self, indices=None, **options):
            drawn.extend(indices.tolist())
            return some.batch(indices, **options)

    for share, expected in (0.0, set(range(8))), (1.0, set(range(8, 14))):
        drawn.clear()
        config = GeneratorConfig(latent_dim=4, hidden=(8,), method=method, unconditional_share=share, inner=AdaptConfig(steps=1),
                                 fit=FitConfig(steps=12, batch_size=4, warmup=1))
        train_hnet(base, Spy(), tasks.split("unconditional").subset([]), config, num_unconditional=6, progress=False)
        assert set(drawn) == expected
