"""Runs the program as a user does: a new process, a working directory, what it prints."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl

ROOT = Path(__file__).resolve().parent.parent


def run_cli(*arguments: str, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """`python -m runner …` on this checkout; `changes` go into the environment."""
    return subprocess.run(
        [sys.executable, "-m", "runner", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | changes,
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(*arguments: str, cwd: Path, **changes: str) -> str:
    """What a run that has to succeed prints on stdout."""
    done = run_cli(*arguments, cwd=cwd, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: str, cwd: Path, **changes: str) -> str:
    """The one line that a run with a user's mistake prints before it leaves with 2."""
    done = run_cli(*arguments, cwd=cwd, **changes)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def results(directory: Path) -> pl.DataFrame:
    """All rows of an output directory, in a fixed order."""
    return pl.scan_ipc(directory / "part-*.arrow").collect().sort("row_id", "sample_index")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file of `rows`."""
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
