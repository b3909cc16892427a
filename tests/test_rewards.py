"""Rewards: what counts as right, that one failure stays one failure, and advantages."""

import asyncio
import functools
import math
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import RewardError
from runner.rewards import (
    RewardRunner,
    exact_match,
    group_advantages,
    last_number,
    regex_match,
)

ROW: dict[str, Any] = {"answer": "42", "question": "?"}


@pytest.mark.parametrize(
    ("text", "expected"), [("42", 1.0), ("  42\n", 1.0), ("42.", 0.0), ("", 0.0), ("4 2", 0.0)]
)
def test_exact_match(text: str, expected: float) -> None:
    assert exact_match(text, ROW) == expected


def test_exact_match_without_regard_to_case() -> None:
    row = {"capital": "Bern "}
    assert exact_match("bern", row, answer_column="capital", ignore_case=True) == 1.0
    assert exact_match("bern", row, answer_column="capital") == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("7 + 35 = 42", 42),
        ("It costs $1,234.50!", "1234.5"),
        ("-3.5", "-3.5"),
        ("x=-5", -5),
        ("\u22125", -5),
        ("he owes -$5", "-5"),
        ("10-5", "5"),
        ("(2)-3", "3"),
        (".5", 0.5),
        ("12,345,678", "12345678"),
        ("1,2,3", "3"),
        ("5.\n", "5"),
        ("42", "So 6 * 7 = 42.\n#### 42"),
        ("1,000", "#### 1000"),
        ("0.1", 0.1),
        ("both 3 and then 4", 4.0),
    ],
)
def test_last_number_is_found(text: str, answer: object) -> None:
    assert last_number(text, {"answer": answer}) == 1.0


@pytest.mark.parametrize("text", ["", "none", "41", "42 or 43", "42.1", "-42", "9" * 400])
def test_last_number_that_is_wrong(text: str) -> None:
    assert last_number(text, ROW) == 0.0


@given(number=st.integers(-(10**9), 10**9), prefix=st.sampled_from(["", "It is ", "3 then "]))
def test_last_number_reads_numbers_however_they_are_written(number: int, prefix: str) -> None:
    for written in (f"{number}", f"{number:,}", f"{number}.", f"{number}.0"):
        assert last_number(prefix + written, {"answer": number}) == 1.0
        assert last_number(prefix + written, {"answer": number + 1}) == 0.0


def test_last_number_within_a_tolerance() -> None:
    assert last_number("3.14", {"pi": 3.14159}, answer_column="pi") == 0.0
    assert last_number("3.14", {"pi": 3.14159}, answer_column="pi", tolerance=0.01) == 1.0


def test_regex_match() -> None:
    assert regex_match("<answer>x</answer>", {}, pattern="<answer>.*</answer>") == 1.0
    assert regex_match("x", {}, pattern="<answer>") == 0.0
    boxed = functools.partial(regex_match, pattern=r"\\boxed\{(.*?)\}", answer_column="answer")
    assert boxed(r"so \boxed{ 42 }", ROW) == 1.0
    assert boxed(r"so \boxed{43}", ROW) == 0.0
    assert boxed("42", ROW) == 0.0


def test_a_pattern_needs_a_group_to_compare() -> None:
    with pytest.raises(RewardError, match="has no group to compare with answer"):
        regex_match("x", ROW, pattern="x", answer_column="answer")


@pytest.mark.parametrize(
    "reward",
    [exact_match, last_number, functools.partial(regex_match, pattern="(1)")],
)
def test_an_answer_that_is_not_there(reward: Any) -> None:
    with pytest.raises(RewardError, match="'gold' is not there; the columns are answer, question"):
        reward("1", ROW, answer_column="gold")
    with pytest.raises(RewardError, match="'answer' is null"):
        reward("1", {"answer": None}, answer_column="answer")


def test_an_answer_without_a_number() -> None:
    with pytest.raises(RewardError, match="has no number in 'many'"):
        last_number("1", {"answer": "many"})


def length(text: str, row: Mapping[str, Any]) -> float:
    return len(text)


async def slow_length(text: str, row: Mapping[str, Any]) -> float:
    await asyncio.sleep(0.05)
    return len(text)


class Reward:
    """An object with an async call, as a reward that keeps a client would be."""

    async def __call__(self, text: str, row: Mapping[str, Any]) -> float:
        return len(text) * row.get("scale", 1)


@pytest.mark.parametrize(
    "function",
    [
        length,
        slow_length,
        Reward(),
        functools.partial(slow_length),
        lambda text, row: slow_length(text, row),
        lambda text, row: np.float32(len(text)),
    ],
    ids=["sync", "async", "object", "partial", "returns awaitable", "numpy"],
)
def test_every_kind_of_function_gives_its_rewards_in_order(function: Any) -> None:
    with RewardRunner(function) as runner:
        futures = [runner.submit(["a" * i, ""], ROW) for i in range(5)]
        assert [future.result(timeout=10) for future in futures] == [[i, 0] for i in range(5)]
        rewards = runner.submit(["abc"], ROW).result(timeout=10)
    assert [type(reward) for reward in rewards] == [float]


def test_options_are_bound_beforehand() -> None:
    reward = functools.partial(last_number, answer_column="gold")
    with RewardRunner(reward) as runner:
        assert runner.submit(["1", "2"], {"gold": 2}).result(timeout=10) == [0.0, 1.0]


def test_async_functions_run_concurrently() -> None:
    started = time.monotonic()
    with RewardRunner(slow_length) as runner:
        futures = [runner.submit(["a"] * 20, ROW) for _ in range(10)]
        for future in futures:
            future.result(timeout=10)
    assert time.monotonic() - started < 200 * 0.05 / 4


def test_sync_functions_run_concurrently_and_off_this_thread() -> None:
    both = threading.Barrier(2, timeout=10)

    def meet(text: str, row: Mapping[str, Any]) -> bool:
        both.wait()
        return threading.current_thread() is not threading.main_thread()

    with RewardRunner(meet) as runner:
        assert runner.submit(["a", "b"], ROW).result(timeout=10) == [1.0, 1.0]


def fail(text: str, row: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {
        "nan": math.nan,
        "inf": -math.inf,
        "text": "1.0",
        "none": None,
        "list": [1.0],
        "fine": True,
    }
    if text == "exit":
        sys.exit("enough")
    if text == "stop":
        raise StopIteration
    if text == "own":
        raise RewardError("no answer")
    return values[text]


async def fail_later(text: str, row: Mapping[str, Any]) -> Any:
    await asyncio.sleep(0)
    if text == "stop":
        raise RuntimeError("coroutine raised StopIteration")
    return fail(text, row)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nan", "returned nan, not a finite number"),
        ("inf", "returned -inf, not a finite number"),
        ("text", "returned '1.0', not a finite number"),
        ("none", "returned None, not a finite number"),
        ("list", "returned [1.0], not a finite number"),
        ("missing", "KeyError: 'missing'"),
        ("own", "no answer"),
        ("stop", "StopIteration"),
        ("exit", "SystemExit: enough"),
    ],
)
@pytest.mark.parametrize("function", [fail, fail_later])
def test_a_failure_is_that_sample_alone(function: Any, text: str, message: str) -> None:
    with RewardRunner(function) as runner:
        before, failed, after = runner.submit(["fine", text, "fine"], ROW).result(timeout=10)
        assert runner.submit(["fine"], ROW).result(timeout=10) == [1.0]
    assert (before, after) == (1.0, 1.0)
    assert isinstance(failed, RewardError)
    assert message in str(failed)


def test_no_texts_give_no_rewards() -> None:
    with RewardRunner(length) as runner:
        assert runner.submit([], ROW).result(timeout=10) == []


def test_closing_cancels_what_runs_and_ends_the_thread() -> None:
    async def forever(text: str, row: Mapping[str, Any]) -> float:
        await asyncio.sleep(3600)
        return 0.0

    runner = RewardRunner(forever)
    future = runner.submit(["a", "b"], ROW)
    runner.close()
    runner.close()
    with pytest.raises(CancelledError):
        future.result(timeout=10)
    assert "rewards" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(AssertionError, match="closed"):
        runner.submit(["a"], ROW)


def test_advantages_of_a_group() -> None:
    # GRPO, arXiv 2402.03300, section 4.1.2, with the population's deviation (0.5 here).
    assert group_advantages([1.0, 0.0, 0.0, 1.0], epsilon=0.0) == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages([1.0, 0.0], epsilon=0.5) == [0.5, -0.5]
    assert group_advantages([3.0, None, 1.0], normalize=False) == [1.0, None, -1.0]


def test_groups_that_teach_nothing() -> None:
    assert group_advantages([]) == []
    assert group_advantages([None, None]) == [None, None]
    assert group_advantages([0.7]) == [0.0]
    assert group_advantages([None, 0.7]) == [None, 0.0]
    assert group_advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]


REWARDS = st.lists(st.none() | st.floats(-100, 100), max_size=8)


@given(rewards=REWARDS, normalize=st.booleans())
def test_advantages_have_no_mean_and_keep_the_order(
    rewards: list[float | None], normalize: bool
) -> None:
    advantages = group_advantages(rewards, normalize=normalize)
    assert [a is None for a in advantages] == [r is None for r in rewards]
    present = [a for a in advantages if a is not None]
    assert sum(present) == pytest.approx(0.0, abs=1e-6)
    by_reward = sorted((r, a) for r, a in zip(rewards, advantages, strict=True) if r is not None)
    assert [a for _, a in by_reward] == sorted(present)
    if normalize and present:
        assert np.std(present) <= 1.0 + 1e-6
