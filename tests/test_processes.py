"""Several processes: the same networks as one process, a whole zoo, one writer, and an end that is clear when a process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import TINY

from hyperlatent.base import CLIPAdapter, random_tasks
from hyperlatent.data.rehearsal_tasks import made_up_tasks, stand_in_features
from hyperlatent.settings import (
    AdaptConfig,
    FitConfig,
    GeneratorConfig,
    HVAEConfig,
    HyperCLIPConfig,
    HyperLDMConfig,
    MultitaskConfig,
    TextConfig,  # fmt: skip
    ZooConfig,
)

pytestmark = pytest.mark.xdist_group("processes")
ROOT = Path(__file__).resolve().parent.parent
FIT = FitConfig(steps=6, batch_size=7, warmup=1, validate_every=2, ema_decay=0.9, weight_decay=0.01, checkpoint_every=2)
INNER = AdaptConfig(steps=3, learning_rate=0.05)


def trainings(base, train, validation):
    """Every training of the library in miniature, by name: a function of `fit`'s options that gives a network."""
    from hyperlatent.direct_weights import DirectWeights
    from hyperlatent.guide_training import train_hyperclip, train_hyperldm
    from hyperlatent.hvae import train_hvae
    from hyperlatent.hypernet import HNet
    from hyperlatent.meta import train_hnet, train_mnet, validation_batches
    from hyperlatent.text_baselines import train_text_network
    from hyperlatent.zoo import build_zoo

    lots = torch.Generator().manual_seed(5)
    hnet = HNet(base.n_weights, 6, (12,), 0.3, generator=lots).requires_grad_(False)
    zoo = build_zoo(hnet, base, train, ZooConfig(runs=2, samples_per_task=8, inner=INNER), progress=False)
    held_out = validation_batches(base, validation)
    generator = GeneratorConfig(latent_dim=6, hidden=(12,), samples_per_task=8, inner=INNER, dropout=0.2, fit=FIT)
    mnet = MultitaskConfig(samples_per_task=8, inner=INNER, fit=FIT)
    text = TextConfig(hidden=(12,), dropout=0.3, question_noise=0.2, samples_per_task=8, fit=FIT)
    ldm = HyperLDMConfig(hidden=16, blocks=2, dropout=0.3, question_noise=0.1, num_inference_steps=4, num_samples=2, scheduler="ddim",
                         prediction_type="v_prediction", fit=FIT)  # fmt: skip
    clip = HyperCLIPConfig(hidden=(12,), latent_noise=0.1, num_inference_steps=3, fit=FIT)
    hvae = HVAEConfig(latent_dim=4, hidden=(12,), task_weight=1.0, samples_per_task=8, fit=FIT,
                      networks=ZooConfig(runs=2, samples_per_task=8, inner=INNER))  # fmt: skip
    found = {f"mnet {name}": lambda name=name, **options: train_mnet(base, train, validation, replace(mnet, method=name), **options)[0]
             for name in ("multitask", "fomaml", "maml")}  # fmt: skip
    found |= {f"hnet {name}": lambda name=name, **more: train_hnet(base, train, validation, replace(generator, method=name), **more)[0]
              for name in ("auto_decoder", "joint", "fomaml", "maml", "multitask")}  # fmt: skip
    found |= {f"text {name}": lambda name=name, **more: train_text_network(base, train, validation, replace(text, method=name), **more)[0]
              for name in ("hypernetwork", "film")}  # fmt: skip
    start = DirectWeights(0.3 * base.init(1, lots)[0])
    return found | {
        "hvae": lambda **options: train_hvae(start, base, train, validation, hvae, **options)[0],
        "hyperclip": lambda **options: train_hyperclip(zoo, hnet, base, held_out, clip, **options)[0],
        "hyperldm": lambda **options: train_hyperldm(zoo, hnet, base, held_out, ldm, **options)[0]}  # fmt: skip


def miniature():
    lots = torch.Generator().manual_seed(0)
    return CLIPAdapter(8, hidden=4), random_tasks(11, 8, lots), random_tasks(5, 8, lots, "meta-validation")


NAMES = ["mnet multitask", "mnet fomaml", "mnet maml", "hnet auto_decoder", "hnet joint", "hnet fomaml", "hnet maml", "hnet multitask",
         "text hypernetwork", "text film", "hvae", "hyperclip", "hyperldm"]  # fmt: skip


def train_all(out: Path, checkpoints: Path | None = None) -> None:
    """What each of the processes does: every training, a zoo and an evaluation; the results of this process into a file."""
    from safetensors.torch import save_file

    from hyperlatent.files import untied
    from hyperlatent.hyperclip import HyperCLIP, info_nce
    from hyperlatent.hypernet import HNet
    from hyperlatent.processes import Share, summed
    from hyperlatent.settings import Config
    from hyperlatent.stages import make_accelerator
    from hyperlatent.zoo import build_zoo

    accelerator = make_accelerator(Config(device="cpu"))
    share = Share.of(accelerator)
    base, train, validation = miniature()
    found = {}
    for name, learn in trainings(base, train, validation).items():
        model = learn(accelerator=accelerator, progress=False, checkpoint=out / f"{name}.safetensors")
        found |= {f"{name}/{key}": value for key, value in model.state_dict().items()}
    lots = torch.Generator().manual_seed(3)
    model = HyperCLIP(20, 6, (8,), generator=lots)
    weights, questions = torch.randn(7, 20, generator=lots), torch.randn(7, 6, generator=lots)
    info_nce(model, share(weights), questions, share=share).backward()
    summed([p.grad for p in model.parameters()], share)
    found |= {f"gradient/{key}": p.grad for key, p in model.named_parameters()}  # Adam would forgive a wrong factor
    hnet = HNet(base.n_weights, 6, (12,), 0.3, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    config = ZooConfig(runs=2, samples_per_task=8, inner=INNER)
    zoo = build_zoo(hnet, base, train, config, max_tasks=2, share=share, progress=False)
    save_file(untied(found | {"zoo": zoo.latents, "phrase_task": zoo.phrase_task}), out / f"results{accelerator.process_index}.safetensors")
    accelerator.end_training()


SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
import test_processes
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launched(number: int, *arguments, **options) -> subprocess.Popen:
    """`torchrun` with so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict[str, torch.Tensor]]]:
    """What each process has found, with one process and with two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "train.py").write_text(SCRIPT + "test_processes.train_all(Path(sys.argv[1]))\n")
    found = {}
    for number in (1, 2):
        (out := folder / str(number)).mkdir()
        process = launched(number, folder / "train.py", out)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        found[number] = [load_file(out / f"results{i}.safetensors") for i in range(number)]
        networks = list(out.glob("*-networks-run*.safetensors"))  # HVAE's, kept run by run
        assert len(networks) == 2
        assert len(list(out.glob("*.safetensors"))) == len(NAMES) + number + 2  # a checkpoint of each training, by one writer
    return found


@pytest.mark.parametrize("name", [*NAMES, "gradient"])
def test_two_processes_train_what_one_does(name, results):
    [alone], (main, other) = results[1], results[2]
    keys = [key for key in alone if key.startswith(f"{name}/")]
    assert keys
    for key in keys:
        assert torch.equal(main[key], other[key])  # not even rounding may part the processes
        torch.testing.assert_close(main[key], alone[key], rtol=1e-3, atol=2e-5)


def test_the_zoo_is_whole(results):
    [alone], (main, other) = results[1], results[2]
    assert torch.equal(main["zoo"], other["zoo"]) and main["zoo"].shape == (2, 11, 6)
    torch.testing.assert_close(main["zoo"], alone["zoo"], rtol=1e-3, atol=1e-4)
    assert len(main["zoo"].flatten(0, 1).unique(dim=0)) == 22 and torch.equal(main["phrase_task"], alone["phrase_task"])


# ---- the command


# Threads of the process group that outlive it may hold a tensor still when the interpreter has ended, which aborts the process: now and
# then, on a busy machine. So it is their presence that is looked for.
CONSOLE_SCRIPT = """
import sys
from pathlib import Path
from hyperlatent.cli import main
code = main()
left = [name for thread in Path("/proc/self/task").iterdir() if "gloo" in (name := (thread / "comm").read_text())]
if left: sys.exit(f"threads of the process group are left: {left}")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list:
    """`hyperlatent train` on a folder of tasks, as the arguments of a launcher."""
    folder = tmp_path_factory.mktemp("command")
    stand_in_features(made_up_tasks(20, 8, 500), dim=8).save(folder / "tasks")
    (folder / "tiny.json").write_text(json.dumps({k: v for k, v in TINY.items() if k != "data"} | {"base": {"hidden": 4}}))
    (folder / "hyperlatent").write_text(CONSOLE_SCRIPT)
    return [folder / "hyperlatent", "demo", "--tasks", folder / "tasks", "--config", folder / "tiny.json", "--out"]


def test_the_command_with_two_processes(command, tmp_path):
    tables, weights = [], []
    for number in (1, 2):
        process = launched(number, *command, tmp_path / str(number))
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        assert output.count("\nhyperldm ") == output.count("| majority") == 1  # one process speaks
        tables.append(json.loads((tmp_path / str(number) / "results.json").read_text())["rows"])
        weights.append(load_file(tmp_path / str(number) / "hyperldm" / "weights.safetensors"))
    for name, value in weights[0].items(): torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
    for one, two in zip(*tables):
        assert one["method"] == two["method"] and one["accuracy"] == pytest.approx(two["accuracy"], abs=0.02)


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_run_and_the_next_start_goes_on(command, tmp_path, which):
    out = tmp_path / "run"
    long = ["--hnet.fit.steps", "1000000", "--hnet.fit.validate-every", "1000000"]
    process = launched(2, *command, out, *long)
    while not process.stdout.readline().startswith("multitask"): assert process.poll() is None, process.stderr.read()[-3000:]
    deadline = time.monotonic() + 60
    while not list(out.glob(".checkpoints/hnet-*")) and time.monotonic() < deadline: time.sleep(0.05)
    workers = children(process.pid)
    rank = {int(dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line)["RANK"]): pid
            for pid in workers}  # fmt: skip
    start = time.monotonic()
    os.kill(rank[which], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert "SIGKILL" in error or "exitcode: -9" in error or "exitcode  : -9" in error
    assert "error: another process of this run has ended" in error and "start the same command again" in error
    assert "threads of the process group" not in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    again = launched(2, *command, out)
    output, error = again.communicate(timeout=300)
    assert again.returncode == 0 and "multitask    reused" in output, error[-3000:]
