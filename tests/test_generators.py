"""Either generator carries the whole chain: guides, rows, evidence and n-shot curves do not know which one they walk."""

from dataclasses import replace

import pytest
import torch

from hyperlatent.base import CLIPAdapter, random_tasks
from hyperlatent.committee import Committee
from hyperlatent.direct_weights import DirectWeights
from hyperlatent.evaluate import Models, zero_shot_rows
from hyperlatent.evidence import control_questions, control_rows, inference_rows, question_ranks, wording_row
from hyperlatent.few_shot import few_shot_rows, from_question, from_start, inside_diffusion
from hyperlatent.guidance import ClassifierGuidance
from hyperlatent.guide_training import train_hyperclip, train_hyperldm, walk
from hyperlatent.hvae import HVAE, encode_zoo, kl_divergence, train_hvae
from hyperlatent.hyperclip import HyperCLIP
from hyperlatent.hyperldm import Denoiser
from hyperlatent.hypernet import HNet
from hyperlatent.latent_health import health_report, memorisation
from hyperlatent.meta import initial_weights, train_committee, train_hnet, validation_batches
from hyperlatent.methods import ensemble_rows, guidance_rows, neighbours_of_kind, rows_of, sampled_latents, walk_rows
from hyperlatent.settings import AdaptConfig, FewShotConfig, FitConfig, HVAEConfig, ZooConfig, preset
from hyperlatent.zoo import build_zoo

INNER = AdaptConfig(steps=5, learning_rate=0.05, optimizer="adam")
FIT = FitConfig(steps=6, batch_size=8, validate_every=3, warmup=1)
NETWORKS = ZooConfig(runs=2, samples_per_task=15, inner=INNER)


def tiny(config):
    hyperclip = replace(config.hyperclip, hidden=(16,), num_inference_steps=3, fit=FIT)
    hyperldm = replace(config.hyperldm, hidden=16, blocks=1, num_inference_steps=5, num_samples=2, fit=FIT)
    evaluate = replace(config.evaluate, guidance_scales=(0.0, 1.5), few_shot=INNER)
    few_shot = FewShotConfig(shots=(2,), draws=2, inner=INNER, prior_weight=0.1)
    hnet = replace(config.hnet, latent_dim=6, hidden=(16,), inner=INNER, fit=FIT)
    return replace(config, hyperclip=hyperclip, hyperldm=hyperldm, evaluate=evaluate, few_shot=few_shot, hnet=hnet)


@pytest.fixture(scope="module", params=["hnet", "hvae", "committee"])
def chain(request):
    lots, config = torch.Generator().manual_seed(0), tiny(preset("scenes"))
    train, held_out, unseen = (random_tasks(12, 16, lots, split) for split in ("meta-train", "meta-validation", "meta-test"))
    base = CLIPAdapter(16, hidden=8, logit_scale=10.0)
    mnet = DirectWeights(initial_weights(base, 0.1, lots))
    if request.param == "hvae":
        settings = HVAEConfig(latent_dim=6, hidden=(16,), samples_per_task=10, task_weight=0.5, networks=NETWORKS, fit=FIT)
        generator, _, zoo = train_hvae(mnet, base, train, held_out, settings, progress=False)
    elif request.param == "committee":
        generator, _ = train_committee(base, train, held_out, replace(config.hnet, method="joint", members=2), progress=False)
        zoo = build_zoo(generator, base, train, NETWORKS, start=generator.priors, progress=False)
    else:
        generator, _ = train_hnet(base, train, held_out, config.hnet, progress=False)
        zoo = build_zoo(generator, base, train, NETWORKS, progress=False)
    generator.requires_grad_(False)
    batches = validation_batches(base, held_out)
    hyperclip, _ = train_hyperclip(zoo, generator, base, batches, config.hyperclip, progress=False)
    denoiser, _ = train_hyperldm(zoo, generator, base, batches, config.hyperldm, progress=False)
    return Models(base, mnet, generator, zoo, hyperclip, denoiser, train), unseen, batches, config


def test_every_row_on_either_generator(chain):
    models, tasks, batches, config = chain
    negative = tasks.batch().question_features[neighbours_of_kind(tasks.kinds)]
    rows = zero_shot_rows(models, tasks, config) + few_shot_rows(models, tasks, config)
    rows += rows_of(tasks, models.base, lambda batch, at: walk_rows(models, batch, config) + ensemble_rows(models, batch, config, (2,))
                    + guidance_rows(models, batch, negative[at], config), samples=2)
    rows += inference_rows(question_ranks(models, tasks, config))
    names = [(row.method, row.guidance_scale) for row in rows]
    assert len(names) == len(set(names))
    for row in rows:
        assert row.per_task.shape == (12,) and ((0 <= row.per_task) & (row.per_task <= 1)).all(), row.method


def test_evidence_changes_nothing_but_the_question(chain):
    models, tasks, _, config = chain
    score = lambda batch: models.score_latents(sampled_latents(models, batch.question_features, config), batch)
    encode = lambda texts: torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(len(texts)))
    batch = tasks.batch()
    controls = control_questions(tasks, encode, torch.Generator().manual_seed(0), mask=lambda kind: "what is it?")
    own, *others = control_rows("hyperldm", score, batch, controls | {"same": batch.question_features})
    assert torch.equal(own.per_task, others[-1].per_task)
    assert sorted(controls["shuffled"].sum(1).tolist()) == sorted(batch.question_features.sum(1).tolist())
    assert not (controls["shuffled"] == batch.question_features).all(1).any()
    first = tasks.subset([i for i, task in enumerate(tasks.tasks) if not task.paraphrases])  # whose only wording is the question
    assert torch.allclose(wording_row("hyperldm", score, first, unseen=False).per_task, score(first.batch()))


def test_health_and_memorisation(chain):
    models, tasks, batches, config = chain
    networks = build_zoo(models.mnet, models.base, models.train, NETWORKS, progress=False)
    report = health_report(models.zoo, models.hnet, INNER, models.mnet, INNER, models.base, models.train, batches, networks)
    assert 0 <= report["share_within"] <= 1 and ("collapsed" in report) == isinstance(models.hnet, HVAE)
    z = sampled_latents(models, tasks.batch().question_features, config)
    assert memorisation(models.zoo.latents[0], z[0], models.zoo)["generated"] == 0  # the zoo itself is recited perfectly


def test_latents_drawn_from_the_encoder_have_its_mean_and_variance():
    lots = torch.Generator().manual_seed(0)
    model, networks = HVAE(50, latent_dim=3, hidden=(8,), generator=lots), torch.randn(1, 4, 50, generator=lots)
    zoo = lambda g: encode_zoo(model, build(networks), g).latents
    from hyperlatent.zoo import Zoo
    build = lambda latents: Zoo(latents, torch.zeros(4, 1), torch.arange(4))
    draws = torch.stack([zoo(torch.Generator().manual_seed(i)) for i in range(2000)])
    mean, log_variance = model.encode(networks)
    assert torch.allclose(zoo(None), mean, atol=1e-5) and torch.allclose(draws.mean(0), mean, atol=0.1)
    assert torch.allclose(draws.var(0), log_variance.exp(), rtol=0.2)
    assert (kl_divergence(torch.zeros(3), torch.zeros(3)) == 0).all()


@pytest.fixture(scope="module")
def committee():
    """Three untrained members, with guides that sample six latents."""
    lots, config = torch.Generator().manual_seed(0), tiny(preset("scenes"))
    tasks, base = random_tasks(12, 16, lots), CLIPAdapter(16, hidden=8, logit_scale=10.0)
    members = [HNet(base.n_weights, 6, (16,), question_dim=16, generator=lots) for _ in range(3)]
    network = Committee(base.n_weights, 6, (16,), 16, networks=members).requires_grad_(False)
    zoo = build_zoo(network, base, tasks, replace(NETWORKS, runs=4), start=network.priors, progress=False)
    denoiser = Denoiser(9, 16, hidden=16, n_blocks=1, generator=lots).fit_statistics(zoo.flat)
    hyperclip = HyperCLIP(base.n_weights, 16, (16,), generator=lots)
    config = replace(config, hyperclip=replace(config.hyperclip, num_samples=6), hyperldm=replace(config.hyperldm, num_samples=6))
    return Models(base, members[0], network, zoo, hyperclip, denoiser, tasks), tasks.batch(), config


def members_of(z):
    return z[..., -3:].argmax(-1).T.tolist()


def test_runs_of_the_zoo_take_the_members_in_turn(committee):
    models, batch, _ = committee
    assert members_of(models.zoo.latents) == [[0, 1, 2, 0]] * len(batch)


def test_all_members_of_a_committee_have_the_same_say(committee):
    models, batch, config = committee
    in_turn = [[0, 1, 2, 0, 1, 2]] * len(batch)
    assert members_of(sampled_latents(models, batch.question_features, config)) == in_turn
    assert members_of(inside_diffusion(models, batch, config)) == in_turn
    assert members_of(from_question(models, batch, config)) == in_turn
    assert members_of(from_start(models, batch, config)) == [[0, 1, 2]] * len(batch)
    walked = walk(ClassifierGuidance(models.hyperclip, models.hnet), batch.question_features, config.hyperclip)
    assert members_of(walked.final) == in_turn and members_of(walked.z[0]) == in_turn


def test_a_committee_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped while it trains its second member: the same networks, and the first is not trained from the start again."""
    import hyperlatent.training as training

    lots, config = torch.Generator().manual_seed(0), tiny(preset("scenes")).hnet
    config = replace(config, method="joint", members=2, fit=replace(FIT, checkpoint_every=3))
    tasks, base, taken, step = random_tasks(12, 16, lots), CLIPAdapter(16, hidden=8, logit_scale=10.0), [], training._one_step
    learn = lambda **options: train_committee(base, tasks, tasks, config, progress=False, **options)[0].state_dict()
    whole = learn()

    def counted(run, *arguments):
        taken.append(run.result.steps)
        if len(taken) == 11: raise KeyboardInterrupt
        return step(run, *arguments)

    monkeypatch.setattr(training, "_one_step", counted)
    with pytest.raises(KeyboardInterrupt): learn(checkpoint=tmp_path / "hnet-1.safetensors")
    again = learn(checkpoint=tmp_path / "hnet-1.safetensors")
    assert taken == [*range(6), *range(5), *range(3, 6)] and again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
