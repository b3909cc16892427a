"""The gate on made-up machines: never much slower than plain decoding, and near the best."""

import random
from collections.abc import Callable, Sequence

import pytest

from runner.engine.gate import Acceptance, Gate, Rows

Seconds = Callable[[int], float]


def memory_bound(num_positions: int) -> float:
    return 0.020 + 0.0005 * num_positions


def compute_bound(num_positions: int) -> float:
    return 0.004 * num_positions


def stepped(num_positions: int) -> float:
    """A machine on which the second position of a row costs as much as many more."""
    return 0.020 if num_positions == 1 else 0.045 + 0.001 * num_positions


def rows(
    num: int,
    lengths: Sequence[int],
    chances: Sequence[float],
    sure: Sequence[float] | None = None,
    ends: Sequence[tuple[int, float]] | None = None,
) -> Rows:
    """What the gate is told; what is promised can be counted on where nothing else is said."""
    return Rows(num, lengths, chances, chances if sure is None else sure, ends)


def simulated(
    seconds: Seconds,
    num_rows: int,
    chance: float,
    *,
    most: int = 8,
    steps: int = 600,
    overlap: float = 1.0,
) -> tuple[float, Gate]:
    """Speed with the gate, as a multiple of plain decoding's.

    A step that waits for the draws before it takes `overlap` times as long.
    """
    gate, chances, dice = Gate(), Acceptance(), random.Random(1)
    tokens = spent = 0.0
    for _ in range(steps):
        chances.fade()
        known = [chances.chance(row, "x") for row in range(num_rows)]
        sure = [chances.sure(row, "x") for row in range(num_rows)]
        looked = rows(num_rows, [most] * num_rows, known, sure)
        if gate.probes(num_rows):
            gate.probe(looked)
        waited = gate.waits
        width = gate.width(looked) if waited else 1
        time = seconds(num_rows * width) * dice.uniform(0.95, 1.05)
        time *= overlap if waited else 1.0
        spent, before = spent + time, tokens
        for row in range(num_rows):
            accepted = 0
            while accepted < width - 1 and dice.random() < chance:
                accepted += 1
            tokens += 1 + accepted
            if width > 1:
                chances.record(row, "x", num_drafted=width - 1, num_accepted=accepted)
        gate.record(num_rows, width, time, num_tokens=int(tokens - before), waited=waited)
    return tokens / spent / (num_rows / seconds(num_rows)), gate


@pytest.mark.parametrize("overlap", [1.0, 1.2])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("num_rows", [1, 6, 32])
@pytest.mark.parametrize("seconds", [memory_bound, compute_bound, stepped])
def test_never_much_slower_than_plain(seconds, num_rows, chance, overlap):
    assert simulated(seconds, num_rows, chance, overlap=overlap)[0] > 0.97


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("num_rows", [1, 6, 32])
@pytest.mark.parametrize("seconds", [memory_bound, compute_bound, stepped])
def test_a_job_of_a_few_steps_is_not_much_slower_either(seconds, num_rows, chance):
    assert simulated(seconds, num_rows, chance, steps=40)[0] > 0.97


@pytest.mark.parametrize("num_accepted", [8, 0])
def test_what_was_drafted_by_an_earlier_run_is_trusted_at_once(num_accepted):
    gate, chances, widths = Gate(), Acceptance(), []
    for _ in range(30):
        known, sure = chances.chance("row", "previous"), chances.sure("row", "previous")
        widths.append(gate.width(rows(1, [8], [known], [sure])))
        accepted = min(widths[-1] - 1, num_accepted)
        gate.record(1, widths[-1], memory_bound(widths[-1]), num_tokens=1 + accepted)
        if widths[-1] > 1:
            counts = {"num_drafted": widths[-1] - 1, "num_accepted": accepted}
            chances.record("row", "previous", **counts)
    assert widths[0] == 1 < widths[1]
    assert (sum(width > 1 for width in widths) > 25) == (num_accepted > 0)


@pytest.mark.parametrize(("num_rows", "chance"), [(1, 0.95), (1, 0.7), (4, 0.95), (16, 0.95)])
def test_near_the_best_width(num_rows, chance):
    def speed(width: int) -> float:
        tokens = sum(chance**place for place in range(width))
        return tokens * memory_bound(num_rows) / memory_bound(num_rows * width)

    best = max(speed(width) for width in range(1, 10))
    assert best > 1.4
    assert simulated(memory_bound, num_rows, chance)[0] > 0.88 * best


def test_sizes_that_kernels_are_made_for_are_tried():
    """One position more than a power of two costs a third more, as with many a kernel."""

    def bumpy(positions: int) -> float:
        return memory_bound(positions) * (1.0 if positions & (positions - 1) == 0 else 1.35)

    assert simulated(bumpy, 1, 0.95)[0] > 4.7


def test_one_wide_draft_that_missed_does_not_undo_what_many_gained():
    gate = Gate()
    plain_steps(gate, 1.0)
    for _ in range(40):
        width = gate.width(rows(1, [15], [0.95]))
        gate.record(1, width, 1.0 + 0.05 * (width - 1), num_tokens=width)
    for _ in range(5):
        assert gate.width(rows(1, [15], [0.95])) == 16
        gate.record(1, 16, 1.75, num_tokens=1)
    assert gate.width(rows(1, [15], [0.95])) == 16


def test_as_the_batch_drains_drafts_begin_to_pay():
    gate, chances, dice = Gate(), Acceptance(), random.Random(1)

    def widths(num_rows: int, steps: int) -> list[int]:
        found = []
        for _ in range(steps):
            chances.fade()
            known = [chances.chance(row, "x") for row in range(num_rows)]
            found.append(gate.width(rows(num_rows, [8] * num_rows, known)))
            num_tokens = num_rows
            for row in range(num_rows if found[-1] > 1 else 0):
                drafted = found[-1] - 1
                accepted = next((i for i in range(drafted) if dice.random() > 0.6), drafted)
                chances.record(row, "x", num_drafted=drafted, num_accepted=accepted)
                num_tokens += accepted
            time = 0.01 + 0.002 * num_rows * found[-1]
            gate.record(num_rows, found[-1], time, num_tokens=num_tokens)
        return found

    assert sum(width > 1 for width in widths(32, 200)) < 30
    assert sum(width > 1 for width in widths(1, 100)) > 60


def test_a_row_that_missed_is_left_alone_for_a_while_and_tried_again():
    gate, chances = Gate(), Acceptance()
    tried, lost = [], 0.0
    for step in range(400):
        chances.fade()
        width = gate.width(rows(1, [4], [chances.chance("row", "x")]))
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


def plain_steps(gate: Gate, seconds: float, *, num_rows: int = 1, steps: int = 4) -> None:
    """Steps that were launched ahead, so that a plain one is known."""
    for _ in range(steps):
        gate.width(rows(num_rows, [0] * num_rows, [0.0] * num_rows))
        gate.record(num_rows, 1, seconds, num_tokens=num_rows, waited=False)


def lied_to(gate: Gate, steps: int, *, num_rows: int = 1) -> float:
    """Seconds beyond those of plain steps, of 1 s each, where all is promised and nothing kept."""
    lost = 0.0
    for _ in range(steps):
        width = gate.width(rows(num_rows, [4] * num_rows, [0.99] * num_rows))
        seconds = 1.0 if width == 1 else 1.5
        gate.record(num_rows, width, seconds, num_tokens=num_rows)
        lost += seconds - 1.0
    return lost


def test_promises_that_are_never_kept_cost_a_hundredth_and_a_step():
    gate = Gate()
    plain_steps(gate, 1.0)
    lost = lied_to(gate, 1000)
    assert 0 < lost <= 0.01 * (1000 + lost) + 1.0 + 0.5


def test_what_was_gained_long_ago_does_not_pay_for_what_is_lost_now():
    gate = Gate()
    plain_steps(gate, 1.0)
    for _ in range(1000):
        width = gate.width(rows(1, [4], [0.99]))
        gate.record(1, width, 1.0 if width == 1 else 1.5, num_tokens=width)
    assert lied_to(gate, 1000) < (0.01 + 0.05) * 2500 + 1.0 + 0.5


def test_what_is_lost_with_many_rows_does_not_stop_a_few():
    gate = Gate()
    for num_rows in (1, 32):
        plain_steps(gate, 1.0, num_rows=num_rows)
    lied_to(gate, 300, num_rows=32)
    plain_steps(gate, 1.0, num_rows=32)
    assert gate.width(rows(32, [4] * 32, [0.99] * 32)) == 1
    plain_steps(gate, 1.0)
    assert gate.width(rows(1, [4], [0.99])) > 1


def chosen_after(*plain: float, chance: float, verify: float) -> int:
    """The width for one row, where a verify step of two positions takes `verify` seconds."""
    gate = Gate()
    gate.width(rows(1, [0], [0.0]))
    for _ in range(2):
        gate.record(1, 2, verify, num_tokens=2)
    for seconds in plain:
        plain_steps(gate, seconds, steps=1)
    return gate.width(rows(1, [1], [chance]))


def test_the_first_step_of_a_size_is_not_believed_where_the_next_is_faster():
    """It paid for its memory; were it believed, anything would look faster than plain steps."""
    assert chosen_after(1.0, 0.010, chance=0.5, verify=0.020) == 1
    assert chosen_after(1.0, 0.010, chance=0.5, verify=0.012) == 2


def test_a_step_that_was_held_up_says_little():
    steady = [0.010, 0.010]
    assert chosen_after(*steady, 10.0, chance=0.2, verify=0.020) == 1
    # One that takes longer for good is believed after a few.
    assert chosen_after(*steady, *([0.040] * 12), chance=0.2, verify=0.020) == 2


def test_a_width_that_was_not_tried_looks_slower_than_the_largest_that_was():
    """By the root of its size, so that of two with the same promise the smaller is tried first."""
    gate = Gate()
    plain_steps(gate, 1.0)
    assert gate.width(rows(1, [8], [0.5])) == 2
    assert gate.width(rows(1, [8], [0.05])) == 1
    assert gate.width(rows(1, [8], [0.95])) > 4


@pytest.mark.parametrize("promised", [0.0, 0.99])
def test_steps_are_launched_ahead_until_drafts_look_good(promised):
    gate, looks = Gate(), []
    for step in range(400):
        if gate.probes(1):
            looks.append(step)
            gate.probe(rows(1, [4], [promised if step > 300 else 0.0]))
        assert gate.waits == (promised > 0 and step >= 304), "a look each eight steps"
        width = gate.width(rows(1, [4], [promised])) if gate.waits else 1
        assert (width > 1) == gate.waits
        gate.record(1, width, 1.0, num_tokens=width, waited=gate.waits)
    assert looks[:5] == [1, 2, 4, 8, 16]
    assert looks[5:] == list(range(24, 305 if promised else 400, 8))


def test_after_drafts_that_were_of_use_a_few_steps_wait_in_vain():
    gate = Gate()
    plain_steps(gate, 1.0)

    def looks(chance: float) -> int:
        """Steps that wait, from a look on that promised something."""
        gate.probe(rows(1, [4], [0.99]))
        num = 0
        while gate.waits:
            num += 1
            width = gate.width(rows(1, [4], [chance if num == 1 else 0.0]))
            gate.record(1, width, 1.0, num_tokens=width)
            assert gate.waits or width == 1, "what drafts came to is read before the next step"
        return num

    assert looks(0.0) == 1, "with the latest draws it did not look good"
    assert looks(0.99) == 5


def test_one_that_waited_for_the_draws_before_it_is_no_plain_step():
    """It may take longer than the plain steps that drafts have to beat."""
    gate = Gate()
    plain_steps(gate, 1.0)
    gate.probe(rows(1, [4], [0.99]))
    for _ in range(3):
        gate.record(1, 1, 3.0, num_tokens=1, waited=True)
    for _ in range(2):
        gate.record(1, 2, 1.9, num_tokens=2)
    assert gate.width(rows(1, [1], [0.5])) == 1


def test_a_number_of_rows_that_is_new_is_timed_at_once():
    gate = Gate()
    plain_steps(gate, 1.0, num_rows=8)
    gate.probe(rows(8, [4] * 8, [0.99] * 8))
    assert gate.waits
    assert gate.width(rows(4, [4] * 4, [0.99] * 4)) == 1 and not gate.waits
    assert not gate.probes(4), "nothing to compare with yet"
    gate.record(4, 1, 1.0, num_tokens=4, waited=True)
    assert gate.probes(4)


def test_times_of_long_ago_are_forgotten():
    """A machine that has become faster is not judged by what verify steps took before."""
    gate = Gate()
    plain_steps(gate, 1.0)
    for _ in range(2):
        gate.width(rows(1, [1], [0.9]))
        gate.record(1, 2, 3.0, num_tokens=2)
    tried = []
    for step in range(1200):
        width = gate.width(rows(1, [1], [0.9]))
        tried += [step] if width > 1 else []
        gate.record(1, width, 1.0, num_tokens=width)
    assert tried[0] > 500 and len(tried) > 500


def chosen_at_the_end(*left: tuple[int, float], chance: float = 0.9) -> int:
    """The width where the rows have so much left and so often a draft, and now all have one."""
    gate = Gate()
    plain_steps(gate, 1.0, num_rows=len(left))
    num = len(left)
    promised = [4] * num, [chance] * num
    assert gate.width(rows(num, *promised)) > 1, "it pays where others take their slots"
    return gate.width(rows(num, *promised, None, list(left)))


def test_at_the_end_the_row_that_is_done_last_decides():
    assert chosen_at_the_end((100, 1.0), (100, 1.0)) > 1
    assert chosen_at_the_end((100, 1.0), (100, 0.0)) == 1, "the other one is not done sooner"
    assert chosen_at_the_end((100, 1.0), (10, 0.0)) > 1, "the other one is done long before"
    assert chosen_at_the_end((10, 1.0), (100, 0.0)) == 1
    assert chosen_at_the_end((100, 0.9), (100, 0.8), (90, 0.7)) > 1


def test_how_often_a_row_has_a_draft():
    chances = Acceptance()
    for step in range(100):
        chances.look("always", has_draft=True)
        chances.look("never", has_draft=False)
        chances.look("half", has_draft=step % 2 == 0)
    assert chances.share("always") == 1.0 and chances.share("never") == 0.0
    assert 0.4 < chances.share("half") < 0.6
    chances.look("new", has_draft=True)
    assert chances.share("new") == 1.0
    chances.end("always")
    chances.look("always", has_draft=False)
    assert chances.share("always") == 0.0


def test_a_prefill_tells_what_a_size_takes():
    def tried(*prefills: tuple[int, float]) -> int:
        gate = Gate()
        for size, seconds in prefills:
            gate.record_prefill(size, seconds)
        plain_steps(gate, 1.0, num_rows=8)
        return gate.width(rows(8, [4] * 8, [0.8] * 8))

    assert tried() == tried((80, 2.0)) == 5
    assert tried((80, 10.0)) == tried((64, 8.0), (80, 10.0)) == 1


def test_what_a_prefill_tells_is_set_right_by_what_drafts_took():
    gate = Gate()
    gate.record_prefill(200, 1.2)
    plain_steps(gate, 1.0, num_rows=32)
    assert gate.width(rows(32, [3] * 32, [0.55] * 32)) == 4
    for _ in range(2):
        gate.record(32, 2, 1.9, num_tokens=61)
    assert gate.width(rows(32, [3] * 32, [0.55] * 32)) == 1


@pytest.mark.parametrize(
    ("fewer_rows", "chance", "width"),
    [
        ((16, 1.0), 0.5, 2),
        ((16, 0.55), 0.5, 1),
        ((16, 0.55), 0.9, 4),
        ((28, 0.5), 0.5, 2),
        ((16, 1.5), 0.5, 4),
    ],
    ids=["as fast", "faster", "faster, good drafts", "nearly as many", "slower"],
)
def test_what_more_rows_cost_more_positions_do_too(fewer_rows, chance, width):
    """As a line tells from numbers of rows that are far enough apart; a prefill is of one row."""
    gate = Gate()
    gate.record_prefill(64, 0.9)
    plain_steps(gate, fewer_rows[1], num_rows=fewer_rows[0])
    plain_steps(gate, 1.0, num_rows=32)
    assert gate.width(rows(32, [3] * 32, [chance] * 32)) == width


def test_a_few_prefills_of_a_size_are_timed():
    gate = Gate()
    for _ in range(3):
        assert gate.wants_prefill(600)
        gate.record_prefill(600, 1.0)
    assert not gate.wants_prefill(600) and gate.wants_prefill(100)
