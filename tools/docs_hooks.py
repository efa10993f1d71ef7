"""What `mkdocs build` adds to docs/: every notebook, a reference page per module, the figures stored in notebooks, the changelog."""

import base64
import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
EXPLORER = ROOT / "docs" / "static" / "explorer.html"  # the explorer's page that needs no kernel; without it there is no page about it
OPTIONS = {"hyperlatent.pipeline": "    options: {inherited_members: true}\n"}  # all that a user calls stands on one page
DEFAULT = re.compile(r'<pre><span></span><span class="c1">#\| *default_exp [\w.]+</span>\n</pre>')  # said to nbdev, not to a reader
EXPORT = re.compile(r'(<pre><span></span>)<span class="c1">#\| *export</span>\n|(<div class="clipboard-copy-txt" id="\S+">)#\| *export\n')
LINK = re.compile(r'(href=")(?![a-z]+:|#|/)([^"#]+)\.ipynb(#[^"]*)?(")')  # notebooks become pages


def notebooks() -> list[Path]:
    """Numbered notebooks in order, then the tutorials."""
    found = [*sorted((ROOT / "nbs").glob("[0-9]*_*.ipynb")), *sorted((ROOT / "nbs").glob("tutorials/*.ipynb"))]
    return [file for file in found if ".ipynb_checkpoints" not in file.parts]


def modules() -> list[str]:
    """Dotted names of the package's modules, those of its folders last."""
    files = [file for file in (ROOT / "hyperlatent").rglob("*.py") if not file.name.startswith("_")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return sorted(names, key=lambda name: (name.count("."), name))


def page_of(notebook: Path) -> str:
    return notebook.relative_to(ROOT).as_posix()


def title_of(notebook: Path) -> str:
    """The notebook's H1."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "markdown"))
    return re.search(r"^# (.+)", text, flags=re.MULTILINE)[1]


def figures(notebook: Path) -> list[bytes]:
    """The PNG pictures that are stored in a notebook, in order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [base64.b64decode("".join(data["image/png"])) for data in outputs if "image/png" in data]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    rooms = [{title_of(file): page_of(file)} for file in notebooks() if file.parent.name != "tutorials"]
    tutorials = [{title_of(file): page_of(file)} for file in notebooks() if file.parent.name == "tutorials"]
    pages = [{name.removeprefix("hyperlatent."): f"reference/{name}.md"} for name in modules()]
    more = [{"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]
    if not EXPLORER.exists():
        guide = next(entry["Guide"] for entry in config.nav if "Guide" in entry)
        guide[:] = [page for page in guide if "Explorer" not in page]
    config.nav += [{"Tutorials": tutorials}, {"Notebooks": rooms}, {"Reference": pages}, {"Project": more}]
    return config


@event_priority(100)  # before mkdocs-jupyter, which looks for notebooks among the files
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in notebooks():
        files.append(File(page_of(file), str(ROOT), config.site_dir, config.use_directory_urls))
        for number, picture in enumerate(figures(file), 1):
            files.append(File.generated(config, f"figures/{file.stem}-{number}.png", content=picture))
    for name in modules():
        files.append(File.generated(config, f"reference/{name}.md", content=f"# {name}\n\n::: {name}\n{OPTIONS.get(name, '')}"))
    for file in "CHANGELOG.md", "CONTRIBUTING.md":
        text = (ROOT / file).read_text(encoding="utf-8").replace("](LICENSE)", "](https://www.apache.org/licenses/LICENSE-2.0)")
        files.append(File.generated(config, file.lower(), content=text))
    if not EXPLORER.exists():
        files.remove(files.get_file_from_path("explorer.md"))
    return files


def on_post_page(output: str, page, config: MkDocsConfig) -> str:
    """Notebooks: links lead to pages, and nbdev's directives are left out of the code."""
    if not page.file.src_uri.endswith(".ipynb"): return output
    output = LINK.sub(r"\1\2.html\3\4", output)
    return EXPORT.sub(r"\1\2", DEFAULT.sub('<pre class="default-exp"></pre>', output))
