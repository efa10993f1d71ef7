"""Every test runs with shapes checked, on one thread, offline and without a display."""

import os
from pathlib import Path

# Before torch is imported, and inherited by the notebooks' processes: xdist's workers share the cores among themselves.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
SHAPE_CHECKS = install_import_hook("hyperlatent", "beartype.beartype")  # kept: it lasts as long as it is referenced


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parent.parent
