"""The gate on made-up machines: never much slower than plain decoding, and near the best."""

import random
from collections.abc import Callable

import pytest

from runner.engine.gate import Acceptance, Gate

Seconds = Callable[[int], float]


def memory_bound(num_positions: int) -> float:
    return 0.020 + 0.0005 * num_positions


def compute_bound(num_positions: int) -> float:
    return 0.004 * num_positions


def stepped(num_positions: int) -> float:
    """A machine on which the second position of a row costs as much as many more."""
    return 0.020 if num_positions == 1 else 0.045 + 0.001 * num_positions


def simulated(
    seconds: Seconds, rows: int, chance: float, *, most: int = 8, steps: int = 600, rests: bool
) -> tuple[float, Gate]:
    """Speed with the gate, as a multiple of plain decoding's."""
    gate, chances, dice = Gate(rests=rests), Acceptance(), random.Random(1)
    tokens = spent = 0.0
    for _ in range(steps):
        width, looked = 1, gate.looks
        if looked:
            chances.fade()
            known = [chances.chance(row, "x") for row in range(rows)]
            sure = [chances.sure(row, "x") for row in range(rows)]
            width = gate.width(rows, [most] * rows, known, sure)
        else:
            gate.pass_step()
        time = seconds(rows * width) * dice.uniform(0.95, 1.05)
        # Where steps overlap, one that waits for the draws before it takes longer.
        time *= 1.2 if rests and looked else 1.0
        spent, before = spent + time, tokens
        for row in range(rows):
            accepted = 0
            while accepted < width - 1 and dice.random() < chance:
                accepted += 1
            tokens += 1 + accepted
            if width > 1:
                chances.record(row, "x", num_drafted=width - 1, num_accepted=accepted)
        gate.record(rows, width, time, num_tokens=int(tokens - before), looked=looked)
    return tokens / spent / (rows / seconds(rows)), gate


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("rows", [1, 6, 32])
@pytest.mark.parametrize("seconds", [memory_bound, compute_bound, stepped])
@pytest.mark.parametrize("steps", [40, 600])
def test_never_much_slower_than_plain(seconds, rows, chance, rests, steps):
    """From the first step on: a job may be short."""
    assert simulated(seconds, rows, chance, rests=rests, steps=steps)[0] > 0.97


@pytest.mark.parametrize("num_accepted", [8, 0])
def test_what_was_drafted_by_an_earlier_run_is_trusted_at_once(num_accepted):
    gate, chances, widths = Gate(), Acceptance(), []
    for _ in range(30):
        known, sure = chances.chance("row", "previous"), chances.sure("row", "previous")
        widths.append(gate.width(1, [8], [known], [sure]))
        accepted = min(widths[-1] - 1, num_accepted)
        gate.record(1, widths[-1], memory_bound(widths[-1]), num_tokens=1 + accepted)
        if widths[-1] > 1:
            counts = {"num_drafted": widths[-1] - 1, "num_accepted": accepted}
            chances.record("row", "previous", **counts)
    assert widths[0] == 1 < widths[1]
    assert (sum(width > 1 for width in widths) > 25) == (num_accepted > 0)


@pytest.mark.parametrize(("rows", "chance"), [(1, 0.95), (1, 0.7), (4, 0.95), (16, 0.95)])
def test_near_the_best_width(rows, chance):
    def speed(width: int) -> float:
        tokens = sum(chance**place for place in range(width))
        return tokens * memory_bound(rows) / memory_bound(rows * width)

    best = max(speed(width) for width in range(1, 10))
    assert best > 1.4
    assert simulated(memory_bound, rows, chance, rests=False)[0] > 0.88 * best


def test_as_the_batch_drains_drafts_begin_to_pay():
    gate, chances, dice = Gate(), Acceptance(), random.Random(1)

    def widths(rows: int, steps: int) -> list[int]:
        found = []
        for _ in range(steps):
            chances.fade()
            known = [chances.chance(row, "x") for row in range(rows)]
            found.append(gate.width(rows, [8] * rows, known))
            num_tokens = rows
            for row in range(rows if found[-1] > 1 else 0):
                drafted = found[-1] - 1
                accepted = next((i for i in range(drafted) if dice.random() > 0.6), drafted)
                chances.record(row, "x", num_drafted=drafted, num_accepted=accepted)
                num_tokens += accepted
            time = 0.01 + 0.002 * rows * found[-1]
            gate.record(rows, found[-1], time, num_tokens=num_tokens)
        return found

    assert sum(width > 1 for width in widths(32, 200)) < 30
    assert sum(width > 1 for width in widths(1, 100)) > 60


def test_a_row_that_missed_is_left_alone_for_a_while_and_tried_again():
    gate, chances = Gate(), Acceptance()
    tried, lost = [], 0.0
    for step in range(400):
        chances.fade()
        width = gate.width(1, [4], [chances.chance("row", "x")])
        extra = 0.07 * (width - 1)
        gate.record(1, width, 0.010 * (1 + extra), num_tokens=1)
        if width > 1:
            tried.append(step)
            chances.record("row", "x", num_drafted=width - 1, num_accepted=0)
            lost += extra
    assert len(tried) < 80 and tried[-1] > 200
    assert lost < 0.02 * 400


def test_chances_are_those_of_the_row_and_of_what_drafted():
    chances = Acceptance()
    for _ in range(20):
        chances.record("good", "x", num_drafted=4, num_accepted=4)
        chances.record("bad", "y", num_drafted=4, num_accepted=0)
    assert chances.chance("good", "x") > 0.9 > 0.2 > chances.chance("bad", "y")
    assert chances.chance("new", "x") > 0.9, "a new row takes what is known of the source"
    chances.end("good")
    assert chances.chance("good", "y") < 0.3
