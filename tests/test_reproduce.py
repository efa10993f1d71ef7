"""The whole comparison: stopped and gone on with, chosen on meta-validation alone, and its intervals against a plain bootstrap."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperlatent.artifacts import load_artifact
from hyperlatent.base import random_tasks
from hyperlatent.cli import main
from hyperlatent.config import to_dict
from hyperlatent.reproduce import run_seed
from hyperlatent.reproduce_results import Collected, claims, ours, table_rows
from hyperlatent.reproduce_settings import reproduce_preset
from hyperlatent.reproduce_training import shortened
from hyperlatent.statistics import crossed_bootstrap
from hyperlatent.tasks import TaskSet

pytestmark = pytest.mark.xdist_group("reproduce")
SPLITS = ["meta-train"] * 16 + ["meta-validation"] * 6 + ["meta-test"] * 8
CONFIG = replace(shortened(reproduce_preset()), device="cpu", methods=("mnet_maml", "text_film", "hvae"), studies=("samplers", "few_shot"))


def tasks_of(splits: list[str], changed_test: bool = False) -> TaskSet:
    """Random tasks of these splits; with other labels in meta-test if `changed_test`."""
    lots = torch.Generator().manual_seed(0)
    whole = random_tasks(len(splits), 16, lots)
    phrases, owner = whole.question_phrases()
    made = [replace(task, split=split) for task, split in zip(whole.tasks, splits, strict=True)]
    if changed_test:
        other = lambda pairs: tuple((image, 1 - label) for image, label in pairs)
        made = [replace(t, support=other(t.support), query=other(t.query)) if t.split == "meta-test" else t for t in made]
    return TaskSet(made, whole.image_features, question_features=[phrases[owner == i] for i in range(len(made))],
                   answer_features=list(whole.batch().answer_features))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks and settings of a very small comparison."""
    path = tmp_path_factory.mktemp("reproduce")
    tasks_of(SPLITS).save(path / "tasks")
    (path / "settings.json").write_text(json.dumps(to_dict(CONFIG)))
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return ["reproduce", "--config", str(folder / "settings.json"), "--data", str(folder / "tasks"), "--out", str(out), *more]


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from hyperlatent.cli import main; sys.exit(main())", *words]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """The folder of a comparison of two seeds that was never stopped."""
    words = command(*arguments(folder, folder / "finished", "--seeds", "2", "--workers", "2"))
    result = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "| method | zero-shot |" in result.stdout and "seed 1  hvae" in result.stdout
    return folder / "finished"


def test_killed_it_goes_on_to_the_same_results(folder, finished):
    out = folder / "killed"
    words = command(*arguments(folder, out, "--seeds", "2", "--workers", "2"))
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    seed = next(line.split()[1] for line in first.stdout if line.split()[2] == "hvae")
    first.kill()
    # both seeds' processes hold the pipe: it ends when they have ended
    rest, _ = first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL and not (out / "results.json").exists()
    assert "scores_few_shot" not in rest
    again = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert f"seed {seed}  mnet_maml           reused" in again.stdout
    for name in "results.json", "table.md", "table.tex":
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    left = [path.name for path in out.rglob(".*") if path.name != ".lock"]
    assert left == []


def test_results(finished):
    found = json.loads((finished / "results.json").read_text())
    assert found["seeds"] == [0, 1] and found["tasks"] == 8
    rows = {(row["method"], row["guidance_scale"]): row for row in found["rows"]}
    for row in rows.values():
        assert 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1 and len(row["per_seed"]) == 2
    for method in "clip", "multitask_0_steps", "mnet_maml_0_steps", "text_film", "hyperclip_hvae", "hyperldm_hvae":
        assert (method, None) in rows
    assert rows["hyperldm_hnet", 1.0]["published"] == [58.70, 0.11] and rows["clip", None]["published"] is None
    # stored per task: the row is their mean
    for seed, mean in enumerate(rows["text_film", None]["per_seed"]):
        stage = load_artifact(finished / f"seed{seed}" / "scores_test", "scores_test")
        at = [row["method"] for row in stage.documents["rows"]].index("text_film")
        assert abs(stage.tensors["per_task"][at].mean().item() - mean) < 1e-6
    assert {"guidance_scale.png", "examples.png", "samplers.png", "kinds.png"} <= {path.name for path in finished.iterdir()}
    assert (finished / "table.tex").read_text().count(r"\\") == len(rows) + 1


def test_a_seed_more_leaves_the_others(folder, finished, capsys):
    assert main(arguments(folder, finished, "--seeds", "1")) == 0
    printed = capsys.readouterr().out
    stages = [line.split()[2:] for line in printed.splitlines() if line.startswith("seed 0")]
    assert len(stages) > 15 and all(stage[1] == "reused" for stage in stages if stage[0] != "tasks")
    assert json.loads((finished / "results.json").read_text())["seeds"] == [0]


def test_a_seed_is_a_run_of_the_chain(folder, finished, capsys):
    assert main(["evaluate", "--out", str(finished / "seed0")]) == 0
    assert "hyperldm_shuffled_text" in capsys.readouterr().out


@pytest.mark.parametrize("changed", [False, True])
def test_nothing_is_chosen_on_meta_test(changed, tmp_path, finished):
    """Other labels in meta-test change its scores, and nothing that was chosen."""
    tasks_of(SPLITS, changed).save(tmp_path / "tasks")
    config = replace(CONFIG, tasks=str(tmp_path / "tasks"), studies=())
    run_seed(tmp_path / "seed0", config, say=lambda line: None)
    found = {name: [load_artifact(path / "seed0" / f"scores_{name}") for path in (tmp_path, finished)] for name in ("validation", "test")}
    assert found["validation"][0].documents["chosen"] == found["validation"][1].documents["chosen"]
    assert torch.equal(*(stage.tensors["per_task"] for stage in found["validation"]))
    assert torch.equal(*(stage.tensors["per_task"] for stage in found["test"])) == (not changed)


# ---- bad arguments


@pytest.mark.parametrize("more, message", [
    (["--seeds", "0"], "error: there are 0 seeds"),
    (["--workers", "-1"], "error: there are 5 seeds and -1 workers"),
    (["--data", "nowhere"], "does not exist, or is no folder"),
    (["--quick", "--preset", "reference"], "--quick and --preset are both given"),
])  # fmt: skip
def test_bad_arguments(more, message, folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err


def test_a_failing_process_is_named(folder, tmp_path, capfd):
    assert main(arguments(folder, tmp_path / "out", "--data", "nowhere", "--seeds", "2", "--workers", "2")) == 1
    printed = capfd.readouterr().err
    assert "error: seed 1: " in printed and "error: seed 0 did not finish" in printed and "Traceback" not in printed


@pytest.mark.parametrize("more", [["--methods", "mnet_mamle"], ["--studies", "evidnce"], ["--sed", "3"]])
def test_misspelt_options(more, folder, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(arguments(folder, tmp_path / "out", *more))
    assert end.value.code == 2


def test_meta_validation_tasks_are_needed(folder, tmp_path, capsys):
    tasks_of(["meta-train"] * 16 + ["meta-test"] * 8).save(tmp_path / "tasks")
    assert main(arguments(folder, tmp_path / "out", "--data", str(tmp_path / "tasks"), "--seeds", "1")) == 1
    assert "there is no meta-validation task" in capsys.readouterr().err


# ---- statistics


def test_bootstrap_is_the_plain_one():
    """Against a loop that draws seeds and tasks and takes the drawn table's mean."""
    random = np.random.default_rng(0)
    scores = random.normal(0.6, 0.1, (1, 40)) + random.normal(0, 0.1, (5, 1)) + random.normal(0, 0.05, (5, 40))
    means = [scores[random.integers(5, size=4)][:, random.integers(40, size=40)].mean() for _ in range(20_000)]
    found = crossed_bootstrap(torch.tensor(scores), 20_000)
    low, high = np.quantile(means, [0.025, 0.975])
    assert abs(found.value - scores.mean()) < 1e-12
    assert abs(found.low - low) < 0.03 * (high - low) and abs(found.high - high) < 0.03 * (high - low)


def scored(validation: dict, test: dict) -> Collected:
    kinds = [dict(question="?", kind="", new_pairs=0)] * 50
    choice = {"hnet": dict(guidance_scale=1.0, scheduler="ddim", num_inference_steps=10, walk="")}
    lots = torch.Generator().manual_seed(0)
    table = lambda scores: {key: value + 0.01 * torch.randn(3, 50, generator=lots) for key, value in scores.items()}
    return Collected([0, 1, 2], {"validation": table(validation), "test": table(test)}, [choice] * 3, kinds, [])


def test_ours_is_chosen_on_validation_and_judged_on_test():
    names = [("clip", None), ("hyperldm_hnet", 1.0), ("hyperclip_hnet", None), ("text_film", None), ("hnet_0_steps", None)]
    validation, test = dict(zip(names, (0.5, 0.6, 0.7, 0.5, 0.5))), dict(zip(names, (0.5, 0.8, 0.6, 0.7, 0.5)))
    found = scored(validation, test)
    assert ours(found) == "hyperclip_hnet"
    verdicts = {one.text: one for one in claims(found, 1000)}
    assert verdicts["HNet + HyperCLIP beats CLIP"].verdict == "holds"
    lost = verdicts["HNet + HyperCLIP beats text-conditioned FiLM"]
    assert lost.verdict == "refuted" and abs(lost.difference.value + 0.1) < 0.01 and lost.as_dict()["holds"] is False
    rows = {row["method"]: row for row in table_rows(found, 1000) if row["guidance_scale"] is None}
    assert abs(rows["hyperclip_hnet"]["delta_clip"] - 0.1) < 0.01 and abs(rows["hyperclip_hnet"]["validation"] - 0.7) < 0.01
