"""The mathematics of hyperlatent, written the plain way: one task after the other, one step after the other.

Each function does what a stage of hyperlatent does and gives the same numbers. `hyperlatent bench` times the two side by side, and
tests/test_bench.py compares them. From hyperlatent come the networks and the tasks, and nothing that is batched over tasks.
"""

import math

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

# ---- tasks


class PlainTask:
    """One task: its samples as data sets, the features of its answers' prompts and of its question."""

    def __init__(self, support: Dataset, query: Dataset, answers, question):
        self.support, self.query, self.answers, self.question = support, query, answers, question


def plain_tasks(batch) -> list[PlainTask]:
    """The tasks of a `hyperlatent.tasks.TaskBatch`, one by one and without padding."""

    def samples(part, i):
        return TensorDataset(part.features[i][part.mask[i]], part.labels[i][part.mask[i]])

    return [
        PlainTask(samples(batch.support, i), samples(batch.query, i), batch.answer_features[i][batch.answer_mask[i]], question)
        for i, question in enumerate(batch.question_features)
    ]


def all_samples(dataset):
    """The samples of a task as one batch of a loader."""
    return next(iter(DataLoader(dataset, batch_size=len(dataset))))


# ---- the base network


def logits(weights, features, answers, hidden, scale=100.0):
    """A CLIP-Adapter: `x + W2 relu(W1 x / sqrt(d) + b1) / sqrt(h) + b2`, its cosines with the answers."""
    dim = features.shape[1]
    w1, b1, w2, b2 = weights.split([hidden * dim, hidden, dim * hidden, dim])
    inner = F.relu(features @ w1.view(hidden, dim).T / math.sqrt(dim) + b1)
    moved = features + inner @ w2.view(dim, hidden).T / math.sqrt(hidden) + b2
    return scale * F.normalize(moved, dim=1) @ answers.T


def loss_of(weights, samples, answers, hidden):
    features, labels = samples
    return F.cross_entropy(logits(weights, features, answers, hidden), labels)


# ---- adaptation


def adapt(generator, start, task, hidden, steps, learning_rate):
    """Gradient descent on the latent of one task (or on its weights, where `generator` is the identity)."""
    samples = all_samples(task.support)
    z = start.detach().clone()
    for _ in range(steps):
        z.requires_grad_()
        loss = loss_of(generator(z), samples, task.answers, hidden)
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z - learning_rate * gradient).detach()
    return z


def adapt_all(generator, start, tasks, hidden, steps, learning_rate):
    return torch.stack([adapt(generator, start, task, hidden, steps, learning_rate) for task in tasks])


# ---- training of the hypernetwork


def maml_step(hnet, optimizer, tasks, hidden, steps, learning_rate, second_order, clip_norm):
    """One outer step: the gradients of all tasks are accumulated, then the optimiser moves once."""
    optimizer.zero_grad()
    total = 0.0
    for task in tasks:
        support, query = all_samples(task.support), all_samples(task.query)
        z = hnet.z0
        for _ in range(steps):
            if not second_order:
                z = z.detach().requires_grad_()
            loss = loss_of(hnet(z), support, task.answers, hidden)
            (gradient,) = torch.autograd.grad(loss, z, create_graph=second_order)
            z = z - learning_rate * gradient
        if not second_order:  # the adapted latent moves with the start
            z = hnet.z0 + (z - hnet.z0).detach()
        loss = loss_of(hnet(z), query, task.answers, hidden) / len(tasks)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(hnet.parameters(), clip_norm)
    optimizer.step()
    return total


# ---- training of the autoencoder and the guides


def hvae_step(hvae, optimizer, networks, noise, kl_weight, clip_norm):
    """One step on some fine-tuned networks, one after the other; `noise` is what the latents are drawn with."""
    optimizer.zero_grad()
    total = 0.0
    loader = DataLoader(TensorDataset(networks, noise), batch_size=1)
    for weights, eps in loader:
        mean, log_variance = hvae.encode(weights)
        again = hvae.decode(mean + (0.5 * log_variance).exp() * eps)
        error = 0.5 * (again - hvae.standardize(weights)).square().sum()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        loss = (error + kl_weight * divergence) / hvae.n_weights / len(networks)
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(hvae.parameters(), clip_norm)
    optimizer.step()
    return total


def hyperclip_step(hyperclip, hnet, optimizer, latents, questions, clip_norm):
    """One contrastive step: every network is generated and encoded by itself, then all are compared."""
    optimizer.zero_grad()
    encoded = []
    for z, _ in DataLoader(TensorDataset(latents, questions), batch_size=1):
        with torch.no_grad():
            weights = hnet(z)
        encoded.append(hyperclip(weights))
    scores = hyperclip.logit_scale * torch.cat(encoded) @ F.normalize(questions, dim=1).T
    target = torch.arange(len(scores), device=scores.device)
    loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    loss.backward()
    torch.nn.utils.clip_grad_norm_(hyperclip.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def diffusion_step(denoiser, optimizer, latents, questions, t, noise, withheld, alphas_cumprod, clip_norm):
    """One step of noise prediction (or velocity prediction) on a batch of a loader over the zoo."""
    loader = DataLoader(TensorDataset(latents, questions, t, noise, withheld), batch_size=len(latents))
    latents, questions, t, noise, withheld = next(iter(loader))
    optimizer.zero_grad()
    z = (latents - denoiser.latent_mean) / denoiser.latent_std
    signal, spread = alphas_cumprod[t].sqrt()[:, None], (1 - alphas_cumprod[t]).sqrt()[:, None]
    questions = torch.where(withheld[:, None], torch.zeros_like(questions), questions)
    velocity = denoiser.config["prediction_type"] == "v_prediction"
    target = signal * noise - spread * z if velocity else noise
    loss = F.mse_loss(denoiser(signal * z + spread * noise, t, questions), target)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(denoiser.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


# ---- guidance


@torch.no_grad()
def sample(denoiser, scheduler, question, steps, guidance_scale, seed):
    """One latent for one question: two calls of the denoiser at each step, without and with the question."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    options = {"generator": generator} if type(scheduler).__name__ in ("DDPMScheduler", "DDIMScheduler") else {}
    device, nothing = question.device, torch.zeros_like(question)[None]
    z = torch.randn(1, denoiser.config["latent_dim"], generator=generator).to(device)
    for t in scheduler.timesteps:
        time = t.to(device)[None]
        without = denoiser(z, time, nothing)
        with_question = denoiser(z, time, question[None])
        output = (1 - guidance_scale) * without + guidance_scale * with_question
        z = scheduler.step(output, t, z, **options).prev_sample
    return (z * denoiser.latent_std + denoiser.latent_mean)[0]


def sample_all(denoiser, scheduler, questions, steps, guidance_scale, seed):
    return torch.stack([sample(denoiser, scheduler, question, steps, guidance_scale, seed) for question in questions])


def walk(hyperclip, hnet, question, steps, learning_rate, prior_weight):
    """HyperCLIP's guidance for one question: Adam climbs the cosine between the generated weights and the question."""
    start = hnet.z0.detach()
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], learning_rate)
    for _ in range(steps):
        cosine = F.cosine_similarity(hyperclip(hnet(z)), question, dim=0)
        loss = -cosine + prior_weight / 2 * (z - start).square().sum()
        (z.grad,) = torch.autograd.grad(loss, z)
        optimizer.step()
    return z.detach()


def walk_all(hyperclip, hnet, questions, steps, learning_rate, prior_weight):
    return torch.stack([walk(hyperclip, hnet, question, steps, learning_rate, prior_weight) for question in questions])


# ---- evaluation


@torch.no_grad()
def accuracy(hnet, z, task, hidden, batch_size=64):
    """Query accuracy of the network that one latent stands for."""
    weights, right = hnet(z), 0
    for features, labels in DataLoader(task.query, batch_size=batch_size):
        right += (logits(weights, features, task.answers, hidden).argmax(1) == labels).sum().item()
    return right / len(task.query)


def evaluate_all(hnet, latents, tasks, hidden):
    return torch.tensor([accuracy(hnet, z, task, hidden) for z, task in zip(latents, tasks, strict=True)])


# ---- features


@torch.no_grad()
def encode_all(model, preprocess, files, device="cpu"):
    """The bare loop of open_clip's own documentation: open, preprocess, encode, normalise."""
    from PIL import Image

    features = []
    for file in files:
        picture = preprocess(Image.open(file)).unsqueeze(0).to(device)
        features.append(F.normalize(model.encode_image(picture), dim=1).cpu())
    return torch.cat(features)
