"""A fresh benchmark beside one that was kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.errors import ParameterError

_TOLERANCE = 0.05
"""A figure is slower where its median is below the baseline's lowest round by more than this."""
_MACHINE = ("machine", "processor", "cores", "device", "blas", "model", "dtype")


def read_baseline(path: str) -> dict[str, Any]:
    """Raises ParameterError where the file is not what a benchmark wrote."""
    try:
        baseline: dict[str, Any] = json.loads(Path(path).read_text())
        dict(_figures(baseline, with_speeds=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParameterError(
            f"job.baseline={path} is not a benchmark.json of this version: {error!r}"
        ) from error
    return baseline


def regressions(fresh: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """A line for each figure that is slower than before.

    Tokens/s are compared on a machine of the same kind only, ratios on any.
    """
    alike = all(fresh[name] == baseline[name] for name in _MACHINE)
    before = dict(_figures(baseline, with_speeds=alike))
    return [
        f"{name}: {now['median']:.3g}, and {then['min']:.3g} to {then['max']:.3g} before"
        for name, now in _figures(fresh, with_speeds=alike)
        if (then := before.get(name)) and now["median"] < (1 - _TOLERANCE) * then["min"]
    ]


def print_comparison(fresh: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Says which figures are slower than the baseline, or that none is."""
    slower = regressions(fresh, baseline)
    compared = dict(_figures(baseline, with_speeds=True)).keys() & {
        name for name, _ in _figures(fresh, with_speeds=True)
    }
    if not compared:
        print("  baseline  nothing in it was measured here")
    for line in slower:
        print(f"  slower    {line}")
    if compared and not slower:
        print("  baseline  nothing is slower")


def _figures(
    result: dict[str, Any], *, with_speeds: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """Every figure that may get worse, by a name."""
    for workload in result["workloads"]:
        if with_speeds:
            yield f"{workload['workload']}, tokens/s", workload["runner"]["tokens_per_second"]
        for peer in workload["peers"]:
            yield f"{workload['workload']}, ratio to {peer['name']}", peer["ratio"]
