"""A package with a source of tasks, installed on the fly, is found by name; a broken one is one clear error."""

import sys

import pytest
import torch

from hyperlatent.errors import ConfigError, HyperLatentError
from hyperlatent.plugins import load_plugin, plugins

MODULE = """
import torch
from hyperlatent.base import random_tasks
from hyperlatent.tasks import TaskSet
from hyperlatent.trajectory import Trajectory

class Still:
    "Stays where the generator starts."

    def __init__(self, pipe):
        self.z0 = pipe.generator_network.z0

    def __call__(self, features, *, seeds):
        z = self.z0.expand(2, *seeds.shape, -1)
        return Trajectory(z, z[:1], torch.zeros(1), seeds, "still")

def bricks():
    parts = [random_tasks(4, 8, torch.Generator().manual_seed(i), split) for i, split in enumerate(["meta-train", "meta-test"])]
    from dataclasses import replace
    tasks = [replace(t, question=f"{t.split} {t.question}") for part in parts for t in part.tasks]
    first = parts[0]
    return TaskSet([replace(t, support=t.support, paraphrases=()) for t in tasks], first.image_features,
                   question_features=[torch.ones(1, 8) for _ in tasks], answer_features=[torch.ones(2, 8) for _ in tasks])
"""
ENTRY_POINTS = """[hyperlatent.sources]
bricks = bricks_for_tests:bricks
rubble = bricks_for_tests:nothing
dust = package_that_is_not_there:dust

[hyperlatent.guides]
still = bricks_for_tests:Still
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What pip leaves behind: the module, and the metadata that Python looks for beside it."""
    (tmp_path / "bricks_for_tests.py").write_text(MODULE)
    info = tmp_path / "bricks_for_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bricks-for-tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("bricks_for_tests", None)


def test_a_source_is_found_by_name_and_only_then_imported(installed):
    assert {"bricks", "rubble", "dust"} <= plugins("sources").keys() and "bricks_for_tests" not in sys.modules
    assert len(load_plugin("sources", "bricks")()) == 8


def test_a_run_takes_its_tasks_from_a_source(installed):
    from dataclasses import replace

    from hyperlatent.settings import preset
    from hyperlatent.stages import load_tasks

    tasks = load_tasks(replace(preset("scenes"), tasks="bricks"))
    assert len(tasks.split("meta-train")) == len(tasks.split("meta-test")) == 4


def test_the_pipeline_takes_a_guide_by_name(installed, tmp_path):
    from hyperlatent import HyperLatentPipeline, cli

    pipe = HyperLatentPipeline.from_pretrained("scenes", progress=False)
    out = pipe(["what color is the star?", "where is the ring?"], guider="still")
    assert out.trajectory.method == "still" and torch.equal(out.latents[0], pipe.generator_network.z0.expand(2, -1))
    with pytest.raises(HyperLatentError, match="'stil'.*'classifier-free', 'classifier', 'still'"):
        pipe("what color is the star?", guider="stil")
    with pytest.raises(HyperLatentError, match="Still has no option 'guidance_scale'"):
        pipe("what color is the star?", guider="still", guidance_scale=1.5)
    assert cli.main(["generate", "what color is the star?", "--guider", "still", "--out", str(tmp_path / "w.safetensors")]) == 0


def test_what_is_wrong_with_a_plugin_is_told(installed):
    with pytest.raises(ConfigError, match="source 'brick'.*Did you mean 'bricks'"): load_plugin("sources", "brick")
    with pytest.raises(ConfigError, match="'rubble'.*AttributeError.*reinstall"): load_plugin("sources", "rubble")
    with pytest.raises(ConfigError, match="'dust'.*No module named 'package_that_is_not_there'"): load_plugin("sources", "dust")
    with pytest.raises(ConfigError, match="no installed package has guide 'bricks'"): load_plugin("guides", "bricks")
    with pytest.raises(ConfigError, match="sauces"): plugins("sauces")
