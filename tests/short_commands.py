"""`hyperlatent` as a reader of the documentation types it, in a moment: run as a program by test_docs_commands.py.

Every option means what it means; what takes long or is not here is smaller: networks, steps and Meta-Scenes; at most two seeds;
the small CLIP in the place of a model that would be downloaded; the CPU in the place of a GPU.
"""

import sys
from dataclasses import replace
from functools import wraps

import torch

import hyperlatent.commands.folder
import hyperlatent.data.features
import hyperlatent.encoders
from hyperlatent import cli
from hyperlatent.config import from_dict, to_dict
from hyperlatent.encoders import SCENES
from hyperlatent.reproduce_training import shortened
from hyperlatent.settings import ScenesConfig

FIT = {"steps": 6, "batch_size": 8, "warmup": 1, "validate_every": 2, "checkpoint_every": 2}
TINY = {
    "data": {"num_tasks": 24, "pictures_per_task": 12}, "multitask": {"fit": FIT}, "zoo": {"runs": 2, "inner": {"steps": 2}},
    "hnet": {"latent_dim": 8, "hidden": [16], "inner": {"steps": 2}, "fit": FIT},
    "hyperclip": {"hidden": [16], "num_inference_steps": 3, "fit": FIT},
    "hyperldm": {"hidden": 16, "blocks": 1, "num_samples": 2, "fit": FIT},
    "evaluate": {"few_shot": {"steps": 2}},
}


def small(preset):
    """A function that names settings, whose settings are tiny."""
    return wraps(preset)(lambda name: from_dict(type(preset(name)), cli.merged(to_dict(preset(name)), TINY)))


def few(preset):
    """The same for the comparison of all methods: some of them."""
    data = ScenesConfig(**TINY["data"])
    return wraps(preset)(lambda name="scenes": replace(shortened(preset(name)), data=data, methods=("text_film",), studies=("few_shot",)))


def offline(load):
    """The small CLIP in the place of one that is named; a file of weights is its own then."""
    def small(name, pretrained=None, *more, **options):
        return load(*((SCENES, pretrained) if str(pretrained).endswith(".safetensors") else ("scenes", None)), *more, **options)
    return wraps(load)(small)


def shorten() -> None:
    cli.preset, cli.reproduce_preset = small(cli.preset), few(cli.reproduce_preset)
    hyperlatent.commands.folder.preset_of = small(hyperlatent.commands.folder.preset_of)
    for module in hyperlatent.encoders, hyperlatent.data.features:
        module.load_encoder = offline(module.load_encoder)


def here(arguments: list[str]) -> list[str]:
    """The arguments for this machine."""
    changed = list(arguments)
    for before, i in zip(arguments, range(1, len(arguments))):
        if before == "--device" and arguments[i] == "cuda" and not torch.cuda.is_available(): changed[i] = "cpu"
        if before == "--seeds": changed[i] = str(min(2, int(arguments[i])))
    return changed + (["--scale", "tiny", "--quick"] if arguments[0] == "bench" else [])


def main(arguments: list[str]) -> int:
    shorten()
    return cli.main(here(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
