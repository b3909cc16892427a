"""A job that fails wholesale is stopped, from its hundredth row on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.error_rate import ErrorRate
from runner.errors import StoppedError

ERROR = {"type": "PromptError", "message": "no tokens"}


def stops_after(rate: float, failed: list[bool]) -> int | None:
    """The row that stops the run, counted from 1."""
    errors = ErrorRate(rate)
    for number, is_error in enumerate(failed, start=1):
        try:
            errors.add(ERROR if is_error else None)
        except StoppedError:
            return number
    return None


@given(st.floats(0, 1), st.lists(st.booleans(), min_size=80, max_size=150))
def test_it_stops_at_the_first_row_from_the_hundredth_with_too_many_before(rate, failed):
    wanted = [n for n in range(100, len(failed) + 1) if sum(failed[:n]) > rate * n]
    assert stops_after(rate, failed) == (wanted[0] if wanted else None)


def test_the_default_lets_one_of_a_hundred_fail():
    assert stops_after(0.01, [True] + [False] * 500) is None
    assert stops_after(0.01, [True] * 2 + [False] * 98) == 100
    assert stops_after(0.01, [False] * 150 + [True] * 2) == 152
    assert stops_after(1.0, [True] * 500) is None


@pytest.mark.parametrize("can_retry", [True, False])
def test_it_says_what_went_wrong_most_first_and_what_to_do(can_retry):
    errors = ErrorRate(0.0, can_retry=can_retry)
    with pytest.raises(StoppedError) as stopped:
        for number in range(100):
            kind = "RewardError" if number % 4 == 0 else "PromptError"
            errors.add({"type": kind, "message": "bad"})
    message = str(stopped.value)
    assert "100 of 100 rows failed" in message and "output.max_error_rate=0.0" in message
    assert "(75 x PromptError: bad; 25 x RewardError: bad)" in message
    assert ("job.retry_errors=true" in message) == can_retry and "\n" not in message


def test_messages_that_all_differ_take_no_more_memory():
    errors = ErrorRate(1.0)
    for number in range(1000):
        errors.add({"type": "PromptError", "message": f"row {number}"})
    assert errors.num_errors == 1000 and len(errors._messages) == 101
