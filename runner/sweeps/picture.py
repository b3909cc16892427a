"""A sweep as a picture; needs matplotlib (the extra `plots`)."""

import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill, wrap
from typing import Any

from runner.sweeps.view import Panel, View

# Okabe and Ito's colours, which colour-blind readers tell apart.
_VALUE, _DIFFERENCE = "#0072B2", "#D55E00"
_INK, _PALE = "#333333", "#DDDDDD"
_NAME_WIDTH = 34
"""Characters of a point's name in a line."""


def draw(view: View, directory: Path) -> list[str]:
    """Writes `sweep.png` and `sweep.svg`; returns their names, none without matplotlib."""
    if find_spec("matplotlib") is None:
        advice = "pip install 'mlx-runner[plots]' and give the same command again"
        print(f"warning: no picture, as matplotlib is missing: {advice}", file=sys.stderr)
        return []
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = [_wrapped(name) for name in view.names]
    rows = sum(max(1.45, 0.4 + 0.75 * (1 + name.count("\n"))) for name in names)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "runner"}):
        figure = Figure(figsize=(3.4 + 3.3 * len(view.panels), 1.35 + 0.32 * rows), dpi=150)
        figure.set_layout_engine("constrained", wspace=0.06, w_pad=0.12)
        axes = figure.subplots(1, len(view.panels), squeeze=False, sharey=True)[0]
        for one, panel in zip(axes, view.panels, strict=True):
            _panel(one, panel, view)
        axes[0].set_yticks(range(len(names)), names)
        caption = "\n".join(fill(note, 44 * (1 + len(view.panels))) for note in _notes(view))
        figure.supxlabel(caption, fontsize=8.5, color=_INK, x=0.01, ha="left")
        files = ["sweep.png", "sweep.svg"]
        for file in files:
            figure.savefig(directory / file)
    return files


def _notes(view: View) -> list[str]:
    reach = "Bars reach 1.96 standard errors to either side (95 %)."
    return [reach, *view.notes] if view.notes else ["Bars are the spread of the rounds."]


def _wrapped(name: str) -> str:
    """A name in lines, cut behind commas; of a longer part only its ends are left."""
    parts = [_shortened(part) for part in name.split(",")]
    return "\n".join(wrap(", ".join(parts), _NAME_WIDTH, break_on_hyphens=False))


def _shortened(part: str) -> str:
    half = _NAME_WIDTH // 2 - 1
    return (
        part if len(part) < _NAME_WIDTH else f"{part[:half]}\N{HORIZONTAL ELLIPSIS}{part[-half:]}"
    )


def _panel(axes: Any, panel: Panel, view: View) -> None:
    """A dot and an error bar for each point, the first on top, with its number above."""
    color = _DIFFERENCE if panel.is_difference else _VALUE
    if panel.is_difference:
        axes.axvline(0, color=_INK, linewidth=1)
    for place, bar in enumerate(panel.bars):
        if bar is None:
            said = "" if view.states[place] == "finished" else view.states[place]
            beside = {"transform": axes.get_yaxis_transform(), "va": "center", "style": "italic"}
            axes.text(0.03, place, said, color=_INK, **beside)
            continue
        low, value, high = bar
        axes.plot([low, high], [place, place], color=color, linewidth=2)
        axes.plot([value], [place], "o", color=color, markersize=6)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        label = panel.labels[place].replace("-", "\N{MINUS SIGN}")
        axes.annotate(label, (value, place), color=_INK, bbox=paper, **above)
    axes.set_ylim(len(panel.bars) - 0.45, -0.75)
    axes.margins(x=0.3)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.grid(axis="x", color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
