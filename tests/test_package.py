"""What a user installs: light to import, complete as a wheel, no module too long."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from the source distribution as a package index would get it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for file in "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md":
        shutil.copy(ROOT / file, source)
    shutil.copytree(PACKAGE, source / "hyperlatent")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.mark.xdist_group("wheel")
def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    files = (file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    inside = {file for file in wheel.namelist() if ".dist-info/" not in file}
    assert inside == {file.relative_to(ROOT).as_posix() for file in files}


@pytest.mark.xdist_group("wheel")
def test_wheel_declares_command_licence_and_requirements(wheel):
    text = {Path(file).name: wheel.read(file).decode() for file in wheel.namelist() if ".dist-info/" in file}
    assert "hyperlatent = hyperlatent.cli:main" in text["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]
    assert "Apache License" in text["LICENSE"]
    required = {line.split(": ")[1] for line in text["METADATA"].splitlines() if line.startswith("Requires-Dist")}
    assert any(line.startswith("torch>=") for line in required)
    assert any(line.startswith("nbdev") and "extra == " in line for line in required)
