"""Every training, killed with SIGKILL at random moments and started again, ends with the bits of one that never was."""

import os
import random
import signal
import threading
import warnings
from dataclasses import replace

import pytest
import test_processes
import torch
from test_processes import FIT, NAMES, miniature, trainings

import hyperlatent.training
from hyperlatent.settings import ClipTrainingConfig, FitConfig
from hyperlatent.training import fit, previous_checkpoint

pytestmark = pytest.mark.xdist_group("resume")


def in_a_child(function) -> int:
    """The process number of a copy of this process that runs a function and ends."""
    if pid := os.fork(): return pid
    try:
        function()
        os._exit(0)
    finally:
        os._exit(99)


def small_clip(config: FitConfig, monkeypatch):
    """The training of `hyperlatent train-clip`, validated on one question of each kind."""
    from hyperlatent import clip_training
    from hyperlatent.data.scene_questions import ASKED, all_questions

    questions = [next(q for q in all_questions() if q.asked == kind) for kind in ASKED]
    monkeypatch.setattr(clip_training, "some_questions", lambda: questions)
    monkeypatch.setattr(clip_training, "held_out_scores", lambda encoder: {})  # of the network that is there at the end
    settings = ClipTrainingConfig(fit=config, mixed_precision="no", device="cpu")
    return lambda **options: clip_training.train_clip(settings, **options)[0].model


@pytest.mark.parametrize("name", [*NAMES, "small CLIP"])
def test_killed_at_random_moments(name, tmp_path, monkeypatch):
    every = 3
    config = replace(FIT, steps=14, checkpoint_every=every, validate_every=4)
    monkeypatch.setattr(test_processes, "FIT", config)
    learn = small_clip(config, monkeypatch) if name == "small CLIP" else trainings(*miniature())[name]
    file, record = tmp_path / "checkpoint.safetensors", tmp_path / "steps"
    whole = learn(progress=False).state_dict()
    lots, step = random.Random(name), hyperlatent.training._one_step

    def noted(run, *arguments):
        with open(record, "a") as f: f.write(f"{run.result.steps}\n")
        if run.result.steps == last: threading.Timer(lots.uniform(0, 0.02), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return step(run, *arguments)

    monkeypatch.setattr(hyperlatent.training, "_one_step", noted)
    ends = []
    for last in sorted(lots.sample(range(12), 3)) + [10**6]:
        lots.random()
        pid = in_a_child(lambda: learn(progress=False, checkpoint=file))
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert ends[-1] == 0 and -signal.SIGKILL in ends and set(ends) <= {0, -signal.SIGKILL}
    final = learn(progress=False, checkpoint=file).state_dict()  # of the last checkpoint, or from the start
    assert all(torch.equal(final[key], whole[key]) for key in whole) and final.keys() == whole.keys()
    steps = [int(line) for line in record.read_text().split()]
    for before, after in zip(steps, steps[1:]): assert after == before + 1 or before - after < every and after % every == 0


def test_the_one_before_serves_when_the_last_is_damaged(tmp_path):
    model = lambda: torch.nn.Linear(3, 1, bias=False)
    loss = lambda model, generator: (model(torch.randn(5, 3, generator=generator)) - 1).square().mean()
    config, file = replace(FIT, steps=10, checkpoint_every=4, ema_decay=0.0), tmp_path / "checkpoint.safetensors"
    torch.manual_seed(0)
    start = model()
    whole, damaged = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(3, 1, bias=False)
    for other in (whole, damaged): other.load_state_dict(start.state_dict())
    fit(whole, loss, config, progress=False, checkpoint=file)
    assert file.exists() and previous_checkpoint(file).exists()
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="the one before it, of step 4"):
        fit(damaged, loss, config, progress=False, checkpoint=file)
    assert torch.equal(damaged.weight, whole.weight)
    with warnings.catch_warnings():  # both are whole again
        warnings.simplefilter("error")
        fit(start, loss, config, progress=False, checkpoint=file)
    assert torch.equal(start.weight, whole.weight)


def test_a_checkpoint_is_there_at_every_moment(tmp_path, monkeypatch):
    """Between any two steps of the file system, the last checkpoint or the one before it can be read."""
    config, file, seen = replace(FIT, steps=8, checkpoint_every=1), tmp_path / "checkpoint.safetensors", []
    move = hyperlatent.files._move

    def watched(temporary, path):
        if file.exists(): seen.append(path.name)
        move(temporary, path)
        assert file.exists() or not seen

    monkeypatch.setattr(hyperlatent.files, "_move", watched)
    model = torch.nn.Linear(2, 1)
    fit(model, lambda model, generator: model.weight.square().sum(), config, progress=False, checkpoint=file)
    assert seen.count(file.name) == seen.count(previous_checkpoint(file).name) == 7
