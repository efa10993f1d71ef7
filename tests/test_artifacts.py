"""Damaged, hostile and interrupted artifacts."""

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings

from hyperlatent import artifacts, files
from hyperlatent.artifacts import artifact_is_current, load_artifact, save_artifact
from hyperlatent.errors import ArtifactError
from hyperlatent.files import fingerprint, fingerprint_file, write_json, write_tensors, written_whole

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save(folder, value=1.0, **options):
    options = {
        "config": {"hidden": (128, 64)},
        "inputs": {"tasks": "ab12"},
        "documents": {"tasks": [{"q": "é?"}]},
    } | options
    return save_artifact(folder, "hnet", {"w": torch.full((4, 3), value), "b": torch.arange(5)}, **options)


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def sign(folder, **changes):
    """Make the folder consistent again after tampering: what an attacker would do."""
    path = folder / "artifact.json"
    description = json.loads(path.read_text()) | changes
    for name in description["files"]:
        if (folder / name).is_file():
            description["files"][name] = fingerprint_file(folder / name)
    description["fingerprint"] = fingerprint([description[key] for key in ("kind", "config", "files")])
    description.pop("checksum")
    description["checksum"] = fingerprint(description)
    path.write_text(json.dumps(description))


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "stage")
    return tmp_path / "stage"


def refusal(folder, **expected):
    with pytest.raises(ArtifactError) as e:
        load_artifact(folder, **expected)
    assert "\n" not in str(e.value) and e.value.remedy
    return str(e.value)


# --- what is written comes back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5)])
def test_tensors_come_back_exactly(tmp_path, dtype, shape):
    x = torch.randint(0, 2, shape).to(dtype)
    save_artifact(tmp_path / "a", "x", {"x": x})
    y = load_artifact(tmp_path / "a", shapes={"x": shape}).tensors["x"]
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, y)


def test_tied_transposed_and_trainable_tensors_can_be_saved(tmp_path):
    w = torch.randn(3, 4, requires_grad=True)
    save_artifact(tmp_path / "a", "x", {"w": w, "tied": w, "transposed": w.T, "row": w[1]})
    tensors = load_artifact(tmp_path / "a").tensors
    assert (
        torch.equal(tensors["tied"], w)
        and torch.equal(tensors["transposed"], w.T)
        and torch.equal(tensors["row"], w[1])
    )


def test_saving_twice_writes_the_same_bytes(tmp_path):
    first, second = save(tmp_path / "1"), save(tmp_path / "2", metrics={"seconds": 3.5})
    assert first.fingerprint == second.fingerprint  # a metric is no part of what was made
    save(tmp_path / "3")
    assert {p.name for p in (tmp_path / "1").iterdir()} == {"artifact.json", "tasks.json", "weights.safetensors"}
    for p in (tmp_path / "1").iterdir():
        assert p.read_bytes() == (tmp_path / "3" / p.name).read_bytes()
    assert save(tmp_path / "1", value=2.0).fingerprint != first.fingerprint
    assert save(tmp_path / "1", config={}).fingerprint != first.fingerprint
    assert save(tmp_path / "1", documents={}).fingerprint != first.fingerprint


def test_a_moved_folder_loads(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    loaded = load_artifact(tmp_path / "elsewhere", kind="hnet")
    assert loaded.config == {"hidden": [128, 64]} and loaded.documents == {"tasks": [{"q": "é?"}]}


def test_saving_through_a_symlink_replaces_its_target(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", value=7.0)
    assert (tmp_path / "link").is_symlink() and load_artifact(folder).tensors["w"][0, 0] == 7


def test_tensors_stay_valid_while_their_folder_is_replaced(folder):
    before = load_artifact(folder).tensors["w"]
    save(folder, value=9.0)
    assert (before == 1).all() and (load_artifact(folder).tensors["w"] == 9).all()


def test_others_may_read_what_they_may_read_elsewhere(folder, tmp_path):
    """safetensors alone would write files that nobody but their owner can open."""
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    modes = {path.name: path.stat().st_mode for path in (*folder.iterdir(), tmp_path / "x.safetensors")}
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode}, modes
    (folder / "secret").touch(0o600)
    save(folder, value=2.0)
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600  # what somebody keeps beside it stays as it is


# --- damage ------------------------------------------------------------------------------------------------------


@quick
@given(data=st.data())
def test_a_flipped_byte_is_refused(folder, data):
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    good = path.read_bytes()
    at, flip = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255))
    path.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    try:
        load_artifact(folder)
    except ArtifactError as e:
        assert str(folder) in str(e)
    else:  # a blank became another blank
        assert path.name == "artifact.json" and json.loads(path.read_bytes()) == json.loads(good)
    finally:
        path.write_bytes(good)


@quick
@given(data=st.data())
def test_a_shortened_file_is_refused(folder, data):
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    good = path.read_bytes()
    path.write_bytes(good[: data.draw(st.integers(0, len(good.rstrip()) - 1))])
    try:
        assert path.name in refusal(folder)
    finally:
        path.write_bytes(good)


@quick
@given(garbage=st.binary(max_size=200))
def test_garbage_tensors_are_refused_even_when_signed(folder, garbage):
    (folder / "weights.safetensors").write_bytes(garbage)
    sign(folder)
    assert "weights.safetensors" in refusal(folder)


@quick
@given(
    header=st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda s: (
            st.lists(s, max_size=3) | st.dictionaries(st.sampled_from(["w", "b", "dtype", "shape", "data_offsets"]), s)
        ),
        max_leaves=8,
    )
)
def test_a_strange_header_is_refused_even_when_signed_and_declared(folder, header):
    text = json.dumps(header).encode()
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    declared = {k: v for k, v in header.items() if k != "__metadata__"} if isinstance(header, dict) else {}
    sign(folder, tensors=declared)
    try:
        load_artifact(folder)
    except ArtifactError:
        pass
    else:
        assert header == {}


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 10**8 + 1, 5 * 10**7, 0, 1])
def test_an_oversized_header_sets_no_memory_aside(folder, length):
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 40)
    sign(folder)
    tracemalloc.start()
    message = refusal(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "cut short" in message and peak < 1_000_000


def test_a_header_that_overruns_its_data_is_refused(folder):
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (folder / "weights.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    sign(folder, tensors={"w": {"dtype": "F32", "shape": [10**9]}})
    assert "cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"a"',
        "[" * 100_000,
        "\x00",
        "{}",
        '{"schema_version": 1}',
        '{"schema_version": "1"}',
        '{"schema_version": 1, "kind": 3}',
    ],
)
def test_a_malformed_description_is_refused(folder, text):
    (folder / "artifact.json").write_text(text)
    assert "artifact.json" in refusal(folder)


def test_missing_parts_are_named(folder, tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
    for name in ("tasks.json", "weights.safetensors", "artifact.json"):
        (folder / name).unlink()
        assert name in refusal(folder)
    (tmp_path / "file").write_text("x")
    assert "no folder" in refusal(tmp_path / "file")


def test_a_newer_schema_asks_for_an_upgrade(folder):
    sign(folder, schema_version=2)
    assert "Upgrade hyperlatent" in refusal(folder)


@pytest.mark.parametrize(
    "field", ["kind", "config", "inputs", "metrics", "tensors", "files", "fingerprint", "checksum"]
)
def test_a_description_lacking_a_field_is_refused(folder, field):
    path = folder / "artifact.json"
    description = json.loads(path.read_text())
    del description[field]
    path.write_text(json.dumps(description))
    assert repr(field) in refusal(folder)


def test_an_edited_description_is_refused(folder):
    path = folder / "artifact.json"
    path.write_text(path.read_text().replace("128", "256"))
    assert "checksum" in refusal(folder)


def test_declared_tensors_must_be_there(folder):
    safetensors.torch.save_file({"w": torch.zeros(4, 3)}, folder / "weights.safetensors")
    sign(folder)
    assert "see b" in refusal(folder)


def test_wrong_kind_inputs_and_shapes_are_named(folder):
    assert "'hnet'" in refusal(folder, kind="denoiser") and "'denoiser'" in refusal(folder, kind="denoiser")
    assert "ab12" in refusal(folder, inputs={"tasks": "cd34"}) and "cd34" in refusal(folder, inputs={"tasks": "cd34"})
    assert "'zoo'" in refusal(folder, inputs={"zoo": "ab12"})
    assert "[4, 3]" in refusal(folder, shapes={"w": (3, 4)}) and "'absent'" in refusal(folder, shapes={"absent": (1,)})
    assert load_artifact(folder, kind="hnet", inputs={"tasks": "ab12"}, shapes={"w": (4, 3)}).kind == "hnet"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


def test_a_pickle_is_not_opened(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    buffer = io.BytesIO()
    torch.save({"w": Bomb()}, buffer)
    for payload in (buffer.getvalue(), pickle.dumps(Bomb())):
        (folder / "weights.safetensors").write_bytes(payload)
        sign(folder)
        refusal(folder)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # the bomb is real
    assert (tmp_path / "exploded").exists()


# --- names -------------------------------------------------------------------------------------------------------

EVIL = ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\x00b", "a\nb", "artifact", "C:\\x", "con/../../x"]


@pytest.mark.parametrize("name", EVIL)
def test_a_document_cannot_be_written_outside(tmp_path, name):
    with pytest.raises(ArtifactError, match="cannot be called"):
        save_artifact(tmp_path / "in" / "stage", "x", {}, documents={name: "stolen"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", [f"{name}.json" for name in EVIL] + ["../stage/tasks.json", "tasks.json/../tasks.json", "tasks"]
)
def test_a_signed_artifact_cannot_point_outside(folder, tmp_path, name):
    (tmp_path / "secret.json").write_text('"secret"')
    description = json.loads((folder / "artifact.json").read_text())
    sign(folder, files={**description["files"], name: fingerprint_file(tmp_path / "secret.json")})
    assert "forbidden name" in refusal(folder)


def test_a_tensor_name_is_only_a_name(tmp_path):
    save_artifact(tmp_path / "a", "x", {"../../evil": torch.zeros(1)})
    assert list(load_artifact(tmp_path / "a").tensors) == ["../../evil"] and len(list(tmp_path.iterdir())) == 1


# --- writing that fails ------------------------------------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", [(safetensors.torch, "save_file"), (os, "fsync"), (Path, "write_text"), (os, "replace")]
)
def test_a_full_disk_leaves_the_old_artifact(tmp_path, monkeypatch, where):
    new, old = tmp_path / "new", save(tmp_path / "old").folder
    with monkeypatch.context() as m:
        m.setattr(*where, full_disk)
        with pytest.raises(ArtifactError, match=f"cannot write '{new}': No space left on device. Free some space"):
            save(new)
        if where[1] != "replace":  # a folder that is there is renamed away, not replaced
            with pytest.raises(ArtifactError, match="No space left"):
                save(old, value=2.0)
    assert not new.exists() and hidden(tmp_path) == [] and load_artifact(old).tensors["w"][0, 0] == 1


def test_a_disk_that_fills_up_while_writing(tmp_path):
    """The real thing, by a limit on the size of files: safetensors reports it as an error of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ArtifactError, match="cannot write .*File too large"):
            save_artifact(tmp_path / "stage", "x", {"x": torch.randn(10_000)})
        with pytest.raises(ArtifactError, match="cannot write .*x.safetensors"):
            write_tensors(tmp_path / "x.safetensors", {"x": torch.randn(10_000)})
        with pytest.raises(ArtifactError, match="cannot write .*x.json.*File too large"):
            write_json(tmp_path / "x.json", list(range(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for write in (save, lambda path: write_json(path, {}), lambda path: write_tensors(path, {"x": torch.zeros(1)})):
        with pytest.raises(ArtifactError, match="cannot write .*file/stage"):
            write(tmp_path / "file" / "stage")
    with pytest.raises(ArtifactError, match="cannot write"):
        save("/proc/stage")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(
        ArtifactError, match="Permission denied. Free some space or choose a folder that you may write to"
    ):
        save(tmp_path / "stage")


def test_a_rename_that_fails_brings_the_old_folder_back(folder, monkeypatch):
    rename, calls = os.rename, []

    def second_fails(*args):
        calls.append(args)
        return full_disk() if len(calls) == 2 else rename(*args)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ArtifactError):
        save(folder, value=2.0)
    assert load_artifact(folder).tensors["w"][0, 0] == 1 and hidden(folder.parent) == [] and len(calls) == 3


def save_and_crash(folder, call, count):
    """Save in a child process that dies, as when the power fails, at its call number `count` of `os.<call>`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    real, left = getattr(os, call), iter(range(count))
    setattr(os, call, lambda *args: real(*args) if next(left, None) is not None else os._exit(9))
    try:
        save(folder, value=2.0)
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("exists", "call", "count"),
    [
        (False, "fsync", 0),
        (False, "fsync", 2),
        (False, "replace", 0),
        (True, "fsync", 1),
        (True, "rename", 0),
        (True, "rename", 1),
    ],
)
def test_a_crash_leaves_nothing_that_is_trusted(tmp_path, exists, call, count):
    folder = tmp_path / "stage"
    if exists:
        save(folder)
    assert save_and_crash(folder, call, count) == 9 and len(hidden(tmp_path)) >= 1
    if exists and (call, count) != ("rename", 1):
        assert load_artifact(folder).tensors["w"][0, 0] == 1  # untouched
    else:
        assert "does not exist" in refusal(folder) and not artifact_is_current(folder, "hnet", {})
    save(folder, value=3.0)
    assert load_artifact(folder).tensors["w"][0, 0] == 3


def test_stale_temporaries_are_removed_and_young_ones_left(tmp_path):
    stale, young = tmp_path / ".stage.0123abcd.tmp", tmp_path / ".stage.4567abcd.old"
    others = [
        tmp_path / name
        for name in (".stage.notes", ".stagehand.0123abcd.tmp", "stage.0123abcd.tmp", ".stage.0123abcd.tmpx")
    ]
    for p in (stale, young, *others):
        (p / "inside").mkdir(parents=True)
    for p in (stale, *others):
        os.utime(p, (0, 0))
    save(tmp_path / "stage")
    assert not stale.exists() and young.exists() and all(p.exists() for p in others)


def test_what_others_left_in_the_folder_is_kept(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("log")
    save(folder, value=2.0, documents={"words": []})
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "logs" / "events").read_text() == "log"
    assert not (folder / "tasks.json").exists() and load_artifact(folder).documents == {"words": []}


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    home, file = tmp_path / "home", tmp_path / "file"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    file.write_text("x")
    for place in (home, file):
        with pytest.raises(ArtifactError, match="not an artifact"):
            save(place)
    assert (home / "thesis.tex").read_text() == "years of work" and file.read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert save(tmp_path / "empty").kind == "hnet"


def test_an_interrupted_file_keeps_its_old_content(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "a.json").read_text()) == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"a": {1, 2}}, object(), {(1, 2): 3}, "\ud800", torch.zeros(2)]
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    for write in (
        lambda: write_json(tmp_path / "x.json", value),
        lambda: save(tmp_path / "x", config={"x": value}),
        lambda: save(tmp_path / "x", documents={"x": [value]}),
    ):
        with pytest.raises(ArtifactError, match="cannot be written as JSON"):
            write()
    assert list(tmp_path.iterdir()) == []


# --- reuse and fingerprints --------------------------------------------------------------------------------------


def test_a_finished_stage_is_reused_only_when_it_fits(folder, tmp_path):
    current = lambda **changes: artifact_is_current(
        **{"folder": folder, "kind": "hnet", "config": {"hidden": [128, 64]}, "inputs": {"tasks": "ab12"}} | changes
    )
    assert current() and current(config={"hidden": (128, 64)})
    assert not current(config={"hidden": [128, 65]}) and not current(config={})
    assert (
        not current(inputs={"tasks": "cd34"})
        and not current(inputs={})
        and not current(inputs={"tasks": "ab12", "zoo": "1"})
    )
    assert not current(folder=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert not current(folder=tmp_path / "empty")
    with pytest.raises(ArtifactError, match="kind"):
        current(kind="denoiser")
    (folder / "tasks.json").write_text("[]")
    with pytest.raises(ArtifactError, match="SHA-256"):  # damage is told, not papered over
        current()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda s: (
        st.lists(s, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), s, max_size=4)
    ),
    max_leaves=15,
)


@quick
@given(json_values, json_values)
def test_a_fingerprint_tells_values_apart_and_survives_json(a, b):
    assert fingerprint(a) == fingerprint(json.loads(json.dumps(a)))
    assert (fingerprint(a) == fingerprint(b)) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))


def test_a_fingerprint_follows_its_recipe():
    """Stored fingerprints must still be understood by later versions: the recipe, spelled out independently."""
    of_tensor = hashlib.sha256(struct.pack("<3q", 0, 1, 2)).hexdigest()
    text = '{"a":["é",1.5],"b":{"dtype":"torch.int64","sha256":"OF_TENSOR","shape":[3]}}'.replace(
        "OF_TENSOR", of_tensor
    )
    assert fingerprint({"b": torch.arange(3), "a": ("é", 1.5)}) == hashlib.sha256(text.encode()).hexdigest()


def test_a_fingerprint_sees_type_shape_and_every_bit():
    x = torch.zeros(2, 3)
    flipped = x.clone()
    flipped[1, 2] = -0.0
    variants = [x, x.half(), x.double(), x.bool(), x.T, x.flatten(), flipped, x[:1], torch.zeros(0), torch.zeros(0, 3)]
    assert len({fingerprint(v) for v in variants}) == len(variants)
    assert fingerprint(torch.arange(6.0).reshape(2, 3).T) == fingerprint(torch.arange(6.0).reshape(2, 3).T.contiguous())


def test_names_of_this_room():
    assert artifacts.write_json is files.write_json and artifacts.fingerprint is files.fingerprint
