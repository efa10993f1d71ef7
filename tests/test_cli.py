"""The command line: what goes wrong is one clear line and an exit code, and nothing half-written is left."""

import json
import os
import resource
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import hyperlatent
from hyperlatent.cli import main
from hyperlatent.tasks import TaskSet

FIT = {"steps": 6, "batch_size": 8, "warmup": 1, "validate_every": 2, "checkpoint_every": 2}
TINY = {  # every stage for real, in a moment
    "data": {"num_tasks": 24, "pictures_per_task": 12},
    "multitask": {"fit": FIT},
    "hnet": {"latent_dim": 8, "hidden": [16], "inner": {"steps": 2}, "fit": FIT},
    "zoo": {"runs": 2, "inner": {"steps": 2}},
    "hyperclip": {"hidden": [16], "num_inference_steps": 3, "fit": FIT},
    "hyperldm": {"hidden": 16, "blocks": 1, "num_inference_steps": 2, "num_samples": 2, "fit": FIT},
    "evaluate": {"guidance_scales": [0.0, 1.0, 1.5], "few_shot": {"steps": 2}},
}
STAGES = ["multitask", "hnet", "zoo", "hyperclip", "hyperldm", "evaluate"]


def forked(function, stderr: Path) -> int:
    """Exit status of a function in a copy of this process, where everything is imported already; -9 after SIGKILL."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            sys.stderr = open(stderr, "w", buffering=1)
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def leftovers(folder: Path) -> list[str]:
    """Temporaries and checkpoints, which a finished run does not leave."""
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A configuration file of a chain in miniature."""
    file = tmp_path_factory.mktemp("config") / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def demo(tiny, cache, monkeypatch, capsys):
    """`hyperlatent demo` in miniature: exit code, lines printed, the line of the error."""
    monkeypatch.setenv("HYPERLATENT_CACHE", str(cache))

    def run(out: Path, *options: str) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = main(["demo", "--out", str(out), "--config", str(tiny), *options])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err

    return run


def error_of(result) -> str:
    """The one line of a run that failed."""
    code, _, error = result
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1, result
    return error


# ---- options


@pytest.mark.parametrize(
    "options, nearest",
    [
        (["--hnet.fit.stepz", "3"], "--hnet.fit.steps"),
        (["--quik"], "--quick"),
        (["--hnet.latent-dim", "many"], "--hnet.latent-dim INT"),
    ],
)
def test_wrong_option_names_the_nearest(options, nearest, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *options])
    assert nearest in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, named",
    [
        ('{"hnet": {"fit": {"steps": "many"}}}', ["hnet.fit.steps", "'many'", "int"]),
        ('{"hnet": {"latent_dims": 3}}', ["hnet.latent_dims", "latent_dim?"]),
        ('{"hnet": 3}', ["hnet"]),
        ("[]", ["as a whole"]),
        ("{", ["not valid JSON"]),
    ],
)
def test_wrong_config_file(content, named, tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(content)
    assert main(["demo", "--config", str(file), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(name in error for name in ["mine.json", *named])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["", "demo", "train", "evaluate", "train-clip"])
def test_help_is_quick_and_does_without_torch(command):
    script = """
import sys, resource
import hyperlatent
from hyperlatent.cli import main
try: main(sys.argv[1:])
except SystemExit as end: assert not end.code
usage = resource.getrusage(resource.RUSAGE_SELF)
print("torch" in sys.modules, usage.ru_utime + usage.ru_stime, file=sys.stderr)
"""
    arguments = [sys.executable, "-c", script, *command.split(), "--help"]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "usage: hyperlatent" in result.stdout
    torch, seconds = result.stderr.split()
    assert torch == "False" and float(seconds) < 1.5


# ---- folders


@pytest.mark.xdist_group("tiny")
def test_out_that_cannot_be_a_folder(demo, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in file, file / "below", Path("/proc/hyperlatent"):
        assert str(out) in error_of(demo(out))
    assert file.read_text() == "mine"


@pytest.mark.xdist_group("tiny")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_out_of_somebody_else(demo, tmp_path):
    stderr = tmp_path / "stderr"
    demo(tmp_path / "other")  # everything is imported: somebody else may not be allowed to read root's Python

    def run():
        sys.stderr = open(stderr, "w", buffering=1)
        os.seteuid(65534)
        return main(["demo", "--out", str(tmp_path / "out")])

    assert forked(run, stderr) == 1
    assert "Permission denied" in stderr.read_text() and stderr.read_text().count("\n") == 1


@pytest.mark.xdist_group("tiny")
def test_full_disk(demo, tmp_path, tiny):
    out, stderr = tmp_path / "out", tmp_path / "stderr"
    demo(tmp_path / "other")  # the cache is filled

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing more fails, as on a full disk
        return main(["demo", "--out", str(out), "--config", str(tiny)])

    assert forked(run, stderr) == 1
    error = stderr.read_text()
    assert error.count("\n") == 1 and "cannot write" in error and str(out) in error
    assert leftovers(out) == [] or leftovers(out) == [".checkpoints"]
    assert demo(out)[0] == 0
    assert (out / "results.json").read_text() == (tmp_path / "other" / "results.json").read_text()


@pytest.mark.xdist_group("tiny")
def test_busy_folder(demo, tmp_path):
    from hyperlatent.data.prepare import locked

    with locked(tmp_path):
        assert "another run" in error_of(demo(tmp_path))


# ---- stages


@pytest.mark.xdist_group("tiny")
def test_reused_redone_and_damaged(demo, tmp_path):
    code, _, _ = demo(tmp_path)
    results = (tmp_path / "results.json").read_bytes()
    assert code == 0 and leftovers(tmp_path) == []
    _, lines, _ = demo(tmp_path)
    assert [line.split()[0] for line in lines if line.endswith("reused")] == STAGES
    assert (tmp_path / "results.json").read_bytes() == results
    _, lines, _ = demo(tmp_path, "--hyperldm.hidden", "24")
    assert [line.split()[0] for line in lines if line.endswith("reused")] == STAGES[:4]
    _, lines, _ = demo(tmp_path, "--seed", "1")
    assert not any(line.endswith("reused") for line in lines)
    assert (tmp_path / "results.json").read_bytes() != results
    demo(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == results  # a seed repeats

    for stage in "hnet", "evaluate":
        weights = tmp_path / stage / "weights.safetensors"
        whole = weights.read_bytes()
        for cut in 4, len(whole) // 2, len(whole) - 1:
            weights.write_bytes(whole[:cut])
            assert str(weights) in error_of(demo(tmp_path))
        weights.write_bytes(whole)
    assert demo(tmp_path)[0] == 0


@pytest.mark.xdist_group("tiny")
def test_evaluate_and_train(demo, tmp_path, tiny, capsys):
    assert main(["evaluate", "--out", str(tmp_path / "none")]) == 1
    assert "config.json" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["train", "--out", str(out), "--config", str(tiny)]) == 0
    assert not (out / "results.json").exists()
    assert main(["evaluate", "--out", str(out)]) == 0
    demo(tmp_path / "demo")
    assert (out / "results.json").read_bytes() == (tmp_path / "demo" / "results.json").read_bytes()


@pytest.mark.xdist_group("tiny")
def test_features_of_another_encoder(demo, tmp_path, monkeypatch, cache):
    assert demo(tmp_path / "out")[0] == 0
    from hyperlatent.artifacts import load_artifact

    (folder,) = cache.glob("scenes-*")
    stored = load_artifact(folder / "tasks", "taskset").config
    tasks = TaskSet.load(folder / "tasks")
    try:
        tasks.save(folder / "tasks", config=stored | {"contract": stored["contract"] | {"weights": "0" * 64}})
        error = error_of(demo(tmp_path / "out"))
        assert str(folder) in error and "weights" in error
    finally:
        tasks.save(folder / "tasks", config=stored)
    assert demo(tmp_path / "out")[0] == 0


@pytest.mark.xdist_group("tiny")
def test_stage_of_other_tasks_is_not_loaded(demo, tmp_path):
    from hyperlatent.errors import ArtifactError
    from hyperlatent.stages import load_models

    demo(tmp_path)
    models = load_models(tmp_path)
    assert models.hnet.latent_dim == 8 and not any(p.requires_grad for p in models.denoiser.parameters())
    demo(tmp_path / "other", "--seed", "1")
    (tmp_path / "zoo").rename(tmp_path / "mine")
    (tmp_path / "other" / "zoo").rename(tmp_path / "zoo")
    with pytest.raises(ArtifactError, match="other 'hnet'"):
        load_models(tmp_path)


def test_version_and_a_warning_are_a_line(tmp_path, capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"hyperlatent {hyperlatent.__version__}\n"
    assert main(["generate", "what xylophone is it?", "--out", str(tmp_path / "w.safetensors")]) == 0
    assert capsys.readouterr().err.startswith("warning: the encoder does not know 'xylophone'")
