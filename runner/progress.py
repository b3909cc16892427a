"""The bar that a run shows: rows, useful tokens per second, errors, time left."""

import io
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from runner.errors import PromptError
from runner.types import Embedding, RequestOutput, Score

AnyResult = TypeVar("AnyResult", Score, Embedding)

_SECONDS_BETWEEN_LINES = 10.0
"""Where nobody can redraw a bar, it is a line now and then."""

_TOTAL = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} rows{postfix}, {remaining} left"
_NO_TOTAL = "{n_fmt} rows{postfix}, {elapsed}"


class _Lines(io.TextIOBase):
    """Takes the states of a bar that cannot be redrawn, in a file or a pipe: each is a line."""

    def write(self, text: str) -> int:
        """Prints what tqdm meant to draw over its last state."""
        if state := text.strip():
            print(state, file=sys.stderr, flush=True)
        return len(text)


class Progress:
    """A bar over rows; `total` is None where the number of rows is not known."""

    def __init__(self, total: int | None, *, initial: int = 0, enabled: bool = True) -> None:
        self.num_tokens = 0
        self.num_errors = 0
        self._enabled = enabled
        is_terminal = sys.stderr.isatty()
        self._bar: tqdm[None] = tqdm(
            total=total,
            initial=initial,
            disable=not enabled,
            bar_format=_NO_TOTAL if total is None else _TOTAL,
            mininterval=0.1 if is_terminal else _SECONDS_BETWEEN_LINES,
            dynamic_ncols=is_terminal,
            ncols=None if is_terminal else 80,
            file=None if is_terminal else _Lines(),
        )

    def update(self, output: RequestOutput) -> None:
        """Counts a finished row; its tokens are those sampled, or else those scored."""
        self.advance(output.num_useful_tokens, failed=output.error is not None)

    def advance(self, num_tokens: int, *, failed: bool = False) -> None:
        """Counts a finished row with so many useful tokens."""
        self.num_tokens += num_tokens
        self.num_errors += failed
        if not self._enabled:
            return
        elapsed = self._bar.format_dict["elapsed"] or 0.0
        shown = f"{self.num_tokens / max(elapsed, 1e-3):.0f} tok/s"
        if self.num_errors:
            shown += f", {self.num_errors} error{'s' if self.num_errors > 1 else ''}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *of: object) -> None:
        self.close()


def all_of(
    found: Iterable[AnyResult], count: int | None, *, enabled: bool = True
) -> list[AnyResult]:
    """All results, behind a bar; `count` is how many there will be, None where that is not known.

    Raises PromptError for one that failed.
    """
    done: list[AnyResult] = []
    with Progress(count, enabled=enabled) as progress:
        for result in found:
            if result.error is not None:
                raise PromptError(f"input {result.index}: {result.error.message}")
            done.append(result)
            progress.advance(result.num_tokens)
    return done
