"""Arguments that nobody should pass to a pipeline or a guide, or put into a task: a result or an error of ours. Run by test_fuzz.py."""

import math
import os

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from hyperlatent import HyperLatentPipeline
from hyperlatent.base import random_tasks
from hyperlatent.errors import HyperLatentError, TaskError
from hyperlatent.guidance import ClassifierFreeGuidance, ClassifierGuidance
from hyperlatent.hyperclip import HyperCLIP
from hyperlatent.hyperldm import Denoiser
from hyperlatent.hypernet import HNet
from hyperlatent.questions import Task, check_tasks
from hyperlatent.tasks import TaskSet

torch.set_num_threads(1)
LOTS = torch.Generator().manual_seed(0)
DENOISER = Denoiser(4, 3, hidden=8, n_blocks=1, time_dim=4, num_train_timesteps=20, generator=LOTS)
GUIDES = [ClassifierFreeGuidance(DENOISER), ClassifierGuidance(HyperCLIP(6, 3, [4]), HNet(6, 4, [4], generator=LOTS))]
MORE = int(os.environ.get("FUZZ_SECONDS", 0))  # then not the same examples every time
quick = settings(max_examples=max(40, MORE), deadline=None, derandomize=not MORE)

strange = [1e30, -1e30, 10**5 + 1, 10**400, True, None, "2", [1.0], torch.tensor(1.0)]
numbers = st.one_of(st.floats(), st.integers(-3, 5), st.sampled_from(strange))
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
tensors = st.builds(lambda shape, dtype, value: torch.full(shape, value).to(dtype), shapes | st.sampled_from([(3,), (2, 3)]), dtypes,
                    st.sampled_from([0.0, 1.0, -2.0, 1e30, math.nan, math.inf]))
things = tensors | st.sampled_from([None, [1.0, 2.0, 3.0], "what color?", 3])


def answer(guide, question, **options):
    """The trajectory, or None after an error of ours."""
    try:
        return guide(question, **options)
    except HyperLatentError as error:
        assert error.problem and "\n" not in str(error)


def fits(trajectory):
    assert trajectory is None or (trajectory.final.isfinite().all() and trajectory.final.shape[-1] == 4)


@quick
@given(st.sampled_from(GUIDES), things)
def test_questions(guide, question):
    fits(answer(guide, question, num_inference_steps=2))


@quick
@given(things)
def test_negative_questions(question):
    fits(answer(GUIDES[0], torch.ones(2, 3), negative_features=question, num_inference_steps=2))


@quick
@given(st.sampled_from(["guidance_scale", "guidance_rescale", "eta", "num_samples", "num_inference_steps"]), numbers)
def test_numbers_of_classifier_free_guidance(name, value):
    fits(answer(GUIDES[0], torch.ones(2, 3), **{"num_inference_steps": 2, name: value}))


@quick
@given(st.sampled_from(["learning_rate", "prior_weight", "noise", "num_samples"]), numbers)
def test_numbers_of_classifier_guidance(name, value):
    fits(answer(GUIDES[1], torch.ones(2, 3), **{"num_inference_steps": 2, name: value}))


@pytest.mark.parametrize("steps", [0, -1, 10**6 + 1, 10**30, 1.5, math.nan, None, "2", True])
def test_steps_of_classifier_guidance(steps):
    assert answer(GUIDES[1], torch.ones(2, 3), num_inference_steps=steps) is None


@quick
@given(st.sampled_from(GUIDES), things)
def test_seeds(guide, seeds):
    fits(answer(guide, torch.ones(2, 3), seeds=seeds, num_inference_steps=2))


@quick
@given(things)
def test_starts(start):
    fits(answer(GUIDES[1], torch.ones(2, 3), z=start, num_inference_steps=2))


@quick
@given(st.tuples(numbers, numbers) | numbers)
def test_intervals(interval):
    fits(answer(GUIDES[0], torch.ones(2, 3), guidance_interval=interval, num_inference_steps=2))


def test_another_device():
    fits(answer(GUIDES[0], torch.ones(2, 3, device="meta"), num_inference_steps=2))
    fits(answer(GUIDES[1], torch.ones(2, 3, device="meta"), num_inference_steps=2))


texts = st.text(max_size=4) | st.sampled_from(["", " ", "\x00", "\ud800", "a" * 10_000, "yes"])
samples = st.lists(st.tuples(st.integers(-1, 4) | st.sampled_from([2**70, None, 0.5, "x"]), st.integers(-1, 4)), max_size=4).map(tuple)


@quick
@given(st.builds(Task, texts, *[st.lists(texts, max_size=4).map(tuple)] * 2, samples, samples, split=st.sampled_from(["meta-train", "x"])))
def test_tasks(task):
    try:
        check_tasks([task], 5)
    except TaskError as error:
        assert "\n" not in str(error)
    else:
        assert task.question.strip() and len(set(task.answers)) == len(task.answers) == len(task.prompts) >= 2
        assert all(0 <= i < 5 and 0 <= a < len(task.answers) for i, a in (*task.support, *task.query)) and task.support and task.query


@pytest.mark.parametrize("n", [0, 1, 2, 5000])
def test_numbers_of_answers(n):
    answers = tuple(f"answer {i}" for i in range(n))
    task = Task("how many?", answers, answers, ((0, 0),), ((0, 0),))
    make = lambda: TaskSet([task], torch.ones(1, 2), question_features=[torch.ones(1, 2)], answer_features=[torch.ones(n, 2)])
    if n < 2:
        with pytest.raises(TaskError): make()
    else:
        assert make().batch().answer_mask.sum() == n


@quick
@given(things, st.integers(-5, 5) | st.none(), st.integers(-5, 5) | st.sampled_from(["random", "x", 0.5]))
def test_batches(indices, number, phrase):
    tasks = random_tasks(3, 4, torch.Generator().manual_seed(0))
    try:
        tasks.batch(indices, num_support=number, phrase=phrase, generator=torch.Generator())
    except HyperLatentError as error:
        assert "\n" not in str(error)


# ---- every argument of the pipeline, each replaced by everything that it is not

PIPE = HyperLatentPipeline.from_pretrained("scenes", progress=False)
QUESTION, ANSWERS, FEATURES = "what color is the star?", ["red", "blue"], torch.ones(2, PIPE.base.dim)
WEIGHTS = torch.zeros(1, PIPE.base.n_weights)
ask = lambda **options: PIPE(QUESTION, **{"num_samples": 1, "num_inference_steps": 2} | options)
STRANGE = [
    None, True, -1, 0, 2, 10**6, 10**400, 10**5000, 1.5, -0.5, math.nan, math.inf, 1e308, 1j, "", "x", "\0", "\ud800", "x" * 5000, b"x",
    [], [[]], [None], [1, 2], ["a", "b"], ["a", "a"], (), (1, 2, 3), {}, {"a": 1}, {1}, object(), len, dict, float, iter(["a", "b"]),
    range(3), np.array(3), np.array([1, 2]), np.array("x"), np.zeros((2, 2)), np.array([object()]), torch.tensor(3), torch.zeros(2, 3),
    torch.zeros(0), torch.full((2, 192), torch.nan), torch.ones(2, 192, dtype=torch.complex64), torch.ones(2, 3, device="meta"),
    torch.ones(2, 192, device="meta"), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(10**6, 1, dtype=torch.int64), torch.float32,
    torch.int8, torch.Generator(), [torch.Generator()], torch.nn.Linear(2, 2)]
but = lambda x, number, other: other if isinstance(x, int) and x == number else x  # what is allowed, but takes too long
between = lambda a, b, steps=2: PIPE.interpolate(a, b, steps, num_samples=1, num_inference_steps=2)
adapt = lambda images, labels, question=QUESTION, answers=ANSWERS, steps=1: PIPE.adapt((images, labels), question, answers, steps=steps)
predict = lambda images=FEATURES, question=QUESTION, answers=ANSWERS, weights=WEIGHTS, **options: PIPE.predict(
    images, question, answers, weights=weights, **options)
CALLS = {
    "question": lambda x: PIPE(x, num_samples=1, num_inference_steps=2), "num_samples": lambda x: ask(num_samples=x),
    "steps": lambda x: ask(num_inference_steps=x), "scale": lambda x: ask(guidance_scale=x), "generator": lambda x: ask(generator=x),
    "seeds": lambda x: ask(seeds=x), "negative": lambda x: ask(negative_question=x), "guider": lambda x: ask(guider=x),
    "scheduler": lambda x: ask(scheduler=x), "callback": lambda x: ask(callback_on_step_end=x), "eta": lambda x: ask(eta=x),
    "rescale": lambda x: ask(guidance_rescale=x), "interval": lambda x: ask(guidance_interval=x),
    "learning rate": lambda x: ask(guider="classifier", learning_rate=x), "prior": lambda x: ask(guider="classifier", prior_weight=x),
    "noise": lambda x: ask(guider="classifier", noise=x), "z": lambda x: ask(guider="classifier", z=x),
    "pictures": lambda x: predict(x), "asked": lambda x: predict(question=x), "answers": lambda x: predict(answers=x),
    "prompts": lambda x: predict(prompts=x), "weights": lambda x: predict(weights=x, num_samples=1, num_inference_steps=2),
    "infer": lambda x: PIPE.infer_task(x, QUESTION), "infer from": lambda x: PIPE.infer_task(WEIGHTS, x),
    "from": lambda x: between(x, QUESTION), "to": lambda x: between(QUESTION, x),
    "way": lambda x: between(QUESTION, QUESTION, but(x, 10**6, 10**5)),
    "support": lambda x: PIPE.adapt(x), "adapt to": lambda x: adapt(x, ["red", "blue"]), "labels": lambda x: adapt(FEATURES, x),
    "adapt question": lambda x: adapt(FEATURES, [0, 1], question=x), "adapt answers": lambda x: adapt(FEATURES, [0, 1], answers=x),
    "adapt steps": lambda x: adapt(FEATURES, [0, 1], steps=but(x, 10**6, 0)),
    "device": lambda x: PIPE.to(x).to("cpu", torch.float32), "dtype": lambda x: PIPE.to(dtype=x).to("cpu", torch.float32),
    "model": lambda x: HyperLatentPipeline.from_pretrained(x)}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_the_pipeline(name):
    foreign = []
    for value in STRANGE:
        if name in ("guider", "callback") and callable(value): continue  # it is called, and fails in its own way
        try:
            CALLS[name](value)
        except HyperLatentError as error:
            if "\n" in str(error) or not error.remedy or len(str(error)) > 2000: foreign.append(f"    no clear sentence: {error}"[:300])
        except Exception as error:  # noqa: BLE001  that is what is looked for
            shown = type(value).__name__ if isinstance(value, int) else f"{type(value).__name__} {value!r:.50}"
            foreign.append(f"{shown} -> {type(error).__name__}: {str(error)[:100]}")
    assert not foreign, "\n".join(foreign)
