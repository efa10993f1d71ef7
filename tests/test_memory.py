"""When the system grants no more memory, chunks get smaller and results stay as they are."""

import resource

import pytest
import torch
from safetensors.torch import load_file
from test_cli import forked

from hyperlatent.artifacts import load_artifact, save_artifact
from hyperlatent.base import CLIPAdapter, random_tasks
from hyperlatent.hypernet import HNet
from hyperlatent.memory import bytes_of, chunk_memory, memory_in_use
from hyperlatent.processes import mean_score
from hyperlatent.settings import AdaptConfig, ZooConfig
from hyperlatent.zoo import build_zoo, zoo_health

pytestmark = pytest.mark.xdist_group("memory")
MB = 2**20


def address_space() -> int:
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()


def limited(spare: int) -> None:
    """From here on this process gets so many bytes more and not one beyond."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + spare,) * 2)


def zoo_of(memory: int):
    """The zoo of 300 tasks, how many networks were asked for at a time, its health, and a score."""
    lots = torch.Generator().manual_seed(0)
    tasks, base = random_tasks(300, 64, lots), CLIPAdapter(64, hidden=2048)
    base.memory, sizes = memory, []
    hnet = HNet(base.n_weights, 4, (8,), 0.3, generator=lots).requires_grad_(False)
    hnet.register_forward_pre_hook(lambda module, z: sizes.append(len(z[0])))
    config = ZooConfig(runs=1, samples_per_task=10, inner=AdaptConfig(steps=1, learning_rate=1e-3))
    zoo = build_zoo(hnet, base, tasks, config, progress=False)
    health = zoo_health(zoo, hnet, base, tasks)
    batch = tasks.batch()
    with torch.no_grad():
        score = mean_score(lambda part: base.accuracy(hnet(zoo.latents[0, :1].expand(len(part), -1)), part.query, part), [batch],
                           size=base.max_tasks)  # fmt: skip
    return zoo.latents, sizes, health["accuracy"], score


def test_a_chunk_that_does_not_fit_is_computed_in_smaller_ones(tmp_path):
    zoo_of(64 * MB)  # libraries are loaded, before memory is short
    (latents, sizes, accuracy, score), file = zoo_of(64 * MB), tmp_path / "limited.safetensors"

    def starved() -> int:
        from safetensors.torch import save_file

        limited(200 * MB)  # 300 networks of 264 256 weights would take 317 MB
        found = zoo_of(2**40)
        save_file({"latents": found[0], "scores": torch.tensor(found[2:]), "sizes": torch.tensor(found[1])}, file)
        return 0

    assert forked(starved, tmp_path / "stderr") == 0, (tmp_path / "stderr").read_text()[-2000:]
    found = load_file(file)
    torch.testing.assert_close(found["latents"], latents, rtol=1e-4, atol=1e-5)
    assert found["scores"].tolist() == pytest.approx([accuracy, score], abs=0.01)
    assert max(sizes) < 100 and found["sizes"][0] == 300  # the whole was tried first
    assert found["sizes"][-1] < 300 and found["sizes"].median() > 1  # and then parts of it, not one by one, a rest apart


def test_the_zoo_is_mapped_not_read(tmp_path):
    """A file of 200 MB is opened, and its first row used, in a process that may have 100 MB more of its own."""
    save_artifact(tmp_path / "zoo", "zoo", {"latents": torch.ones(50, 1000, 1000)})
    load_artifact(tmp_path / "zoo")

    def starved() -> int:
        limited_data = int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
        tensors = load_artifact(tmp_path / "zoo").tensors
        assert tensors["latents"][0, 0].sum() == 1000
        grown = int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024 - limited_data
        return 0 if grown < 50 * MB else 1

    assert forked(starved, tmp_path / "stderr") == 0, (tmp_path / "stderr").read_text()[-2000:]


def test_the_budget_leaves_room_for_what_is_there():
    used = memory_in_use()
    assert 50 * MB < used < 64 * 1024 * MB
    tight = f"{(used + 200 * MB) // 10**6}MB"
    assert bytes_of(tight) // 16 <= chunk_memory(tight) <= max(bytes_of(tight) // 16, 110 * MB) < chunk_memory("900GB")
