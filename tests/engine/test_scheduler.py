from tiny import request

from runner.engine.scheduler import Scheduler


def scheduler(*shapes: tuple[int, int], max_batch_size: int = 8) -> Scheduler:
    """Requests r0, r1, … of (prompt length, n)."""
    made = Scheduler(max_batch_size=max_batch_size)
    for index, (length, n) in enumerate(shapes):
        made.add(request([5] * length, f"r{index}", n=n))
    return made


def names(requests):
    return [r.request_id for r in requests]


def test_takes_what_the_free_rows_hold_in_order():
    made = scheduler((4, 2), (4, 2), (4, 2))
    assert names(made.next_prompts(5)) == ["r0", "r1"]
    assert names(made.next_prompts(5)) == ["r2"]
    assert made.next_prompts(5) == []


def test_no_free_row_takes_nothing():
    made = scheduler((4, 1))
    assert made.next_prompts(0) == []
    assert len(made) == 1


def test_a_group_larger_than_the_free_rows_starts_alone():
    made = scheduler((4, 20), (4, 1))
    assert names(made.next_prompts(1)) == ["r0"]


def test_prompts_of_very_different_length_are_prefilled_apart():
    made = scheduler((100, 1), (90, 1), (2, 1), (2, 1))
    assert names(made.next_prompts(8)) == ["r0", "r1", "r2"]
    assert names(made.next_prompts(8)) == ["r3"]
    made = scheduler((100, 1), (2, 1), (2, 1))
    assert names(made.next_prompts(8)) == ["r0", "r1"]


def test_wants_requests_until_a_batch_waits():
    made = scheduler((4, 1), (4, 1), max_batch_size=2)
    assert not made.wants_requests
    made.next_prompts(1)
    assert made.wants_requests


def test_remove_takes_out_one_that_waits():
    made = scheduler((4, 1), (4, 1))
    taken = made.remove("r0")
    assert taken is not None and taken.request_id == "r0"
    assert made.remove("r0") is None
    assert names(made.next_prompts(8)) == ["r1"]
