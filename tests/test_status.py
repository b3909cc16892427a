"""How far a job is: read off a directory, whoever writes it, and shown in 80 columns."""

import fcntl
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run_cli, succeed

from runner.errors import OutputError
from runner.status import as_json, as_lines, read_status

SUMMARY: dict[str, Any] = {
    "state": "running",
    "rows": 120,
    "total_rows": 200,
    "errors": {"PromptError": 2, "RewardError": 1},
    "complete": False,
    "run": {"seconds": 10.0, "tokens_per_second": 116.2, "rows_per_hour": 6894.0},
    "model": {"name": "SmolLM2", "path": "x"},
}


def directory(place: Path, manifest: str = "manifest.jsonl", **changes: Any) -> Path:
    """A directory of results whose summary differs so from `SUMMARY`."""
    (place / manifest).write_text("")
    content = {key: value for key, value in (SUMMARY | changes).items() if value is not ...}
    (place / "summary.json").write_text(json.dumps(content))
    return place


@pytest.mark.parametrize("manifest", ["manifest.json", "manifest.jsonl", "batch.json"])
@pytest.mark.parametrize("state", ["finished", "interrupted", "stopped"])
def test_a_run_that_ended_says_how(state: str, manifest: str, tmp_path: Path) -> None:
    status = read_status(directory(tmp_path, manifest, state=state))
    assert (status.state, status.rows, status.total_rows) == (state, 120, 200)
    assert (status.errors, status.model, status.seconds_left) == (3, "SmolLM2", None)


def test_a_run_runs_while_somebody_holds_its_lock(tmp_path: Path) -> None:
    directory(tmp_path)
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status = read_status(tmp_path)
    assert status.state == "running"
    assert status.seconds_left == pytest.approx(80 / 6894 * 3600)
    after = read_status(tmp_path)
    assert (after.state, after.seconds_left) == ("interrupted", None)


@pytest.mark.parametrize(("complete", "state"), [(True, "finished"), (False, "interrupted")])
def test_a_summary_without_a_state_is_judged_by_its_end(
    complete: bool, state: str, tmp_path: Path
) -> None:
    assert read_status(directory(tmp_path, state=..., complete=complete)).state == state


def test_before_the_first_commit_nothing_is_done(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("")
    status = read_status(tmp_path)
    assert (status.state, status.rows, status.total_rows) == ("interrupted", 0, None)
    assert "\n".join(as_lines(status)) == "  state     interrupted\n  rows      0, 0 errors"


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    directory(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    read_status(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_summary_that_cannot_be_read_is_told(content: str, tmp_path: Path) -> None:
    directory(tmp_path)
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(OutputError, match="summary.json"):
        read_status(tmp_path)


@pytest.mark.parametrize(
    ("rows", "per_hour", "left"),
    [(199, 3600.0, "1 s"), (100, 100.0, "1 h 0 min"), (0, 1.0, "8 d 8 h"), (140, 900.0, "4 min")],
)
def test_the_time_left_is_what_the_pace_makes_of_the_rest(
    rows: int, per_hour: float, left: str, tmp_path: Path
) -> None:
    run = SUMMARY["run"] | {"rows_per_hour": per_hour}
    directory(tmp_path, rows=rows, run=run)
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shown = "\n".join(as_lines(read_status(tmp_path)))
    assert f"  left      about {left}" in shown


def test_what_people_see_fits_80_columns(tmp_path: Path) -> None:
    many = {"rows": 123456789, "total_rows": 999999999, "model": {"name": "x" * 200}}
    lines = list(as_lines(read_status(directory(tmp_path, **many))))
    assert max(map(len, lines)) <= 80
    assert lines[1] == "  rows      123456789 of 999999999 (12%), 3 errors"
    assert lines[-1].startswith("  updated   ") and lines[-1].endswith(" ago")


def test_what_programs_see_is_one_line_of_json(tmp_path: Path) -> None:
    found = json.loads(as_json(read_status(directory(tmp_path))))
    assert found["rows"] == 120 and found["tokens_per_second"] == 116.2
    assert abs(found["updated"] - time.time()) < 60


def test_the_command_takes_the_directory_as_a_word(tmp_path: Path) -> None:
    place = tmp_path / "it's a [place], {here}"
    place.mkdir()
    directory(place, state="finished")
    printed = succeed("status", place.name, cwd=tmp_path)
    assert "  rows      120 of 200 (60%), 3 errors\n" in printed
    assert json.loads(succeed("status", place.name, "job.json=true", cwd=tmp_path))["rows"] == 120


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["status"], "error: status needs a directory: runner status DIR"),
        (["status", "nowhere"], "error: nowhere: no such directory"),
        (["status", "output.dir=nowhere"], "error: nowhere: no such directory"),
        (["status", "empty"], "empty: holds no results of a job"),
        (["status", "empty", "model.path=x"], "error: model means nothing to status"),
    ],
)
def test_what_is_no_directory_of_results_is_one_line(
    words: list[str], line: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert line in refused(*words, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "empty"] == []


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    directory(tmp_path)
    code = """
import sys
sys.argv[1:] = ["status", "."]
from runner.cli import main
main()
heavy = {"mlx", "mlx_lm", "datasets", "pyarrow", "polars", "numpy", "transformers"}
print(*heavy & set(sys.modules), file=sys.stderr)
"""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "\n")


def test_its_configuration_can_be_shown_without_a_directory(tmp_path: Path) -> None:
    assert run_cli("status", "--cfg", "job", cwd=tmp_path).returncode == 0
    assert "job.json=false" in succeed("status", "--help", cwd=tmp_path)
