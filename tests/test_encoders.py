"""Encoders: our features are open_clip's, whatever does not fit is one error, and nothing is unpickled."""

import json
import resource
import shutil
import warnings
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperlatent.artifacts import load_artifact, save_artifact
from hyperlatent.encoders import CONFIG_FILE, MODELS, SCENES, WEIGHTS_FILE, build_encoder, load_encoder, save_encoder
from hyperlatent.errors import EncoderError

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 40, "layers": 2, "width": 64, "patch_size": 20},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a red star", "what color is the small object at the top left?", "", "Ünknown words, twice: ünknown!"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random weights of a small architecture that is registered with open_clip under the name "tiny"."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def pictures():
    """Pictures of several modes, sizes and forms."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 57, 83, 3), dtype=np.uint8)
    modes = zip(pixels, ["RGB", "L", "RGBA", "CMYK", "YCbCr", "LA"])
    return [Image.fromarray(p).convert(m).resize((30 + 20 * i, 61)) for i, (p, m) in enumerate(modes)]


@pytest.fixture(scope="module")
def scenes():
    return load_encoder("scenes", device="cpu")


# ---- the truth: open_clip's own calls


def by_hand(model, transform, pictures, texts):
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([transform(p) for p in pictures]))
        words = model.encode_text(open_clip.get_tokenizer("tiny")(texts))
    return images / images.norm(dim=-1, keepdim=True), words / words.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("mode, theirs", [("crop", None), ("squash", "squash")])
def test_features_are_those_of_open_clip(tiny, pictures, mode, theirs):
    model, _, transform = open_clip.create_model_and_transforms("tiny", str(tiny), image_resize_mode=theirs)
    encoder = load_encoder("tiny", tiny, device="cpu", resize_mode=mode)
    images, words = by_hand(model, transform, pictures, TEXTS)
    torch.testing.assert_close(encoder.encode_images(pictures), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), words, rtol=0, atol=1e-5)


def test_squash_and_crop_differ(tiny, pictures):
    squash, crop = (load_encoder("tiny", tiny, device="cpu", resize_mode=mode) for mode in ("squash", "crop"))
    assert (squash.encode_images(pictures) - crop.encode_images(pictures)).abs().max() > 1e-3


def test_the_shipped_model_is_open_clips_too(scenes):
    model = open_clip.create_model(SCENES, str(MODELS / f"{SCENES}.safetensors")).eval()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = open_clip.image_transform(64, is_train=False)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(p) for p in pictures]), normalize=True)
        words = model.encode_text(scenes.tokenizer(TEXTS), normalize=True)
    for given_as in pixels, pictures, [np.asarray(p) for p in pictures]:
        torch.testing.assert_close(scenes.encode_images(given_as), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(scenes.encode_texts(TEXTS), words, rtol=0, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_batch_size_does_not_matter(scenes, number, batch_size):
    pixels = torch.randint(0, 256, (number, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    words = (TEXTS * 3)[:number]
    kwargs = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(scenes.encode_images(pixels, batch_size), scenes.encode_images(pixels), **kwargs)
    torch.testing.assert_close(scenes.encode_images(list(pixels), batch_size), scenes.encode_images(pixels), **kwargs)
    torch.testing.assert_close(scenes.encode_texts(words, batch_size), scenes.encode_texts(words), **kwargs)


def test_one_thing_is_a_list_of_one_and_nothing_is_none(scenes, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    for one in pictures[0], tmp_path / "a.png", str(tmp_path / "a.png"):
        assert torch.equal(scenes.encode_images(one), scenes.encode_images([pictures[0]]))
    assert torch.equal(scenes.encode_texts("a star"), scenes.encode_texts(["a star"]))
    assert scenes.encode_images([]).shape == scenes.encode_texts([]).shape == (0, scenes.dim)


def test_the_model_is_left_as_it_was_found(scenes, tmp_path):
    model = build_encoder(SCENES, ["a", "star"]).model.train()
    model.visual.bn1.eval()  # a mixture of modes
    encoder, before = replace(scenes, model=model), [module.training for module in model.modules()]
    features = encoder.encode_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert not features.requires_grad and not encoder.encode_texts(["a star"]).requires_grad
    with pytest.raises(EncoderError):
        encoder.encode_images([tmp_path / "missing.png"])
    assert [module.training for module in model.modules()] == before
    assert model.visual.bn1.num_batches_tracked == 0 and torch.is_grad_enabled()


# ---- the contract


def test_contract_survives_an_artifact(scenes, tmp_path):
    save_artifact(tmp_path / "features", "features", {"x": torch.zeros(1)}, config={"contract": scenes.contract})
    stored = load_artifact(tmp_path / "features").config["contract"]
    scenes.contract.check(stored)
    assert load_encoder("scenes", device="cpu").contract.fingerprint == scenes.contract.fingerprint


@pytest.mark.parametrize("entry, value", [
    ("activation", "quick_gelu"), ("weights", "0" * 64), ("normalisation", "none"), ("open_clip", "2.20.0"),
    ("architecture", {"embed_dim": 192}), ("preprocessing", {}), ("text", {"context_length": 77}),
])
def test_every_entry_of_the_contract_counts(scenes, entry, value):
    contract = scenes.contract
    other = replace(contract, **{entry: value})
    assert other.fingerprint != contract.fingerprint
    for one, two in (contract, other), (other, contract):
        with pytest.raises(EncoderError, match=entry):
            one.check(two)


def test_other_weights_other_pictures_and_other_words_break_the_contract(scenes, tiny):
    reference, model = scenes.contract, build_encoder(SCENES, ["a"]).model
    model.load_state_dict(scenes.model.state_dict())
    replace(scenes, model=model).contract.check(reference)
    with torch.no_grad():
        model.visual.bn1.running_mean[0] += 1e-4  # a buffer, not a parameter
    with pytest.raises(EncoderError, match="weights"):
        replace(scenes, model=model).contract.check(reference)
    with pytest.raises(EncoderError, match="preprocessing.resize_mode 'squash', here it is 'shortest'"):
        load_encoder("tiny", tiny, resize_mode="crop").contract.check(load_encoder("tiny", tiny).contract)


def test_the_tag_decides_about_quick_gelu(tiny, monkeypatch):
    """open_clip only warns when a tag's activation is not the architecture's, and computes other features."""
    tag = {"file": str(tiny), "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"quick": tag})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick, plain = load_encoder("tiny", "quick", device="cpu"), load_encoder("tiny", tiny, device="cpu")
    model = open_clip.create_model("tiny", str(tiny), force_quick_gelu=True)
    truth = by_hand(model, open_clip.image_transform(40, False), [Image.new("RGB", (40, 40))], TEXTS)[1]
    torch.testing.assert_close(quick.encode_texts(TEXTS), truth, rtol=0, atol=1e-5)
    assert (quick.encode_texts(TEXTS) - plain.encode_texts(TEXTS)).abs().max() > 1e-4
    assert quick.contract.activation == "quick_gelu" and quick.contract.preprocessing["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(EncoderError, match="activation"):
        quick.contract.check(plain.contract)


# ---- saving


def test_saved_encoders_load_here_and_in_open_clip(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"quick": {"file": str(tiny), "quick_gelu": True}})
    encoder = load_encoder("tiny", "quick", device="cpu", resize_mode="crop")
    save_encoder(encoder, tmp_path / "saved")
    load_encoder(tmp_path / "saved", device="cpu", resize_mode="crop").contract.check(encoder.contract)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")
    images, words = by_hand(model, transform, pictures, TEXTS)
    torch.testing.assert_close(encoder.encode_images(pictures), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), words, rtol=0, atol=1e-5)


def test_saving_replaces_an_encoder_and_nothing_else(scenes, tmp_path):
    save_encoder(scenes, tmp_path / "mine")
    save_encoder(scenes, tmp_path / "mine", dtype=torch.float16)
    assert {p.name for p in tmp_path.rglob("*")} == {"mine", CONFIG_FILE, WEIGHTS_FILE}
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(EncoderError, match="thesis.tex"):
        save_encoder(scenes, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


# ---- what does not fit


@pytest.fixture
def saved(scenes, tmp_path):
    save_encoder(scenes, tmp_path / "saved", dtype=torch.float16)
    load_encoder(tmp_path / "saved", device="cpu").contract.check(scenes.contract)  # until it is damaged, it loads
    return tmp_path / "saved"


@pytest.mark.parametrize("damage", [
    lambda bytes_: bytes_[:-1], lambda bytes_: bytes_[:100], lambda bytes_: b"", lambda bytes_: b"\x80\x04}." * 9,
    lambda bytes_: (2**62).to_bytes(8, "little") + bytes_[8:],
])
def test_damaged_weights_are_one_error(saved, damage):
    (saved / WEIGHTS_FILE).write_bytes(damage((saved / WEIGHTS_FILE).read_bytes()))
    with pytest.raises(EncoderError, match=WEIGHTS_FILE):
        load_encoder(saved)


@pytest.mark.parametrize("config", ["", "{}", "[]", '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": 3}}', "null"])
def test_a_damaged_configuration_is_one_error(saved, config):
    (saved / CONFIG_FILE).write_text(config)
    with pytest.raises(EncoderError):
        load_encoder(saved)


@pytest.mark.parametrize("change", [
    {"embed_dim": 2**22}, {"text_cfg": {"width": 2**18}}, {"text_cfg": {"layers": 10**9}}, {"vision_cfg": {"layers": [1, 1, 1, 10**7]}},
    {"vision_cfg": {"width": 10**13}}, {"text_cfg": {"vocab_size": 2**24, "width": 2048, "heads": 8}},
])
def test_a_model_that_its_weights_cannot_fill_is_never_built(saved, change):
    """Not an out-of-memory kill: the sizes are compared before memory is taken."""
    config = json.loads((saved / CONFIG_FILE).read_text())
    for name, value in change.items():
        config["model_cfg"][name] = config["model_cfg"][name] | value if isinstance(value, dict) else value
    (saved / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="no model has more than|describes a model of"):
        load_encoder(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4e6  # kilobytes


def test_missing_files_are_one_error(saved, tmp_path):
    (saved / CONFIG_FILE).unlink()
    with pytest.raises(EncoderError, match=CONFIG_FILE):
        load_encoder(saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match=WEIGHTS_FILE):
        load_encoder(tmp_path / "empty")


def test_weights_of_another_architecture_are_one_error(tiny):
    with pytest.raises(EncoderError, match="weights.safetensors"):
        load_encoder(SCENES, tiny)
    with pytest.raises(EncoderError, match=SCENES):
        load_encoder("tiny", MODELS / f"{SCENES}.safetensors")


def test_a_small_vocabulary_must_say_which(scenes, tmp_path):
    safetensors.torch.save_file(scenes.model.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(EncoderError, match="does not say which"):
        load_encoder(SCENES, tmp_path / "plain.safetensors")


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "open_clip_pytorch_model.bin"])
def test_pickles_are_never_opened(name, tmp_path, saved, capsys):
    torch.save({"visual.bn1.weight": Bomb()}, tmp_path / name)
    with pytest.raises(EncoderError, match="never opened"):
        load_encoder(SCENES, tmp_path / name)
    (saved / WEIGHTS_FILE).unlink()
    shutil.copy(tmp_path / name, saved / name)
    with pytest.raises(EncoderError, match=WEIGHTS_FILE):
        load_encoder(saved)
    shutil.copy(tmp_path / name, saved / WEIGHTS_FILE)  # a pickle under a false name
    with pytest.raises(EncoderError):
        load_encoder(saved)
    assert "boom" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (("ViT-L-14-336", "openai"), "download"), (("hf-hub:nobody/nothing",), "local folder"), (("RN50",), "openai"),
    (("RN50", "typo"), "openai"), (("scene",), "scenes"), (("ViT-B/32",), "laion2b_s34b_b79k"),
])
def test_what_cannot_be_had_offline_says_what_to_do(arguments, message):
    with pytest.raises(EncoderError, match=message) as error:
        load_encoder(*arguments)
    assert error.value.remedy and "\n" not in str(error.value)


@pytest.mark.parametrize("make", [
    lambda file: file, lambda file: file.write_text("no picture") and file,
    lambda file: (Image.effect_noise((99, 99), 9).save(file), file.write_bytes(file.read_bytes()[:2000]))[1] and file,
])
def test_a_picture_that_cannot_be_read_is_named(scenes, tmp_path, make):
    with pytest.raises(EncoderError, match="bad.png"):
        scenes.encode_images([Image.new("RGB", (8, 8)), make(tmp_path / "bad.png")])


@pytest.mark.parametrize("wrong", [
    torch.rand(2, 3, 64, 64), [np.zeros((8, 8, 3))], [None], [3], torch.zeros(2, 5, 64, 64, dtype=torch.uint8),
    torch.zeros(2, 3, 64, 64, dtype=torch.int64),
])
def test_what_is_no_picture_is_one_error(scenes, wrong):
    with pytest.raises(EncoderError):
        scenes.encode_images(wrong)


def test_what_is_no_text_is_one_error(scenes):
    with pytest.raises(EncoderError, match="3"):
        scenes.encode_texts(["a star", 3])


# ---- words


def test_unknown_words(scenes, tiny):
    assert scenes.unknown_words("What color is the small, STAR-shaped thing?") == [",", "-", "shaped", "thing"]
    assert scenes.unknown_words("") == [] and load_encoder("tiny", tiny).unknown_words("xylophone") == []


def test_a_cut_text_is_said_once_and_a_full_one_never(tiny):
    encoder = load_encoder("tiny", tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_texts(["star " * 18])  # 20 tokens with start and end
    with pytest.warns(UserWarning, match="18 tokens"):
        cut = encoder.encode_texts(["red star", "star " * 19])
    torch.testing.assert_close(cut[1:], encoder.encode_texts(["star " * 18]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_texts(["star " * 40])


def test_every_word_of_the_scenes_is_known(scenes):
    from hyperlatent.data.scene_captions import all_words

    assert [word for word in all_words() if scenes.unknown_words(word)] == []
    assert scenes.tokenizer(all_words()).max() == len(scenes.token_ids) + 1 == scenes.model.vocab_size - 1


def test_the_shipped_files_are_small():
    assert sum(file.stat().st_size for file in MODELS.glob(f"{SCENES}*")) < 12e6
