"""The notebooks, the package and the README say the same; no room leans on a higher floor; nothing is unpickled."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 2**20


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tools" / name, *arguments], capture_output=True, text=True)


def read(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code(notebook: Path) -> str:
    """All code of a notebook as plain Python (magics and shell lines taken out)."""
    cells = ("".join(cell["source"]) for cell in read(notebook) if cell["cell_type"] == "code")
    return "\n".join(
        re.sub(r"^\s*[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells if not cell.startswith("%%")
    )


NOTEBOOKS = sorted(file for file in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts)
ROOMS = [file for file in NOTEBOOKS if re.match(r"\d+_", file.name)]
MODULES = sorted((ROOT / "hyperlatent").rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- one text, three places


@pytest.fixture
def copy(tmp_path) -> Path:
    """The parts of the repository that have to agree, to be spoilt."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", ".ipynb_checkpoints")
    for folder in "nbs", "hyperlatent":
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in "settings.ini", "README.md":
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def test_package_is_what_the_notebooks_export():
    result = tool("sync.py")
    assert result.returncode == 0, result.stdout + result.stderr


def test_sync_sees_drift_and_stale_modules(copy):
    assert tool("sync.py", "--root", str(copy)).returncode == 0
    with open(copy / "hyperlatent" / "errors.py", "a") as file:
        file.write("edited = 'by hand'\n")
    (copy / "hyperlatent" / "stale.py").touch()
    (copy / "hyperlatent" / "tasks.py").unlink()
    result = tool("sync.py", "--root", str(copy))
    assert result.returncode == 1
    for message in "errors.py: differs", "stale.py: no notebook exports it", "tasks.py: missing":
        assert message in result.stdout


def test_sync_sees_an_unclean_notebook(copy):
    notebook = copy / "nbs" / "00_errors.ipynb"
    content = json.loads(notebook.read_text(encoding="utf-8"))
    next(cell for cell in content["cells"] if cell["cell_type"] == "code")["execution_count"] = 7
    notebook.write_text(json.dumps(content), encoding="utf-8")
    assert "nbs/00_errors.ipynb: differs" in tool("sync.py", "--root", str(copy)).stdout


def test_readme_is_what_the_index_notebook_gives():
    result = tool("readme.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_check_sees_an_edit_and_mends_it(copy):
    with open(copy / "README.md", "a") as file:
        file.write("edited by hand\n")
    assert tool("readme.py", "--check", "--root", str(copy)).returncode == 1
    assert tool("readme.py", "--root", str(copy)).returncode == 0
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


# ---- notebooks


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_stored_outputs_are_small_and_impersonal(notebook):
    outputs = json.dumps([cell.get("outputs", []) for cell in read(notebook)])
    assert len(outputs) < 1.5 * MEGABYTE
    assert not re.search(r"/(home|root|Users)/\w+|site-packages", outputs), "a path of somebody's machine"
    assert str(ROOT) not in outputs


@pytest.mark.parametrize("notebook", ROOMS, ids=name)
def test_room_has_title_and_summary(notebook):
    first = read(notebook)[0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# .+\n+> .+", "".join(first["source"]))


def exported_modules() -> dict[str, int]:
    """Module -> number of the room that exports it."""
    floors = {}
    for notebook in ROOMS:
        for module in re.findall(r"^#\|\s*default_exp\s+(\S+)", code(notebook), flags=re.MULTILINE):
            assert module not in floors, f"two notebooks export {module}"
            floors[module] = int(notebook.name.split("_")[0])
    return floors


def imported_modules(source: str) -> set[str]:
    """What `source` imports from the package: names of modules, or of things found in `hyperlatent` itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hyperlatent":
            inside = node.module.removeprefix("hyperlatent").lstrip(".")
            found |= {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("hyperlatent.") for alias in node.names if "hyperlatent." in alias.name}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hyperlatent":
            found.add(node.attr)
    return found


def too_high(source: str, number: int, floors: dict[str, int]) -> list[str]:
    """Imports of `source` that a room with this number may not make: higher rooms, or the package's front door."""
    wrong = []
    for target in sorted(imported_modules(source) - {"__version__"}):
        module = next((target.rsplit(".", cut)[0] for cut in range(3) if target.rsplit(".", cut)[0] in floors), None)
        if module is None or floors[module] > number:
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("notebook", ROOMS, ids=name)
def test_room_imports_no_higher_floor(notebook):
    assert too_high(code(notebook), int(notebook.name.split("_")[0]), exported_modules()) == []


def test_floor_check_sees_every_form_of_import():
    floors = {"tasks": 3, "data.scenes": 11, "guidance": 33}
    fine = "from hyperlatent.tasks import Task\nfrom hyperlatent import tasks, __version__\nimport hyperlatent.tasks"
    fine += "\nimport hyperlatent\nprint(hyperlatent.__version__)"
    assert too_high(fine, 11, floors) == []
    for source in (
        "from hyperlatent.guidance import ClassifierGuidance",
        "from hyperlatent import guidance",
        "import hyperlatent.guidance",
        "def late():\n    from hyperlatent.guidance import ClassifierGuidance",
        "from hyperlatent import HyperLatentPipeline",
        "import hyperlatent\nhyperlatent.HyperLatentPipeline",
    ):
        assert len(too_high(source, 11, floors)) == 1, source
    assert too_high("from hyperlatent.data.scenes import render", 10, floors) == ["data.scenes.render"]


# ---- nothing is unpickled

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle"}


def unpickling(source: str) -> list[str]:
    """Every import and call in `source` that reads or writes pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += names if node.module.split(".")[0] in UNPICKLERS else [n for n in names if n in PICKLING_CALLS]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLING_CALLS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else ["allow_pickle"]
    return found


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_module_never_unpickles(module):
    assert unpickling(module.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_unpickling_is_seen(source):
    assert len(unpickling(source)) == 1
