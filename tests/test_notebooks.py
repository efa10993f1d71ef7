"""Every notebook runs top to bottom, each in a process of its own, with shapes checked inside the package."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
SECONDS = 300

RUN = """
import sys
from pathlib import Path
from jaxtyping import install_import_hook
from nbdev.test import test_nb
hook = install_import_hook("hyperlatent", "beartype.beartype")
passed, seconds = test_nb(Path(sys.argv[1]), skip_flags=["notest"])
sys.exit(not passed)
"""


def notebooks() -> list[str]:
    files = (file.relative_to(NOTEBOOKS) for file in NOTEBOOKS.rglob("*.ipynb"))
    return sorted(file.as_posix() for file in files if not any(part.startswith((".", "_")) for part in file.parts))


def run(notebook: Path) -> None:
    command = [sys.executable, "-c", RUN, str(notebook)]
    try:
        result = subprocess.run(command, cwd=notebook.parent, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{notebook.name} took more than {SECONDS} s", pytrace=False)
    if result.returncode:
        pytest.fail(f"{notebook.name} failed\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}", pytrace=False)


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("name", notebooks())
def test_notebook_runs(name):
    run(NOTEBOOKS / name)


WRONG_SHAPE = """
from hyperlatent.hypernet import HNet
HNet(n_weights=5, latent_dim=3)(z=[1.0, 2.0, 3.0])"""


@pytest.mark.parametrize("cell, error", [("assert 1 == 2", "AssertionError"), (WRONG_SHAPE, "TypeCheckError")])
def test_a_failing_cell_fails_the_test(cell, error, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell(cell)])
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(pytest.fail.Exception, match=error):
        run(tmp_path / "bad.ipynb")


def test_a_notebook_that_hangs_fails_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr("test_notebooks.SECONDS", 5)
    cell = nbformat.v4.new_code_cell("import time; time.sleep(60)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "endless.ipynb")
    with pytest.raises(pytest.fail.Exception, match="more than 5 s"):
        run(tmp_path / "endless.ipynb")
