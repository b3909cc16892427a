"""How far the job of a directory is, read off what it wrote, without disturbing it."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.data.lock import DirectoryLock
from runner.errors import OutputError

SUMMARY_FILE = "summary.json"
_MANIFESTS = ("manifest.json", "manifest.jsonl", "batch.json")


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a job is."""

    state: str
    """running, finished, interrupted (also where it was killed) or stopped."""
    rows: int
    """Rows that have their results."""
    total_rows: int | None
    """Rows of the job; None where that is not known."""
    errors: int
    """Results that are errors."""
    tokens_per_second: float | None
    """Of the last run."""
    rows_per_hour: float | None
    seconds_left: float | None
    """Estimated from the speed of the run; None unless it runs."""
    updated: float | None
    """When that was so, in seconds since 1970."""
    model: str | None


def read_status(directory: Path) -> Status:
    """Reads a directory of results; raises `OutputError` for any other."""
    if not any((directory / name).exists() for name in _MANIFESTS):
        raise OutputError(f"{directory}: holds no results of a job")
    summary = _summary(directory)
    run, total, rows = summary.get("run", {}), summary.get("total_rows"), summary.get("rows", 0)
    state = _state(directory, summary)
    per_hour = run.get("rows_per_hour")
    has_pace = state == "running" and total is not None and per_hour
    return Status(
        state=state,
        rows=rows,
        total_rows=total,
        errors=sum(summary.get("errors", {}).values()),
        tokens_per_second=run.get("tokens_per_second"),
        rows_per_hour=per_hour,
        seconds_left=max(total - rows, 0) / per_hour * 3600 if has_pace else None,
        updated=summary.get("written"),
        model=summary.get("model", {}).get("name"),
    )


def _summary(directory: Path) -> dict[str, Any]:
    """The summary; empty for a run that has not committed yet."""
    path = directory / SUMMARY_FILE
    try:
        summary, written = json.loads(path.read_bytes()), path.stat().st_mtime
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(summary, dict):
        raise OutputError(f"{path}: not a summary of results")
    return summary | {"written": written}


def _state(directory: Path, summary: dict[str, Any]) -> str:
    if DirectoryLock(directory).is_held:
        return "running"
    said = summary.get("state", "finished" if summary.get("complete") else "interrupted")
    return "interrupted" if said == "running" else str(said)


def as_json(status: Status) -> str:
    """A status on one line, for programs."""
    return json.dumps(asdict(status))


def as_lines(status: Status) -> Iterator[str]:
    """A status for people, at most 80 columns wide."""
    yield _line("state", status.state)
    total, share = status.total_rows, ""
    if total:
        share = f" of {total} ({status.rows / total:.0%})"
    errors = f", {status.errors} error{'' if status.errors == 1 else 's'}"
    yield _line("rows", f"{status.rows}{share}{errors}")
    if status.tokens_per_second is not None and status.rows_per_hour is not None:
        speed = f"{status.tokens_per_second:.0f} tokens/s, {status.rows_per_hour:.0f} rows/hour"
        yield _line("speed", speed)
    if status.seconds_left is not None:
        yield _line("left", f"about {_duration(status.seconds_left)}")
    if status.model is not None:
        yield _line("model", status.model)
    if status.updated is not None:
        yield _line("updated", f"{_duration(max(time.time() - status.updated, 0))} ago")


def _line(name: str, value: str) -> str:
    line = f"  {name:<9} {value}"
    return line if len(line) <= 80 else f"{line[:77]}..."


def _duration(seconds: float) -> str:
    """Seconds as the two units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
