"""When a job fails wholesale, it stops before it has made a directory of errors."""

from collections import Counter

from runner.errors import ParameterError, StoppedError

FIRST_ROWS = 100
"""Rows that a run does before their errors can stop it."""


class ErrorRate:
    """Counts the input rows of one run that failed, by what went wrong."""

    def __init__(self, max_error_rate: float, *, can_retry: bool = False) -> None:
        """`can_retry` says that the failed rows can be done again."""
        if not 0.0 <= max_error_rate <= 1.0:
            raise ParameterError(f"max_error_rate={max_error_rate!r} is not allowed: 0 to 1")
        self.max_error_rate = max_error_rate
        self._can_retry = can_retry
        self._num_rows = 0
        self._messages: Counter[str] = Counter()

    @property
    def num_errors(self) -> int:
        """Input rows of this run with an error."""
        return self._messages.total()

    def add(self, error: dict[str, str] | None) -> None:
        """Counts an input row; raises StoppedError once too many have failed."""
        self._num_rows += 1
        if error is not None:
            # Messages may differ from row to row, and a few of them tell why.
            message = f"{error['type']}: {error['message']}"
            known = message in self._messages or len(self._messages) < FIRST_ROWS
            self._messages[message if known else "others"] += 1
        is_early = self._num_rows < FIRST_ROWS
        if not is_early and self.num_errors > self.max_error_rate * self._num_rows:
            raise StoppedError(self._reason())

    def _reason(self) -> str:
        most = "; ".join(f"{count} x {text}" for text, count in self._messages.most_common(3))
        retry = ", job.retry_errors=true does the failed ones again" if self._can_retry else ""
        return (
            f"{self.num_errors} of {self._num_rows} rows failed, more than "
            f"output.max_error_rate={self.max_error_rate} allows ({most}); the same command goes "
            f"on with the other rows{retry}"
        )
