"""Reward functions, the thread that runs them, and group-relative advantages.

A reward function is `function(text, row) -> float`, sync or async; options are bound beforehand.
"""

import asyncio
import inspect
import math
import re
import statistics
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeAlias

from runner.errors import RewardError
from runner.types import Completion, ErrorInfo

Row: TypeAlias = Mapping[str, Any]
RewardFunction: TypeAlias = Callable[[str, Row], float | Awaitable[float]]

# A sign only where it cannot be the minus of "10-5"; commas only as thousands.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])[-\u2212])?\$?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)",
    re.ASCII,
)


def _answer(row: Row, column: str) -> Any:
    if row.get(column) is None:
        what = "is null" if column in row else "is not there"
        raise RewardError(f"answer_column={column!r} {what}; the columns are {', '.join(row)}")
    return row[column]


def exact_match(
    text: str, row: Row, *, answer_column: str = "answer", ignore_case: bool = False
) -> float:
    """Returns 1 where the completion is the answer, apart from space around it."""
    given, answer = text.strip(), str(_answer(row, answer_column)).strip()
    if ignore_case:
        given, answer = given.casefold(), answer.casefold()
    return float(given == answer)


def last_number(
    text: str, row: Row, *, answer_column: str = "answer", tolerance: float = 1e-6
) -> float:
    """Returns 1 where the last number of the completion is the last number of the answer.

    Reads 1,234 and -3.5 and $5; an answer may be a whole solution that ends in "#### 42".
    `tolerance` is absolute.
    """
    answer = _answer(row, answer_column)
    expected = _last_number(str(answer))
    if expected is None:
        raise RewardError(f"answer_column={answer_column!r} has no number in {answer!r}")
    given = _last_number(text)
    return float(given is not None and abs(given - expected) <= tolerance)


def _last_number(text: str) -> float | None:
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    number = float(numbers[-1]["digits"].replace(",", ""))
    return -number if numbers[-1]["sign"] else number


def regex_match(text: str, row: Row, *, pattern: str, answer_column: str | None = None) -> float:
    """Returns 1 where `pattern` is found; with `answer_column`, where its group 1 is the answer."""
    found = re.search(pattern, text)
    if answer_column is None:
        return float(found is not None)
    if re.compile(pattern).groups < 1:
        raise RewardError(f"pattern={pattern!r} has no group to compare with {answer_column}")
    answer = str(_answer(row, answer_column)).strip()
    return float(found is not None and (found[1] or "").strip() == answer)


def word_limit(text: str, row: Row, *, most: int = 4) -> float:
    """Returns 1 where the completion has a word, and at most `most` of them."""
    return float(1 <= len(text.split()) <= most)


def group_advantages(
    rewards: Sequence[float | None], *, normalize: bool = True, epsilon: float = 1e-4
) -> list[float | None]:
    """Returns how far each reward of a group is from their mean; None stays None.

    With `normalize` in units of their population standard deviation plus `epsilon`: the outcome
    advantage of GRPO (arXiv 2402.03300, section 4.1.2).
    """
    present = [reward for reward in rewards if reward is not None]
    if not present:
        return [None] * len(rewards)
    mean = statistics.fmean(present)
    scale = statistics.pstdev(present, mean) + epsilon if normalize else 1.0
    return [None if reward is None else (reward - mean) / scale for reward in rewards]


def reward_columns(
    samples: Sequence[Completion], rewards: Sequence[float | RewardError], *, normalize: bool
) -> dict[int, dict[str, Any]]:
    """The columns `reward` and `advantage`, or `error`, of a group's samples, by their index.

    A sample that is not whole has no reward, whatever its function said.
    """
    pairs = list(zip(samples, rewards, strict=True))
    numbers = [_number(sample, reward) for sample, reward in pairs]
    advantages = group_advantages(numbers, normalize=normalize)
    columns: dict[int, dict[str, Any]] = {}
    for (sample, reward), number, advantage in zip(pairs, numbers, advantages, strict=True):
        columns[sample.index] = {"reward": number, "advantage": advantage}
        if isinstance(reward, RewardError) and sample.finish_reason != "error":
            columns[sample.index] = {"error": asdict(ErrorInfo("RewardError", str(reward)))}
    return columns


def _number(sample: Completion, reward: float | RewardError) -> float | None:
    """The reward, if the sample is whole and has one."""
    if sample.finish_reason == "error" or isinstance(reward, RewardError):
        return None
    return reward


class RewardRunner:
    """Runs a reward function off the caller's thread, so that the engine never waits for it.

    Async functions run concurrently in the event loop of one daemon thread; sync ones in the
    loop's thread pool, so they have to be thread-safe.
    """

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._is_async = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[str], row: Row) -> "Future[list[float | RewardError]]":
        """Starts scoring the completions of one row; a sample that fails gives its error."""
        assert not self._loop.is_closed(), "the reward runner is closed"
        return asyncio.run_coroutine_threadsafe(self._score_all(list(texts), row), self._loop)

    def close(self) -> None:
        """Stops the thread; what is not finished is cancelled."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *of: object) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.wait(tasks) if tasks else asyncio.sleep(0))
        self._loop.close()

    async def _score_all(self, texts: list[str], row: Row) -> list[float | RewardError]:
        return list(await asyncio.gather(*(self._score(text, row) for text in texts)))

    async def _score(self, text: str, row: Row) -> float | RewardError:
        try:
            if self._is_async:
                result = self._call(text, row)
            else:
                result = await asyncio.to_thread(self._call, text, row)
            if inspect.isawaitable(result):
                result = await result
        except (Exception, SystemExit) as error:
            return _as_reward_error(error)
        return result if isinstance(result, RewardError) else _checked_reward(result)

    def _call(self, text: str, row: Row) -> Any:
        """Returns errors: StopIteration cannot pass a future, and SystemExit would end the loop."""
        try:
            return self._function(text, row)
        except (Exception, SystemExit) as error:
            return _as_reward_error(error)


def _as_reward_error(error: BaseException) -> RewardError:
    if isinstance(error, RewardError):
        return error
    wrapped = RewardError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def _checked_reward(value: Any) -> float | RewardError:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        return RewardError(f"the reward function returned {value!r}, not a finite number")
    return number
