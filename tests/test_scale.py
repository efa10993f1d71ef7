"""Large task sets: chunks change nothing but memory, stand-ins follow the published split, and the chain takes any folder of tasks."""

import json
from dataclasses import replace

import pytest
import torch

from hyperlatent.base import CLIPAdapter, random_tasks
from hyperlatent.cli import main
from hyperlatent.data.rehearsal_tasks import SPLIT_VARIABLE, rehearsal_tasks
from hyperlatent.direct_weights import DirectWeights
from hyperlatent.evaluate import Models, zero_shot_rows
from hyperlatent.hyperclip import HyperCLIP
from hyperlatent.hyperldm import Denoiser
from hyperlatent.hypernet import HNet
from hyperlatent.meta import accuracy, validation_batches
from hyperlatent.settings import AdaptConfig, ZooConfig, preset
from hyperlatent.tasks import TaskSet
from hyperlatent.zoo import build_zoo, zoo_health

CONFIG = preset("scenes")
CONFIG = replace(CONFIG, hyperldm=replace(CONFIG.hyperldm, num_inference_steps=4, num_samples=2), evaluate=replace(
    CONFIG.evaluate, guidance_scales=(0.0, 1.5), few_shot=AdaptConfig(steps=2)))  # fmt: skip


def evaluated(tasks, most: int, monkeypatch):
    """Zoo, health, validation score and rows with `most` networks at once, and the most networks ever asked for at once."""
    monkeypatch.setattr(CLIPAdapter, "max_tasks", most)
    lots, made = torch.Generator().manual_seed(0), []
    base = CLIPAdapter(tasks.dim, hidden=4)
    hnet = HNet(base.n_weights, 3, (8,), 0.3, generator=lots).requires_grad_(False)
    trunk = hnet.trunk  # of all networks, also those whose weights are never there as a whole
    hnet.trunk = lambda z: made.append(z.numel() // z.shape[-1]) or trunk(z)
    zoo = build_zoo(hnet, base, tasks, ZooConfig(runs=2, samples_per_task=4, inner=AdaptConfig(steps=2)), progress=False)
    denoiser = Denoiser(3, tasks.question_dim, hidden=8, n_blocks=1, generator=lots)
    torch.nn.init.normal_(denoiser.out.weight, generator=lots)
    models = Models(base, DirectWeights(base.init(1, lots)[0]), hnet, zoo,
                    HyperCLIP(base.n_weights, tasks.question_dim, (8,), generator=lots), denoiser, tasks)  # fmt: skip
    rows = zero_shot_rows(models, tasks, CONFIG)
    scores = accuracy(hnet, base, validation_batches(base, tasks), AdaptConfig(steps=2))
    return zoo.latents, [row.per_task for row in rows], scores, zoo_health(zoo, hnet, base, tasks)["accuracy"], max(made)


def test_chunks_change_nothing_but_memory(monkeypatch):
    tasks = rehearsal_tasks(dim=16, num_tasks=30)
    whole, parts = evaluated(tasks, 1000, monkeypatch), evaluated(tasks, 4, monkeypatch)
    assert torch.allclose(whole[0], parts[0], atol=1e-4)
    assert len(whole[1]) == len(parts[1])
    for one, other in zip(whole[1], parts[1]): assert (one - other).abs().mean() < 0.01  # a tie may fall the other way
    assert whole[2:4] == pytest.approx(parts[2:4], abs=0.01)
    assert whole[4] >= 30 and parts[4] <= 4


def test_stand_ins_follow_the_published_split(tmp_path, monkeypatch):
    task = lambda letters: {"train": [[f"{x}1", x] for x in letters] + [[f"{x}2", x] for x in letters],
                            "test": [[f"{x}3", x] for x in letters], "answers": list(letters)}  # fmt: skip
    train = {f"what is thing {i}?": task("abc") for i in range(20)}
    (tmp_path / "meta_train.json").write_text(json.dumps(train))
    (tmp_path / "meta_test.json").write_text(json.dumps({"where is it?": task("ab")}))
    (tmp_path / "prompt_meta.json").write_text(json.dumps({"where is it?": "it is at {}"}))
    monkeypatch.setenv(SPLIT_VARIABLE, str(tmp_path))
    tasks = rehearsal_tasks(dim=24)
    assert tasks.source["split"] == "published" and tasks.questions == [*train, "where is it?"]
    assert tasks.tasks[-1].prompts == ("it is at a", "it is at b") and len(tasks.image_features) == 9
    assert len(tasks.split("meta-validation")) == 2 and len(rehearsal_tasks(dim=24, validation_share=0.0).split("meta-train")) == 20
    assert tasks.fingerprint == rehearsal_tasks(tmp_path, dim=24).fingerprint != rehearsal_tasks(tmp_path, dim=24, seed=1).fingerprint
    assert main(["prepare", "rehearsal", "--out", str(tmp_path / "out"), "--dim", "24"]) == 0
    assert TaskSet.load(tmp_path / "out").fingerprint == tasks.fingerprint


def test_the_chain_takes_a_folder(tmp_path, capsys):
    def error_of(*arguments: str) -> str:
        assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    random_tasks(4, 8, torch.Generator()).save(tmp_path / "tasks")
    assert "no meta-test task" in error_of("--tasks", str(tmp_path / "tasks"))
    assert "does not exist" in error_of("--tasks", str(tmp_path / "nothing"))
    assert "--preset" in error_of("--quick", "--preset", "reference")
    assert "no preset 'referense'" in error_of("--preset", "referense")


def test_what_a_set_is_made_from_travels_with_it(tmp_path):
    tasks = random_tasks(4, 8, torch.Generator())
    tasks.source = {"encoder": {"name": "mine"}}
    tasks.save(tmp_path / "tasks")
    assert TaskSet.load(tmp_path / "tasks").source == tasks.subset([1]).source == tasks.source
    assert tasks.fingerprint == random_tasks(4, 8, torch.Generator()).fingerprint  # what it holds, not where it is from
