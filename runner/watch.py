"""What others see of a run while it runs: the bar, the log file, the tracker, the numbers."""

import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from runner.errors import ParameterError
from runner.progress import Progress
from runner.run_log import RunLog
from runner.trackers import NoTracker, Tracker
from runner.types import RequestOutput

State: TypeAlias = Literal["running", "finished", "interrupted", "stopped"]
"""Of a run, for `summary.json`: stopped is one that gave up, as on too many errors or a full disk.
One that was killed says running, and nobody holds its directory."""


class Watch:
    """Follows one run; the counts are of this run alone, `done` rows were there before."""

    def __init__(
        self,
        directory: Path,
        options: Mapping[str, Any],
        *,
        total: int | None,
        done: int = 0,
        tracker: Tracker | None = None,
        model: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to show a run.

        Args:
            directory: that of the results, claimed already.
            options: what may be said of the configuration, as `public_options` has it.
            total: rows of the job; None where that is not known.
            done: rows that have their results already.
            tracker: takes the numbers of every commit.
            model: facts of the model, for the log.

        Raises:
            ParameterError: the tracker cannot begin, for want of a key or a network.
        """
        self.errors: Counter[str] = Counter()
        self.num_rows = 0
        self._total = total
        self._started = time.monotonic()
        self._log = RunLog(directory)
        self._log.info("start", options)
        self._log.info("model", model or {})
        self._tracker = tracker or NoTracker()
        try:
            self._tracker.start(options)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ParameterError(f"the tracker cannot start: {reason}; see tracker=none") from error
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warned
        self._progress = Progress(total, initial=done)

    def output(self, output: RequestOutput) -> None:
        """Counts a finished row."""
        error = output.error.type if output.error else None
        self.row(output.num_useful_tokens, error=error)

    def row(self, num_tokens: int, *, error: str | None = None) -> None:
        """Counts a finished row with so many useful tokens, or an error's type."""
        self.num_rows += 1
        if error is not None:
            self.errors[error] += 1
        self._progress.advance(num_tokens, failed=error is not None)

    def committed(self, rows: int, metrics: Mapping[str, float] | None = None) -> None:
        """Reports that `rows` rows of the job are safe; `metrics` adds to the numbers.

        It may be called in the thread that commits, while another one counts rows.
        """
        run = self.numbers("running")["run"]
        counts = {"rows": rows, "errors": self.errors.total()}
        reported = run | counts | dict(metrics or {})
        self._log.info("commit", reported)
        try:
            self._tracker.log(reported, step=rows)
        # A tracker is somebody else's service: no run of days ends because it is down.
        except Exception as error:
            self._tracker = NoTracker()
            warnings.warn(f"the tracker failed and is left out: {error}", stacklevel=2)

    def numbers(self, state: State) -> dict[str, Any]:
        """What `summary.json` says of the run, for `runner status`; times in seconds."""
        seconds = time.monotonic() - self._started
        tokens = self._progress.num_tokens
        return {
            "state": state,
            "total_rows": self._total,
            "run": {
                "rows": self.num_rows,
                "seconds": seconds,
                "completion_tokens": tokens,
                "tokens_per_second": tokens / max(seconds, 1e-9),
                "rows_per_hour": self.num_rows / max(seconds, 1e-9) * 3600,
            },
        }

    def close(self, state: State) -> None:
        """Ends the bar, the log and the tracker."""
        self._progress.close()
        warnings.showwarning = self._show_warning
        self._log.info("end", {"state": state, "rows": self.num_rows} | dict(self.errors))
        try:
            self._tracker.finish()
        except Exception as error:
            warnings.warn(f"the tracker failed at its end: {error}", stacklevel=2)

    def _warned(self, message: Warning | str, *where: Any, **also: Any) -> None:
        self._log.warning(str(message))
        self._show_warning(message, *where, **also)
