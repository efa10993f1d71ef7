"""The site builds, its links lead somewhere, nothing in it is fetched from elsewhere; what the pages tell a reader to type works."""

import ast
import html
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- run -->\n)?```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, bool]]:
    """Language, text, and whether a shell block is to be run."""
    return [(kind, text, bool(run)) for run, kind, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


# ---- the site


class Page(HTMLParser):
    """What a page can be linked at, what it links to, and what a browser would fetch for it."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in values:
            self.fetched.append(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values.get("href", ""))


def faults(site: Path) -> list[str]:
    """Links and files of all pages that lead nowhere, or away."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for target in {*page.links, *page.fetched}:
            address, anchor = urldefrag(target)
            if urlparse(address).scheme:
                if target in page.fetched and not target.startswith("data:"):
                    found.append(f"{path.relative_to(site)} fetches {target[:80]}")
                continue
            base = site if address.startswith("/") else path.parent
            there = (base / unquote(address.lstrip("/"))).resolve() if address else path
            if there.is_dir():
                there /= "index.html"
            if not there.exists():
                found.append(f"{path.relative_to(site)} links to {target}")
            elif anchor and there in pages and unquote(anchor) not in pages[there].anchors and not anchor.startswith("__"):
                found.append(f"{path.relative_to(site)} links to {target}, which has no such anchor")
    return sorted(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.xdist_group("site")
def test_links_lead_somewhere_and_nothing_comes_from_elsewhere(site):
    assert faults(site) == []


@pytest.mark.xdist_group("site")
def test_every_notebook_and_module_has_its_page(site):
    for notebook in (ROOT / "nbs").rglob("*_*.ipynb"):
        if ".ipynb_checkpoints" not in notebook.parts:
            assert (site / notebook.relative_to(ROOT).with_suffix(".html")).exists(), notebook
    source = (ROOT / "hyperlatent" / "guidance.py").read_text(encoding="utf-8")
    text = (site / "reference" / "hyperlatent.guidance.html").read_text(encoding="utf-8")
    assert 'id="hyperlatent.guidance.ClassifierFreeGuidance"' in text
    shown = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)))
    for parameter, comment in re.findall(r"^ +(hyperclip|negative_features): [^#]+# (.+)$", source, flags=re.MULTILINE):
        said = re.escape(comment.replace("`", "")).replace(r"\ ", r"\s+")
        assert re.search(rf"{parameter}\b[^–]*–\s+{said}", shown), parameter  # what a parameter means stands beside its name
    assert 'Float[Tensor, "..."]' in shown  # and its shape


@pytest.mark.xdist_group("site")
def test_stored_outputs_are_shown(site):
    assert (site / "figures" / "latent_trajectories-1.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in (site / "nbs" / "tutorials" / "latent_trajectories.html").read_text(encoding="utf-8")


@pytest.mark.xdist_group("site")
def test_search_knows_pages_notebooks_and_functions(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    for words, place in [
        ("another run is writing to", "troubleshooting.html"),
        ("Adapted latents", "nbs/24_zoo.html"),
        ("ClassifierFreeGuidance", "reference/hyperlatent.guidance.html"),
    ]:
        hits = {entry["location"].split("#")[0] for entry in index if words.lower() in (entry["title"] + entry["text"]).lower()}
        assert place in hits, (words, hits)


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="b.html#there"></a><a href="https://example.org"></a>'
        '<a href="gone.html"></a><a href="b.html#gone"></a><script src="https://cdn.example.org/x.js"></script><img src="no.png">'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    found = faults(tmp_path.resolve())
    assert len(found) == 4
    for wrong in "gone.html", "b.html#gone", "cdn.example.org", "no.png":
        assert any(wrong in fault for fault in found), wrong


# ---- what readers type


@pytest.mark.parametrize("page", [page for page in PAGES if any(kind == "python" for kind, _, _ in blocks(page))], ids=lambda p: p.name)
def test_code_of_page_runs(page, tmp_path):
    """Python blocks, and shell blocks that are marked, one after the other in an empty folder."""
    script = ["import subprocess"]
    for kind, text, run in blocks(page):
        if kind == "python":
            script.append(text)
        elif run:
            script.append(f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {text!r}], check=True)")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def shell_lines() -> list:
    return [
        pytest.param(line, id=f"{page.stem}: {line[:60]}")
        for page in PAGES
        for kind, text, _ in blocks(page)
        if kind == "sh"
        for line in text.splitlines()
        if line.strip()
    ]


def check_launcher(launcher: str, options: str) -> None:
    """Fails unless torchrun or accelerate knows its options."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parser = get_args_parser() if launcher == "torchrun" else launch_command_parser()
    try:
        found, more = parser.parse_known_args([*shlex.split(options), "hyperlatent"])
    except SystemExit:
        raise AssertionError(f"{launcher} does not accept: {options}") from None
    assert not more and found.training_script == "hyperlatent" and found.no_python, f"{launcher} does not accept: {options}"


def check_line(line: str) -> None:
    """Fails unless a shell reads the line, and we can answer for what it calls."""
    from hyperlatent.cli import parse

    subprocess.run(["bash", "-n", "-c", line], check=True, capture_output=True)
    for launcher, options in re.findall(r"^(torchrun|accelerate launch) (.*?--no.python) hyperlatent", line):
        check_launcher(launcher, options)
        line = line[line.index("hyperlatent"):]
    for command in re.findall(r"\b(?:hyperlatent|make|pip|tensorboard|python3?) [^;#]*", line.replace("$seed", "0")):
        program, *arguments = shlex.split(command)
        if program == "hyperlatent":
            try:
                parse(arguments)
            except SystemExit as end:
                assert not end.code, f"hyperlatent does not accept: {command}"
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE), command
    called = re.sub(r"^for \w+ in [^;]*; do ", "", line.strip()).split()[0]
    known = ("hyperlatent", "make", "tensorboard", "python3", ".venv/bin/pip", "pip")
    assert called in known, f"nobody checks {called!r}: teach this test"


@pytest.mark.parametrize("line", shell_lines())
def test_shell_line_is_accepted(line):
    check_line(line)


@pytest.mark.parametrize("line", ["hyperlatent demo --quik", "make nothing", "for s in 0; do hyperlatent dmo; done", "curl x",
                                  "torchrun --nproc-pre-node 2 --no-python hyperlatent demo", "torchrun --no-python hyperlatent dmo"])
def test_wrong_shell_lines_are_seen(line, capsys):
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        check_line(line)


# ---- messages


def package_texts() -> str:
    """All string constants of the package; what is filled in is left out."""
    texts = []
    for file in (ROOT / "hyperlatent").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def quoted_messages() -> list[str]:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def test_quoted_messages_exist():
    texts, messages = package_texts(), quoted_messages()
    assert len(messages) > 20
    assert [message for message in messages if message not in texts] == []
