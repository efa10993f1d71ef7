"""Write README.md from nbs/index.ipynb; with --check only say whether it is up to date."""

import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOMS = "<!-- table of the rooms -->"  # in the index notebook; the README has the table in its place
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)")  # a relative target of a markdown link or image


def rooms(notebooks: Path) -> str:
    """A table of the numbered notebooks, then the tutorials: the line below the title, and the module exported."""
    rows = ["| notebook | what lives there | module |", "|---|---|---|"]
    for file in [*sorted(notebooks.glob("[0-9]*_*.ipynb")), *sorted(notebooks.glob("tutorials/*.ipynb"))]:
        text = "\n".join(cell.source for cell in nbformat.read(file, as_version=4).cells)
        summary = re.search(r"^> (.+?)\.?$", text, flags=re.MULTILINE)
        module = re.search(r"^#\| *default_exp (\S+)", text, flags=re.MULTILINE)
        name = file.relative_to(notebooks).with_suffix("").as_posix()
        module = f"`{module[1]}`" if module else ""
        rows.append(f"| [{name}]({name}.ipynb) | {summary[1] if summary else ''} | {module} |")
    return "\n".join(rows)


def render(root: Path) -> str:
    """The text of README.md: the prose and code of the index notebook, with text outputs and without hidden cells."""
    notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # names the language of the code fences
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("#| hide")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.MULTILINE)
        else:
            cell.source = cell.source.replace(ROOMS, rooms(root / "nbs"))
            # links are relative to nbs/ in the notebook, to the root in the README
            cell.source = LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), cell.source)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"<!-- Generated from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n{text}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README.md is out of date")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    arguments = parser.parse_args()
    readme, text = arguments.root / "README.md", render(arguments.root)
    current = readme.exists() and readme.read_text(encoding="utf-8") == text
    if not current and arguments.check:
        print("README.md is not what nbs/index.ipynb gives: run `make readme`.")
        return 1
    if not current:
        readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
