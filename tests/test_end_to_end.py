"""The installed command, from nothing to the table: `hyperlatent demo --quick` with an empty cache."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.xdist_group("quick")
SCALES = [0, 0.5, 1, 1.5, 3, 5]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder, printed text and processor seconds of one quick run."""
    folder = tmp_path_factory.mktemp("quick")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [Path(sys.executable).with_name("hyperlatent"), "demo", "--quick", "--out", folder / "out", "--seed", "3"]
    environment = os.environ | {"HYPERLATENT_CACHE": str(folder / "cache")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return folder / "out", result.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_results(quick):
    out, _, _ = quick
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"seed", "tasks", "rows"} and results["seed"] == 3 and results["tasks"] > 50
    for row in results["rows"]:
        assert set(row) == {"method", "guidance_scale", "accuracy", "ci95"}
        low, high = row["ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
    methods = [row["method"] for row in results["rows"]]
    assert sorted(set(methods)) == sorted(
        ["chance", "majority", "clip", "multitask", "hnet_z0", "hyperclip", "hyperldm", "hyperldm_shuffled_text",
         "nearest_task", "few_shot"])  # fmt: skip
    assert [row["guidance_scale"] for row in results["rows"] if row["method"] == "hyperldm"] == SCALES
    scaleless = {"chance", "majority", "clip", "multitask", "hnet_z0", "hyperclip", "nearest_task", "few_shot"}
    assert all(row["guidance_scale"] is None for row in results["rows"] if row["method"] in scaleless)
    assert len(methods) == len(SCALES) + 9


def test_something_is_learnt(quick):
    rows = {(row["method"], row["guidance_scale"]): row["accuracy"] for row in
            json.loads((quick[0] / "results.json").read_text())["rows"]}  # fmt: skip
    assert rows["clip", None] > rows["chance", None] + 0.1
    assert max(rows["hyperldm", scale] for scale in SCALES) > rows["chance", None] + 0.1


def test_files_and_lines(quick):
    out, printed, _ = quick
    assert json.loads((out / "config.json").read_text())["seed"] == 3
    for name in "guidance_scale.png", "trajectories.png":
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 300
    stages = ["tasks", "multitask", "hnet", "zoo", "hyperclip", "hyperldm", "evaluate"]
    assert [line.split()[0] for line in printed.splitlines()[:7]] == stages
    assert "| method |" in printed and "few_shot" in printed
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert visible == {*stages[1:], "results.json", "config.json", "guidance_scale.png", "trajectories.png"}


def test_quick_is_quick(quick):
    # 90 s on two idle cores; counted in processor seconds, since a busy machine is no fault of ours
    assert quick[2] < 120
