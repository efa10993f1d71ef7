"""Ragged batches against a plain construction, random choices against statistics, and tasks that must be refused."""

import json
import time
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hyperlatent.errors import HyperLatentError, TaskError
from hyperlatent.files import fingerprint, fingerprint_file
from hyperlatent.ragged import bad_rows, random_ranks
from hyperlatent.tasks import SPLITS, Task, TaskSet, chance, majority, number_images

# the shape checker, not the strategies, draws from `random`
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
quick = settings(max_examples=60, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_task(i, n_answers=2, support=((0, 0),), query=((1, 1),), **options):
    answers = tuple(f"a{j}" for j in range(n_answers))
    return Task(
        f"question {i}?", answers, tuple(f"prompt {a}" for a in answers), tuple(support), tuple(query), **options
    )


def make_features(tasks, n_images, dim=3, question_dim=2, dtype=torch.float32):
    g = seeded()
    draw = lambda n, d: torch.randn(n, d, generator=g)
    return {
        "image_features": torch.arange(1, n_images * dim + 1)
        .reshape(n_images, dim)
        .to(dtype),  # rows tell images apart
        "question_features": [draw(1 + len(t.paraphrases), question_dim) for t in tasks],
        "answer_features": [draw(len(t.answers), dim) for t in tasks],
        "unseen_question_features": [draw(len(t.unseen_paraphrases), question_dim) for t in tasks],
    }


def make_set(tasks, n_images=10, **options):
    return TaskSet(tasks, **make_features(tasks, n_images, **options))


@st.composite
def task_lists(draw, n_images=10):
    def one(i):
        n_answers = draw(st.integers(2, 5))
        pairs = st.lists(st.tuples(st.integers(0, n_images - 1), st.integers(0, n_answers - 1)), min_size=1, max_size=7)
        words = st.integers(0, 3).map(lambda n: tuple(f"wording {i}.{k}" for k in range(n)))
        return make_task(i, n_answers, draw(pairs), draw(pairs), split=draw(st.sampled_from(SPLITS)),
                         paraphrases=draw(words), unseen_paraphrases=draw(words))  # fmt: skip

    return [one(i) for i in range(draw(st.integers(1, 6)))]


def pad(rows, width):
    return torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])])


def plain_batch(tasks, features, indices):
    """The same tensors, one task after the other."""
    chosen = [tasks[i] for i in indices]
    out = {"question_features": torch.stack([features["question_features"][i][0] for i in indices])}
    width = max(len(t.answers) for t in chosen)
    out["answer_features"] = torch.stack([pad(features["answer_features"][i], width) for i in indices])
    out["answer_mask"] = torch.stack([torch.arange(width) < len(t.answers) for t in chosen])
    for name in ("support", "query"):
        samples = [getattr(t, name) for t in chosen]
        width = max(map(len, samples))
        images = features["image_features"].float()
        out[name] = (
            torch.stack([pad(torch.stack([images[i] for i, _ in s]), width) for s in samples]),
            torch.stack([pad(torch.tensor([a for _, a in s]), width) for s in samples]),
            torch.stack([torch.arange(width) < len(s) for s in samples]),
        )
    return out


def assert_same(batch, expected):
    for name in ("question_features", "answer_features", "answer_mask"):
        assert torch.equal(getattr(batch, name), expected[name])
    for name in ("support", "query"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(batch, name), expected[name], strict=True))


# --- batches -----------------------------------------------------------------------------------------------------


@quick
@given(tasks=task_lists(), data=st.data(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_a_batch_equals_a_plain_construction(tasks, data, dtype):
    features = make_features(tasks, 10, dtype=dtype)
    taskset = TaskSet(tasks, **features)
    assert_same(taskset.batch(), plain_batch(tasks, features, range(len(tasks))))
    indices = data.draw(st.lists(st.integers(0, len(tasks) - 1), min_size=1, max_size=8))
    assert_same(taskset.batch(indices), plain_batch(tasks, features, indices))
    assert_same(taskset.subset(indices).batch(), plain_batch(tasks, features, indices))
    assert_same(taskset.subset(indices).subset([0]).batch(), plain_batch(tasks, features, indices[:1]))
    assert_same(taskset.batch().take(indices), plain_batch_padded(tasks, features, indices))
    for split in SPLITS:
        own = [i for i, t in enumerate(tasks) if t.split == split]
        assert taskset.split(split).tasks == tuple(tasks[i] for i in own)
        if own:
            assert_same(taskset.split(split).batch(), plain_batch(tasks, features, own))


def plain_batch_padded(tasks, features, indices):
    everything = plain_batch(tasks, features, range(len(tasks)))
    at = torch.tensor(indices)
    return {k: tuple(x[at] for x in v) if isinstance(v, tuple) else v[at] for k, v in everything.items()}


@quick
@given(tasks=task_lists(), k=st.integers(1, 3))
def test_a_repeated_batch_is_sample_major(tasks, k):
    batch = make_set(tasks).batch()
    repeated = batch.repeat(k)
    assert len(repeated) == k * len(batch)
    again = repeated.take([s * len(batch) + t for s in range(k) for t in range(len(batch))])
    for s in range(k):
        part = repeated.take(range(s * len(batch), (s + 1) * len(batch)))
        assert torch.equal(part.query.labels, batch.query.labels) and torch.equal(part.answer_mask, batch.answer_mask)
    assert torch.equal(again.support.features, repeated.support.features)


@quick
@given(tasks=task_lists(), max_tasks=st.integers(1, 7), max_samples=st.integers(1, 60))
def test_batches_cover_every_task_once_and_do_not_depend_on_the_grouping(tasks, max_tasks, max_samples):
    taskset = make_set(tasks)
    options = {"num_support": 2, "phrase": "random"}
    alone = {i.item(): b for i, b in taskset.batches(max_tasks=1, generator=seeded(), **options)}
    grouped = list(taskset.batches(max_tasks, max_samples, generator=seeded(), **options))
    assert sorted(i for indices, _ in grouped for i in indices.tolist()) == list(range(len(tasks))) == sorted(alone)
    for indices, batch in grouped:
        largest = max(len(tasks[i].support) + len(tasks[i].query) for i in indices.tolist())
        assert len(batch) == len(indices) <= max_tasks and (len(batch) == 1 or len(batch) * largest <= max_samples)
        for row, i in enumerate(indices.tolist()):
            one, n = alone[i], int(batch.support.mask[row].sum())
            assert torch.equal(batch.support.features[row, :n], one.support.features[0, :n])
            assert torch.equal(batch.question_features[row], one.question_features[0])


def test_batches_do_not_disturb_a_generator_used_between_them():
    taskset, g = make_set([make_task(i) for i in range(6)]), seeded()
    draws = [torch.randn(2, generator=g) for _ in taskset.batches(max_tasks=1, num_support=1, generator=g)]
    assert len(torch.stack(draws).unique(dim=0)) == 6


def test_indices_may_be_of_many_kinds_and_wrong_ones_are_refused():
    taskset = make_set([make_task(i) for i in range(4)])
    for indices in ([2, 3], (2, 3), range(2, 4), torch.tensor([2, 3]), torch.tensor([2, 3], dtype=torch.int32)):
        assert torch.equal(taskset.subset(indices).batch().question_features, taskset.batch(indices).question_features)
    for indices, message in ([4], "number 4"), ([-1], "number -1"), ([True, False], "bool"):
        with pytest.raises(TaskError, match=message):
            taskset.batch(indices)
    empty = taskset.split("meta-test")
    assert len(empty) == 0 and list(empty.batches()) == [] and len(empty.question_phrases()[0]) == 0
    with pytest.raises(TaskError, match="at least one task"):
        empty.batch()
    with pytest.raises(TaskError, match="'train'.*meta-train, meta-validation, meta-test"):
        taskset.split("train")


# --- random choices ----------------------------------------------------------------------------------------------


@quick
@given(tasks=task_lists(), n=st.integers(0, 9), seed=st.integers(0, 2**62))
def test_a_random_subset_is_a_subset_and_does_not_depend_on_the_batch(tasks, n, seed):
    tasks = [
        replace(t, support=tuple({i: a for i, a in t.support}.items())) for t in tasks
    ]  # images tell samples apart
    taskset = make_set(tasks)
    batch = taskset.batch(num_support=n, generator=seeded(seed))
    assert_same_samples(batch.support, taskset.batch(num_support=n, generator=seeded(seed)).support)
    assert batch.query.mask.sum(1).tolist() == [len(t.query) for t in tasks]
    for i, task in enumerate(tasks):
        count = min(n, len(task.support))
        drawn = read_back(batch.support, i)
        assert len(drawn) == count == len(set(drawn)) and set(drawn) <= set(task.support)
        alone = taskset.batch([i], num_support=n, generator=seeded(seed)).support
        behind = taskset.subset([i]).batch([0], num_support=n, num_query=1, generator=seeded(seed)).support
        assert read_back(alone, 0) == drawn == read_back(behind, 0)  # nor on the set, nor on the other choices


def read_back(samples, task):
    """(image, answer) pairs out of features made by make_features."""
    mask = samples.mask[task]
    assert (samples.features[task][~mask] == 0).all() and (samples.labels[task][~mask] == 0).all()
    images = ((samples.features[task][mask][:, 0] - 1) / 3).long().tolist()
    return list(zip(images, samples.labels[task][mask].tolist(), strict=True))


def assert_same_samples(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_random_subsets_are_uniform_and_tasks_independent():
    """Ordered pairs out of 5 (20 outcomes) for two tasks at 8000 seeds: each uniform, and so are the pairs of pairs."""
    rows = torch.stack(
        [random_ranks(torch.tensor([11, 12]), 5, seed).topk(2, largest=False).indices for seed in range(8000)]
    )
    outcome = rows[..., 0] * 4 + rows[..., 1] - (rows[..., 1] > rows[..., 0]).long()
    for task in (0, 1):
        assert (
            3 < chi_square(outcome[:, task].bincount(minlength=20)) < 50
        )  # 19 degrees of freedom: p = 1e-6 ... 1 - 1e-4
    assert (
        270 < chi_square((outcome[:, 0] * 20 + outcome[:, 1]).bincount(minlength=400)) < 550
    )  # 399, 5 deviations each way


def test_seeds_repetitions_and_consecutive_draws_differ():
    taskset = make_set([make_task(0, support=[(i, 0) for i in range(10)])])
    g = seeded()
    draws = [tuple(read_back(taskset.batch(num_support=3, generator=g).support, 0)) for _ in range(300)]
    repeated = taskset.batch([0] * 300, num_support=3, generator=seeded()).support
    others = [tuple(read_back(taskset.batch(num_support=3, generator=seeded(s)).support, 0)) for s in range(300)]
    for sets in (draws, [tuple(read_back(repeated, i)) for i in range(300)], others):
        assert 200 < len(set(sets)) <= 300  # 720 ordered triples: 245 distinct ones expected in 300 draws
    assert draws[0] == others[0] == tuple(read_back(repeated, 0))


def test_samples_come_from_support_and_query():
    taskset = make_set(
        [make_task(0, support=[(0, 0), (1, 1)], query=[(2, 1)]), make_task(1, support=[(3, 1)], query=[(4, 0)])]
    )
    samples = taskset.samples_batch([0, 1], 3, seeded())
    assert set(read_back(samples, 0)) == {(0, 0), (1, 1), (2, 1)} and set(read_back(samples, 1)) == {(3, 1), (4, 0)}
    many = taskset.samples_batch([0] * 3000, 1, seeded())
    counts = torch.tensor([read_back(many, i)[0][0] for i in range(3000)]).bincount()
    assert chi_square(counts) < 25 and len(counts) == 3


def test_wordings():
    tasks = [make_task(0, paraphrases=("b", "c"), unseen_paraphrases=("z",)), make_task(1)]
    features = make_features(tasks, 10)
    taskset, questions = TaskSet(tasks, **features), features["question_features"]
    assert torch.equal(taskset.batch([0], phrase=2).question_features[0], questions[0][2])
    for phrase in (1, -1):
        with pytest.raises(TaskError, match=f"task 'question 1\\?' has no phrasing number {phrase}"):
            taskset.batch([0, 1] if phrase == 1 else [1], phrase=phrase)
    drawn = taskset.batch([0] * 3000 + [1], phrase="random", generator=seeded()).question_features
    counts = (drawn[:3000, None] == questions[0]).all(-1).sum(0)
    assert counts.sum() == 3000 and chi_square(counts) < 25 and torch.equal(drawn[-1], questions[1][0])
    seen, task = taskset.question_phrases()
    assert torch.equal(seen, torch.cat(questions)) and task.tolist() == [0, 0, 0, 1]
    unseen, task = taskset.question_phrases(unseen=True)
    assert torch.equal(unseen, features["unseen_question_features"][0]) and task.tolist() == [0]
    seen, task = taskset.subset([1]).question_phrases()
    assert torch.equal(seen, questions[1]) and task.tolist() == [0]


@pytest.mark.parametrize("options", [{"num_support": 1}, {"num_query": 1}, {"phrase": "random"}])
def test_a_random_choice_needs_a_generator(options):
    with pytest.raises(TaskError, match="generator=torch.Generator"):
        make_set([make_task(0)]).batch(**options)


# --- tasks that must be refused ----------------------------------------------------------------------------------

GOOD = make_task(7, 3, support=[(0, 0), (1, 2)], query=[(2, 1)])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"support": ()}, "no support sample"),
        ({"query": ()}, "no query sample"),
        ({"answers": (), "prompts": ()}, "0 answers"),
        ({"answers": ("yes",), "prompts": ("yes",)}, "1 answers"),
        ({"answers": ("a", "b", "a")}, "'a' more than once"),
        ({"prompts": ("p", "q")}, "2 prompts for 3 answers"),
        ({"query": ((2, 3),)}, "answer number 3"),
        ({"support": ((0, 0), (1, -1))}, "answer number -1"),
        ({"support": ((10, 0),)}, "image number 10"),
        ({"query": ((-1, 0),)}, "image number -1"),
        ({"query": ((2**70, 0),)}, "image number"),
        ({"query": (("cat.jpg", 0),)}, "image 'cat.jpg'"),
        ({"split": "test"}, "split 'test'"),
    ],
)
def test_a_bad_task_is_named(change, problem):
    tasks = [make_task(0), replace(GOOD, **change), make_task(1)]
    with pytest.raises(TaskError) as e:
        make_set(tasks)
    assert "'question 7?'" in str(e.value) and problem in str(e.value) and e.value.remedy


def test_other_bad_sets():
    with pytest.raises(TaskError, match="no task"):
        TaskSet([], torch.zeros(1, 3), question_features=[], answer_features=[])
    with pytest.raises(TaskError, match="'question 7\\?' is listed more than once"):
        make_set([GOOD, make_task(1), GOOD])
    with pytest.raises(TaskError, match="empty question"):
        make_set([replace(GOOD, question=" ")])


@pytest.mark.parametrize("name", ["question_features", "answer_features", "unseen_question_features"])
@pytest.mark.parametrize("wrong", ["rows", "dim", "type", "flat", "nan", "inf", "count"])
def test_bad_features_name_their_task(name, wrong):
    tasks = [make_task(0, unseen_paraphrases=("a",)), replace(GOOD, unseen_paraphrases=("b",))]
    features = make_features(tasks, 10)
    x = features[name][1].clone()
    if wrong in ("nan", "inf"):
        x[-1, 1] = float(wrong)
    changed = {"rows": x[:-1], "dim": x[:, :-1], "type": x.long(), "flat": x[0]}.get(wrong, x)
    features[name] = features[name][: 1 if wrong == "count" else 2]
    features[name][-1] = changed
    expected = (
        name if wrong == "count" else "'question 7\\?'.*NaN" if wrong in ("nan", "inf") else "'question 7\\?'.*shape"
    )
    with pytest.raises(TaskError, match=expected):
        TaskSet(tasks, **features)


def test_unseen_wordings_need_features():
    tasks = [replace(GOOD, unseen_paraphrases=("a",))]
    features = make_features(tasks, 10) | {"unseen_question_features": None}
    with pytest.raises(TaskError, match="'question 7\\?' has unseen_question_features of shape \\(0, 2\\)"):
        TaskSet(tasks, **features)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_broken_image_names_its_task_quickly(bad, dtype):
    tasks = [make_task(0), make_task(1, query=[(77_777, 0)])]
    features = make_features(tasks, 1, dim=128)
    images = torch.randn(100_000, 128, generator=seeded()).to(dtype)
    images[77_777, 127] = float(bad)
    features["image_features"] = images
    start = time.process_time()
    with pytest.raises(TaskError, match="task 'question 1\\?' uses image 77777.*NaN or infinity"):
        TaskSet(tasks, **features)
    assert time.process_time() - start < 1  # measured: 0.02 s
    assert len(TaskSet([make_task(0), make_task(1)], **features)) == 2  # no task uses it: no matter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_that_overflow_their_sum_are_fine(dtype):
    table = torch.full((3, 100), torch.finfo(dtype).max, dtype=dtype)
    assert not bad_rows(table).any()
    table[1, 0] = float("nan")
    assert bad_rows(table).tolist() == [False, True, False]


def test_image_features_are_shared_not_copied(tmp_path):
    path = tmp_path / "features"
    path.write_bytes(torch.arange(1, 31).half().numpy().tobytes())
    mapped = torch.from_file(str(path), size=30, dtype=torch.float16).reshape(10, 3)
    taskset = TaskSet([GOOD], **make_features([GOOD], 10) | {"image_features": mapped})
    for view in (taskset, taskset.subset([0]), taskset.split("meta-train"), taskset.to("cpu")):
        assert view.image_features.data_ptr() == mapped.data_ptr() and view.image_features.dtype == torch.float16
    batch = taskset.batch()
    assert batch.support.features.dtype == torch.float32 and batch.support.features[0, 1].tolist() == [4, 5, 6]


def test_an_image_shared_by_tasks_gets_one_row():
    tasks = [
        make_task(0, support=[("a", 0), ("b", 1)], query=[("c", 0)]),
        make_task(1, support=[("c", 1)], query=[("a", 0)]),
    ]
    numbered, names = number_images(tasks)
    assert names == ["a", "b", "c"] and numbered[1].support == ((2, 1),) and numbered[1].query == ((0, 0),)
    named = lambda samples: tuple((names[i], a) for i, a in samples)
    assert [replace(t, support=named(t.support), query=named(t.query)) for t in numbered] == tasks


# --- baselines ---------------------------------------------------------------------------------------------------


@quick
@given(tasks=task_lists())
def test_chance_and_majority_equal_plain_loops(tasks):
    def accuracy(task):
        labels = [a for _, a in task.support]
        favourite = max(range(len(task.answers)), key=lambda a: (labels.count(a), -a))
        return sum(a == favourite for _, a in task.query) / len(task.query)

    taskset = make_set(tasks)
    assert majority(taskset) == pytest.approx(sum(map(accuracy, tasks)) / len(tasks))
    assert chance(taskset) == pytest.approx(sum(1 / len(t.answers) for t in tasks) / len(tasks))
    assert majority(taskset.subset([0])) == pytest.approx(accuracy(tasks[0]))


# --- on disk -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(tasks=task_lists(), dtype=st.sampled_from([torch.float16, torch.float32]), data=st.data())
def test_a_set_comes_back_from_disk(tmp_path_factory, tasks, dtype, data):
    taskset = make_set(tasks, dtype=dtype)
    taskset = taskset.subset(data.draw(st.lists(st.integers(0, len(tasks) - 1), min_size=1, unique=True)))
    folder = tmp_path_factory.mktemp("tasks") / "set"
    taskset.save(folder, inputs={"encoder": "ab12"}, config={"source": "test"})
    loaded = TaskSet.load(folder, inputs={"encoder": "ab12"})
    assert loaded.tasks == taskset.tasks and loaded.fingerprint == taskset.fingerprint
    assert loaded.image_features.dtype == dtype
    a, b = taskset.batch(), loaded.batch()
    assert torch.equal(a.answer_features, b.answer_features) and torch.equal(a.question_features, b.question_features)
    for unseen in (False, True):
        assert all(map(torch.equal, taskset.question_phrases(unseen), loaded.question_phrases(unseen)))


def test_the_fingerprint_covers_words_samples_and_features():
    tasks = [GOOD, make_task(1)]
    features = make_features(tasks, 10)
    original = TaskSet(tasks, **features)
    assert len(original.fingerprint) == 64  # kept by the set, but not by its subsets
    changed = [
        replace(GOOD, kind="color"),
        replace(GOOD, support=GOOD.support[::-1]),
        replace(GOOD, answers=("x", "y", "z")),
    ]
    sets = [TaskSet([t, tasks[1]], **features) for t in changed] + [original.subset([0]), original.subset([1, 0])]
    for name in ("image_features", "question_features", "answer_features"):
        other = [x.clone() for x in features[name]]
        other[0].view(-1)[0] += 1
        sets.append(TaskSet(tasks, **features | {name: torch.stack(other) if name == "image_features" else other}))
    assert len({s.fingerprint for s in [original, *sets]}) == 9
    assert (
        TaskSet(tasks, **make_features(tasks, 10)).fingerprint
        == original.fingerprint
        == original.subset([0, 1]).fingerprint
    )


hostile_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=3), s, max_size=2), max_leaves=6)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    field=st.sampled_from(["question", "answers", "support", "split", "paraphrases", "new", None]), value=hostile_values
)
def test_a_forged_task_list_is_refused_with_an_error_of_ours(tmp_path_factory, field, value):
    folder = tmp_path_factory.mktemp("tasks") / "set"
    make_set([GOOD]).save(folder)
    documents = json.loads((folder / "tasks.json").read_text())
    if field is None:
        documents = value
    else:
        documents[0][field] = value
    (folder / "tasks.json").write_text(json.dumps(documents))
    path = folder / "artifact.json"
    description = json.loads(path.read_text())
    description["files"]["tasks.json"] = fingerprint_file(folder / "tasks.json")
    description["checksum"] = fingerprint({k: v for k, v in description.items() if k != "checksum"})
    path.write_text(json.dumps(description))
    try:
        loaded = TaskSet.load(folder)
    except HyperLatentError as e:
        assert "\n" not in str(e) and e.remedy
    else:  # the forgery is a valid task
        assert getattr(loaded.tasks[0], field) == (tuple(value) if isinstance(value, list) else value)
