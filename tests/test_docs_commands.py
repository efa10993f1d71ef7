"""Every code block of the README and of docs/ is executed: page by page, in the order of the page, in a folder that holds what it takes
for granted. Commands are shortened as short_commands.py says; test_docs.py runs the first steps unshortened, in a process of their own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import short_commands
from PIL import Image
from test_docs import PAGES, ROOT
from vqa_official import official, synthetic_split

from hyperlatent.encoders import MODELS, SCENES

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]
HERE = Path(__file__).resolve().parent
PROGRAMS = {  # what a machine has that we do not: a cluster's commands, and launchers that are given two processes instead of four
    "hyperlatent": f'exec {sys.executable} {HERE / "short_commands.py"} "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "${{@//#4/2}}"',
    "accelerate": f'shift; exec {sys.executable} -m accelerate.commands.launch "${{@//#4/2}}"',
    "scontrol": "echo localhost",
    "srun": 'shift; exec "$@"',
}


# ---- what a page takes for granted


def vqa(folder: Path) -> None:
    train, test = synthetic_split()
    official(train | test).write(folder)


def coco(folder: Path) -> None:
    lots = np.random.default_rng(0)
    names = {name for part in synthetic_split() for task in part.values() for name, _ in task["train"] + task["test"]}
    for name in sorted(names):
        path = folder / name.split("_")[1] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(lots.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


GIVEN = {  # a path that a command names: how it came there
    "vqa": vqa,
    "coco": coco,
    "prompt_meta.json": lambda path: path.write_text(json.dumps({question: "it is {}" for question in synthetic_split()[0]})),
    "tasks/metavqa": lambda path: typed(f"hyperlatent prepare metavqa --vqa-root vqa --prompts prompt_meta.json --out {path}"),
    "features/tasks": lambda path: typed(f"hyperlatent prepare features --tasks tasks/metavqa --images coco --out {path.parent}"),
    "weights.safetensors": lambda path: shutil.copy(MODELS / f"{SCENES}.safetensors", path),
    "runs/mine/logs": lambda path: typed("hyperlatent train --tracker tensorboard --out runs/mine"),
}


# ---- typing


def typed(line: str) -> None:
    """Run a line of a shell block, where its program allows in a copy of this process; raise if it fails."""
    if loop := re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", line):
        for value in loop[2].split():
            typed(loop[3].replace(f"${loop[1]}", value))
        return
    program, *arguments = shlex.split(line, comments=True)
    for word in arguments:
        if word in GIVEN and not Path(word).exists() and arguments[arguments.index(word) - 1] not in ("--out",):
            GIVEN[word](Path(word))
    if program == "hyperlatent":
        return in_a_copy(lambda: short_commands.main(arguments), line)
    if program == "make":
        shown = subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        comment = line.partition("# ")[2]
        assert not comment.startswith("hyperlatent") or comment in shown, shown
        return None
    if program == "tensorboard":
        line += " --inspect"  # prints what there is, and does not wait for a browser
    return shell(line)


def shell(text: str) -> None:
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True)
    assert result.returncode == 0, f"{text}\n{result.stdout}{result.stderr}"[-6000:]


def in_a_copy(work, what: str) -> None:
    """A function in a fork of this process, with everything imported; fails unless it returns 0 or nothing."""
    sys.stdout.flush()
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, f"exit code {code}: {what}"
        return
    code = 99
    try:
        if "accelerate" in sys.modules:  # a command has a process of its own, and chooses device and precision anew
            sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
        code = work() or 0
    except SystemExit as end:  # of --help
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def checkout(folder: Path) -> None:
    """What is installed from; the packages that it requires are those of the tests."""
    for file in "settings.ini", "setup.py", "pyproject.toml", "LICENSE", "NOTICE", "README.md":
        shutil.copy(ROOT / file, folder)
    shutil.copytree(ROOT / "hyperlatent", folder / "hyperlatent", ignore=shutil.ignore_patterns("__pycache__"))
    site = next(path for path in sys.path if path.endswith("site-packages"))
    os.environ |= {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "false", "PIP_NO_INDEX": "1", "PYTHONPATH": site}


def read_through(page: Path, folder: Path, counted: Path) -> None:
    """Type everything that stands on a page."""
    (folder / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    os.chdir(folder)
    os.environ |= {"PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
                   "PYTHONPATH": str(ROOT), "HYPERLATENT_CACHE": str(folder / "cache"),
                   "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1"}
    names: dict = {"__name__": "__main__"}
    done: dict[str, int] = defaultdict(int)
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if "pip install ." in text:
            before = dict(os.environ)
            checkout(folder)
            shell(text)
            os.environ["PYTHONPATH"] = before["PYTHONPATH"]
        elif kind == "python": exec(compile(text, f"{page.name}", "exec"), names)
        elif kind == "bash": shell(text)
        else: [typed(line) for line in text.splitlines() if line.strip()]
        done[kind] += 1
    counted.write_text(json.dumps(done))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_everything_on_the_page_works(page, tmp_path):
    (tmp_path / "work").mkdir()
    in_a_copy(lambda: read_through(page, tmp_path / "work", tmp_path / "done.json"), page.name)
    done = json.loads((tmp_path / "done.json").read_text())
    assert sum(done.values()) == page.read_text(encoding="utf-8").count("```") / 2


@pytest.mark.parametrize("text", ["hyperlatent demo --tasks nowhere", "hyperlatent generate", "hyperlatent train --preset scene", "false"])
def test_a_command_that_fails_is_seen(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n{text}\n```\n")
    (tmp_path / "work").mkdir()
    with pytest.raises(AssertionError, match="exit code 99"):
        in_a_copy(lambda: read_through(page, tmp_path / "work", tmp_path / "done.json"), text)
