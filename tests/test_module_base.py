"""Any network as the base: the whole chain gives what it gives with the adapter that is batched by hand, about as fast."""

import statistics
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperlatent.base import CLIPAdapter, cross_entropy, random_batch, random_tasks
from hyperlatent.errors import HyperLatentError, TaskError
from hyperlatent.guide_training import train_hyperclip, train_hyperldm
from hyperlatent.meta import train_hnet, train_mnet
from hyperlatent.module_base import ModuleBase, right_answer
from hyperlatent.settings import AdaptConfig, FitConfig, GeneratorConfig, HyperCLIPConfig, HyperLDMConfig, MultitaskConfig, ZooConfig
from hyperlatent.tensor_tasks import TensorTasks
from hyperlatent.zoo import build_zoo, zoo_health

FIT = FitConfig(steps=6, batch_size=4, validate_every=3, warmup=0)


class Adapter(nn.Module):
    """The adapter in ordinary layers."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        return F.normalize(x + self.up(self.down(x).relu()), dim=-1)


def compare_with_answers(outputs, batch):
    return (100 * outputs @ batch.answer_features.mT).masked_fill(~batch.answer_mask[:, None], -torch.inf)


def adapter_module(dim, hidden):
    return ModuleBase(Adapter(dim, hidden), cross_entropy, right_answer, readout=compare_with_answers,
                      averaged=lambda logits: logits.softmax(-1))


def chain(base, tasks, validation, method="auto_decoder"):
    """Everything that meta-learning makes, as tensors by name."""
    inner = AdaptConfig(steps=3, learning_rate=0.01)
    mnet, _ = train_mnet(base, tasks, validation, MultitaskConfig(fit=FIT), progress=False)
    config = GeneratorConfig(latent_dim=5, hidden=(6,), method=method, samples_per_task=8, inner=inner, fit=FIT, output_scale=0.3)
    hnet, _ = train_hnet(base, tasks, validation, config, progress=False)
    zoo = build_zoo(hnet, base, tasks, ZooConfig(runs=2, samples_per_task=8, inner=inner), progress=False)
    health, held_out = zoo_health(zoo, hnet, base, tasks), [validation.batch()]
    hyperclip, _ = train_hyperclip(zoo, hnet, base, held_out, HyperCLIPConfig(hidden=(6,), fit=FIT, num_inference_steps=3), progress=False)
    config = HyperLDMConfig(hidden=8, blocks=1, prediction_type="v_prediction", scheduler="ddim", num_inference_steps=4, num_samples=2,
                            fit=replace(FIT, ema_decay=0.5))
    denoiser, _ = train_hyperldm(zoo, hnet, base, held_out, config, progress=False)
    models = dict(mnet=mnet, hnet=hnet, hyperclip=hyperclip, denoiser=denoiser)
    tensors = {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    return tensors | {"latents": zoo.latents, "accuracy": torch.tensor(health["accuracy"])}


@pytest.mark.parametrize("method", ["auto_decoder", "fomaml", "maml"])
def test_the_chain_with_a_module_is_the_chain_with_the_adapter(method):
    lots = torch.Generator().manual_seed(0)
    tasks, validation = random_tasks(8, 16, lots), random_tasks(4, 16, lots, "meta-validation")
    by_hand, by_module = (chain(base, tasks, validation, method) for base in (CLIPAdapter(16, 4), adapter_module(16, 4)))
    assert by_hand.keys() == by_module.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(by_module[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_chain_fits_curves():
    lots = torch.Generator().manual_seed(0)
    slopes = torch.randn(12, generator=lots)
    x = torch.rand(12, 20, 1, generator=lots) * 2 - 1
    question = F.normalize(torch.stack([slopes, slopes.square(), torch.ones(12)], 1), dim=1)[:, None]
    make = lambda part: TensorTasks([f"slope {s:.2f}" for s in slopes[part].tolist()], question[part], x[part],
                                    slopes[part, None, None] * x[part], num_support=10)
    base = ModuleBase(nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)), nn.MSELoss(reduction="none"))
    tensors = chain(base, make(slice(8)), make(slice(8, 12)), "fomaml")
    assert all(value.isfinite().all() for value in tensors.values()) and tensors["accuracy"] < 0  # minus the squared error


def test_a_convolution_gives_each_task_its_own_pictures():
    """Against one call per task of a module with the parameters loaded."""
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    base, lots = ModuleBase(net, cross_entropy, right_answer), torch.Generator().manual_seed(0)
    weights, pictures = base.init(3, lots, 0.5), torch.randn(3, 5, 64, generator=lots)
    outputs = base.outputs(weights, pictures)
    for t in range(3):
        other, start = type(net)(*net), 0
        other.load_state_dict(net.state_dict())
        own = {}
        for name, p in net.named_parameters():
            change = weights[t, start : start + p.numel()].view_as(p)
            own[name] = p.detach() + change * (p[0].numel() ** -0.5 if p.ndim > 1 else 1.0)
            start += p.numel()
        torch.testing.assert_close(torch.func.functional_call(other, own, pictures[t]), outputs[t], rtol=1e-4, atol=1e-5)


def test_one_task_alone_is_that_task_among_others():
    base, lots = adapter_module(16, 4), torch.Generator().manual_seed(0)
    weights, x = base.init(3, lots), torch.randn(3, 5, 16, generator=lots)
    for t in range(3):
        torch.testing.assert_close(base.outputs(weights[t : t + 1], x[t : t + 1]), base.outputs(weights, x)[t : t + 1])


def test_the_module_itself_is_left_alone():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    base = ModuleBase(net, nn.MSELoss(reduction="none"), scales={"0.bias": 0.0})
    outputs = base.outputs(torch.zeros(2, base.n_weights), torch.ones(2, 3, 2))
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.allclose(outputs, net.eval()(torch.ones(2, 3, 2)))  # no dropout
    moved = base.outputs(torch.cat([torch.zeros(2, 4), torch.ones(2, 2)], 1), torch.ones(2, 3, 2))
    assert torch.equal(moved, outputs)  # the bias counts in units of zero


@pytest.mark.parametrize("change", [dict(questions=["a"]), dict(inputs=torch.zeros(2, 5, 1)), dict(inputs=torch.zeros(2)),
                                    dict(num_support=6), dict(num_support=0),
                                    dict(targets=torch.full((2, 6, 1), torch.nan)), dict(question_features=torch.zeros(1, 1, 3))])
def test_tensor_tasks_that_do_not_fit_are_refused(change):
    fitting = dict(questions=["a", "b"], question_features=torch.zeros(2, 1, 3), inputs=torch.zeros(2, 6, 1),
                   targets=torch.zeros(2, 6, 1), num_support=3)
    TensorTasks(**fitting)
    with pytest.raises(TaskError):
        TensorTasks(**fitting | change)


def test_a_metric_that_averages_is_refused():
    base = ModuleBase(nn.Linear(1, 1), nn.MSELoss(reduction="none"), F.mse_loss)
    tasks = TensorTasks(["a", "b"], torch.zeros(2, 1, 3), torch.zeros(2, 6, 1), torch.zeros(2, 6, 1), 3)
    with pytest.raises(HyperLatentError, match="metric gives shape.*reduction='none'"):
        base.accuracy(torch.zeros(2, 2), tasks.batch().query, tasks.batch())


def test_time_beside_the_hand_batched_adapter(capsys):
    """Gradients and losses of 48 tasks, measured alternately in processor time: medians of ratios, which neighbours do not stretch."""
    lots = torch.Generator().manual_seed(0)
    batch = random_batch([40] * 48, [4] * 48, 128, lots)
    bases = CLIPAdapter(128, 64), adapter_module(128, 64)
    weights = bases[0].init(48, lots)

    def gradient(base):
        own = weights.detach().requires_grad_()
        torch.autograd.grad(base.loss(own, batch.support, batch).sum(), own)

    def loss(base):
        with torch.no_grad(): base.loss(weights, batch.support, batch)

    def seconds(work, base):
        start = time.process_time()
        work(base)
        return time.process_time() - start

    ratios = {}
    for work in gradient, loss:
        times = [[seconds(work, base) for base in bases] for _ in range(31)][1:]
        ratios[work.__name__] = statistics.median(by_module / by_hand for by_hand, by_module in times)
    with capsys.disabled(): print(f"\nModuleBase beside the adapter, times its time: {ratios}")
    assert ratios["gradient"] < 1.5 and ratios["loss"] < 2


@pytest.mark.parametrize("grad", [True, False])
def test_many_tasks_are_computed_in_parts_that_stay_in_the_cache(grad):
    base, lots = adapter_module(16, 4), torch.Generator().manual_seed(0)
    weights, x = base.init(7, lots), torch.randn(7, 5, 16, generator=lots)
    whole, parts = base.outputs(weights, x), []
    run, base.cache = base.parameters, 4 * base.n_weights * 3  # three tasks
    base.parameters = lambda w: parts.append(len(w)) or run(w)
    torch.testing.assert_close(base.outputs(weights.requires_grad_(grad), x), whole)
    assert parts == ([7] if grad else [3, 3, 1])
