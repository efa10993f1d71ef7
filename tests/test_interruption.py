"""A run that is stopped anywhere, by SIGINT or SIGKILL, goes on to the results of a run that never was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import cache, demo, forked, leftovers, tiny  # noqa: F401  fixtures

import hyperlatent.files
import hyperlatent.training
from hyperlatent.cli import main

pytestmark = pytest.mark.xdist_group("tiny")
SCRIPT = "import sys; from hyperlatent.cli import main; sys.exit(main())"


def stopped_at_first_new_write(arguments: list[str], with_signal: int, record: Path) -> int:
    """Run, and send ourselves the signal at the first moment of a write that `record` does not list yet.

    SIGKILL comes just before the written file is renamed into place, and another time just after; SIGINT just after.
    """
    move, seen = hyperlatent.files._move, record.read_text().splitlines() if record.exists() else []

    def moment(name):
        if name in seen: return
        with open(record, "a") as file: file.write(f"{name}\n")
        os.kill(os.getpid(), with_signal)

    def stop(temporary, path):
        if with_signal == signal.SIGKILL: moment(f"before {path.name}")
        move(temporary, path)
        moment(path.name)

    hyperlatent.files._move = stop
    return main(arguments)


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_stopped_at_every_write(with_signal, demo, tmp_path, tiny, monkeypatch):  # noqa: F811
    assert demo(tmp_path / "never stopped")[0] == 0
    monkeypatch.setenv("HYPERLATENT_CACHE", str(tmp_path / "cache"))
    out, record, stderr = tmp_path / "out", tmp_path / "record", tmp_path / "stderr"
    arguments = ["demo", "--out", str(out), "--config", str(tiny)]
    for _ in range(60):
        status = forked(lambda: stopped_at_first_new_write(arguments, with_signal, record), stderr)
        if status == 0:
            break
        assert status == (130 if with_signal == signal.SIGINT else -9), stderr.read_text()
        if with_signal == signal.SIGINT:
            assert stderr.read_text() == "interrupted: run the same command again to go on from here\n"
    stopped_at = record.read_text().splitlines()
    assert {"config.json", "objects", "tasks", "multitask", "hnet", "zoo", "hyperclip", "hyperldm", "evaluate",
            "results.json", "guidance_scale.png", "trajectories.png"} <= set(stopped_at)  # fmt: skip
    kept = [name for name in stopped_at if name.endswith(".safetensors")]
    checkpoints = [name for name in kept if "zoo-" not in name]
    assert len(kept) > len(checkpoints)  # every run of the zoo is kept for itself
    assert len({name.split()[-1] for name in checkpoints}) == 4  # a checkpoint of each training
    assert with_signal == signal.SIGINT or len(stopped_at) == 2 * len({name.split()[-1] for name in stopped_at})
    assert sum(name.endswith(".previous") for name in stopped_at) == len(checkpoints)
    assert status == 0 and leftovers(out) == []
    for name in "results.json", "config.json":
        assert (out / name).read_bytes() == (tmp_path / "never stopped" / name).read_bytes()


def test_training_goes_on_where_it_was(demo, tmp_path, monkeypatch):  # noqa: F811
    save, step, steps = hyperlatent.training._Run.save, hyperlatent.training._one_step, []

    def interrupted(run, path):
        save(run, path)
        if "hnet" in path.name and run.result.steps == 4:
            raise KeyboardInterrupt

    def counted(run, *arguments):
        steps.append(run.result.steps)
        return step(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(hyperlatent.training._Run, "save", interrupted)
        assert demo(tmp_path)[0] == 130
    monkeypatch.setattr(hyperlatent.training, "_one_step", counted)
    code, lines, _ = demo(tmp_path)
    assert code == 0 and "multitask    reused" in lines
    assert steps == [4, 5, *range(6), *range(6)]  # hnet goes on, then both guides


def test_checkpoint_of_other_settings_is_not_taken(demo, tmp_path, monkeypatch):  # noqa: F811
    def interrupted(run, path, save=hyperlatent.training._Run.save):
        save(run, path)
        if "hnet" in path.name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hyperlatent.training._Run, "save", interrupted)
        assert demo(tmp_path / "a", "--seed", "1")[0] == 130
    assert demo(tmp_path / "a")[0] == demo(tmp_path / "b")[0] == 0
    assert (tmp_path / "a/results.json").read_bytes() == (tmp_path / "b/results.json").read_bytes()
    assert leftovers(tmp_path / "a") == []


def test_two_at_once_share_an_empty_cache(tmp_path, tiny, demo, monkeypatch):  # noqa: F811
    assert demo(tmp_path / "alone")[0] == 0
    monkeypatch.setenv("HYPERLATENT_CACHE", str(tmp_path / "cache"))
    outs, children = [tmp_path / "a", tmp_path / "b"], []
    for out in outs:
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(main(["demo", "--out", str(out), "--config", str(tiny)]))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(list((tmp_path / "cache").glob("scenes-*"))) == 1
    for out in outs:
        assert (out / "results.json").read_bytes() == (tmp_path / "alone" / "results.json").read_bytes()


@pytest.mark.parametrize("with_signal, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_of_its_own(with_signal, status, tmp_path, tiny, cache, demo):  # noqa: F811
    """Nothing injected: a real process, in the middle of a long training."""
    assert demo(tmp_path / "fill the cache")[0] == 0
    command = [sys.executable, "-c", SCRIPT, "demo", "--out", tmp_path / "out", "--config", tiny]
    long = ["--hnet.fit.steps", "1000000", "--hnet.fit.validate-every", "1000000"]
    process = subprocess.Popen([*command, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("multitask"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(with_signal)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error.count("\n") == (with_signal == signal.SIGINT) and "Traceback" not in error
    assert demo(tmp_path / "out")[0] == 0
    assert (tmp_path / "out/results.json").read_bytes() == (tmp_path / "fill the cache/results.json").read_bytes()
