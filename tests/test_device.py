"""The chain on another device, without one: tensors that say they are on a GPU, compute on the CPU, and refuse to meet a CPU tensor."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from hyperlatent.base import CLIPAdapter, random_tasks
from hyperlatent.settings import AdaptConfig, FitConfig, preset

GPU = torch.device("lazy")  # a name only; "cuda" itself would look for a driver
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}  # indices may be on the CPU


class Elsewhere(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=GPU,
            requires_grad=False)

    def __init__(self, inner): self.inner = inner
    def __repr__(self, **options): return f"Elsewhere({self.inner})"
    def tolist(self): return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


def dispatch(op, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    if op in INDEXED: tensors = [x for x in (args[0], *args[2:3]) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim]
    if there and here and op not in COPIES:
        raise RuntimeError(f"{op}: expected all tensors to be on the same device, found one of shape {tuple(here[0].shape)} on the CPU")
    device = kwargs.get("device")
    if isinstance(kwargs.get("generator"), torch.Generator) and (there or device == GPU):
        raise RuntimeError(f"{op}: expected another device type for generator but found 'cpu'")
    result_there = GPU.type == torch.device(device).type if device is not None else there
    if op is aten.copy_.default: result_there = isinstance(args[0], Elsewhere)
    if "device" in kwargs: kwargs = kwargs | {"device": torch.device("cpu")}
    inner = lambda x: x.inner if isinstance(x, Elsewhere) else x
    out = op(*tree_map(inner, args), **tree_map(inner, kwargs))
    if not result_there: return out
    if op._schema.name.endswith("_") and isinstance(args[0], Elsewhere): return args[0]
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere) else x, out)


class Factories(TorchDispatchMode):
    """Also `torch.zeros(..., device=...)` and `x.to(device)`, where no argument is elsewhere yet."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


@pytest.fixture
def gpu():
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU and then moved, where we see it
    try:
        with Factories(): yield SimpleNamespace(device=GPU, autocast=nullcontext, trackers=[], process_index=0, num_processes=1)
    finally: torch._C._set_only_lift_cpu_tensors(False)


def test_the_stand_in_is_strict(gpu):
    x = torch.ones(3).to(GPU)
    assert x.device == (x + 1).device == torch.zeros(2, device=GPU).device == GPU and (x + x).sum().item() == 6
    with pytest.raises(RuntimeError, match="same device"): x + torch.ones(3)
    with pytest.raises(RuntimeError, match="generator"): torch.randn(3, generator=torch.Generator(), device=GPU)
    assert x[torch.tensor([0, 1])].device == GPU and x.cpu().device.type == "cpu"


def chain(accelerator, base, tasks, method):
    """Every stage once; the final row accuracies."""
    from hyperlatent.evaluate import Models, zero_shot_rows
    from hyperlatent.guide_training import train_hyperclip, train_hyperldm
    from hyperlatent.meta import train_hnet, train_mnet, validation_batches
    from hyperlatent.zoo import build_zoo, zoo_health

    few = FitConfig(steps=3, batch_size=4, warmup=1, validate_every=2, ema_decay=0.9)
    inner = AdaptConfig(steps=2, optimizer="adam")
    config = preset("scenes")
    config = replace(
        config, multitask=replace(config.multitask, fit=few), zoo=replace(config.zoo, runs=2, inner=inner),
        hnet=replace(config.hnet, method=method, latent_dim=4, hidden=(8,), inner=inner, fit=few),
        hyperclip=replace(config.hyperclip, hidden=(8,), num_inference_steps=2, noise=0.1, num_samples=2, fit=few),
        hyperldm=replace(config.hyperldm, hidden=8, blocks=1, num_inference_steps=4, question_noise=0.1, num_samples=2, fit=few),
        evaluate=replace(config.evaluate, guidance_scales=(0.0, 1.0, 1.5), few_shot=inner))
    options = dict(progress=False, accelerator=accelerator)
    mnet, _ = train_mnet(base, tasks, tasks, config.multitask, **options)
    hnet, _ = train_hnet(base, tasks, tasks, config.hnet, **options)
    hnet.requires_grad_(False)
    zoo, held_out = build_zoo(hnet, base, tasks, config.zoo, progress=False), validation_batches(base, tasks)
    zoo_health(zoo, hnet, base, tasks)
    hyperclip, _ = train_hyperclip(zoo, hnet, base, held_out, config.hyperclip, **options)
    denoiser, _ = train_hyperldm(zoo, hnet, base, held_out, config.hyperldm, **options)
    models = Models(base, mnet, hnet, zoo, hyperclip, denoiser, tasks)
    rows = zero_shot_rows(models, tasks, config)
    return {(row.method, row.guidance_scale): (row.accuracy, row.interval()) for row in rows}


@pytest.mark.parametrize("method", ["auto_decoder", "fomaml", "maml"])
def test_every_stage_stays_on_its_device(gpu, method):
    """And what comes out is what comes out on the CPU."""
    lots = torch.Generator().manual_seed(0)
    tasks, base = random_tasks(6, 8, lots), CLIPAdapter(8, hidden=4)
    on_cpu = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, trackers=[], process_index=0, num_processes=1)
    assert chain(gpu, base, tasks.to(GPU), method) == chain(on_cpu, base, tasks, method)


def other_methods(accelerator, base, tasks):
    """HVAE, text-conditioned baselines and few-shot guidance: sums that depend on every number drawn."""
    from hyperlatent.few_shot_guidance import FewShotGuidance
    from hyperlatent.guide_training import train_hyperldm
    from hyperlatent.hvae import train_hvae
    from hyperlatent.meta import train_mnet
    from hyperlatent.settings import HVAEConfig, HyperLDMConfig, MultitaskConfig, TextConfig, ZooConfig
    from hyperlatent.text_baselines import train_text_network

    few, inner = FitConfig(steps=3, batch_size=4, warmup=1, validate_every=2), AdaptConfig(steps=2)
    options = dict(progress=False, accelerator=accelerator)
    mnet, _ = train_mnet(base, tasks, tasks, MultitaskConfig(method="fomaml", inner=inner, fit=few), **options)
    config = HVAEConfig(latent_dim=4, hidden=(8,), task_weight=0.1, networks=ZooConfig(runs=2, inner=inner), fit=few)
    hvae, _, zoo = train_hvae(mnet, base, tasks, tasks, config, **options)
    hvae.requires_grad_(False)
    found = [zoo.latents.sum()]
    for method in ("hypernetwork", "film"):
        text = TextConfig(method=method, hidden=(8,), question_noise=0.1, fit=few)
        network, _ = train_text_network(base, tasks, tasks, text, **options)
        found.append(network(tasks.batch().question_features).sum())
    config = HyperLDMConfig(hidden=8, blocks=1, prediction_type="v_prediction", fit=few)
    denoiser, _ = train_hyperldm(zoo, hvae, base, [], config, **options)
    guide = FewShotGuidance(denoiser, hvae, base, "ddim")
    found.append(guide(tasks.batch(), num_inference_steps=4, num_samples=2, generator=torch.Generator().manual_seed(0)).final.sum())
    return [x.item() for x in found]


def test_the_other_methods_stay_on_their_device(gpu):
    lots = torch.Generator().manual_seed(0)
    tasks, base = random_tasks(6, 8, lots), CLIPAdapter(8, hidden=4)
    on_cpu = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, trackers=[], process_index=0, num_processes=1)
    # Adam magnifies the last bits of gradients near zero
    assert other_methods(gpu, base, tasks.to(GPU)) == pytest.approx(other_methods(on_cpu, base, tasks), rel=0.05)


def comparison(accelerator, tasks, out):
    """All methods and studies of `hyperlatent reproduce` in miniature; every score that they leave."""
    from hyperlatent.chain import Chain
    from hyperlatent.reproduce_rows import Judge
    from hyperlatent.reproduce_settings import reproduce_preset
    from hyperlatent.reproduce_training import shortened, train_all

    config = shortened(reproduce_preset("scenes-quick"), 2)
    config = replace(config, compare=replace(config.compare, samplers=(("ddim", 10), ("ddpm", 20))))
    chain = Chain(out, config, tasks, accelerator, False, lambda line: None)
    judge = Judge(chain, train_all(chain))
    judge.test(judge.validate())
    return sorted(path.name for path in out.glob("scores_*"))


def test_the_whole_comparison_stays_on_its_device(gpu, tmp_path):
    from hyperlatent.data.prepare import prepare
    from hyperlatent.settings import ScenesConfig

    tasks = prepare(ScenesConfig(num_tasks=60, pictures_per_task=20), device=GPU, cache=tmp_path / "cache", progress=False)
    assert len(comparison(gpu, tasks.to(GPU), tmp_path / "run")) == 7
