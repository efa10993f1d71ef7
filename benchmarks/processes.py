"""What several processes gain: `hyperlatent train` at the published sizes under `accelerate launch`, one process and several in turn.

    python benchmarks/processes.py --processes 2 --repeats 3

Every process has one thread. Prints a Markdown table of each stage's seconds and their ratio; a few steps of each training, one
run of the zoo with few inner steps, and short validations stand for the whole.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

FIT = dict(warmup=0, validate_every=10**6, checkpoint_every=10**6)
SETTINGS = {
    "multitask": {"fit": FIT | {"steps": 20}},
    "hnet": {"fit": FIT | {"steps": 8}, "inner": {"steps": 10}},
    "zoo": {"runs": 1, "inner": {"steps": 20}},
    "hyperclip": {"num_inference_steps": 10, "fit": FIT | {"steps": 50}},
    "hyperldm": {"num_inference_steps": 10, "num_samples": 1, "scheduler": "ddim", "fit": FIT | {"steps": 100}},
}


def stages_of(processes: int, tasks: Path, config: Path, out: Path) -> dict[str, float]:
    """Seconds of every stage of one run."""
    train = ["train", "--preset", "reference", "--config", str(config), "--tasks", str(tasks), "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else []), "--num_processes", str(processes),
               "--no_python", str(Path(sys.executable).parent / "hyperlatent"), *train]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode: raise SystemExit(done.stdout + done.stderr)
    return {name: float(seconds) for name, seconds in re.findall(r"^(\w+) +([\d.]+) s", done.stdout, re.M) if name in SETTINGS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from hyperlatent.data.rehearsal_tasks import rehearsal_tasks

    with tempfile.TemporaryDirectory() as folder:
        tasks, config = Path(folder) / "tasks", Path(folder) / "settings.json"
        rehearsal_tasks().save(tasks)
        config.write_text(json.dumps(SETTINGS))
        runs = [[stages_of(number, tasks, config, Path(folder) / f"{turn}-{number}") for number in (1, options.processes)]
                for turn in range(options.repeats)]  # fmt: skip
    print(f"| stage | one process, s | {options.processes} processes, s | times as fast (lowest to highest) |")
    print("| --- | ---: | ---: | ---: |")
    for name in runs[0][0]:
        alone, together = zip(*([run[name] for run in pair] for pair in runs))
        ratios = [a / b for a, b in zip(alone, together)]
        print(f"| {name} | {median(alone):.1f} | {median(together):.1f} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
