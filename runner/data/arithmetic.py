"""Writes `arithmetic.jsonl`: word problems that a small model gets right now and then.

`python -m runner.data.arithmetic` writes the same bytes every time.
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

PATH = Path(__file__).with_name("arithmetic.jsonl")
NUM_PROBLEMS = 200
_SEED = 0

_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hiro", "Ines", "Jack")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")
_BOXES = ("bags", "boxes", "jars", "baskets")

_ADD = (
    "{a} has {x} {things}. {b} gives {a} {y} more {things}. How many {things} does {a} have now?",
    "There are {x} {things} on the table and {y} {things} on the floor. "
    "How many {things} are there in total?",
    "{a} found {x} {things} and {b} found {y} {things}. How many {things} did they find together?",
)
_SUBTRACT = (
    "{a} has {x} {things}. {a} gives {y} {things} to {b}. How many {things} does {a} have left?",
    "There were {x} {things} in the shop. {y} {things} were sold. How many {things} are left?",
    "{a} has {x} {things} and {b} has {y} {things}. How many more {things} does {a} have than {b}?",
)
_MULTIPLY = (
    "{a} has {x} {boxes} with {y} {things} in each. How many {things} does {a} have?",
    "One of the {things} costs {x} dollars. How many dollars do {y} {things} cost?",
    "{a} collects {x} {things} every day. How many {things} does {a} have after {y} days?",
)
_DIVIDE = (
    "{a} puts {x} {things} into {y} {boxes}, the same number in each. "
    "How many {things} are in each of the {boxes}?",
    "{y} friends share {x} {things} equally. How many {things} does each friend get?",
)
_TWO_STEPS = (
    "{a} has {x} {things}, buys {y} more and then gives {z} to {b}. "
    "How many {things} does {a} have now?",
    "There are {x} {things} in one box and {y} in another. {a} takes out {z}. "
    "How many {things} are left?",
)

Numbers = tuple[dict[str, int], int]
"""The numbers of a problem by name, and its answer."""


def _addition(random: Random) -> Numbers:
    x, y = random.randint(2, 12), random.randint(1, 9)
    return {"x": x, "y": y}, x + y


def _subtraction(random: Random) -> Numbers:
    y, answer = random.randint(1, 9), random.randint(1, 9)
    return {"x": y + answer, "y": y}, answer


def _multiplication(random: Random) -> Numbers:
    x, y = random.randint(2, 9), random.randint(2, 6)
    return {"x": x, "y": y}, x * y


def _division(random: Random) -> Numbers:
    y, answer = random.randint(2, 6), random.randint(2, 9)
    return {"x": y * answer, "y": y}, answer


def _two_steps(random: Random) -> Numbers:
    x, y = random.randint(4, 15), random.randint(2, 9)
    z = random.randint(1, x - 1)
    return {"x": x, "y": y, "z": z}, x + y - z


# Twice as often what is easiest: the mean reward of a small model has to leave zero.
_KINDS: tuple[tuple[str, tuple[str, ...], Callable[[Random], Numbers]], ...] = (
    ("addition", _ADD, _addition),
    ("subtraction", _SUBTRACT, _subtraction),
    ("addition", _ADD, _addition),
    ("multiplication", _MULTIPLY, _multiplication),
    ("subtraction", _SUBTRACT, _subtraction),
    ("division", _DIVIDE, _division),
    ("two_steps", _TWO_STEPS, _two_steps),
)


def problems(count: int = NUM_PROBLEMS) -> list[dict[str, str]]:
    """Returns `count` different problems: question, answer (an integer in digits), kind."""
    random = Random(_SEED)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        kind, templates, numbers = _KINDS[len(found) % len(_KINDS)]
        one, other = random.sample(_NAMES, 2)
        things, boxes = random.choice(_THINGS), random.choice(_BOXES)
        values, answer = numbers(random)
        template = random.choice(templates)
        question = template.format(a=one, b=other, things=things, boxes=boxes, **values)
        found[question] = {"question": question, "answer": str(answer), "kind": kind}
    return list(found.values())


def as_jsonl(rows: list[dict[str, str]]) -> str:
    """Returns rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    PATH.write_text(as_jsonl(problems()))
