"""The table that a sweep prints, in 80 columns."""

from textwrap import wrap

from runner.sweeps.view import Column, View

_WIDTH = 80
_NARROWEST_NAME = 12


def print_table(view: View) -> None:
    """A line for each point, its name on a line of its own where it is long; then the notes."""
    columns = _fitting(view)
    widths = [_width(column) for column in columns]
    room = _WIDTH - 2 - sum(width + 2 for width in widths)
    longest = max(map(len, [*view.names, "point"]))
    first = min(longest, room)
    print(f"\n  {'point':<{first}}" + _cells([it.head for it in columns], widths))
    for number, name in enumerate(view.names):
        cells = [column.cells[number] for column in columns]
        state = view.states[number]
        if len(name) > first:
            parts = name.replace(",", ", ")
            lines = wrap(parts, _WIDTH - 2, break_on_hyphens=False)
            print("\n".join(f"  {line}" for line in lines))
            name = ""
        line = f"  {name:<{first}}" + _cells(cells, widths)
        print(f"  {name:<{first}}  {state}" if not any(cells) else line.rstrip())
    for note in view.notes:
        print("\n".join(wrap(note, _WIDTH, initial_indent="  ", subsequent_indent="  ")))


def _fitting(view: View) -> list[Column]:
    """As many columns as leave the names some room; all are in the files."""
    columns = list(view.columns)
    while columns and sum(_width(it) + 2 for it in columns) > _WIDTH - 2 - _NARROWEST_NAME:
        columns.pop()
    return columns


def _width(column: Column) -> int:
    return max(map(len, [column.head, *column.cells]))


def _cells(cells: list[str], widths: list[int]) -> str:
    return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
