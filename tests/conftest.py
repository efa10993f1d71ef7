"""Every test runs with shapes checked, on one thread, offline and without a display."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Before torch is imported, and inherited by the notebooks' processes: xdist's workers share the cores among themselves.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
# libraries may have asked for more since; a forked child would wait for ever for threads that it does not have
os.register_at_fork(before=lambda: torch.set_num_threads(1))
SHAPE_CHECKS = install_import_hook("hyperlatent", "beartype.beartype")  # kept: it lasts as long as it is referenced


def copied(files, folder: Path) -> Path:
    """The folder, with copies of some files in it that a test may damage."""
    for file in files:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def wheel(root, tmp_path_factory) -> Path:
    """The wheel, built from the source distribution as a package index would get it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    packaging = "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in"
    for file in *packaging, "LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "CITATION.cff":
        shutil.copy(root / file, source)
    shutil.copytree(root / "hyperlatent", source / "hyperlatent", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))
