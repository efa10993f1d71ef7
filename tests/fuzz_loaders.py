"""Coverage-guided fuzzing (atheris) of everything that reads a file: whatever is in it, the answer is a result or an error of ours.

    python tests/fuzz_loaders.py --seconds 600 [--keep-going] [--corpus FOLDER]

An input's first byte chooses the file that the rest of it becomes. Checksums are made to fit, as an attacker would, so that the
code behind them is reached. An exception that is no `HyperLatentError`, 2 GB of memory or 20 seconds for one file is a finding.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hyperlatent", "json", "safetensors"], enable_loader_override=False):
    import torch

    from hyperlatent.artifacts import load_artifact, save_artifact
    from hyperlatent.base import CLIPAdapter, random_tasks
    from hyperlatent.config import load_config
    from hyperlatent.encoders import MODELS, SCENES
    from hyperlatent.errors import HyperLatentError
    from hyperlatent.evaluate import read_results, seeds_table, table
    from hyperlatent.files import fingerprint, fingerprint_file, read_json
    from hyperlatent.guidance import ClassifierGuidance
    from hyperlatent.hyperclip import HyperCLIP
    from hyperlatent.hyperldm import Denoiser
    from hyperlatent.hypernet import HNet
    from hyperlatent.model_sizes import check_numbers
    from hyperlatent.pipeline import HyperLatentPipeline
    from hyperlatent.pipeline_parts import Background, PipelineConfig, PipelineParts, save_parts
    from hyperlatent.settings import Config, FitConfig
    from hyperlatent.stages import load_multitask, load_network, load_zoo
    from hyperlatent.tasks import TaskSet
    from hyperlatent.training import fit
    from hyperlatent.trajectory import Trajectory
    from hyperlatent.word_table import WordTable

SIZES = {HNet: dict(n_weights=6, latent_dim=3, hidden=[4]), HyperCLIP: dict(n_weights=6, question_dim=5, hidden=[4]),
         Denoiser: dict(latent_dim=3, question_dim=5, hidden=4, n_blocks=1, time_dim=4)}
OUT, SETTINGS = Path("."), FitConfig(steps=1, batch_size=2, validate_every=1, warmup=0, checkpoint_every=1)


def prepare(folder: Path) -> None:
    """One valid file or folder of every kind."""
    generator = torch.Generator().manual_seed(0)
    random_tasks(2, 3, generator).save(folder / "tasks")
    hyperclip, hnet = HyperCLIP(**SIZES[HyperCLIP]), HNet(**SIZES[HNet])
    ClassifierGuidance(hyperclip, hnet)(torch.ones(2, 5), num_inference_steps=2).save(folder / "trajectory")
    for cls, sizes in SIZES.items():
        save_artifact(folder / cls.__name__, cls.__name__, cls(**sizes).state_dict(), documents={"architecture": sizes})
    adapter = {"dim": 2, "hidden": 1, "logit_scale": 100.0}
    save_artifact(folder / "multitask", "multitask", {"z0": torch.zeros(7)}, documents={"architecture": adapter})
    zoo = dict(latents=torch.zeros(2, 3, 4), phrases=torch.zeros(3, 5), phrase_task=torch.arange(3))
    save_artifact(folder / "zoo", "zoo", zoo)
    (folder / "config.json").write_text(json.dumps({"seed": 1, "hnet": {"hidden": [4, 4], "inner": {"learning_rate": 0.1}}}))
    row = dict(method="hyperldm", guidance_scale=1.5, accuracy=0.5, ci95=[0.4, 0.6])
    (folder / "results.json").write_text(json.dumps(dict(seed=0, tasks=3, rows=[row, row | {"guidance_scale": None}])))
    train(folder / "checkpoint.safetensors")
    pipeline = {cls: cls(**sizes | ({"n_weights": 7} if "n_weights" in sizes else {})) for cls, sizes in SIZES.items()}
    words = WordTable(torch.tensor([320, 1125, 3140]), torch.randn(5, 5, generator=generator), 12)
    save_parts(PipelineParts(CLIPAdapter(2, 1), pipeline[HNet], pipeline[Denoiser], pipeline[HyperCLIP], torch.zeros(5), words,
                             Background(torch.zeros(1, 2, 3), ["a?", "b?"], ["", ""]), PipelineConfig(num_samples=1)), folder / "pipeline")
    ask(folder / "pipeline")  # what it imports is imported before the clock runs
    (folder / "encoder.json").write_bytes((MODELS / f"{SCENES}.json").read_bytes())


def ask(folder: Path) -> None:
    """Load a pipeline and use it: what its settings say takes effect then."""
    pipe = HyperLatentPipeline.from_pretrained(folder, progress=False)
    pipe("a red star?", num_inference_steps=2, num_samples=1)
    pipe("a red star?", guider="classifier", num_inference_steps=2, num_samples=1)


def train(checkpoint: Path) -> None:
    model = torch.nn.Linear(2, 1)
    fit(model, lambda model, generator: model(torch.ones(2)).sum() ** 2, SETTINGS, validate=lambda model: 0.0, progress=False,
        checkpoint=checkpoint)


def score(folder: Path) -> None:
    found = read_results(folder)
    table(found)
    seeds_table([found, found])


def networks(folder: Path) -> None:
    artifact = load_artifact(folder)
    load_network({cls.__name__: cls for cls in SIZES}[folder.name], artifact)


FILES = {  # the file that an input becomes: what reads it
    "tasks/tasks.json": TaskSet.load, "tasks/artifact.json": TaskSet.load, "tasks/weights.safetensors": TaskSet.load,
    "trajectory/artifact.json": Trajectory.load, "trajectory/weights.safetensors": Trajectory.load,
    **{f"{cls.__name__}/architecture.json": networks for cls in SIZES}, "HNet/weights.safetensors": networks,
    "multitask/architecture.json": lambda folder: load_multitask(load_artifact(folder)),
    "multitask/weights.safetensors": lambda folder: load_multitask(load_artifact(folder)),
    "zoo/weights.safetensors": lambda folder: load_zoo(load_artifact(folder)),
    "config.json": lambda folder: load_config(folder / "config.json", Config), "results.json": score,
    "checkpoint.safetensors": lambda folder: train(folder / "checkpoint.safetensors"),
    **{f"pipeline/{name}": ask for name in ("pipeline.json", "background.json", "artifact.json", "weights.safetensors")},
    "encoder.json": lambda folder: check_numbers(read_json(folder / "encoder.json"), "encoder.json")}


def sign(folder: Path) -> None:
    """Make fingerprints and checksums of a folder fit what it holds now, as far as it still can be read."""
    path = folder / "artifact.json"
    try:
        description = json.loads(path.read_bytes())
        for name in description["files"]:
            if (folder / name).is_file(): description["files"][name] = fingerprint_file(folder / name)
        if isinstance(header := header_of(folder / "weights.safetensors"), dict): description["tensors"] = header
        description.pop("checksum", None)
        description["fingerprint"] = fingerprint([description[key] for key in ("kind", "config", "files")])
        description["checksum"] = fingerprint(description)
        path.write_text(json.dumps(description))
    except Exception:  # noqa: BLE001  not this program's business
        pass


def header_of(path: Path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: {key: entry.get(key) for key in ("dtype", "shape")} for name, entry in header.items() if name != "__metadata__"}


def one_file(data: bytes) -> None:
    if not data: return
    name, read = list(FILES.items())[data[0] % len(FILES)]
    good, bad = OUT / "good" / name, OUT / "bad" / name
    signed = bad.parent != OUT / "bad"
    description = (bad.parent / "artifact.json").read_bytes() if signed else b""
    try:
        bad.write_bytes(data[1:])
        if signed: sign(bad.parent)
        read(bad.parent)
    except HyperLatentError as error:
        assert "\n" not in str(error) and error.problem, error
    finally:
        shutil.copyfile(good, bad)
        if signed: (bad.parent / "artifact.json").write_bytes(description)


HOSTILE = [None, True, -1, 0, 1, 2, 7, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
           "", "a", "\ud800", "é\x00\n", "../../etc/passwd", "/etc/passwd", "a" * 5000, [], {}, [[]], [0], [1, 2], [10**9] * 2, {"a": None},
           "F32", "I64", "BOOL", "F8_E4M3", "meta-test", "classifier"]


def altered(value, lots: random.Random):
    """A JSON value with one place in it replaced, dropped, doubled or moved."""
    if isinstance(value, dict) and value and lots.random() < 0.85:
        key = lots.choice(sorted(value))
        change = lots.random()
        if change < 0.05: return {k: v for k, v in value.items() if k != key}
        if change < 0.1: return value | {lots.choice([*value, "x", "\ud800", ""]): value[key]}
        return value | {key: altered(value[key], lots)}
    if isinstance(value, list) and value and lots.random() < 0.85:
        at, change = lots.randrange(len(value)), lots.random()
        if change < 0.05: return value[:at] + value[at + 1 :]
        if change < 0.1: return value[:at] + [value[at]] * lots.choice([2, 3, 100]) + value[at + 1 :]
        return value[:at] + [altered(value[at], lots)] + value[at + 1 :]
    return lots.choice(HOSTILE)


def renamed(header, lots: random.Random):
    """A tensor file's header with a change that safetensors accepts as often as not: another name, type or shape of the same size."""
    name = lots.choice(sorted(header))
    entry, change = header[name], lots.random()
    if change < 0.3 or not isinstance(entry, dict): return altered(header, lots)
    if change < 0.5: return {k: v for k, v in header.items() if k != name} | {lots.choice([*header, "x", "seeds", "score"]): entry}
    if change < 0.75: return header | {name: entry | {"dtype": {"F32": "I32", "I64": "F64"}.get(entry.get("dtype"), "U8")}}
    shape = entry.get("shape") or []
    return header | {name: entry | {"shape": lots.choice([shape[::-1], [*shape, 1], [1, *shape], shape[1:], [0, *shape]])}}


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the mutations are libFuzzer's, half respect JSON, also that of a tensor file's header."""
    lots = random.Random(seed)
    name = list(FILES)[data[0] % len(FILES)] if data else ""
    try:
        if lots.random() < 0.4: raise ValueError
        if name.endswith(".json"):
            return (data[:1] + json.dumps(altered(json.loads(data[1:]), lots)).encode())[:max_size]
        length = int.from_bytes(data[1:9], "little")
        header = json.dumps(renamed(json.loads(data[9 : 9 + length]), lots)).encode()
        return (data[:1] + len(header).to_bytes(8, "little") + header + data[9 + length :])[:max_size]
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError):
        return atheris.Mutate(data, max_size)


def main() -> None:
    global OUT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-going", action="store_true", help="print every kind of finding once and go on")
    parser.add_argument("--corpus", type=Path, help="keep the interesting inputs here")
    parser.add_argument("--input", type=Path, help="read one input and stop")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        OUT = Path(folder)
        prepare(OUT / "good")
        shutil.copytree(OUT / "good", OUT / "bad")
        if options.input: return one_file(options.input.read_bytes())
        corpus = options.corpus or OUT / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(FILES):
            (corpus / name.replace("/", "-")).write_bytes(bytes([i]) + (OUT / "good" / name).read_bytes())
        seen: set[str] = set()

        def watched(data: bytes) -> None:
            try:
                one_file(data)
            except Exception as error:
                frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/hyperlatent/" in frame.filename]
                where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "this program"
                kind = f"{list(FILES)[data[0] % len(FILES)]}: {type(error).__name__} in {where}"
                if not options.keep_going: raise
                if kind not in seen: print(f"FOUND {kind}: {str(error)[:200]!r}", flush=True)
                seen.add(kind)

        flags = [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-max_len=8192", "-rss_limit_mb=3000", "-timeout=20",
                 "-print_final_stats=1", f"-artifact_prefix={os.getcwd()}/"]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], watched, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
