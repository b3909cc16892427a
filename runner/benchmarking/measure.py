"""Turns of all sides, and what their times come to."""

import statistics
from collections.abc import Sequence
from typing import Any

from runner.benchmarking.engine_side import Run
from runner.benchmarking.peers import Side
from runner.data.workloads import Workload


def measure(sides: Sequence[Side], rounds: int) -> list[list[Run]]:
    """Runs each side once to warm up, then all of them in turn, `rounds` times."""
    runs: list[list[Run]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for side, done in zip(sides, runs, strict=True):
            if turn == 0 and side.is_warm:
                continue
            run = side.run(side.workload)
            wanted = side.workload.num_tokens
            assert run.num_tokens == wanted, f"{side.name}: {run.num_tokens} tokens, not {wanted}"
            if turn > 0:
                done.append(run)
    return runs


def result(
    workload: Workload, sides: Sequence[Side], runs: Sequence[list[Run]], *, weights_bytes: int
) -> dict[str, Any]:
    """Speeds and memory of all sides, ours first, and ratios to ours, round by round."""
    (ours, *peers), (our_runs, *their_runs) = sides, runs
    own = _speed(ours, our_runs, workload)
    cache_bytes = max(run.cache_bytes for run in our_runs)
    own["cache_bytes"] = cache_bytes
    own["peak_to_weights_and_cache"] = own["peak_bytes"] / (weights_bytes + cache_bytes)
    return {
        "workload": workload.name,
        "rows": workload.num_rows,
        "useful_tokens": workload.num_tokens,
        "runner": own,
        "peers": [
            _speed(peer, done, workload) | {"ratio": _ratio(our_runs, done)}
            for peer, done in zip(peers, their_runs, strict=True)
        ],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """All of the values, in the order of the rounds, and where they lie."""
    return {
        "rounds": list(values),
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def _tokens_per_second(runs: Sequence[Run]) -> list[float]:
    return [run.num_tokens / run.seconds for run in runs]


def _ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    speeds = zip(_tokens_per_second(ours), _tokens_per_second(theirs), strict=True)
    return spread([one / other for one, other in speeds])


def _speed(side: Side, runs: Sequence[Run], workload: Workload) -> dict[str, Any]:
    """What a side did; one that did a part of the workload would do all of it at that speed."""
    speeds = _tokens_per_second(runs)
    tokens_per_row = workload.num_tokens / workload.num_rows
    return {
        "kind": side.kind,
        "name": side.name,
        "rows": side.workload.num_rows,
        "useful_tokens": side.workload.num_tokens,
        "seconds": [run.seconds for run in runs],
        "tokens_per_second": spread(speeds),
        "rows_per_hour": spread([3600 * speed / tokens_per_row for speed in speeds]),
        "peak_bytes": max(run.peak_bytes for run in runs),
    }
