"""VQA v2 files in the official format, constructed backwards from a split whose tasks are known."""

import json
import random
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

SUBSETS = ("train2014", "val2014")
QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


def unshuffled(items: list, seed: int = 2021) -> list:
    """The order that `random.Random(seed).shuffle` has turned into this one."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    before = [None] * len(items)
    for place, item in zip(order, items):
        before[place] = item
    return before


def lists_of(tasks: dict) -> dict[str, dict[str, list[str]]]:
    """Question -> answer -> pictures, everything in the order in which the annotations must have named it."""
    found = {}
    for question in unshuffled(list(tasks)):
        pictures = defaultdict(list)
        for picture, answer in tasks[question]["train"] + tasks[question]["test"]:
            pictures[answer].append(picture)
        found[question] = {answer: unshuffled(pictures[answer]) for answer in tasks[question]["answers"]}
    return found


def picture_order(lists: dict) -> list[str]:
    """One order of all pictures that every list and every first appearance of an answer agrees with, train2014 first."""
    after = {"": ()}
    edge = lambda first, then: first != then and after.setdefault(then, set()).add(first)
    for answers in lists.values():
        for pictures in [*answers.values(), [pictures[0] for pictures in answers.values()]]:
            for first, then in zip(pictures, pictures[1:]):
                edge(first, then)
            after.setdefault(pictures[0], set())
    order = [picture for picture in TopologicalSorter(after).static_order() if picture]
    assert not any("val2014" in first and "train2014" in then for then in after for first in after[then])
    return sorted(order, key=lambda picture: "val2014" in picture)


class Writer:
    """Collects rows of both subsets; question ids are the picture's number and a running digit, as in VQA v2."""

    def __init__(self):
        self.questions, self.annotations = ({subset: [] for subset in SUBSETS} for _ in range(2))
        self.asked = defaultdict(int)

    def add(self, picture: str, question: str, answer: str, answer_type: str = "other", raters: int = 10) -> None:
        _, subset, number = picture.split("_")
        row = {"image_id": int(number), "question_id": int(number) * 1000 + self.asked[picture]}
        self.asked[picture] += 1
        self.questions[subset].append({"image_id": row["image_id"], "question": question, "question_id": row["question_id"]})
        rated = [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1} for i in range(raters)]
        self.annotations[subset].append({
            "question_type": " ".join(question.lower().split()[:2]), "multiple_choice_answer": answer, "answers": rated,
            "image_id": row["image_id"], "answer_type": answer_type, "question_id": row["question_id"]})

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"info": {"version": "2.0"}, "license": {"name": "none"}, "data_type": "mscoco"}
        for subset in SUBSETS:
            for file, key, rows in ((QUESTIONS, "questions", self.questions), (ANNOTATIONS, "annotations", self.annotations)):
                (folder / file.format(subset)).write_text(
                    json.dumps(about | {"data_subtype": subset, key: rows[subset]}))


def official(tasks: dict) -> Writer:
    """VQA v2 rows from which the rules make these tasks, with everything among them that the rules must pass over."""
    lists, writer, rows = lists_of(tasks), Writer(), defaultdict(list)
    for number, question in enumerate(lists):  # an answer seen once only fixes the questions' order, and is dropped
        writer.add(f"COCO_train2014_{990_000_000 + number // 3:012d}", question, "seen once only")
    for question, answers in lists.items():
        for answer, pictures in answers.items():
            for picture in pictures:
                rows[picture].append((question, answer))
    for number, picture in enumerate(picture_order(lists)):
        if number % 7 == 0:
            writer.add(picture, rows[picture][0][0], "yes", "yes/no")  # of another type: does not count as the first
        for question, answer in rows[picture]:
            writer.add(picture, question, answer, "number" if answer.isdigit() else "other")
            if number % 11 == 0:
                other = next(a for a in lists[question] if a != answer)
                writer.add(picture, question, other)  # the second time: passed over
    for number in range(60):
        picture = f"COCO_val2014_{980_000_000 + number:012d}"
        writer.add(picture, "Is it one or two?", ("one", "two")[number % 2])  # has an "or"
        writer.add(picture, "What is always the same?", "this")  # a single answer
        if number < 20:
            writer.add(picture, "What is asked too rarely?", ("a", "b")[number % 2])  # 20 pictures
    return writer


def synthetic_split(seed: int = 0, questions: int = 13) -> tuple[dict, dict]:
    """A split with invented tasks, in an order that the rules can give: support before query, train2014 before val2014."""
    lots, tasks, number = random.Random(seed), [], 0
    for i in range(questions):
        pictures, answers = {}, lots.sample(["2", "red", "blue", "left", "a frisbee", "two or three"], lots.randint(2, 4))
        for answer in answers:
            count = lots.randint(11, 19)
            subsets = sorted(lots.choices(SUBSETS, k=count))
            pictures[answer] = [f"COCO_{subset}_{number + j:012d}" for j, subset in enumerate(subsets)]
            number += count
        pictures = dict(sorted(pictures.items(), key=lambda pair: "val2014" in pair[1][0]))  # answers by first appearance
        tasks.append((f"what is {i} for?", {"train": [], "test": [], "answers": list(pictures)}))
        for answer, names in pictures.items():
            random.Random(2021).shuffle(names)
            cut = round(0.7 * len(names))
            tasks[-1][1]["train"] += [[name, answer] for name in names[:cut]]
            tasks[-1][1]["test"] += [[name, answer] for name in names[cut:]]
    cut = round(0.7 * len(tasks))
    return dict(tasks[:cut]), dict(tasks[cut:])
