"""What `hyperlatent bench` times does what the plain loops do: the same numbers stage by stage; and its file holds what it promises."""

import os
from dataclasses import replace

import pytest
import torch

import hyperlatent.adapt as adapting
from hyperlatent.adapt import adapt
from hyperlatent.base import CLIPAdapter
from hyperlatent.cli import main
from hyperlatent.direct_weights import DirectWeights
from hyperlatent.errors import ConfigError
from hyperlatent.files import read_json
from hyperlatent.fixed_inputs import FixedInputs
from hyperlatent.guidance import ClassifierFreeGuidance, ClassifierGuidance
from hyperlatent.hvae import HVAE, hvae_loss
from hyperlatent.hyperclip import info_nce
from hyperlatent.hyperldm import diffusion_loss
from hyperlatent.meta import maml_loss
from hyperlatent.settings import AdaptConfig, FitConfig, ZooConfig
from hyperlatent.speed.run import STAGES, plain_loops
from hyperlatent.speed.setup import make_setup, trainable
from hyperlatent.speed.training import random_zoo
from hyperlatent.zoo import build_zoo


@pytest.fixture(scope="module")
def plain(root):
    """The plain loops of this checkout."""
    return plain_loops(root / "benchmarks")


@pytest.fixture(scope="module")
def setup():
    found = make_setup("tiny", quick=True)
    found.hnet.readout.bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(9))  # zero at first: nobody would miss it
    return found


def close(one, other, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one, other, rtol=10 * tolerance, atol=tolerance)


def descended(model, step) -> list[torch.Tensor]:
    """The parameters after one step of plain gradient descent, taken by `step(optimizer)`."""
    step(torch.optim.SGD(model.parameters(), 0.1))
    return [p.detach() for p in model.parameters()]


def stepped(model, loss, clip_norm: float = 1.0):
    """The same after one step on our loss."""

    def step(optimizer):
        optimizer.zero_grad()
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()

    return descended(model, step)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor], start) -> None:
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(not close(a, b.detach()) for a, b in zip(ours, start.parameters())), "nothing was learnt"


# ---- the inner loop


@pytest.mark.parametrize("images", [False, True])
def test_adapted_latents_and_weights(setup, plain, images, monkeypatch):
    """All tasks at once; and in parts, with the first layer's images instead of its weights, as for many steps at the published sizes."""
    made = []
    if images:
        monkeypatch.setattr(adapting, "TASKS", 5)
        monkeypatch.setattr(adapting, "PART_BYTES", 1)
        monkeypatch.setattr(adapting, "worth_fixing", lambda *_: True)
        monkeypatch.setattr(adapting, "FixedInputs", lambda *inputs: made.append(FixedInputs(*inputs)) or made[-1])
    batch, base = setup.support(12), setup.base
    tasks = plain.plain_tasks(batch)
    direct = DirectWeights(base.init(1, torch.Generator().manual_seed(0))[0]).requires_grad_(False)
    for generator, rate in (setup.hnet, 0.02), (direct, 0.05):
        ours = adapt(generator, base, batch, steps=5, learning_rate=rate)
        assert close(ours, plain.adapt_all(generator, generator.z0, tasks, base.hidden, 5, rate))
        assert not close(ours, generator.z0.expand_as(ours), 1e-3)
    assert len({len(one.images) for one in made}) <= 1 and len(made) == 3 * images
    assert not images or made[0].memory is made[-1].memory


def test_chunks_of_the_zoo_change_nothing(setup):
    tasks = setup.tasks.split("meta-train")
    config = ZooConfig(runs=1, samples_per_task=8, inner=AdaptConfig(steps=4, learning_rate=0.02))
    whole, parts = (build_zoo(setup.hnet, setup.base, tasks, config, max_tasks=n, progress=False).latents for n in (100, 7))
    assert close(whole, parts)


def test_bfloat16_keeps_the_accuracy():
    """Not the latents to the last digit, but what they are good for: within 0.2 points on tasks that can be learnt."""
    from hyperlatent.data.rehearsal_tasks import rehearsal_tasks

    tasks = rehearsal_tasks(dim=64, num_tasks=250)
    base, lots = CLIPAdapter(64, 16), torch.Generator().manual_seed(0)
    hnet = make_setup("tiny").hnet.__class__(base.n_weights, 32, (32,), 0.3, generator=lots).requires_grad_(False)
    batch = tasks.batch()
    scores = {}
    for dtype in (torch.float32, torch.bfloat16):
        z = adapt(hnet, base, batch, steps=10, learning_rate=0.02, dtype=dtype)
        scores[dtype] = base.accuracy(hnet(z), batch.query, batch).mean().item()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapt(hnet, base, batch, steps=10, learning_rate=0.02), z)
    start = base.accuracy(hnet(hnet.z0.expand(len(batch), -1)), batch.query, batch).mean().item()
    assert scores[torch.float32] > start + 0.05
    assert scores[torch.bfloat16] == pytest.approx(scores[torch.float32], abs=0.002)


# ---- trainings


@pytest.mark.parametrize("method", ["fomaml", "maml"])
def test_meta_steps(setup, plain, method):
    tasks, base = setup.tasks.split("meta-train"), setup.base
    fitted = FitConfig(batch_size=6)
    config = replace(setup.config.hnet, method=method, samples_per_task=10, fit=fitted, inner=AdaptConfig(steps=3, learning_rate=0.02))
    ours = stepped(trainable(setup.hnet), lambda m: maml_loss(m, base, tasks, config, torch.Generator().manual_seed(5)))
    # what `maml_loss` draws
    lots = torch.Generator().manual_seed(5)
    chosen = torch.randperm(len(tasks), generator=lots)[:6]
    drawn = plain.plain_tasks(tasks.batch(chosen, num_support=10, generator=lots))
    model = trainable(setup.hnet)
    theirs = descended(model, lambda o: plain.maml_step(model, o, drawn, base.hidden, 3, 0.02, method == "maml", 1.0))
    same(ours, theirs, setup.hnet)


def test_hvae_step(setup, plain):
    networks, lots = setup.base.init(6, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
    hvae = HVAE(setup.base.n_weights, 4, (8,), generator=lots).fit_statistics(networks)
    ours = stepped(trainable(hvae), lambda m: hvae_loss(m, networks, 0.5, torch.Generator().manual_seed(3))[0])
    noise, model = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), trainable(hvae)
    same(ours, descended(model, lambda o: plain.hvae_step(model, o, networks, noise, 0.5, 1.0)), hvae)


def test_hyperclip_step(setup, plain):
    zoo = random_zoo(setup.latents(8), setup.tasks.question_dim)
    z, questions = zoo.latents[0], zoo.phrases
    ours = stepped(trainable(setup.hyperclip), lambda m: info_nce(m, setup.hnet(z), questions))
    model = trainable(setup.hyperclip)
    same(ours, descended(model, lambda o: plain.hyperclip_step(model, setup.hnet, o, z, questions, 1.0)), setup.hyperclip)


def test_diffusion_step(setup, plain):
    zoo, scheduler = random_zoo(setup.latents(16), setup.tasks.question_dim), setup.denoiser.make_scheduler()
    z, questions = zoo.latents[0], zoo.phrases
    ours = stepped(trainable(setup.denoiser), lambda m: diffusion_loss(m, z, questions, scheduler, 0.2, torch.Generator().manual_seed(4)))
    lots = torch.Generator().manual_seed(4)
    t, noise = torch.randint(1000, (16,), generator=lots), torch.randn(16, 6, generator=lots)
    drawn, model = (t, noise, torch.rand(16, 1, generator=lots)[:, 0] < 0.2), trainable(setup.denoiser)
    theirs = descended(model, lambda o: plain.diffusion_step(model, o, z, questions, *drawn, scheduler.alphas_cumprod, 1.0))
    same(ours, theirs, setup.denoiser)


# ---- guidance


@pytest.mark.parametrize("name, steps", [("ddpm", 20), ("ddim", 10), ("dpmsolver++", 5)])
def test_samples(setup, plain, name, steps):
    questions = setup.tasks.batch(range(5)).question_features
    seeds = torch.full((1, 5), 7)
    ours = ClassifierFreeGuidance(setup.denoiser, name)(questions, guidance_scale=1.5, num_inference_steps=steps, seeds=seeds).final[0]
    scheduler = setup.denoiser.make_scheduler(name)
    assert close(ours, plain.sample_all(setup.denoiser, scheduler, questions, steps, 1.5, 7), 1e-4)
    assert not close(ours, plain.sample_all(setup.denoiser, scheduler, questions, steps, 30.0, 7), 1e-3)


def test_walks(setup, plain):
    questions = setup.tasks.batch(range(5)).question_features
    options = dict(learning_rate=0.05, prior_weight=0.01)
    ours = ClassifierGuidance(setup.hyperclip, setup.hnet)(questions, num_inference_steps=6, num_samples=1, **options).final[0]
    assert close(ours, plain.walk_all(setup.hyperclip, setup.hnet, questions, 6, **options), 1e-4)
    assert not close(ours, setup.hnet.z0.expand_as(ours), 1e-2)


def test_evaluation(setup, plain):
    tasks = setup.tasks.split("meta-test")
    z, batch = setup.latents(len(tasks)), tasks.batch()
    with torch.no_grad():
        weights = setup.hnet(z)
        ours = setup.base.accuracy(weights, batch.query, batch)
    assert close(weights, setup.hnet(z))  # with gradients the network takes torch's own product
    assert close(ours, plain.evaluate_all(setup.hnet, z, plain.plain_tasks(batch), setup.base.hidden))
    assert ours.std() > 0


def test_pictures(plain, tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    from hyperlatent.encoders import load_encoder

    files, lots = [tmp_path / f"{i}.png" for i in range(3)], torch.Generator().manual_seed(0)
    for file in files:
        Image.fromarray(torch.randint(256, (48, 80, 3), generator=lots, dtype=torch.uint8).numpy()).save(file)
    encoder = load_encoder("scenes", device="cpu")
    preprocess = image_transform_v2(PreprocessCfg(**encoder.preprocessing.config), is_train=False)
    assert close(encoder.encode_images(files), plain.encode_all(encoder.model, preprocess, files))


# ---- the command


def test_bench_writes_its_file(tmp_path, root, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "--scale", "tiny", "--quick", "--out", str(out), "--plain", str(root / "benchmarks")]) == 0
    printed, found = capsys.readouterr().out, read_json(out)
    rows = found["stages"]
    assert len(rows) == sum(map(len, STAGES.values())) and all(row["name"] in printed for row in rows)
    for row in rows:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] and row["flop"] > 0 and row["peak_gb"] > 0
        assert 0 < row["part"] <= 1.0001 and 0 < row["matmul_share"] < 1 and len(row["seconds"]) == len(row["other_seconds"]) == 1
        assert row["reached"] is (None if row["target"] is None else row["reached"])
    assert found["limits"]["matmul"] > 1e8 and found["limits"]["bandwidth"] > 1e7
    assert set(found["startup"]) == {"python", "torch", "hyperlatent", "pipeline", "help"}
    assert os.listdir(tmp_path) == ["bench.json"]


def test_bench_of_some_stages_and_wrong_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hyperlatent.speed.run.startup", lambda repeats: {"help": 0.0})
    out = tmp_path / "bench.json"
    assert main(["bench", "--scale", "tiny", "--quick", "--stages", "evaluate", "walk", "--out", str(out)]) == 0
    assert [row["name"] for row in read_json(out)["stages"]] == ["evaluation", "HyperCLIP guidance"]
    capsys.readouterr()
    assert main(["bench", "--stages", "nothing", "--out", str(tmp_path / "none.json")]) == 1
    assert "there is no stage 'nothing'" in capsys.readouterr().err and not (tmp_path / "none.json").exists()
    with pytest.raises(ConfigError, match="there is no"):
        plain_loops(tmp_path)
