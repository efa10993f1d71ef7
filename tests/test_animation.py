"""An MP4 with a real ffmpeg, and with one that fails."""

import imageio_ffmpeg
import pytest
import torch
from matplotlib import rc_context

from hyperlatent.trajectory import Trajectory
from hyperlatent.viz.animation import animate_trajectories
from hyperlatent.viz.projection import Plane


@pytest.fixture
def drawn() -> dict:
    """Four chains of twelve steps that all move to the upper right."""
    lots = torch.Generator().manual_seed(0)
    zoo = torch.randn(60, 5, generator=lots)
    z = torch.randn(1, 4, 1, 5, generator=lots) + torch.linspace(0, 3, 13)[:, None, None, None]
    walk = Trajectory(z, z[1:], torch.arange(12), torch.arange(4)[:, None], "classifier-free", 1.5)
    return dict(plane=Plane.fit(zoo), zoo_points=zoo, zoo_kinds=["zoo"] * 60, trajectories=[("walk", walk, torch.linspace(0, 1, 12))],
                seconds=1.0, pause=0.5, frames_per_second=10, dpi=57)


def test_an_mp4_plays(drawn, tmp_path):
    with rc_context({"animation.ffmpeg_path": imageio_ffmpeg.get_ffmpeg_exe()}):
        path = animate_trajectories(path=tmp_path / "walk.mp4", **drawn)
    reader = imageio_ffmpeg.read_frames(path)
    about = next(reader)
    width, height = about["size"]
    frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3).float() for frame in reader]
    assert len(frames) == 15 and about["fps"] == 10 and width % 2 == height % 2 == 0 and about["codec"] == "h264"
    assert about["pix_fmt"].startswith("yuv420p")  # what every player has
    moved = [(b - a).abs().mean().item() for a, b in zip(frames, frames[1:])]
    assert min(moved[:8]) > 5 * max(moved[11:]) and frames[0].mean() > 150  # it moves, then stays, on white
    assert [file.name for file in tmp_path.iterdir()] == ["walk.mp4"]


def test_a_failing_ffmpeg_leaves_nothing(drawn, tmp_path):
    broken = tmp_path / "bin" / "ffmpeg"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "out").mkdir()
    with rc_context({"animation.ffmpeg_path": str(broken)}), pytest.raises(Exception, match="ffmpeg"):
        animate_trajectories(path=tmp_path / "out" / "walk.mp4", **drawn)
    assert not list((tmp_path / "out").iterdir())
