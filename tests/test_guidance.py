"""Guidance against independent truths: closed forms, another implementation, the data, finite differences."""

import math

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from hyperlatent.errors import HyperLatentError
from hyperlatent.guidance import ClassifierFreeGuidance, ClassifierGuidance, sample_seeds
from hyperlatent.hyperclip import HyperCLIP
from hyperlatent.hyperldm import Denoiser, diffusion_loss
from hyperlatent.hypernet import HNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

# --- 1. Normal latents: guidance is affine, so its law can be followed exactly --------------------

# Per dimension: latents are N(PRIOR, PRIOR_STD^2) without a question, N(question, STD^2) with one.
PRIOR, PRIOR_STD = np.array([0.0, 1.0, -0.5]), np.array([1.0, 0.8, 0.5])
QUESTION, STD = np.array([0.8, 0.4, -0.5]), np.array([0.6, 0.8, 0.3])


def cosine_abar(total=1000):
    """The cosine schedule, from the formula of Nichol & Dhariwal (arXiv 2102.09672, equation 17)."""
    f = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


class NormalDenoiser(Denoiser):
    """The best possible denoiser of those latents. Its last question feature says that a question is asked."""

    def __init__(self, prediction_type="v_prediction"):
        super().__init__(3, 4, hidden=1, n_blocks=1, prediction_type=prediction_type)
        self.abar = torch.tensor(cosine_abar())

    def embed_question(self, question):
        return nn.functional.pad(question, (0, 1))

    def embed_time(self, t):
        return nn.functional.pad(t[..., None].float(), (4, 0))

    def denoise(self, z, film):
        question, asked, t = film[..., :3].double(), film[..., 3:4] > 0, film[..., 4:].long()
        mean = torch.where(asked, question, torch.tensor(PRIOR))
        variance = torch.where(asked, torch.tensor(STD), torch.tensor(PRIOR_STD)) ** 2
        a, s = self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()
        z = z.double()
        z0 = mean + variance * a * (z - a * mean) / (variance * a**2 + s**2)
        noise = s * (z - a * mean) / (variance * a**2 + s**2)
        velocity = self.config["prediction_type"] == "v_prediction"
        return (a * noise - s * z0 if velocity else noise).float()


QUESTION_FEATURES = torch.tensor([*QUESTION, 1.0], dtype=torch.float32)


def timesteps_of(steps, spacing, total=1000):
    stride = total // steps
    return np.arange(total - 1, -1, -stride) if spacing == "trailing" else np.arange(steps)[::-1] * stride


def exact_law(method, scale, timesteps, eta=0.0):
    """Mean, slope and variance of the guided result: z = mean + slope * start + N(0, variance), in float64.

    Written from the papers: DDIM equation 12 and 16 (2010.02502), DDPM equation 7 (2006.11239), DPM-Solver++(2M),
    algorithm 2 (2211.01095)."""
    abar = cosine_abar()
    x = np.array([np.ones(3), np.zeros(3)])  # coefficients of (start, 1): an affine function of the start
    variance, before = np.zeros(3), None
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        now, then = abar[t], 1.0 if after is None else abar[after]
        a, s, a_, s_ = now**0.5, (1 - now) ** 0.5, then**0.5, (1 - then) ** 0.5
        # guided prediction of z0 = slope * z + offset
        slope, offset = 0.0, 0.0
        for weight, mean, std in ((1 - scale, PRIOR, PRIOR_STD), (scale, QUESTION, STD)):
            k = std**2 * a / (std**2 * now + s**2)
            slope, offset = slope + weight * k, offset + weight * (1 - k * a) * mean
        z0 = slope * x + np.array([np.zeros(3), offset])
        if method == "ddim":
            sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
            keep = (1 - then - sigma**2) ** 0.5 / s  # of the noise in x
            x = (a_ - keep * a) * z0 + keep * x
            variance = ((a_ - keep * a) * slope + keep) ** 2 * variance + sigma**2
        elif method == "ddpm":
            beta = 1 - now / then
            c0, c1 = a_ * beta / (1 - now), (now / then) ** 0.5 * (1 - then) / (1 - now)
            x, variance = c0 * z0 + c1 * x, (c0 * slope + c1) ** 2 * variance + (1 - then) / (1 - now) * beta
        else:
            h = math.inf if after is None else math.log(a_ / s_) - math.log(a / s)
            d = z0
            if before is not None and after is not None:
                ratio = before[1] / h
                d = (1 + 1 / (2 * ratio)) * z0 - 1 / (2 * ratio) * before[0]
            x, before = s_ / s * x - a_ * math.expm1(-h) * d, (z0, h)
    return x[1], x[0], variance


@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
@pytest.mark.parametrize("drop", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_of_the_best_denoiser(prediction_type, drop, min_snr_gamma):
    """What even the best denoiser cannot know is the posterior variance of the latent; its loss is that, to 1 %."""
    n, g = 200_000, torch.Generator().manual_seed(0)
    mean, std = (PRIOR, PRIOR_STD) if drop else (QUESTION, STD)
    latents = torch.tensor(mean).float() + torch.tensor(std).float() * torch.randn(n, 3, generator=g)
    denoiser = NormalDenoiser(prediction_type)
    loss = diffusion_loss(denoiser, latents, QUESTION_FEATURES.expand(n, -1), denoiser.make_scheduler("ddpm"),
                          drop, g, min_snr_gamma)
    a2 = cosine_abar()[:, None]
    posterior = std**2 * (1 - a2) / (a2 * std**2 + 1 - a2)
    snr = a2 / (1 - a2)
    error = posterior * (snr if prediction_type == "epsilon" else 1 / (1 - a2))
    if min_snr_gamma:  # table 1 of 2303.09556: weights for predicting the latent, carried over
        error = np.minimum(snr, min_snr_gamma) * posterior
    assert loss.item() == pytest.approx(error.mean(), rel=0.01)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", ["ddim", "dpmsolver++"])
def test_deterministic_samplers_follow_the_exact_map(method, prediction_type, scale):
    """Every single chain ends where the affine map of its start says, not only the mean over chains."""
    steps, spacing = 50, "leading" if prediction_type == "epsilon" else "trailing"
    timesteps = timesteps_of(steps, spacing)
    if method == "dpmsolver++" and spacing == "leading":  # diffusers leaves out timestep 0 there
        timesteps = (np.arange(steps + 1) * (1000 // (steps + 1)))[::-1][:-1]
    mean, slope, _ = exact_law(method, scale, timesteps)
    walk = ClassifierFreeGuidance(NormalDenoiser(prediction_type), method)(
        QUESTION_FEATURES, guidance_scale=scale, num_samples=50, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0))
    assert walk.times.tolist() == timesteps.tolist()
    start = walk.z[0, :, 0].double().numpy()
    np.testing.assert_allclose(walk.final[:, 0], mean + slope * start, atol=2e-3)
    # every step's expected end is a guess at the end; the last one is the end
    np.testing.assert_allclose(walk.predicted_z0[-1], walk.final, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler, law",
    [("ddim", ("ddim", 0.0)), ("ddim", ("ddim", 0.6)), ("ddim", ("ddim", 1.0)), ("ddpm", ("ddpm", 0.0))],
)
def test_samples_have_the_exact_law(scheduler, law):
    """Mean and variance within five standard errors of the truth, dimension by dimension."""
    method, eta = law
    n, scale, steps = 4000, 2.0, 20
    mean, slope, variance = exact_law(method, scale, timesteps_of(steps, "trailing"), eta)
    variance = slope**2 + variance
    walk = ClassifierFreeGuidance(NormalDenoiser(), scheduler)(
        QUESTION_FEATURES, guidance_scale=scale, num_samples=n, num_inference_steps=steps, eta=eta,
        generator=torch.Generator().manual_seed(1))
    sample = walk.final[:, 0].double().numpy()
    assert (np.abs(sample.mean(0) - mean) < 5 * (variance / n) ** 0.5).all()
    assert (np.abs(sample.var(0) / variance - 1) < 5 * (2 / n) ** 0.5).all()


def test_ddim_with_full_noise_is_ddpm():
    """Two implementations, one law: eta = 1 is ancestral sampling (section 4.1 of 2010.02502)."""
    for ours, theirs in zip(exact_law("ddim", 2.0, timesteps_of(20, "trailing"), 1.0),
                            exact_law("ddpm", 2.0, timesteps_of(20, "trailing")), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def continuous_law(scale, stochastic):
    """Mean and deviation of guided diffusion with infinitely many steps, by quadrature of the linear equation.

    In y = z / signal and u = (noise / signal)^2, the probability flow is dy/du = sum_i w_i (y - m_i) / (v_i + u) / 2,
    and the reverse SDE has twice that drift and unit noise. Both are linear; their integrating factor is explicit."""
    u = np.concatenate([[0], np.geomspace(1e-7, 1e9, 400_001)])[:, None]
    rate = 1.0 if stochastic else 0.5
    branches = ((1 - scale, PRIOR, PRIOR_STD**2), (scale, QUESTION, STD**2))
    log_factor = sum(rate * w * np.log(v + u) for w, _, v in branches)
    factor = np.exp(log_factor[0] - log_factor)
    pull = sum(rate * w * m / (v + u) for w, m, v in branches)

    def integrate(f):
        return ((f[1:] + f[:-1]) / 2 * np.diff(u, axis=0)).sum(0)

    mean = integrate(pull * factor)
    return mean, integrate(factor**2) ** 0.5 if stochastic else PRIOR_STD ** (1 - scale) * STD**scale


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("method", ["ddim", "ddpm", "sde-dpmsolver++"])
def test_many_steps_reach_the_continuous_law(method, scale):
    """Many small steps come to what guidance means in continuous time; without guidance, to the data."""
    mean, std = continuous_law(scale, method != "ddim")
    if scale in (0.0, 1.0):
        np.testing.assert_allclose(mean, QUESTION if scale else PRIOR, atol=1e-3)
        np.testing.assert_allclose(std, STD if scale else PRIOR_STD, atol=1e-3)
    if method in ("ddim", "ddpm"):
        recursion_mean, slope, variance = exact_law(method, scale, timesteps_of(1000, "trailing"))
        np.testing.assert_allclose(recursion_mean, mean, atol=0.01)
        np.testing.assert_allclose((slope**2 + variance) ** 0.5, std, atol=0.01)
    walk = ClassifierFreeGuidance(NormalDenoiser(), method)(
        QUESTION_FEATURES, guidance_scale=scale, num_samples=1500, num_inference_steps=200,
        generator=torch.Generator().manual_seed(2))
    sample = walk.final[:, 0].double().numpy()
    np.testing.assert_allclose(sample.mean(0), mean, atol=5 * std.max() / 1500**0.5 + 0.01)
    np.testing.assert_allclose(sample.std(0) / std, 1, atol=5 * (1 / 3000) ** 0.5 + 0.02)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_other_schedulers_of_diffusers(name):
    """Any variance-preserving scheduler samples the same law."""
    scheduler = getattr(diffusers, name)(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
    walk = ClassifierFreeGuidance(NormalDenoiser(), scheduler)(
        QUESTION_FEATURES, guidance_scale=1.0, num_samples=1000, generator=torch.Generator().manual_seed(3))
    assert (walk.final[:, 0].mean(0) - torch.tensor(QUESTION)).abs().max() < 0.1
    assert (walk.final[:, 0].std(0) / torch.tensor(STD) - 1).abs().max() < 0.1


# --- 2. A denoiser that has learned ---------------------------------------------------------------

MODES = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [1.0, -2.0]])
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])  # of all latents; question A asks for the first two modes, B for the last
FEATURES = torch.eye(2)


def mixture(n, generator):
    mode = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MODES[mode] + 0.3 * torch.randn(n, 2, generator=generator), FEATURES[(mode == 2).long()]


@pytest.fixture(scope="module")
def trained():
    g = torch.Generator().manual_seed(0)
    denoiser = Denoiser(2, 2, hidden=64, n_blocks=3, generator=g).fit_statistics(*mixture(5000, g))
    scheduler, steps = denoiser.make_scheduler("ddpm"), 1200
    optimizer = torch.optim.Adam(denoiser.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        diffusion_loss(denoiser, *mixture(512, g), scheduler, generator=g).backward()
        optimizer.step()
        schedule.step()
    return denoiser


def mode_weights(z):
    return torch.cdist(z, MODES).argmin(-1).bincount(minlength=3) / len(z)


def energy_distance(a, b):
    """Zero only for equal distributions (Szekely & Rizzo 2013)."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


@pytest.mark.xdist_group("trained denoiser")  # trains once
def test_ancestral_and_deterministic_sampling_agree_with_the_data(trained):
    """A learned denoiser: DDPM, DDIM and DPM-Solver++ give one distribution, and it is the one of the data."""
    n, g = 2000, torch.Generator().manual_seed(4)
    data = mixture(n, g)[0]
    samples = {
        name: ClassifierFreeGuidance(trained, name)(
            FEATURES[0], guidance_scale=0.0, num_samples=n, num_inference_steps=steps, generator=g).final[:, 0]
        for name, steps in (("ddpm", 100), ("ddim", 100), ("dpmsolver++", 25))
    }
    for sample in samples.values():
        assert (mode_weights(sample) - WEIGHTS).abs().max() < 0.06
        assert energy_distance(sample, data) < 0.03
        spread = (sample - MODES[torch.cdist(sample, MODES).argmin(-1)]).std(0)
        assert (spread - 0.3).abs().max() < 0.05
    assert energy_distance(samples["ddpm"], samples["ddim"]) < 0.03
    # the measure sees what it should: a distribution with the modes' weights changed
    assert energy_distance(MODES[torch.multinomial(torch.ones(3), n, True, generator=g)], data) > 0.1


@pytest.mark.xdist_group("trained denoiser")  # trains once
def test_a_question_chooses_the_modes(trained):
    g = torch.Generator().manual_seed(5)
    walk = ClassifierFreeGuidance(trained)(FEATURES, guidance_scale=1.0, num_samples=1000, generator=g)
    assert (mode_weights(walk.final[:, 0]) - torch.tensor([0.5, 0.2, 0.0]) / 0.7).abs().max() < 0.06
    assert mode_weights(walk.final[:, 1])[2] > 0.97


# --- 3. A chain is its own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks():
    g = torch.Generator().manual_seed(0)
    denoiser = Denoiser(6, 10, hidden=32, n_blocks=2, dropout=0.3, generator=g)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.15, generator=g)
    denoiser.latent_mean.fill_(3.0)
    denoiser.latent_std.fill_(2.0)
    hnet = HNet(n_weights=40, latent_dim=6, hidden=(16,), generator=g)
    hyperclip = HyperCLIP(n_weights=40, question_dim=10, hidden=(16,), generator=g)
    return denoiser, hnet, hyperclip, torch.randn(7, 10, generator=g)


CHAINS = [("ddim", {}), ("ddim", dict(eta=0.7))]
CHAINS += [(name, {}) for name in ("ddpm", "dpmsolver++", "sde-dpmsolver++", "classifier")]


@pytest.mark.parametrize("name, options", CHAINS, ids=str)
def test_a_chain_depends_on_its_seed_and_question_only(networks, name, options):
    denoiser, hnet, hyperclip, questions = networks
    denoiser.train()  # dropout must not reach the sampler
    if name == "classifier":
        guide, options = ClassifierGuidance(hyperclip, hnet), dict(noise=0.1)
    else:
        guide = ClassifierFreeGuidance(denoiser, name)
    seeds = torch.arange(35).view(5, 7) + 100
    many = guide(questions, seeds=seeds, num_inference_steps=10, **options)
    assert denoiser.training
    for sample, task in ((0, 0), (4, 6), (2, 3)):
        alone = guide(questions[task], seeds=seeds[sample, task].view(1, 1), num_inference_steps=10, **options)
        for field in ("z", "predicted_z0"):
            expected = getattr(many.select(task=task, sample=sample), field)
            torch.testing.assert_close(getattr(alone, field), expected, atol=1e-4, rtol=1e-4)
    again = guide(questions, seeds=seeds, num_inference_steps=10, **options)
    assert torch.equal(many.z, again.z)
    other = guide(questions, seeds=seeds + 1, num_inference_steps=10, **options)
    assert ((other.final - many.final).norm(dim=-1) > 1e-2).all()
    if name != "classifier":  # which starts every chain at z0
        assert torch.equal(many.z[0, 0, 1:], other.z[0, 0, :-1])


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmsolver++"])
def test_the_sampler_is_the_plain_loop_of_diffusers(networks, name):
    """One chain by the scheduler's own steps and the denoiser's own `forward`: what packing and batching may not change."""
    denoiser, _, _, questions = networks
    walk = ClassifierFreeGuidance(denoiser, name)(
        questions[3], guidance_scale=2.5, seeds=torch.tensor([[8]]), num_inference_steps=20)
    denoiser.eval()
    scheduler, generator = denoiser.make_scheduler(name), torch.Generator().manual_seed(8)
    scheduler.set_timesteps(20)
    z = torch.randn((1, 6), generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            none, asked = (denoiser(z, t, question) for question in (torch.zeros(1, 10), questions[3:4]))
            options = dict(generator=generator) if name == "ddpm" else {}
            z = scheduler.step(none + 2.5 * (asked - none), t, z, **options).prev_sample
    torch.testing.assert_close(walk.final[0], denoiser.unstandardize(z), atol=1e-3, rtol=1e-3)


def test_starts_do_not_depend_on_scheduler_scale_or_steps(networks):
    denoiser, _, _, questions = networks
    seeds = sample_seeds(4, torch.Generator().manual_seed(0), 7)
    starts = []
    for name, scale, steps in (("ddim", 1.0, 10), ("ddpm", 4.0, 20), ("sde-dpmsolver++", 0.0, 7)):
        guide = ClassifierFreeGuidance(denoiser, name)
        starts.append(guide(questions, seeds=seeds, guidance_scale=scale, num_inference_steps=steps).z[0])
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert torch.equal(starts[0][:, 0], starts[0][:, 6])  # tasks share their seeds
    # standard normal in the latents' own units
    g = torch.Generator().manual_seed(1)
    many = ClassifierFreeGuidance(denoiser)(questions[0], num_samples=2000, num_inference_steps=1, generator=g).z[0]
    assert (many.mean() - 3).abs() < 0.1 and (many.std() - 2).abs() < 0.1


def test_a_scheduler_of_ones_own_is_left_as_it_was(networks):
    """It may be shared with other guides, threads, or a call made from the callback."""
    denoiser, _, _, questions = networks
    scheduler = denoiser.make_scheduler("dpmsolver++")
    guide, inner, steps = ClassifierFreeGuidance(denoiser, scheduler), [], []

    def call_again(step, timestep, z, predicted_z0):
        steps.append((step, timestep, z.clone(), predicted_z0.clone()))
        inner.append(guide(questions, seeds=seeds, num_inference_steps=5).final)

    seeds = torch.arange(7).view(1, 7)
    plain = guide(questions, seeds=seeds, num_inference_steps=5)
    walk = guide(questions, seeds=seeds, num_inference_steps=5, callback_on_step_end=call_again, progress=True)
    assert scheduler.num_inference_steps is None and torch.equal(walk.z, plain.z)
    assert all(torch.equal(final, plain.final) for final in inner)
    assert [(step, t) for step, t, _, _ in steps] == list(enumerate(walk.times.tolist()))
    for step, _, z, z0 in steps:  # what the callback sees is what the trajectory keeps
        assert torch.equal(z, walk.z[step + 1]) and torch.equal(z0, walk.predicted_z0[step])


# --- 4. What the scale means ----------------------------------------------------------------------


def test_scale_zero_ignores_and_scale_one_is_the_conditional_model(networks):
    denoiser, _, _, questions = networks
    guide = ClassifierFreeGuidance(denoiser, "dpmsolver++")

    def final(features=questions, **options):
        options = dict(seeds=torch.arange(14).view(2, 7), num_inference_steps=10) | options
        return guide(features, **options).final

    def same(a, b):
        return torch.allclose(a, b, atol=1e-4, rtol=1e-4)

    none = torch.zeros_like(questions)
    assert same(final(guidance_scale=0.0), final(none, guidance_scale=1.0))
    assert same(final(guidance_scale=0.0), final(questions.flip(0), guidance_scale=0.0))
    assert not same(final(guidance_scale=0.0), final(guidance_scale=1.0))
    # the short cuts at 0 and 1 are what the full formula comes to
    assert same(final(guidance_scale=1.0), final(guidance_scale=1 + 1e-7))
    assert same(final(guidance_scale=0.0), final(guidance_scale=1e-7))
    # negative questions
    assert torch.equal(final(guidance_scale=3.0), final(guidance_scale=3.0, negative_features=none))
    assert same(final(guidance_scale=0.0, negative_features=questions), final(guidance_scale=1.0))
    assert same(final(guidance_scale=3.0, negative_features=questions), final(guidance_scale=1.0))
    assert not same(final(guidance_scale=3.0, negative_features=questions.flip(0)), final(guidance_scale=3.0))
    assert same(final(guidance_scale=3.0, negative_features=questions[1]),
                final(guidance_scale=3.0, negative_features=questions[1:2].expand(7, -1)))


def test_interval_and_rescale(networks):
    denoiser, _, _, questions = networks
    guide, seeds = ClassifierFreeGuidance(denoiser), torch.arange(7).view(1, 7)
    plain, guided = (guide(questions, seeds=seeds, guidance_scale=scale) for scale in (1.0, 5.0))
    half = guide(questions, seeds=seeds, guidance_scale=5.0, guidance_interval=(0.3, 0.6))
    denoiser.eval()
    for t, z, z0 in zip(half.times, *map(denoiser.standardize, (half.z, half.predicted_z0)), strict=False):
        with torch.no_grad():
            conditional, none = denoiser(z, t, questions), denoiser(z, t, torch.zeros_like(questions))
        output = none + 5 * (conditional - none) if 300 <= t <= 600 else conditional
        abar = guide.scheduler.alphas_cumprod[t]
        torch.testing.assert_close(z0, abar.sqrt() * z - (1 - abar).sqrt() * output, atol=1e-4, rtol=1e-4)
    assert torch.allclose(guide(questions, seeds=seeds, guidance_scale=5.0, guidance_interval=(0.0, 1.0)).z, guided.z)
    rescaled = guide(questions, seeds=seeds, guidance_scale=5.0, guidance_rescale=0.7)
    assert not torch.allclose(rescaled.final, guided.final, atol=1e-2)
    at_one = guide(questions, seeds=seeds, guidance_scale=1.0, guidance_rescale=0.7)
    assert torch.allclose(at_one.final, plain.final, atol=1e-4)


# --- 5. Classifier guidance -----------------------------------------------------------------------


def test_classifier_guidance_takes_the_true_gradients_adam_step(networks):
    """The walk is redone in float64 with finite differences and Adam as in its paper (1412.6980, algorithm 1)."""
    _, hnet, hyperclip, questions = networks
    prior, lr, question = 0.3, 0.05, questions[0]
    walk = ClassifierGuidance(hyperclip, hnet)(question, prior_weight=prior, learning_rate=lr, num_inference_steps=5)
    z0 = hnet.z0.detach().double()

    def objective(z):
        with torch.no_grad():
            weights = torch.func.functional_call(hnet, {k: v.double() for k, v in hnet.state_dict().items()}, (z,))
            double = {k: v.double() for k, v in hyperclip.state_dict().items()}
            embedded = torch.func.functional_call(hyperclip, double, (weights,))
            cosine = torch.cosine_similarity(embedded, question.double(), dim=-1)
        return cosine - prior / 2 * (z - z0).square().sum(-1), cosine

    z, m, v, h = z0.clone(), 0.0, 0.0, 1e-5
    for step in range(1, 6):
        torch.testing.assert_close(walk.score[step - 1, 0, 0].double(), objective(z)[1], atol=1e-5, rtol=0)
        nudge = h * torch.eye(6).double()
        gradient = (objective(z + nudge)[0] - objective(z - nudge)[0]) / (2 * h)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        z = z + lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(walk.z[step, 0, 0].double(), z, atol=1e-4, rtol=0)
    torch.testing.assert_close(walk.score[5, 0, 0].double(), objective(z)[1], atol=1e-4, rtol=0)


def test_cosine_rises_and_the_prior_pulls_back(networks):
    _, hnet, hyperclip, questions = networks
    guide = ClassifierGuidance(hyperclip, hnet)
    moved, cosines = [], []
    for prior_weight in (0.0, 0.1, 1.0, 100.0):
        walk = guide(questions, prior_weight=prior_weight, num_inference_steps=100)
        assert (walk.score[-1] > walk.score[0] - 1e-4).all()
        moved.append((walk.final - hnet.z0).norm(dim=-1).mean())
        cosines.append(walk.score[-1].mean())
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.05 * moved[0]
    assert cosines == sorted(cosines, reverse=True) and cosines[0] > walk.score[0].mean() + 0.3
    still = guide(questions, learning_rate=0.0)
    assert torch.equal(still.final, still.z[0]) and torch.equal(still.score[0], still.score[-1])
    # a start of one's own, for each task, and the prior still around z0
    start = torch.ones(7, 6)
    walk = guide(questions, z=start, prior_weight=100.0, num_inference_steps=200, cosine_step_size=True)
    assert torch.equal(walk.z[0, 0], start) and (walk.final - hnet.z0).abs().max() < 0.05


def test_classifier_guidance_leaves_nothing_behind(networks):
    """No gradient on the networks, and the same walk under no_grad and inference_mode."""
    _, hnet, hyperclip, questions = networks
    guide = ClassifierGuidance(hyperclip, hnet)
    plain = guide(questions)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            walk = guide(questions.clone())
        assert torch.equal(walk.z, plain.z) and not walk.z.requires_grad and not walk.score.requires_grad
    assert all(p.grad is None for network in (hnet, hyperclip) for p in network.parameters())


def test_langevin_noise_has_its_size(networks):
    _, hnet, hyperclip, questions = networks
    guide, seeds = ClassifierGuidance(hyperclip, hnet), torch.arange(500).view(500, 1)
    options = dict(seeds=seeds, num_inference_steps=1, learning_rate=0.02)
    jump = guide(questions[0], noise=0.5, **options).final - guide(questions[0], **options).final
    assert abs(jump.std() / (0.5 * math.sqrt(2 * 0.02)) - 1) < 0.05 and jump.mean().abs() < 0.01


# --- 6. What is refused ---------------------------------------------------------------------------

REFUSED = [
    (dict(guidance_scale=math.nan), "guidance_scale is nan"),
    (dict(guidance_scale=math.inf), "guidance_scale is inf"),
    (dict(guidance_rescale=1.5), "guidance_rescale is 1.5"),
    (dict(guidance_interval=(0.6, 0.3)), "guidance_interval"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"),
    (dict(num_inference_steps=-3), "num_inference_steps is -3"),
    (dict(num_inference_steps=True), "num_inference_steps is True"),
    (dict(num_inference_steps=1001), "from 1 to 1000"),
    (dict(num_inference_steps=30), "num_inference_steps=25"),
    (dict(num_samples=0), "num_samples is 0"),
    (dict(eta=2.0), "eta is 2.0"),
    (dict(question_features=torch.zeros(7, 9)), r"question_features has shape \(7, 9\)"),
    (dict(question_features=torch.zeros(0, 10)), "question_features has shape"),
    (dict(question_features=torch.full((7, 10), math.nan)), "question_features holds NaN"),
    (dict(negative_features=torch.zeros(3, 10)), "negative_features has 3 rows for 7 questions"),
    (dict(seeds=torch.zeros(7, dtype=torch.int64)), "seeds are"),
    (dict(seeds=torch.zeros(2, 6, dtype=torch.int64)), r"shape \(2, 7\)"),
    (dict(seeds=torch.zeros(2, 7, dtype=torch.int32)), "torch.int32"),
    (dict(seeds=torch.zeros(2, 7, dtype=torch.int64), num_samples=3), r"shape \(3, 7\)"),
    (dict(guidance_scale=1e38), "NaN or infinity"),
]


@pytest.mark.parametrize("wrong, says", REFUSED, ids=[says for _, says in REFUSED])
def test_classifier_free_guidance_refuses(networks, wrong, says):
    denoiser, _, _, questions = networks
    with pytest.raises(HyperLatentError, match=says) as error:
        ClassifierFreeGuidance(denoiser)(**dict(question_features=questions) | wrong)
    assert error.value.remedy and "\n" not in str(error.value)


@pytest.mark.parametrize("wrong, says", [
    (dict(learning_rate=-1.0), "learning_rate is -1.0"),
    (dict(prior_weight=math.nan), "prior_weight is nan"),
    (dict(noise=math.inf), "noise is inf"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"),
    (dict(z=torch.zeros(5)), r"z has shape \(5,\)"),
    (dict(question_features=torch.zeros(7, 3)), "question_features has shape"),
    (dict(seeds=torch.zeros(2, 2, dtype=torch.int64)), "seeds are"),
])
def test_classifier_guidance_refuses(networks, wrong, says):
    _, hnet, hyperclip, questions = networks
    with pytest.raises(HyperLatentError, match=says) as error:
        ClassifierGuidance(hyperclip, hnet)(**dict(question_features=questions) | wrong)
    assert error.value.remedy
