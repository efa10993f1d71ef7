"""A synthetic family of many tasks through the whole chain: seconds and peak memory of each stage, a fresh process for each number.

    python benchmarks/scale.py 1000 10000 100000 --limit 8GB

Training takes the same number of steps for any number of tasks; adaptation, zoo, validation and evaluation go over all of them. The limit
is the budget that chunks are chosen by, and at the same time what the system grants the process (the address space, as `ulimit -v` does).
Writes a Markdown table, and `scale.json` into the folder of --out.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS, ANSWERS, SUPPORT, QUERY, DIM = 50, 3, 8, 4, 32


def family(number: int, seed: int = 0):
    """Tasks "what <kind> is <thing>?" with twelve samples each; what an answer looks like depends on the kind."""
    import torch
    from torch.nn import functional as F

    from hyperlatent.tasks import Task, TaskSet

    lots = torch.Generator().manual_seed(seed)
    unit = lambda *shape: F.normalize(torch.randn(*shape, DIM, generator=lots), dim=-1)
    kinds, things, prompts = unit(KINDS), unit(-(-number // KINDS)), unit(KINDS, ANSWERS)
    kind, thing = torch.arange(number) % KINDS, torch.arange(number) // KINDS
    labels = torch.randint(ANSWERS, (number, SUPPORT + QUERY), generator=lots)
    shown = prompts[kind].gather(1, labels[..., None].expand(-1, -1, DIM))
    images = F.normalize(shown + kinds[kind][:, None].sign() * shown + 1.5 * unit(number, SUPPORT + QUERY), dim=-1)
    questions = F.normalize(kinds[kind] + things[thing], dim=-1)
    splits = ["meta-test" if i % 10 == 9 else "meta-validation" if i % 10 == 8 else "meta-train" for i in torch.randperm(
        number, generator=lots).tolist()]  # fmt: skip
    names, tasks = tuple(f"answer {i}" for i in range(ANSWERS)), []
    for t, row in enumerate(labels.tolist()):
        samples = [(t * len(row) + i, label) for i, label in enumerate(row)]
        support, query = tuple(samples[:SUPPORT]), tuple(samples[SUPPORT:])
        tasks.append(Task(f"what {t % KINDS} is {t // KINDS}?", names, names, support, query, split=splits[t]))
    return TaskSet(tasks, images.flatten(0, 1).half(), question_features=questions.split(1), answer_features=list(prompts[kind]))


def settings(tasks: Path, limit: str):
    from hyperlatent.settings import (
        AdaptConfig,
        BaseConfig,
        Config,
        EvaluateConfig,
        FitConfig,
        GeneratorConfig,
        HyperCLIPConfig,
        HyperLDMConfig,  # fmt: skip
        MultitaskConfig,
        ZooConfig,
    )

    fit = lambda steps, size: FitConfig(steps=steps, batch_size=size, warmup=10, validate_every=steps, checkpoint_every=steps)
    inner = AdaptConfig(steps=10, optimizer="adam")
    return Config(
        tasks=str(tasks), max_memory=limit, base=BaseConfig(hidden=8),
        multitask=MultitaskConfig(samples_per_task=8, scale=0.1, fit=fit(200, 64)),
        hnet=GeneratorConfig(latent_dim=16, hidden=(32,), output_scale=0.3, method="auto_decoder", samples_per_task=8, inner=inner,
                             fit=fit(300, 64)),
        zoo=ZooConfig(runs=2, samples_per_task=8, inner=inner),
        hyperclip=HyperCLIPConfig(hidden=(32,), num_inference_steps=10, fit=fit(100, 128)),
        hyperldm=HyperLDMConfig(hidden=64, blocks=2, num_inference_steps=10, num_samples=2, scheduler="ddim",
                                prediction_type="v_prediction", fit=fit(300, 256)),
        evaluate=EvaluateConfig(guidance_scales=(0.0, 1.5), few_shot=inner))  # fmt: skip


def one(number: int, limit: str, out: Path) -> dict:
    """One number of tasks, in this process: seconds and peak memory in GB by stage."""
    from hyperlatent import stages
    from hyperlatent.memory import bytes_of
    from hyperlatent.rehearsal import peak_memory, reset_peak

    resource.setrlimit(resource.RLIMIT_AS, (bytes_of(limit), bytes_of(limit)))
    found, last = {"number": number, "stages": {}}, (time.process_time(), time.perf_counter())

    def done(line: str) -> None:
        nonlocal last
        cpu, wall = time.process_time() - last[0], time.perf_counter() - last[1]
        found["stages"][line.split(maxsplit=1)[0]] = dict(seconds=cpu, wall=wall, peak_gb=peak_memory())
        print(f"{number:>8} {line[:100]}", file=sys.stderr, flush=True)
        reset_peak()
        last = time.process_time(), time.perf_counter()

    reset_peak()
    with stages.opened(out / "run", settings(out / "tasks", limit), say=done) as chain:
        stages.train(chain)
        rows = stages.evaluate(chain, stages.load_models(chain.out, chain.tasks))
    found["seconds"] = sum(stage["seconds"] for stage in found["stages"].values())
    found["peak_gb"] = max(stage["peak_gb"] for stage in found["stages"].values())
    found["accuracy"] = {f"{row.method} {row.guidance_scale or ''}".strip(): row.accuracy for row in rows}
    return found


def table(found: list[dict]) -> str:
    """Processor seconds by stage, which other work on the machine does not change; the last columns are the whole chain."""
    names = list(found[0]["stages"])  # the first is called tasks: reading them
    titles = ["tasks", "read", *names[1:], "all, s", "ms per task", "peak memory, GB"]
    lines = [f"| {' | '.join(titles)} |", "| ---: |" + " ---: |" * (len(titles) - 1)]
    for one in found:
        seconds = " | ".join(f"{one['stages'][name]['seconds']:.1f}" for name in names)
        each = 1000 * one["seconds"] / one["number"]
        lines.append(f"| {one['number']:,} | {seconds} | {one['seconds']:.1f} | {each:.2f} | {one['peak_gb']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="+", help="numbers of tasks")
    parser.add_argument("--limit", default="8GB")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one: return print(json.dumps(one(options.numbers[0], options.limit, options.one)))
    found = []
    for number in options.numbers:
        with tempfile.TemporaryDirectory() as folder:
            family(number).save(Path(folder) / "tasks")
            command = [sys.executable, __file__, str(number), "--limit", options.limit, "--one", folder]
            found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scale.json").write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
