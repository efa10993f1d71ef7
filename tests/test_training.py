"""What the shared training loop promises: the averaged weights are what is kept, and a killed run loses nothing."""

import signal
import subprocess
import sys

import torch
from torch import nn

from hyperlatent.settings import FitConfig
from hyperlatent.training import fit, learning_rate_factor, step_generator


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


def loss(model, generator):
    return (model.weight - torch.randn(3, generator=generator)).square().sum()


def test_the_averaged_weights_are_what_is_left_in_the_model():
    config = FitConfig(steps=40, learning_rate=0.1, ema_decay=0.9, warmup=1, clip_norm=0.0)
    model = Point()
    fit(model, loss, config, seed=3, progress=False)

    plain, average = Point(), None
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 0.1 * learning_rate_factor(step, 40, 1)
        optimizer.zero_grad()
        loss(plain, step_generator(3, step)).backward()
        optimizer.step()
        average = plain.weight.detach().clone() if average is None else 0.9 * average + 0.1 * plain.weight.detach()
    assert torch.allclose(model.weight, average, atol=1e-6)
    assert not torch.allclose(model.weight, plain.weight, atol=1e-3)


def test_validation_sees_the_averaged_weights():
    seen = []
    config = FitConfig(steps=20, learning_rate=0.1, ema_decay=0.9, validate_every=20)
    model = Point()
    fit(model, loss, config, validate=lambda m: seen.append(m.weight.detach().clone()) or 0.0, progress=False)
    assert torch.equal(seen[-1], model.weight)


class Faint(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def faint(model, generator):
    """In float16 its gradient, 1e-8, is zero unless it is scaled, and infinite if it is scaled by 65536, the scale to begin with."""
    return (model.weight.half() * 1e-4 * 1e-4).float().sum()


def scaled():
    """An accelerator that scales gradients, as it does for float16 on a GPU."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def test_small_gradients_survive_float16(tmp_path):
    config = FitConfig(steps=6, learning_rate=0.1, warmup=1, clip_norm=1.0, checkpoint_every=1)
    plain, model, stopped = Faint(), Faint(), Faint()
    fit(plain, faint, config, progress=False)
    assert torch.equal(plain.weight, torch.ones(3))
    accelerator = scaled()
    fit(model, faint, config, progress=False, accelerator=accelerator)
    assert (model.weight < 0.95).all() and model.weight.isfinite().all()  # all steps but the first, which overflowed
    assert accelerator.scaler.get_scale() == 65536  # a training's scale is its own

    def stops(model, generator):
        if generator.initial_seed() == step_generator(0, 3).initial_seed(): raise KeyboardInterrupt
        return faint(model, generator)

    file = tmp_path / "checkpoint.safetensors"
    try: fit(stopped, stops, config, progress=False, accelerator=scaled(), checkpoint=file)
    except KeyboardInterrupt: pass
    again = Faint()
    fit(again, faint, config, progress=False, accelerator=scaled(), checkpoint=file)
    assert torch.equal(again.weight, model.weight)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_training import Point, loss, FitConfig, fit

def slow(model, generator):
    time.sleep(0.01)
    return loss(model, generator)

model = Point()
print("started", flush=True)
fit(model, slow, FitConfig(steps=200, ema_decay=0.9, checkpoint_every=10), progress=False, checkpoint={file!r})
torch.set_printoptions(precision=10)
print(model.weight.tolist())
"""


def test_a_killed_training_ends_with_the_same_bits(tmp_path, root):
    tests = str(root / "tests")
    run = lambda name: [sys.executable, "-c", SCRIPT.format(tests=tests, file=str(tmp_path / name))]
    whole = subprocess.run(run("whole.safetensors"), capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    killed = subprocess.Popen(run("killed.safetensors"), stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "killed.safetensors").exists() and killed.poll() is None: pass
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    again = subprocess.run(run("killed.safetensors"), capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert again == whole
