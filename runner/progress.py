"""The bar that a run shows: rows, useful tokens per second, errors, time left."""

from types import TracebackType

from tqdm import tqdm

from runner.types import RequestOutput


class Progress:
    """A tqdm bar over rows; `total` is None where the number of rows is not known."""

    def __init__(self, total: int | None, *, initial: int = 0, enabled: bool = True) -> None:
        self._num_tokens = 0
        self._num_errors = 0
        self._bar: tqdm[None] = tqdm(
            total=total, initial=initial, disable=not enabled, unit="row", dynamic_ncols=True
        )

    def update(self, output: RequestOutput) -> None:
        """Counts a finished row; its tokens are those sampled, or else those scored."""
        scored, self._num_errors = 0, self._num_errors + (output.error is not None)
        if output.prompt_token_logprobs is not None:
            scored = len(output.prompt_token_logprobs.logprobs)
        self.count(sum(len(sample.token_ids) for sample in output.outputs) or scored)

    def count(self, num_tokens: int) -> None:
        """Counts a finished row by its useful tokens."""
        self._num_tokens += num_tokens
        elapsed = self._bar.format_dict["elapsed"] or 0.0
        shown = f"{self._num_tokens / max(elapsed, 1e-3):.0f} tok/s"
        if self._num_errors:
            shown += f", {self._num_errors} errors"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
