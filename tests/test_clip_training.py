"""Training the small CLIP: the same run whether or not it was stopped, and a folder that is never half finished."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hyperlatent import clip_training
from hyperlatent.clip_training import (
    Seeing,
    build_scenes_encoder,
    caption_batch,
    centre,
    contrastive_loss,
    train_and_save,
)
from hyperlatent.data.scene_captions import captions
from hyperlatent.data.scene_questions import ASKED, SEEN_WORDINGS, all_questions, split_questions, wordings
from hyperlatent.data.scenes import random_objects
from hyperlatent.encoders import WEIGHTS_FILE, load_encoder
from hyperlatent.errors import EncoderError
from hyperlatent.settings import ClipTrainingConfig, FitConfig

FIT = FitConfig(steps=4, batch_size=8, warmup=2, ema_decay=0.5, validate_every=2, checkpoint_every=1)
SHORT = ClipTrainingConfig(fit=FIT, mixed_precision="no")


@pytest.fixture(autouse=True)
def few_questions(monkeypatch):
    questions = [next(q for q in all_questions() if q.asked == kind) for kind in ASKED]
    monkeypatch.setattr(clip_training, "some_questions", lambda: questions)


def test_the_loss_is_the_symmetric_cross_entropy():
    clip = build_scenes_encoder().model
    images, texts = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clip.logit_scale.fill_(9.0)  # beyond CLIP's limit of log 100
        loss = contrastive_loss(clip, images, texts)
    logits, own = 100 * torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1), torch.arange(6)
    truth = -(logits.log_softmax(0)[own, own] + logits.log_softmax(1)[own, own]).mean() / 2
    torch.testing.assert_close(loss, truth, rtol=1e-4, atol=1e-4)


def test_the_head_reads_every_place():
    """A head that sees the right answers at all places has no loss, and empty places ask for no color and no size."""
    objects = random_objects(64, torch.Generator().manual_seed(0))
    sizes = [9, 8, 2]
    values = objects + torch.tensor([1, 0, 0])  # shape 0 is an empty place
    parts = [torch.nn.functional.one_hot(values[..., i].clamp(min=0), n) for i, n in enumerate(sizes)]
    model = Seeing(torch.nn.Identity(), 4 * sum(sizes))
    with torch.no_grad():
        model.head.weight.copy_(100 * torch.eye(4 * sum(sizes)))
        model.head.bias.zero_()
    images = torch.cat(parts, -1).flatten(1).float()
    assert model.seeing_loss(images, objects) < 1e-5
    assert model.seeing_loss(images.roll(1, 0), objects) > 1


def test_centred_features_have_mean_zero():
    torch.manual_seed(0)
    encoder, seed = build_scenes_encoder(), torch.Generator()
    pictures, tokens, _ = caption_batch(encoder, 1024, seed.manual_seed(3))
    with torch.no_grad():
        for wanted in (False, True):
            towers = encoder.model.encode_image(pictures), encoder.model.encode_text(tokens)
            assert [bool(x.mean(0).norm() < 0.01 * x.norm(dim=1).mean()) for x in towers] == [wanted] * 2
            centre(encoder, seed.manual_seed(3))


def test_held_out_questions_are_never_put_into_words():
    held_out = frozenset(q for q, split in split_questions().items() if split != "meta-train")
    never = {wording for question in held_out for wording in wordings(question, SEEN_WORDINGS)}
    generator = torch.Generator().manual_seed(0)
    said = captions(random_objects(4000, generator), generator, held_out)
    asked = [text for text in said if text.rpartition(" ")[0] in never or text.partition("? ")[0] + "?" in never]
    assert asked == []
    said = captions(random_objects(4000, generator), generator, frozenset())
    assert any(text.partition("? ")[0] + "?" in never for text in said)


def test_a_run_holds_out_all_but_the_training_questions(tmp_path, monkeypatch):
    used = []

    def spy(objects, generator, held_out=frozenset()):
        used.append(held_out)
        return captions(objects, generator, held_out)

    monkeypatch.setattr(clip_training, "captions", spy)
    train_and_save(tmp_path / "run", SHORT, progress=False)
    assert set(used) == {frozenset(q for q, split in split_questions().items() if split != "meta-train")}


def test_a_batch_depends_on_its_generator_alone():
    encoder, batches = build_scenes_encoder(), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(batches))  # the global generator must not matter
        batches.append(caption_batch(encoder, 4, torch.Generator().manual_seed(seed)))
    assert all(map(torch.equal, batches[0], batches[1])) and not torch.equal(batches[0][0], batches[2][0])


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    straight = train_and_save(tmp_path / "straight", SHORT, progress=False)
    loss, calls = clip_training.clip_loss, iter([0, 0, 0])

    def stops(*arguments):
        if next(calls, None) is None:
            raise Stopped
        return loss(*arguments)

    monkeypatch.setattr(clip_training, "clip_loss", stops)
    with pytest.raises(Stopped):
        train_and_save(tmp_path / "stopped", SHORT, progress=False)
    assert not (tmp_path / "stopped" / WEIGHTS_FILE).exists()
    with pytest.raises(EncoderError):
        load_encoder(tmp_path / "stopped")
    (tmp_path / "stopped" / "thesis.tex").write_text("years of work")
    with pytest.raises(EncoderError, match="thesis.tex"):
        train_and_save(tmp_path / "stopped", SHORT, progress=False)
    (tmp_path / "stopped" / "thesis.tex").unlink()
    calls = iter([0])  # one step is left
    torch.manual_seed(123)
    assert train_and_save(tmp_path / "stopped", SHORT, progress=False) == straight
    one, two = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("straight", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == {p.name for p in (tmp_path / "straight").iterdir()}


def test_a_finished_run_is_read_and_no_other_folder_is_touched(tmp_path, monkeypatch):
    scores = train_and_save(tmp_path / "run", SHORT, progress=False)
    assert scores == json.loads((tmp_path / "run" / "training.json").read_text())["scores"]
    monkeypatch.setattr(clip_training, "fit", None)
    assert train_and_save(tmp_path / "run", SHORT, progress=False) == scores
    with pytest.raises(EncoderError, match="other settings"):
        train_and_save(tmp_path / "run", ClipTrainingConfig(seed=1, fit=FIT, mixed_precision="no"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(EncoderError, match="thesis.tex"):
        train_and_save(tmp_path / "mine", SHORT)
    (tmp_path / "run" / "training.json").write_text("{")
    with pytest.raises(EncoderError, match="run"):
        train_and_save(tmp_path / "run", SHORT)


def test_the_averaged_weights_are_validated(monkeypatch):
    validated, accuracies = [], clip_training.prompt_accuracies

    def spy(encoder, *arguments):
        validated.append(encoder.model)
        return accuracies(encoder, *arguments)

    monkeypatch.setattr(clip_training, "prompt_accuracies", spy)
    encoder, _ = clip_training.train_clip(SHORT, progress=False)
    assert validated[-1] is encoder.model and validated[0] is validated[1] is not encoder.model


def test_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_and_save(tmp_path / "run", SHORT, progress=False)
    assert torch.equal(torch.rand(1), expected)
