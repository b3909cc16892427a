"""Speeds and ratios as a picture; needs matplotlib (the extra `plots`)."""

from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from runner.benchmarking.table import parts, shown_ratio, shown_speed
from runner.errors import ParameterError

# Okabe and Ito's colours, which colour-blind readers tell apart; grey keeps to the background.
_COLORS = {
    "runner": "#0072B2",
    "mlx_lm": "#E69F00",
    "stock": "#999999",
    "batch_invariant": "#56B4E9",
    "plain": "#CC79A7",
    "adapters": "#009E73",
}
_INK = "#333333"


def check_matplotlib() -> None:
    """Raises ParameterError, before anything is measured, where no picture can be made."""
    if find_spec("matplotlib") is None:
        raise ParameterError(
            "job.picture=true needs matplotlib: pip install 'mlx-runner[plots]', "
            "or choose job.picture=false"
        )


def draw(result: dict[str, Any], directory: Path) -> None:
    """Writes `benchmark.png` and `benchmark.svg`: a panel a workload, a bar a side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    workloads = result["workloads"]
    bars = [1 + len(workload["peers"]) for workload in workloads]
    with rc_context({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "runner"}):
        figure = Figure(figsize=(8, 0.9 + sum(0.34 * count + 0.45 for count in bars)), dpi=150)
        figure.set_layout_engine("constrained", hspace=0.06)
        panels = figure.subplots(len(bars), 1, squeeze=False, height_ratios=bars)
        for axes, workload in zip(panels[:, 0], workloads, strict=True):
            _panel(axes, workload)
        figure.suptitle(_title(result), fontsize=10, color=_INK, x=0.01, ha="left")
        figure.supxlabel(_caption(result), fontsize=9, color=_INK, x=0.01, ha="left")
        for kind in ("png", "svg"):
            figure.savefig(directory / f"benchmark.{kind}")


def _title(result: dict[str, Any]) -> str:
    cores = f"{result['cores']} cores"
    where = ", ".join(filter(None, [result["processor"], cores, result["machine"]]))
    return f"{result['model']}, {result['dtype']}, {where}"


def _caption(result: dict[str, Any]) -> str:
    lines = ["Useful tokens per second: median of the rounds; the line is their spread."]
    lines += [f"{note}." for note in parts(result)]
    if result["unequal"]:
        lines.append(f"Not equal: only this engine runs with {', '.join(result['unequal'])}.")
    return "\n".join(fill(line, 110) for line in lines)


def _panel(axes: Any, workload: dict[str, Any]) -> None:
    """Bars of one workload, ours on top, each with its speed and our ratio to it."""
    sides = [workload["runner"], *workload["peers"]]
    most = max(side["tokens_per_second"]["max"] for side in sides)
    for place, side in enumerate(sides):
        speed = side["tokens_per_second"]
        low, middle, high = (speed[name] for name in ("min", "median", "max"))
        axes.barh(place, middle, height=0.7, color=_COLORS[side["kind"]])
        axes.plot([low, high], [place, place], color=_INK, linewidth=1.5, solid_capstyle="butt")
        axes.text(high + 0.012 * most, place, _label(side), va="center", color=_INK)
    axes.set_yticks(range(len(sides)), [side["name"] for side in sides])
    axes.set_ylim(len(sides) - 0.4, -0.6)
    axes.set_xlim(0, 1.65 * most)
    axes.set_xticks([])  # Every bar says its number.
    axes.set_title(workload["workload"], loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _label(side: dict[str, Any]) -> str:
    speed = shown_speed(side["tokens_per_second"]["median"])
    if "ratio" not in side:
        return speed
    low, middle, high = (shown_ratio(side["ratio"][name]) for name in ("min", "median", "max"))
    return f"{speed}    runner: {middle} × ({low} to {high})"
