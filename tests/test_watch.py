"""What others see of a run: counts, log, tracker and warnings, none of which can end it."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.errors import ParameterError
from runner.types import ErrorInfo, RequestOutput
from runner.watch import Watch


class Recorder:
    """A tracker that remembers, and fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._failing = failing

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self._failing:
            raise ConnectionError("the service is down")

    def start(self, config: Mapping[str, Any]) -> None:
        self._called("start", dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._called("log", dict(metrics), step)

    def finish(self) -> None:
        self._called("finish")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings are shown, as on the command line, not raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *where, **also: print(message, file=sys.stderr)
        yield


def watch(place: Path, tracker: Recorder | None = None, **options: Any) -> Watch:
    return Watch(place, {"sampling.n": 2}, total=10, done=4, tracker=tracker, **options)


def test_the_tracker_gets_the_options_every_commit_and_the_end(tmp_path: Path) -> None:
    recorder = Recorder()
    seen = watch(tmp_path, recorder)
    seen.row(50)
    seen.row(0, error="PromptError")
    seen.committed(6, {"reward": 0.25})
    seen.close("finished")
    start, log, finish = recorder.calls
    assert start == ("start", {"sampling.n": 2}) and finish == ("finish",)
    metrics = log[1]
    assert log[2] == metrics["rows"] == 6 and metrics["errors"] == 1
    assert metrics["completion_tokens"] == 50 and metrics["reward"] == 0.25
    assert metrics["tokens_per_second"] > 0 and metrics["rows_per_hour"] > 0


def test_the_numbers_are_of_this_run_and_tell_the_state(tmp_path: Path) -> None:
    seen = watch(tmp_path)
    failed = ErrorInfo("PromptError", "the prompt: private")
    seen.output(RequestOutput(request_id="r", prompt=None, prompt_token_ids=[], error=failed))
    seen.row(7)
    numbers = seen.numbers("stopped")
    assert (numbers["state"], numbers["total_rows"]) == ("stopped", 10)
    assert (numbers["run"]["rows"], numbers["run"]["completion_tokens"]) == (2, 7)
    seen.close("stopped")
    log = (tmp_path / "run.log").read_text()
    assert "end state=stopped rows=2 PromptError=1" in log and "private" not in log


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_a_warning(
    failing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(failing)
    seen = watch(tmp_path, recorder)
    seen.committed(5)
    seen.committed(6)
    seen.close("finished")
    assert capsys.readouterr().err.count("the service is down") == 1
    expected = ["start", "log"] if failing == "log" else ["start", "log", "log", "finish"]
    assert [call[0] for call in recorder.calls] == expected


def test_a_tracker_that_cannot_start_ends_the_run_before_it_began(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="cannot start: the service is down"):
        watch(tmp_path, Recorder("start"))


def test_warnings_go_into_the_log_and_on_to_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = warnings.showwarning
    seen = watch(tmp_path, model={"name": "tiny"})
    warnings.warn("no optimised BLAS", stacklevel=1)
    seen.close("finished")
    assert warnings.showwarning is before
    log = (tmp_path / "run.log").read_text()
    assert " WARNING no optimised BLAS\n" in log and " INFO model name=tiny\n" in log
    assert "no optimised BLAS" in capsys.readouterr().err
