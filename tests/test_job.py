"""What a run tells of itself: the summary at every commit, and the state in which it ends."""

import json
import time
from pathlib import Path
from typing import Any

import hydra
import pytest
from command_line import results, write_jsonl

from runner.composition import register
from runner.errors import OutputError, ParameterError
from runner.job import RunContext
from runner.status import read_status


@pytest.fixture
def place(tmp_path: Path, tiny_directory: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny_directory)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"row {i}"} for i in range(6)])
    return tmp_path


def context(place: Path, *options: str) -> RunContext:
    """A run in this process, one row at a time."""
    register()
    words = [
        "job=generate", "data=custom", "model=custom", f"model.path={place / 'tiny'}",
        f"data.path={place / 'prompts.jsonl'}", f"output.dir={place / 'out'}",
        "sampling.max_tokens=3", "sampling.ignore_eos=true", "engine.max_batch_size=1",
    ]  # fmt: skip
    with hydra.initialize_config_module("runner.conf", version_base="1.3"):
        return RunContext(hydra.compose("config", [*words, *options]))


def summary(place: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / "out" / "summary.json").read_text())
    return content


def commits(place: Path) -> list[str]:
    """The rows that each line of the log says are committed."""
    lines = (place / "out" / "run.log").read_text().splitlines()
    return [
        word for line in lines if " commit " in line for word in line.split() if "rows=" in word
    ]


def test_a_commit_is_told_though_no_other_row_comes(place: Path) -> None:
    with context(place, "output.commit_seconds=0.05") as run:
        pairs = run.outputs()
        run.write(*next(pairs))
        deadline = time.monotonic() + 10
        while not (place / "out" / "summary.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        said = summary(place)
        assert (said["state"], said["rows"], said["total_rows"]) == ("running", 1, 6)
        assert read_status(place / "out").state == "running"
        for pair in pairs:
            run.write(*pair)
    said = summary(place)
    assert (said["state"], said["rows"], said["complete"]) == ("finished", 6, True)
    assert commits(place)[0] == "rows=1" and commits(place)[-1] == "rows=6"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_something_ends_says_what_is_there(
    place: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), context(place, "output.shard_rows=2") as run:
        for number, pair in enumerate(run.outputs()):
            if number == 3:
                raise error
            run.write(*pair)
    is_bug = error is ZeroDivisionError
    state = "stopped" if is_bug else "interrupted"
    last = (place / "out" / "run.log").read_text().splitlines()[-1]
    assert f"end state={state}" in last
    if is_bug:
        assert (summary(place)["state"], summary(place)["rows"]) == ("stopped", 3)
        assert read_status(place / "out").rows == results(place / "out").height == 3
    run.writer.close(complete=False)
    with context(place) as run:
        for pair in run.outputs():
            run.write(*pair)
    assert results(place / "out")["row_id"].n_unique() == 6


class NoTracker:
    """One whose service is down."""

    def start(self, config: object) -> None:
        raise ConnectionError("down")


def test_a_tracker_that_cannot_start_leaves_the_directory_free(place: Path) -> None:
    run = context(place)
    run._tracker = NoTracker()
    with pytest.raises(ParameterError, match="tracker cannot start: down"), run:
        pass
    with context(place) as run:
        assert sum(1 for _ in run.outputs()) == 6


def test_a_directory_with_answers_to_a_batch_file_is_left_alone(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "batch.json").write_text("{}")
    for options in ([], ["output.overwrite=true"]):
        with pytest.raises(OutputError, match="holds answers to a batch file"):
            context(place, *options)
