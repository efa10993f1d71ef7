"""Check that the package is exactly what the notebooks export, and that the notebooks are clean.

A temporary copy of the notebooks is cleaned and exported into an empty package; every Python file and every notebook
must then have a twin with the same text in the repository. Modules left behind by a deleted notebook show up too.
"""

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXPORT = "from nbdev.clean import nbdev_clean; from nbdev.doclinks import nbdev_export; nbdev_clean(); nbdev_export()"


def texts(root: Path) -> dict[str, str]:
    """Path -> text of the files that `make export` writes."""
    files = [*root.glob("hyperlatent/**/*.py"), *root.glob("nbs/**/*.ipynb")]
    files = [file for file in files if ".ipynb_checkpoints" not in file.parts]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}


def exported(root: Path) -> dict[str, str]:
    """The same files after cleaning and exporting a copy of the notebooks."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copy(root / "settings.ini", copy)
        (copy / "hyperlatent").mkdir()
        shutil.copy(root / "hyperlatent" / "__init__.py", copy / "hyperlatent")  # written by hand, but for the version
        environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}  # it silences the export
        subprocess.run([sys.executable, "-c", EXPORT], cwd=copy, env=environment, check=True)
        return texts(copy)


def differences(root: Path) -> list[str]:
    """One entry for each file that differs."""
    there, wanted = texts(root), exported(root)
    report = [f"{name}: no notebook exports it; delete it" for name in sorted(there.keys() - wanted.keys())]
    report += [f"{name}: missing; run `make export`" for name in sorted(wanted.keys() - there.keys())]
    for name in sorted(there.keys() & wanted.keys()):
        if there[name] != wanted[name]:
            pair = there[name].splitlines(), wanted[name].splitlines()
            lines = list(difflib.unified_diff(*pair, "now", "exported", lineterm="", n=1))
            report.append("\n    ".join([f"{name}: differs; run `make export`", *lines[:20]]))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    report = differences(parser.parse_args().root)
    print("\n".join(report) if report else "notebooks and package are in sync")
    return 1 if report else 0


if __name__ == "__main__":
    sys.exit(main())
