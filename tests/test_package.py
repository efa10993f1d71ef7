"""What a user installs: light to import, complete as a wheel, no module too long."""

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

import hyperlatent

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hyperlatent"
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "_modidx.py")
HEAVY = ["diffusers", "transformers", "open_clip", "accelerate", "umap", "numba", "sklearn", "matplotlib"]


def dotted(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def loaded_by(*modules: str, among: list[str]) -> list[str]:
    """Which packages of `among` a fresh interpreter has loaded after importing `modules`."""
    script = f"import sys, {', '.join(modules)}; print(*[name for name in {among} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("hyperlatent", among=["torch", *HEAVY]) == []


def test_importing_every_module_loads_nothing_heavy():
    assert loaded_by(*map(dotted, MODULES), among=HEAVY) == []


@pytest.mark.parametrize("name", ["errors", "config", "cli"])
def test_module_does_without_torch(name):
    assert (PACKAGE / f"{name}.py").exists()
    assert loaded_by(f"hyperlatent.{name}", among=["torch"]) == []


def test_heavy_imports_are_seen():
    assert loaded_by("torch", "matplotlib", among=["torch", *HEAVY]) == ["torch", "matplotlib"]


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_module_is_short(module):
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= 320, f"{module.name} has {lines} lines: is there a second concept in this room?"


def test_shapes_are_checked_in_these_tests():
    from hyperlatent.hypernet import HNet

    with pytest.raises(TypeCheckError):
        HNet(n_weights=5, latent_dim=3)(z=[1.0, 2.0, 3.0])


@pytest.mark.xdist_group("wheel")
def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    wheel = zipfile.ZipFile(wheel)
    files = (file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    inside = {file for file in wheel.namelist() if ".dist-info/" not in file}
    assert inside == {file.relative_to(ROOT).as_posix() for file in files}


@pytest.mark.xdist_group("wheel")
def test_wheel_declares_command_licence_and_requirements(wheel):
    wheel = zipfile.ZipFile(wheel)
    text = {Path(file).name: wheel.read(file).decode() for file in wheel.namelist() if ".dist-info/" in file}
    assert "hyperlatent = hyperlatent.cli:main" in text["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]
    assert "Apache License" in text["LICENSE"] and "Meta-VQA" in text["NOTICE"]
    required = {line.split(": ")[1] for line in text["METADATA"].splitlines() if line.startswith("Requires-Dist")}
    assert any(line.startswith("torch>=") for line in required)
    for name, extra in ("nbdev", "dev"), ("anywidget", "explore"), ("tensorboard", "tracking"), ("tensorboard", "dev"):
        assert any(line.startswith(name) and f'extra == "{extra}"' in line for line in required), (name, extra)
    assert not any(line.startswith(("anywidget", "tensorboard", "jupyterlab")) and "extra" not in line for line in required)
    for version in "3.11", "3.12", "3.13":
        assert f"Programming Language :: Python :: {version}" in text["METADATA"]


def test_versions_agree():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    version = settings["DEFAULT"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest[1] == cited[1] == version == hyperlatent.__version__


def test_every_folder_of_shipped_weights_has_a_notice():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    folders = {file.parent.relative_to(ROOT) for file in PACKAGE.rglob("*.safetensors")}
    known = [folder for folder in folders if any(f"{part}/" in notice for part in (folder, *folder.parents) if part.parts[1:])]
    assert folders and folders == set(known), "say in NOTICE where these weights come from and what licence they have"


def public_names(source: str) -> set[str]:
    """What a module defines (and does not import) at its top, without the names that begin with an underscore."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("module", [file for file in MODULES if file.name != "__init__.py"], ids=dotted)
def test_all_is_exact(module):
    names = importlib.import_module(dotted(module)).__all__
    assert len(names) == len(set(names))
    assert set(names) == public_names(module.read_text(encoding="utf-8"))
