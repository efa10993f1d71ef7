"""What a GPU replays from a recording, without a GPU: a stand-in that reads only from its places and writes only to its own results."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

import hyperlatent.adapt
import hyperlatent.graphs
import hyperlatent.training
from hyperlatent.adapt import adapt
from hyperlatent.base import CLIPAdapter, random_batch
from hyperlatent.graphs import Captured
from hyperlatent.guidance import ClassifierFreeGuidance
from hyperlatent.guide_training import train_hyperclip, train_hyperldm
from hyperlatent.hyperldm import Denoiser
from hyperlatent.hypernet import HNet
from hyperlatent.settings import FitConfig, HyperCLIPConfig, HyperLDMConfig
from hyperlatent.speed.training import random_zoo

Real = hyperlatent.graphs._Recording


class StandIn(Real):
    """A recording as CUDA makes it, as far as memory goes."""

    made = 0

    def __init__(self, function, inputs, pool):
        StandIn.made += 1
        self.places, self.last = [x.detach().clone() for x in inputs], [(x, x._version) for x in inputs]
        self.result = function(*self.places)
        self.graph = SimpleNamespace(replay=lambda: tree_map(lambda old, new: old.data.copy_(new.detach()), self.result,
                                                             function(*self.places)))


@pytest.fixture
def recorded(monkeypatch):
    """Everything that would be recorded on a GPU is, by the stand-in; gives the number of recordings so far."""
    StandIn.made = 0
    for module in (hyperlatent.graphs, hyperlatent.adapt, hyperlatent.training):
        monkeypatch.setattr(module, "recordable", lambda inputs: all(isinstance(x, torch.Tensor) for x in inputs))
    monkeypatch.setattr(hyperlatent.graphs, "_Recording", StandIn)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(hyperlatent.adapt, "gradients_of",
                        lambda generator, base, batch, steps, otherwise, dtype: [(torch.arange(len(batch)), otherwise(batch))])
    return lambda: StandIn.made


def test_places_are_filled_and_results_are_copies(recorded):
    calls, constant = [], torch.ones(2)

    def function(x, y):
        calls.append(x)
        return x + y

    captured = Captured(function, after=2)
    results = [captured(torch.full((2,), float(i)), constant) for i in range(5)]
    assert [x.tolist() for x in results] == [[i + 1.0] * 2 for i in range(5)] and recorded() == 1
    constant += 1  # the same tensor, changed
    assert captured(torch.zeros(2), constant).tolist() == [2, 2]
    assert captured(torch.zeros(3), torch.ones(3)).tolist() == [1, 1, 1]  # other shapes are another function
    assert captured(torch.zeros(2), constant).tolist() == [2, 2] and recorded() == 1


def test_what_cannot_be_recorded_is_computed(recorded, monkeypatch):
    def refuse(*_): raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(hyperlatent.graphs, "_Recording", refuse)
    captured = Captured(lambda x: x + 1, after=1)
    with pytest.warns(UserWarning, match="step by step, since CUDA cannot record it: operation not permitted"):
        assert [captured(torch.tensor(float(i))).item() for i in range(4)] == [1, 2, 3, 4]
    monkeypatch.setattr(hyperlatent.graphs, "_Recording", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):  # what computes in parts shall know
        for _ in range(3): Captured(lambda x: x + 1, after=0)(torch.zeros(1))


def networks():
    lots = torch.Generator().manual_seed(0)
    base = CLIPAdapter(8, 4)
    hnet = HNet(base.n_weights, 6, (10,), 0.3, generator=lots)
    return base, hnet, lots


def test_the_inner_loop(recorded):
    """Batches of different tasks one after the other, and parameters that have moved, from one recording."""
    base, hnet, lots = networks()
    plain = lambda batch: hyperlatent.adapt.support_gradient(hnet, base, batch, z)
    for round_ in range(3):
        batch = random_batch([5, 9, 7], [2, 3 + round_, 4], 8, lots)
        z = hnet.z0.detach().expand(3, -1)
        for _ in range(6): z = z - 0.02 * plain(batch)
        assert torch.allclose(adapt(hnet, base, batch, steps=6, learning_rate=0.02), z, atol=1e-6)
        with torch.no_grad():
            for p in hnet.parameters(): p.mul_(1.1)
    assert recorded() == 1
    moved = HNet(base.n_weights, 6, (10,), 0.3, generator=lots)
    assert not torch.allclose(adapt(moved, base, batch, steps=6, learning_rate=0.02), z, atol=1e-3) and recorded() == 2


@pytest.mark.parametrize("clip_norm", [0.0, 1e-2])
def test_trainings(recorded, monkeypatch, clip_norm):
    """Both guides end where they end without recordings."""
    base, hnet, lots = networks()
    hnet.requires_grad_(False)
    zoo = random_zoo(hnet.z0 + torch.randn(12, 6, generator=lots), 5)
    few = FitConfig(steps=12, batch_size=8, warmup=0, ema_decay=0.9, clip_norm=clip_norm)
    ldm, clip = HyperLDMConfig(hidden=16, blocks=2, fit=few), HyperCLIPConfig(hidden=(8,), fit=few)
    trained = lambda: [p.detach() for learn, config in ((train_hyperldm, ldm), (train_hyperclip, clip))
                       for p in learn(zoo, hnet, base, [], config, progress=False)[0].parameters()]
    replayed = trained()
    assert recorded() == 2
    monkeypatch.setattr(hyperlatent.training, "recordable", lambda inputs: False)
    step_by_step = trained()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(replayed, step_by_step, strict=True))
    short = replace(few, steps=1)
    ldm, clip = replace(ldm, fit=short), replace(clip, fit=short)
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(replayed, trained(), strict=True)), "nothing was learnt"


def test_the_sampler(recorded, monkeypatch):
    lots = torch.Generator().manual_seed(0)
    denoiser = Denoiser(4, 5, hidden=16, n_blocks=2, generator=lots)
    for parameter in denoiser.parameters(): torch.nn.init.normal_(parameter, std=0.2, generator=lots)
    questions = torch.randn(3, 5, generator=lots)

    def sample(scheduler):
        return ClassifierFreeGuidance(denoiser, scheduler)(questions, guidance_scale=1.5, num_inference_steps=20,
                                                           guidance_interval=(0.2, 0.7), generator=torch.Generator().manual_seed(1)).z

    for scheduler in "ddpm", "ddim", "dpmsolver++":
        replayed, before = sample(scheduler), recorded()
        assert before
        with monkeypatch.context() as plain:
            plain.setattr(hyperlatent.graphs, "recordable", lambda inputs: False)
            assert torch.allclose(sample(scheduler), replayed, atol=1e-5) and recorded() == before
