"""The reward of a training, step by step, as a picture; needs matplotlib (the extra `plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_INK, _LINE = "#333333", "#0072B2"
_SMOOTHED = 5
"""Steps that the line is a mean of."""


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], directory: Path) -> list[Path]:
    """Writes `reward.png` and `reward.svg`: a line for each run, by its name, of its metrics."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "runner"}):
        figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        for place, (name, metrics) in enumerate(runs.items()):
            _curve(axes, name, metrics, color=f"C{place}" if len(runs) > 1 else _LINE)
        axes.set_xlabel("step", color=_INK)
        axes.set_ylabel("mean reward", color=_INK)
        axes.tick_params(colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(
            f"mean of a step's completions; the line is a mean of {_SMOOTHED} steps",
            loc="left", fontsize=9, color=_INK,
        )  # fmt: skip
        if len(runs) > 1:
            axes.legend(frameon=False, labelcolor=_INK)
        paths = [directory / f"reward.{kind}" for kind in ("png", "svg")]
        for path in paths:
            figure.savefig(path)
    return paths


def _curve(axes: Any, name: str, metrics: Sequence[Mapping[str, Any]], *, color: str) -> None:
    rewards = np.array([it["reward_mean"] for it in metrics], float)  # null is NaN, a gap
    steps = np.arange(1, len(rewards) + 1)
    axes.plot(steps, rewards, ".", color=color, alpha=0.4, markersize=5)
    axes.plot(steps, _smoothed(rewards), color=color, linewidth=2, label=name)


def _smoothed(rewards: npt.NDArray[np.float64]) -> list[float]:
    """For each step the mean of the latest ones that have a reward; NaN without any."""
    latest = [rewards[max(0, end - _SMOOTHED) : end] for end in range(1, len(rewards) + 1)]
    known = [part[~np.isnan(part)] for part in latest]
    return [float(part.mean()) if len(part) else np.nan for part in known]
