"""Features of many pictures: killed and resumed, written by several processes, and every damaged picture named."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copied
from PIL import Image

from hyperlatent.cli import main
from hyperlatent.data.features import encode_pictures, prepare_features, question_encoder
from hyperlatent.data.named_tasks import load_named_tasks, save_named_tasks, without_pictures
from hyperlatent.encoders import load_encoder
from hyperlatent.errors import ArtifactError, EncoderError, HyperLatentError, TaskError
from hyperlatent.feature_store import FeatureStore
from hyperlatent.questions import Task
from hyperlatent.tasks import TaskSet

NAMES = [f"COCO_{'train2014' if i % 2 else 'val2014'}_{i:012d}" for i in range(40)]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("scenes", device="cpu")


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """Pictures in COCO's folders."""
    folder, lots = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    for name in NAMES:
        path = folder / name.split("_")[1] / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(lots.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def copy(coco, tmp_path) -> Path:
    """The same pictures side by side, to be damaged."""
    return copied(coco.rglob("*.jpg"), tmp_path)


def tasks_of(names=NAMES, number: int = 4) -> list[Task]:
    """Tasks that share out some pictures among them."""
    splits = ["meta-train", "meta-train", "meta-validation", "meta-test"]
    tasks = []
    for i in range(number):
        mine = names[i::number]
        samples = [(name, j % 2) for j, name in enumerate(mine)]
        cut = len(samples) * 2 // 3
        tasks.append(Task(f"question {i}?", ("red", "blue"), ("a red star", "a blue star"), tuple(samples[:cut]), tuple(samples[cut:]),
                          split=splits[i % 4]))
    return tasks


def direct(encoder, folder: Path, names) -> torch.Tensor:
    """The truth: the encoder's own features of the files."""
    return encoder.encode_images([next(folder.rglob(f"{name}.jpg")) for name in names])


# ---- what is stored


def test_features_are_the_encoders_in_half_precision(encoder, coco, tmp_path):
    taskset = prepare_features(tasks_of(), [coco], tmp_path, encoder, workers=2, batch_size=7)
    names = list(dict.fromkeys(n for t in tasks_of() for n, _ in (*t.support, *t.query)))
    assert taskset.image_features.dtype == torch.float16 and taskset.image_features.shape == (40, encoder.dim)
    torch.testing.assert_close(taskset.image_features, direct(encoder, coco, names).half(), rtol=0, atol=1e-3)
    loaded = TaskSet.load(tmp_path / "tasks")
    assert loaded.fingerprint == taskset.fingerprint and loaded.source["question_encoder"]["name"] == "clip"
    torch.testing.assert_close(loaded.batch([0]).question_features, encoder.encode_texts(["question 0?"]))
    torch.testing.assert_close(loaded.batch([0]).answer_features[0], encoder.encode_texts(["a red star", "a blue star"]))
    assert not list((tmp_path / "pictures").glob(".*.tmp"))


def test_another_encoder_is_refused(encoder, coco, tmp_path):
    prepare_features(tasks_of(), [coco], tmp_path, encoder, workers=0)
    with pytest.raises(EncoderError, match="resize_mode"):
        prepare_features(tasks_of(), [coco], tmp_path, load_encoder("scenes", device="cpu", resize_mode="crop"), workers=0)


def test_more_tasks_need_only_their_new_pictures(encoder, coco, tmp_path, monkeypatch):
    prepare_features(tasks_of(NAMES[:24]), [coco], tmp_path, encoder, workers=0)
    seen = []
    resize = encoder.preprocessing.resize
    monkeypatch.setattr(encoder.preprocessing, "resize", lambda path: (seen.append(Path(path).stem), resize(path))[1])
    prepare_features(tasks_of(), [coco], tmp_path, encoder, workers=0)
    assert sorted(seen) == sorted(NAMES[24:])


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b"\xff" * 8 + b[8:],
                                    lambda b: b.replace(b'"features"', b'"featurez"')])
def test_damaged_shard(encoder, coco, tmp_path, damage):
    prepare_features(tasks_of(), [coco], tmp_path, encoder, workers=0, batch_size=16)
    shard = sorted((tmp_path / "pictures").glob("*.safetensors"))[1]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ArtifactError, match=shard.name):
        prepare_features(tasks_of(), [coco], tmp_path, encoder, workers=0, batch_size=16)
    shard.unlink()
    again = prepare_features(tasks_of(), [coco], tmp_path, encoder, workers=0, batch_size=16)
    assert len(again.image_features) == 40


def test_question_encoders(encoder, tmp_path):
    tasks = tasks_of()
    words, _ = question_encoder("words", encoder, tasks)
    assert words(["question 0?"]).shape == (1, words.dim)
    with pytest.raises(EncoderError, match="nowhere"):
        question_encoder(str(tmp_path / "nowhere"), encoder, tasks, "cpu")


# ---- damaged pictures


def animated(path: Path):
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


def saved_as(mode: str, kind: str):
    return lambda path: Image.open(path).convert("RGB").convert(mode).save(path, kind)


READABLE = {
    "CMYK": saved_as("CMYK", "JPEG"), "greyscale": saved_as("L", "JPEG"), "black and white": saved_as("1", "PNG"),
    "palette": saved_as("P", "PNG"), "transparent": saved_as("RGBA", "PNG"), "grey with alpha": saved_as("LA", "PNG"),
    "animated": animated, "another format": saved_as("RGB", "WEBP"),
    "sixteen bits": lambda path: Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(path, "PNG"),
    "one pixel": lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"),
    "a strip": lambda path: Image.new("RGB", (2000, 1)).save(path, "PNG"),
}
DAMAGED = {
    "zero bytes": (lambda path: path.write_bytes(b""), "cannot identify"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:900]), "truncated"),
    "text": (lambda path: path.write_text("not a picture"), "cannot identify"),
    "a web page": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    "absent": (lambda path: path.unlink(), "missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "missing"),
    "a dead link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "missing"),
}


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_unusual_pictures_are_encoded(copy, kind, mode, tmp_path):
    READABLE[kind](copy / f"{NAMES[3]}.jpg")
    encoder = load_encoder("scenes", device="cpu", resize_mode=mode)
    store = FeatureStore(tmp_path / "store", encoder.contract)
    assert encode_pictures(NAMES[:6], [copy], encoder, store, workers=0) == {}
    torch.testing.assert_close(store.read(NAMES[:6]), direct(encoder, copy, NAMES[:6]).half(), rtol=0, atol=1e-3)
    assert store.read(NAMES[:6]).isfinite().all()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_listed_by_name(encoder, copy, workers):
    lines, picked = [], dict(zip(NAMES[1::3], DAMAGED))
    for name, kind in picked.items():
        DAMAGED[kind][0](copy / f"{name}.jpg")
    with pytest.raises(HyperLatentError, match=f"{len(DAMAGED)} pictures are damaged or missing") as raised:
        prepare_features(tasks_of(), [copy], copy / "out", encoder, workers=workers, say=lines.append, batch_size=8)
    assert "--on-missing" in str(raised.value) and not (copy / "out" / "tasks").exists()
    assert sorted(line.split(":")[0] for line in lines) == sorted(picked)
    for name, kind in picked.items():
        assert any(line.startswith(name) and DAMAGED[kind][1] in line for line in lines), (kind, lines)
    assert len(FeatureStore(copy / "out" / "pictures", encoder.contract).where()) == 40 - len(DAMAGED)


def test_damaged_pictures_can_be_mended_or_left_out(encoder, copy, coco):
    for name in NAMES[:3]:
        (copy / f"{name}.jpg").unlink()
    left = prepare_features(tasks_of(), [copy], copy / "out", encoder, workers=0, on_missing="leave-out", say=lambda _: None)
    used = {name for task in without_pictures(tasks_of(), NAMES[:3])[0] for name, _ in (*task.support, *task.query)}
    assert len(left.image_features) == 37 and len(used) == 37 and left.source["left_out"]["pictures"] == 3
    whole = prepare_features(tasks_of(), [copy, coco], copy / "out", encoder, workers=0)  # the second folder has them
    assert len(whole.image_features) == 40


def test_tasks_that_become_too_small_are_dropped_by_name(encoder, copy):
    tasks, lines = tasks_of(), []
    for name, _ in tasks[3].query:
        (copy / f"{name}.jpg").unlink()
    left = prepare_features(tasks, [copy], copy / "out", encoder, workers=0, on_missing="leave-out", say=lines.append)
    assert left.questions == ["question 0?", "question 1?", "question 2?"] and left.source["left_out"]["tasks"] == ["question 3?"]
    assert lines[-1].endswith("question 3?")


def test_leaving_out_keeps_answers_and_labels_together():
    task = Task("why?", ("a", "b", "c"), ("is a", "is b", "is c"), (("1", 0), ("2", 1), ("3", 2)), (("4", 0), ("5", 1), ("6", 2)))
    (left,), dropped = without_pictures([task], ["2"])
    assert (left.answers, left.prompts, left.support, left.query) == (
        ("a", "c"), ("is a", "is c"), (("1", 0), ("3", 1)), (("4", 0), ("6", 1))) and dropped == []
    assert without_pictures([task], ["7"]) == ([task], []) and without_pictures([task], ["1", "2"]) == ([], ["why?"])
    assert without_pictures([task], ["4", "5", "6"]) == ([], ["why?"])


# ---- killed, and at the same time


def kill_midway(encoder, coco: Path, out: Path, workers: int, shards: int) -> None:
    """Encode slowly in another process, and kill that with SIGKILL once some shards are written."""
    written = lambda: len(list(out.glob("*.safetensors")))
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            quick, pause = encoder.encode_images, lambda: 0.05 if written() < shards + 3 else 600  # or its end would come first
            encoder.encode_images = lambda *arguments: (time.sleep(pause()), quick(*arguments))[1]
            encode_pictures(NAMES, [coco], encoder, FeatureStore(out, encoder.contract), batch_size=3, workers=workers)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while written() < shards and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_point_and_run_again(encoder, coco, tmp_path, workers, monkeypatch):
    for shards in (1, 3, 6):
        kill_midway(encoder, coco, tmp_path, workers, shards)
    done = FeatureStore(tmp_path, encoder.contract).where()
    assert 18 <= len(done) < 40
    seen, resize = [], encoder.preprocessing.resize
    monkeypatch.setattr(encoder.preprocessing, "resize", lambda path: (seen.append(Path(path).stem), resize(path))[1])
    store = FeatureStore(tmp_path, encoder.contract)
    assert encode_pictures(NAMES, [coco], encoder, store, batch_size=5, workers=0) == {}
    assert sorted(seen) == sorted(set(NAMES) - set(done))  # none that was done, none lost
    where = [(path, row) for path, row in store.where().values()]
    assert len(where) == len(set(where)) == 40
    torch.testing.assert_close(store.read(NAMES), direct(encoder, coco, NAMES).half(), rtol=0, atol=1e-3)


def _write_many(folder: str, contract, seed: int) -> None:
    lots, store = random.Random(seed), FeatureStore(folder, contract)
    for _ in range(25):
        names = sorted(lots.sample(range(200), lots.randint(1, 9)))
        store.add([f"{n}" for n in names], torch.tensor(names).float()[:, None].expand(-1, 4))
        store.where()


def test_concurrent_writers(encoder, tmp_path):
    """Overlapping batches, some of them the same, by four processes at once while a fifth reads."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_many, args=(str(tmp_path), encoder.contract, seed)) for seed in (0, 1, 2, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        FeatureStore(tmp_path, encoder.contract).where()
    assert [writer.exitcode for writer in writers] == [0] * 4
    store = FeatureStore(tmp_path, encoder.contract)
    names = list(store.where())
    expected = set()
    for seed in (0, 1, 2):
        lots = random.Random(seed)
        for _ in range(25):
            expected |= {f"{n}" for n in lots.sample(range(200), lots.randint(1, 9))}
    assert set(names) == expected
    assert torch.equal(store.read(names)[:, 0], torch.tensor([float(name) for name in names]).half())


def test_a_second_run_on_the_folder_is_refused(encoder, coco, tmp_path):
    from hyperlatent.data.prepare import locked

    with locked(tmp_path / "pictures" / ".process0"), pytest.raises(ArtifactError, match="another run"):
        prepare_features(tasks_of(), [coco], tmp_path, encoder, workers=0)


def test_several_processes_share_the_work(coco, tmp_path):
    save_named_tasks(tmp_path / "named", tasks_of())
    (tmp_path / "hyperlatent").write_text("import sys\nfrom hyperlatent.cli import main\nsys.exit(main())\n")  # the console script
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "hyperlatent"),
               "prepare", "features", "--tasks", str(tmp_path / "named"), "--images", str(coco), "--out", str(tmp_path / "out"),
               "--encoder", "scenes", "--workers", "0", "--batch-size", "6", "--device", "cpu"]
    here = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | here)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("TaskSet(4 tasks") == 1
    shards = FeatureStore(tmp_path / "out" / "pictures", load_encoder("scenes", device="cpu").contract).where()
    by_process = [{shards[name][0] for name in NAMES_OF_TASKS[rank::2]} for rank in (0, 1)]
    assert len(shards) == 40 and not by_process[0] & by_process[1]
    assert len(TaskSet.load(tmp_path / "out" / "tasks").image_features) == 40


NAMES_OF_TASKS = list(dict.fromkeys(n for t in tasks_of() for n, _ in (*t.support, *t.query)))


# ---- the command, and the file of tasks


def features(*options) -> int:
    return main(["prepare", "features", *map(str, options), "--encoder", "scenes", "--device", "cpu", "--workers", "0"])


def test_command(coco, copy, tmp_path, capsys):
    save_named_tasks(tmp_path / "named", tasks_of())
    assert features("--tasks", tmp_path / "named", "--images", coco, "--out", tmp_path / "out", "--questions", "words") == 0
    assert "hyperlatent train --tasks" in capsys.readouterr().out
    (copy / f"{NAMES[5]}.jpg").write_bytes(b"")
    assert features("--tasks", tmp_path / "named", "--images", copy, "--out", tmp_path / "other") == 1
    printed = capsys.readouterr()
    assert NAMES[5] in printed.out and printed.err.count("\n") == 1 and "1 pictures are damaged" in printed.err


@pytest.mark.parametrize("text, message", [
    ("", "not valid JSON"), ("{}", "no list"), ('[{"question": "why?"}]', "answers"), ("[1]", "task 0"), ("[]", "no task"),
    (b'["\xff"]', "not valid JSON")])
def test_damaged_file_of_tasks(tmp_path, capsys, text, message):
    (tmp_path / "tasks.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert features("--tasks", tmp_path, "--images", tmp_path, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_pictures_are_named_by_text(tmp_path):
    save_named_tasks(tmp_path, tasks_of())
    rows = json.loads((tmp_path / "tasks.json").read_text())
    rows[0]["support"][0][0] = 7
    (tmp_path / "tasks.json").write_text(json.dumps(rows))
    with pytest.raises(TaskError, match="picture 7"):
        load_named_tasks(tmp_path)
