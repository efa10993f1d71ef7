"""What a user has after `pip install`: the wheel alone, outside the checkout, and types that a checker accepts."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

USE = """
import sys
from importlib.resources import files
from pathlib import Path
import hyperlatent

assert Path(hyperlatent.__file__).is_relative_to(sys.prefix), hyperlatent.__file__
assert (files("hyperlatent") / "models" / "scenes-rn24.safetensors").is_file()
"""

TYPED = """
from pathlib import Path

import torch

from hyperlatent import HyperLatentPipeline
from hyperlatent.base import CLIPAdapter
from hyperlatent.guidance import ClassifierFreeGuidance
from hyperlatent.hyperldm import Denoiser
from hyperlatent.hypernet import HNet
from hyperlatent.trajectory import Trajectory

adapter = CLIPAdapter(dim=64, hidden=16)
guide = ClassifierFreeGuidance(Denoiser(latent_dim=8, question_dim=32))
trajectory: Trajectory = guide(torch.randn(3, 32), guidance_scale=1.5, num_samples=4)
reveal_type(adapter.n_weights)
reveal_type(HyperLatentPipeline.from_pretrained("scenes"))
reveal_type(Trajectory.load(Path("here")))
CLIPAdapter(dim="64")
"""


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin/ of a virtual environment that has our wheel, and what it requires from the environment of the tests."""
    environment = tmp_path_factory.mktemp("installed") / "environment"
    assert run(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python3*/site-packages")
    # a folder named in a .pth file is searched last, and its own .pth files (an editable hyperlatent) are not read
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    result = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel)
    assert result.returncode == 0, result.stdout + result.stderr
    return environment / "bin"


@pytest.fixture
def outside(tmp_path) -> dict:
    """To be run in an empty folder, without the checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return dict(cwd=tmp_path, env=environment | {"HYPERLATENT_CACHE": str(tmp_path / "cache")})


@pytest.mark.xdist_group("wheel")
def test_installed_package_is_the_wheel_with_its_weights(installed, outside):
    result = run(installed / "python", "-c", USE, **outside)
    assert result.returncode == 0, result.stderr


@pytest.mark.xdist_group("wheel")
def test_installed_command_runs_a_chain(installed, outside, tmp_path):
    from test_cli import TINY

    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    result = run(installed / "hyperlatent", "demo", "--out", "here", "--config", "tiny.json", **outside)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "here" / "results.json").exists() and "hyperldm" in result.stdout


# ---- types


def test_package_is_well_typed(root):
    result = run(sys.executable, "-m", "mypy", cwd=root)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}\nSee 'When a check fails' in CONTRIBUTING.md"


@pytest.mark.xdist_group("wheel")
def test_user_code_is_checked_against_our_types(installed, outside, tmp_path):
    """py.typed works: an installed hyperlatent tells mypy what its functions return, and mypy sees a wrong argument."""
    (tmp_path / "mine.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,diffusers.*,accelerate.*]\nfollow_imports = skip\n")  # quick
    result = run(sys.executable, "-m", "mypy", "--python-executable", installed / "python", "mine.py", **outside)
    revealed = [line.split("Revealed type is ")[1].strip('"') for line in result.stdout.splitlines() if "Revealed" in line]
    errors = [line for line in result.stdout.splitlines() if "error:" in line]
    expected = ["int", "hyperlatent.pipeline.HyperLatentPipeline", "hyperlatent.trajectory.Trajectory"]
    assert revealed == expected, result.stdout + result.stderr
    assert len(errors) == 1 and 'incompatible type "str"' in errors[0], result.stdout
