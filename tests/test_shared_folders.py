"""One run folder used by several processes, links and pipes where files should be, giants, and schemas of other versions."""

import json
import multiprocessing
import os
import shutil
import time

import pytest
import torch

from hyperlatent import artifacts
from hyperlatent.artifacts import load_artifact, save_artifact
from hyperlatent.config import load_config
from hyperlatent.errors import ArtifactError, ConfigError, HyperLatentError
from hyperlatent.evaluate import read_results
from hyperlatent.files import fingerprint, write_json
from hyperlatent.settings import Config


def save(folder, value=0.0):
    return save_artifact(folder, "x", {"w": torch.full((50, 50), float(value))}, documents={"who": [value]}, metrics={"value": value})


def work(folder, role, number, seconds, report):
    """Write or read without pause, and count what went wrong."""
    end, done, problems = time.monotonic() + seconds, 0, []
    while time.monotonic() < end:
        try:
            if role == "writer": save(folder, number)
            else:
                found = load_artifact(folder)
                [value] = found.documents["who"]
                if not (found.tensors["w"] == value).all() or found.metrics["value"] != value: problems.append("a mixture")
            done += 1
        except Exception as e:
            problems.append(repr(e))
    report.put((role, done, problems[:3]))


def test_writers_and_readers_of_one_folder(tmp_path):
    """Every save succeeds, and every load gives what one of the writers wrote, whole."""
    save(tmp_path / "stage")
    (tmp_path / "stage" / "notes.txt").write_text("mine")
    start = multiprocessing.get_context("fork")
    report = start.Queue()
    roles = [("writer", 1), ("writer", 2), ("writer", 3), ("reader", 0), ("reader", 0)]
    processes = [start.Process(target=work, args=(tmp_path / "stage", role, number, 5, report)) for role, number in roles]
    for process in processes: process.start()
    outcomes = [report.get(timeout=120) for _ in processes]
    for process in processes: process.join()
    assert [problems for *_, problems in outcomes] == [[]] * 5 and all(done > 3 for _, done, _ in outcomes), outcomes
    assert load_artifact(tmp_path / "stage").kind == "x" and [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_a_writer_that_another_was_quicker_than_writes_after_it(tmp_path, monkeypatch):
    """What the race above may meet, made certain: the place that was just cleared is taken when the new folder is moved there."""
    folder, other, rename, met = save(tmp_path / "stage", 1).folder, save(tmp_path / "other", 2).folder, os.rename, []

    def overtaken(source, target):
        if str(target) == str(folder) and not met:
            met.append(shutil.copytree(other, folder))
        return rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    save(folder, 3)
    assert met and load_artifact(folder).tensors["w"][0, 0] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "stage"]


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    save(tmp_path / "secret", 7)
    for name in ("weights.safetensors", "who.json", "artifact.json"):
        folder = save(tmp_path / f"with {name}", 7).folder
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret" / name)  # its content and checksum fit
        with pytest.raises(ArtifactError, match=f"{name}' is a link that leads out of its folder"): load_artifact(folder)
        (folder / name).unlink()
        (folder / "inner").mkdir()
        shutil.copy(tmp_path / "secret" / name, folder / "inner" / name)
        (folder / name).symlink_to(folder / "inner" / name)
        assert load_artifact(folder).tensors["w"][0, 0] == 7
    (tmp_path / "alias").symlink_to(tmp_path / "secret")  # a link to the folder itself is the caller's own
    assert load_artifact(tmp_path / "alias").kind == "x"


def test_the_cache_of_the_hub_is_read(tmp_path):
    """There the files of a snapshot are links to blobs."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    folder = save(snapshot / "hnet", 3).folder
    blobs.mkdir()
    for i, file in enumerate(list(folder.iterdir())):
        file.rename(blobs / f"{i}")
        file.symlink_to(f"../../../blobs/{i}")
    assert load_artifact(folder).tensors["w"][0, 0] == 3


@pytest.mark.timeout(60)
def test_pipes_and_folders_are_no_files(tmp_path):
    for name in ("weights.safetensors", "who.json", "artifact.json"):
        for make in (os.mkfifo, os.mkdir):
            folder = save(tmp_path / f"{name} {make.__name__}").folder
            (folder / name).unlink()
            make(folder / name)
            with pytest.raises(ArtifactError, match=name): load_artifact(folder)
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(ConfigError, match="no file"): load_config(tmp_path / "config.json", Config)
    with pytest.raises(ArtifactError, match="no file"): read_results(tmp_path)


@pytest.mark.timeout(60)
def test_ten_terabytes_are_refused_before_anything_is_read(tmp_path):
    """A file with holes really has the size that its header promises."""
    folder, size = save(tmp_path / "stage").folder, 10 * 10**12
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(folder / "weights.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        try: f.truncate(8 + len(header) + size)
        except OSError: pytest.skip("this disk has no files with holes of that size")
    with pytest.raises(ArtifactError, match="weights.safetensors' has 1000000000.* bytes, and no more than"): load_artifact(folder)
    for name, read in (("artifact.json", load_artifact), ("results.json", read_results)):
        with open(folder / name, "wb") as f: f.truncate(2**30)
        with pytest.raises(ArtifactError, match=f"{name}.* has {2**30} bytes"): read(folder)
    with open(folder / "config.json", "wb") as f: f.truncate(2**40)
    with pytest.raises(ConfigError): load_config(folder / "config.json", Config)


STRANGE = ["NaN", "[1e999]", '{"a": -Infinity}', '"\\ud800"', "[" * 10**6, "9" * 10**6, '{"seed": ' + "9" * 30 + "}"]


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: text[:20])
def test_json_that_python_would_take(tmp_path, text):
    for name, read in (("config.json", lambda path: load_config(path, Config)), ("results.json", lambda path: read_results(path.parent))):
        (tmp_path / name).write_text(text)
        with pytest.raises(HyperLatentError, match=name) as refused: read(tmp_path / name)
        assert len(str(refused.value)) < 600


@pytest.mark.parametrize("place", ["a\0b", "x" * 5000, "/proc/self/mem", "/dev/null/x"])
def test_places_that_cannot_be(place):
    for use in (load_artifact, save, lambda path: write_json(path, {}), read_results, lambda path: load_config(path, Config)):
        with pytest.raises(HyperLatentError): use(place)


def older(folder):
    """The folder as an earlier version would have written it: the kind was called a type."""
    path = folder / "artifact.json"
    description = json.loads(path.read_text())
    description["type"] = description.pop("kind")
    description["schema_version"] = 1
    description.pop("checksum")
    description["checksum"] = fingerprint(description)
    path.write_text(json.dumps(description))


def test_an_older_schema_is_migrated_or_refused(tmp_path, monkeypatch):
    folder = save(tmp_path / "stage").folder
    older(folder)
    monkeypatch.setattr(artifacts, "SCHEMA_VERSION", 2)
    with pytest.raises(ArtifactError, match="version 1, and no way is known from there to 2. Run the stage again"): load_artifact(folder)
    rename = lambda old: {("kind" if key == "type" else key): value for key, value in old.items()}
    monkeypatch.setitem(artifacts.MIGRATIONS, 1, rename)
    assert load_artifact(folder).kind == "x"
    (folder / "artifact.json").write_text((folder / "artifact.json").read_text().replace('"x"', '"y"'))
    with pytest.raises(ArtifactError, match="checksum"): load_artifact(folder)  # checked before anything is migrated


def test_types_and_fingerprints_are_checked(tmp_path):
    folder = save(tmp_path / "stage").folder
    assert load_artifact(folder, dtypes={"w": "F32"}).kind == "x"
    with pytest.raises(ArtifactError, match="tensor 'w' of type F32, expected F16"): load_artifact(folder, dtypes={"w": "F16"})
    path = folder / "artifact.json"
    description = json.loads(path.read_text()) | {"fingerprint": "0" * 64}
    description.pop("checksum")
    path.write_text(json.dumps(description | {"checksum": fingerprint(description)}))
    with pytest.raises(ArtifactError, match="'fingerprint' that is not that of its content"): load_artifact(folder)


def test_what_would_not_be_read_back_is_not_written(tmp_path):
    for options in (dict(config={"n": 2**64}), dict(documents={"d": [10**30]})):
        with pytest.raises(ArtifactError, match="does not fit into 64 bits"): save_artifact(tmp_path / "stage", "x", {}, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name, value", [("n_blocks", 2**31), ("n_blocks", "ab"), ("n_blocks", [1]), ("hidden", 2**40),
                                         ("hidden", [1] * 10**5), ("latent_dim", 0), ("x", 1)])
def test_an_architecture_cannot_ask_for_what_the_file_does_not_hold(tmp_path, name, value):
    """Found by the fuzzer: without a check such a network is built until memory ends."""
    from hyperlatent.hyperldm import Denoiser
    from hyperlatent.stages import load_multitask, load_network

    sizes = dict(latent_dim=3, question_dim=5, hidden=4, n_blocks=1, time_dim=4)
    tensors = Denoiser(**sizes).state_dict()
    documents = {"architecture": sizes | {name: value}}
    with pytest.raises(ArtifactError, match="holds no Denoiser"):
        load_network(Denoiser, save_artifact(tmp_path / "a", "hyperldm", tensors, documents=documents))
    documents = {"architecture": {"dim": 2**31, "hidden": "ab", "logit_scale": 1.0}}
    with pytest.raises(ArtifactError, match="holds no multi-task weights"):
        load_multitask(save_artifact(tmp_path / "b", "multitask", {"z0": torch.zeros(7)}, documents=documents))
