"""TensorBoard's curves of a chain: read back from the files, named by stage, continued when a run is resumed."""

import json
import math
import os
import signal

import pytest

from hyperlatent.cli import main


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    from test_cli import TINY

    folder = tmp_path_factory.mktemp("tracking")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERLATENT_CACHE", str(folder / "cache"))
        yield ["--config", str(folder / "tiny.json"), "--tracker", "tensorboard"]


def curves(out) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value), in the order in which they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "logs" / "hyperlatent")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.xdist_group("tiny")
def test_curves_of_every_stage_are_in_the_folder(options, tmp_path):
    assert main(["train", "--out", str(tmp_path), *options]) == 0
    found = curves(tmp_path)
    stages = "multitask", "hnet", "hyperclip", "hyperldm"
    assert set(found) == {f"{stage}/{name}" for stage in stages for name in ("loss", "learning_rate", "score")}
    for stage in stages:
        assert [step for step, _ in found[f"{stage}/loss"]] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in found[f"{stage}/score"]] == [2, 4, 6]
        assert all(math.isfinite(value) for _, value in found[f"{stage}/loss"])
        assert found[f"{stage}/learning_rate"][-1][1] < found[f"{stage}/learning_rate"][0][1]
    history = json.loads((tmp_path / "hnet" / "artifact.json").read_text())["metrics"]["history"]
    assert [(row["step"], pytest.approx(row["score"])) for row in history] == found["hnet/score"]


@pytest.mark.xdist_group("tiny")
def test_resumed_run_continues_the_axis_of_steps(options, tmp_path):
    def stopped():
        from hyperlatent import training

        step, taken = training._one_step, []

        def step_until_killed(*arguments):
            taken.append(1)
            if len(taken) == 6 + 4:  # in the second stage, after three steps and the checkpoint of step 2
                os.kill(os.getpid(), signal.SIGINT)
            return step(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_one_step", step_until_killed)
            return main(["train", "--out", str(tmp_path), *options])

    assert stopped() == 130
    assert [step for step, _ in curves(tmp_path)["hnet/loss"]] == [1, 2, 3]
    before = dict(curves(tmp_path)["hnet/loss"])
    assert main(["train", "--out", str(tmp_path), *options]) == 0
    steps = [step for step, _ in curves(tmp_path)["hnet/loss"]]
    # the steps that no checkpoint holds are taken again; TensorBoard's reader puts the newer in place of the older
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    again = dict(curves(tmp_path)["hnet/loss"])
    assert again[3] == before[3] and again[1] == before[1]
    assert [step for step, _ in curves(tmp_path)["multitask/loss"]] == [1, 2, 3, 4, 5, 6]  # a finished stage writes nothing


@pytest.mark.xdist_group("tiny")
def test_without_a_tracker_nothing_is_written(options, tmp_path):
    assert main(["train", "--out", str(tmp_path), *options[:2]]) == 0
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("name, remedy", [("tensorbord", "tensorboard"), ("swanlab", "pip install swanlab")])
def test_tracker_that_is_not_there(name, remedy, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path), "--tracker", name]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and repr(name) in error and remedy in error


def test_tracker_that_wants_an_account(options, tmp_path, capsys, monkeypatch):
    from accelerate import Accelerator

    def refuse(*arguments, **options):
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    assert main(["train", "--out", str(tmp_path), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No API key configured." in error and "WANDB_MODE=offline" in error


def test_logs_that_cannot_be_written(options, tmp_path, capsys):
    (tmp_path / "logs").write_text("mine")
    assert main(["train", "--out", str(tmp_path), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "logs") in error
