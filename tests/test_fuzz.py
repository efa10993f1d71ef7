"""A short turn of the coverage-guided fuzzer over every loader, and of hypothesis over the guides' arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SECONDS = int(os.environ.get("FUZZ_SECONDS", 20))  # FUZZ_SECONDS=3600 make test: all night


def output_of(*command, folder) -> str:
    """What a command prints; it must succeed. Shapes are not checked in it, as they are not for a user."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.timeout(SECONDS + 300)
def test_no_file_brings_a_loader_down(tmp_path):
    pytest.importorskip("atheris", reason="the fuzzer has no wheel for this Python")
    report = output_of(HERE / "fuzz_loaders.py", "--seconds", SECONDS, folder=tmp_path)
    assert int(report.split("stat::number_of_executed_units:")[1].split()[0]) > 10 * SECONDS


def test_the_fuzzer_finds_what_is_there(tmp_path):
    """A loader that is broken on purpose: its check of the rows of results.json is gone."""
    pytest.importorskip("atheris")
    broken = "import fuzz_loaders, hyperlatent.evaluate as e; e._is_row = lambda row: True; fuzz_loaders.main()"
    result = subprocess.run([sys.executable, "-c", broken, "--seconds", "60"], capture_output=True, text=True, cwd=tmp_path,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])})
    assert result.returncode and "Uncaught Python exception" in result.stdout + result.stderr


def test_no_argument_brings_a_guide_down(tmp_path):
    output_of("-m", "pytest", "--noconftest", "-q", "-n", "0", "-p", "no:cacheprovider", HERE / "hostile_calls.py", folder=tmp_path)
