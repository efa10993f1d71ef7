"""Downloads from a server of our own: resumed, checked, and explained when they fail."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from hyperlatent.cli import main
from hyperlatent.data import downloads
from hyperlatent.data.downloads import Remote, coco_picture, download
from hyperlatent.errors import ArtifactError

CONTENT = bytes(range(256)) * 2000


@pytest.fixture
def server():
    """A server whose `behave` decides what it answers: (first byte asked for) -> (status, content)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers["Range"] or "bytes=0-")[6:].rstrip("-"))
            found.asked.append(start)
            status, content, promised = found.behave(start)
            self.send_response(status)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked, found.behave = [], ranges
    found.remote = Remote(f"http://127.0.0.1:{found.server_port}/train2014.zip", len(CONTENT), hashlib.md5(CONTENT).hexdigest())
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def ranges(start: int):
    rest = CONTENT[start:]
    return (416, b"", 0) if start >= len(CONTENT) else (206 if start else 200, rest, len(rest))


def breaks_off(after: int):
    """Sends so many bytes of what it promises, each time."""
    def behave(start: int):
        status, content, promised = ranges(start)
        return status, content[:after], promised
    return behave


def test_whole(server, tmp_path):
    assert download(server.remote, tmp_path / "new").read_bytes() == CONTENT
    assert download(server.remote, tmp_path / "new").exists() and server.asked == [0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train2014.zip"]


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_transfer_that_breaks_off_is_continued_where_it_was(server, tmp_path, size):
    server.behave = breaks_off(200_000)
    remote = server.remote._replace(size=size)
    assert download(remote, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 3 and all(0 <= 200_000 * i - start < 2 * 2**16 for i, start in enumerate(server.asked))


def test_the_next_run_continues(server, tmp_path):
    server.behave = breaks_off(0)
    (tmp_path / "train2014.zip.part").write_bytes(CONTENT[:100_000])
    with pytest.raises(ArtifactError, match="Run again to resume"):
        download(server.remote, tmp_path, attempts=2)
    assert (tmp_path / "train2014.zip.part").read_bytes() == CONTENT[:100_000]
    server.behave, server.asked[:] = ranges, []
    assert download(server.remote, tmp_path).read_bytes() == CONTENT and server.asked == [100_000]


def test_a_server_without_ranges(server, tmp_path):
    server.behave = lambda start: (200, CONTENT, len(CONTENT))
    (tmp_path / "train2014.zip.part").write_bytes(b"x" * 1000)
    assert download(server.remote, tmp_path).read_bytes() == CONTENT


def test_more_is_there_than_the_server_has(server, tmp_path):
    (tmp_path / "train2014.zip.part").write_bytes(b"x" * (len(CONTENT) + 5))
    assert download(server.remote, tmp_path).read_bytes() == CONTENT and server.asked == [len(CONTENT) + 5, 0]


def test_a_part_that_is_complete(server, tmp_path):
    (tmp_path / "train2014.zip.part").write_bytes(CONTENT)
    assert download(server.remote, tmp_path).read_bytes() == CONTENT and server.asked == []


@pytest.mark.parametrize("change, message", [
    (dict(md5="0" * 32), "MD5"), (dict(size=len(CONTENT) + 1), "bytes"), (dict(size=len(CONTENT) - 1, md5=None), "bytes")])
def test_another_file_than_expected(server, tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message) as error:
        download(server.remote._replace(**change), tmp_path, attempts=1)
    assert server.remote.address in str(error.value) and str(tmp_path / "train2014.zip") in str(error.value)
    assert not (tmp_path / "train2014.zip").exists()


def test_a_damaged_file_that_is_there_already(server, tmp_path):
    (tmp_path / "train2014.zip").write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ArtifactError, match="MD5"):
        download(server.remote, tmp_path)
    assert (tmp_path / "train2014.zip").exists() and server.asked == []


@pytest.mark.parametrize("status", [403, 404])
def test_the_server_refuses(server, tmp_path, status):
    server.behave = lambda start: (status, b"", 0)
    with pytest.raises(ArtifactError, match=f"{status}.*by other means"):
        download(server.remote, tmp_path)
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.behave = lambda start: ranges(start) if len(server.asked) > 1 else (503, b"", 0)
    assert download(server.remote, tmp_path).read_bytes() == CONTENT and server.asked == [0, 0]


def test_no_connection(server, tmp_path, monkeypatch, capsys):
    address = "http://127.0.0.1:1/train2014.zip"
    with pytest.raises(ArtifactError, match=f"{address} cannot be downloaded.*put it at"):
        download(Remote(address), tmp_path, attempts=0)
    monkeypatch.setattr(downloads, "VQA_FILES", (server.remote,))
    assert main(["prepare", "downloads", "vqa", "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "train2014.zip") in capsys.readouterr().out


def test_single_pictures(server, tmp_path, monkeypatch):
    from hyperlatent.data.features import encode_pictures
    from hyperlatent.encoders import load_encoder
    from hyperlatent.feature_store import FeatureStore

    file = tmp_path / "picture.jpg"
    from PIL import Image
    Image.new("RGB", (40, 40), "red").save(file)
    server.behave = lambda start: (200, file.read_bytes(), file.stat().st_size) if "42" in NAMES[len(server.asked) - 1] else (404, b"", 0)
    monkeypatch.setattr(downloads, "COCO", f"http://127.0.0.1:{server.server_port}/")
    NAMES = ["COCO_val2014_000000000042", "COCO_val2014_000000000043"]
    encoder = load_encoder("scenes", device="cpu")
    store = FeatureStore(tmp_path / "store", encoder.contract)
    failed = encode_pictures([*NAMES, "mine"], [tmp_path], encoder, store, workers=0, fetch=tmp_path)
    assert list(store.where()) == NAMES[:1] and (tmp_path / f"{NAMES[0]}.jpg").exists()
    assert "404" in failed[NAMES[1]] and "not a picture of COCO" in failed["mine"]
    assert coco_picture(NAMES[0]).address.endswith("val2014/COCO_val2014_000000000042.jpg")


def test_a_folder_that_cannot_be_written_to(server):
    with pytest.raises(ArtifactError, match="cannot write"):
        download(server.remote, Path("/proc/nowhere"))
