"""What of a sweep is shown: the columns of the table and the panels of the picture."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.sweeps.measures import MEASURES
from runner.sweeps.paired import Pair, Ratio

_SURE = 1.96
"""Standard errors to either side that hold 95 % of a normal distribution."""
_MOST_PANELS = 3


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is known of a point."""

    name: str
    state: str
    numbers: Mapping[str, Any]
    values: Mapping[str, Ratio | None]
    """By measure."""
    to_first: Mapping[str, Pair]
    """By measure: how it differs from the first point."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Values of the points with the ends of their error bars; None for a point that has none."""

    title: str
    bars: Sequence[tuple[float, float, float] | None]
    """Low end, value, high end."""
    labels: Sequence[str]
    is_difference: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    """One of the table: its head and a cell for each point."""

    head: str
    cells: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class View:
    """A sweep as it is shown."""

    names: Sequence[str]
    states: Sequence[str]
    columns: Sequence[Column]
    panels: Sequence[Panel]
    notes: Sequence[str]


def view(lines: Sequence[Line]) -> View:
    """Chooses what to show: a measure that all points have, or else the ratios of a benchmark."""
    measure = _common_measure(lines)
    columns, panels = _of_ratios(lines)
    notes: list[str] = []
    if measure is not None:
        columns, panels, notes = _of_measure(lines, measure)
    for head, name, show in (
        ("perplexity", "token_perplexity", lambda it: f"{it:.4g}"),
        ("tokens/s", "tokens_per_second", lambda it: f"{it:.0f}"),
    ):
        columns += _plain_column(lines, head, name, show)
    return View(
        names=[line.name for line in lines],
        states=[line.state for line in lines],
        columns=columns,
        panels=panels,
        notes=notes,
    )


def _common_measure(lines: Sequence[Line]) -> str | None:
    having = [line for line in lines if line.values]
    return next((it for it in MEASURES if having and all(it in i.values for i in having)), None)


def _of_measure(lines: Sequence[Line], name: str) -> tuple[list[Column], list[Panel], list[str]]:
    measure = MEASURES[name]
    values = [line.values.get(name) for line in lines]
    pairs = [line.to_first.get(name) for line in lines]
    texts = [shown(it.value, it.stderr) if it else "" for it in values]
    changes = [shown(it.difference, it.stderr, sign=True) if it else "" for it in pairs]
    better = f", {measure.better} is better" if measure.better else ""
    columns = [Column(head=measure.title, cells=texts)]
    panels = [
        Panel(
            title=measure.title + better,
            bars=[_bar(it.value, it.stderr) if it else None for it in values],
            labels=texts,
        )
    ]
    notes = [_spread_note(measure.unit, values)]
    if any(pairs):
        columns.append(Column(head="difference", cells=changes))
        bars = [_bar(it.difference, it.stderr) if it else None for it in pairs]
        title = "paired difference to the first"
        panels.append(Panel(title=title, bars=bars, labels=changes, is_difference=True))
        notes.append(_pair_note(measure.unit, [it for it in pairs if it]))
    return columns, panels, notes


def _spread_note(unit: str, values: Iterable[Ratio | None]) -> str:
    counts = _range(it.documents for it in values if it)
    return f"± is one standard error over {counts} {unit}, not over their tokens."


def _pair_note(unit: str, pairs: Sequence[Pair]) -> str:
    left_out = max(it.left_out for it in pairs)
    rest = f"; up to {left_out} left out, for which not both have a number" if left_out else ""
    counts = _range(it.documents for it in pairs)
    return f"A difference is to the first point, over the {counts} {unit} of both{rest}."


def _range(counts: Iterable[int]) -> str:
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _of_ratios(lines: Sequence[Line]) -> tuple[list[Column], list[Panel]]:
    names = dict.fromkeys(
        name
        for line in lines
        for name in line.numbers
        if re.search(r"_ratio_", name) and f"{name}_min" in line.numbers
    )
    columns, panels = [], []
    for name in names:
        title = name.replace("_ratio_", ": times ").replace("_", " ")
        bars = [_spread(line.numbers, name) for line in lines]
        cells = [f"{bar[1]:.2f}" if bar else "" for bar in bars]
        columns.append(Column(head=title, cells=cells))
        panels.append(Panel(title=title, bars=bars, labels=cells))
    return columns, panels[:_MOST_PANELS]


def _spread(numbers: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    if name not in numbers:
        return None
    return numbers[f"{name}_min"], numbers[name], numbers[f"{name}_max"]


def _plain_column(
    lines: Sequence[Line], head: str, name: str, show: Callable[[float], str]
) -> list[Column]:
    values = [line.numbers.get(name) for line in lines]
    cells = ["" if value is None else show(value) for value in values]
    return [Column(head=head, cells=cells)] if any(cells) else []


def _bar(value: float, stderr: float | None) -> tuple[float, float, float]:
    reach = _SURE * (stderr or 0.0)
    return value - reach, value, value + reach


def shown(value: float, stderr: float | None, *, sign: bool = False) -> str:
    """A number to the digits that its standard error leaves it, two of which are uncertain."""
    form = "+" if sign else ""
    if not stderr:
        return f"{value:{form}.4g}" + ("" if stderr is None else " ± 0")
    places = min(max(1 - math.floor(math.log10(stderr)), 0), 8)
    return f"{value:{form}.{places}f} ± {stderr:.{places}f}"
