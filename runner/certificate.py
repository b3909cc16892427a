"""How far the logprobs of a run's results are from those that the same model scores: a certificate.

A sample of the result rows is forwarded again, prompt and completion as one text, and what comes
out is compared with the raw logprobs that were recorded while the completions were sampled.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from runner.errors import ParameterError
from runner.llm import LLM
from runner.scores import ScoredText, in_order_of_work

_COLUMNS = (
    "prompt_token_ids",
    "completion_token_ids",
    "raw_logprobs",
    "adapter",
    "adapter_digest",
    "weight_versions",
)

Place = tuple[bytes, str, int]
"""A digest of which result row it is, the file that it stands in, and where there."""


class Certificate:
    """Which result rows are scored again, and what that shows."""

    def __init__(self, num_rows: int) -> None:
        """Takes the number of result rows; 0 for none.

        Raises:
            ParameterError: it is no number of rows.
        """
        if type(num_rows) is not int or num_rows < 0:
            what = "a number of result rows to score again, or 0 for none"
            raise ParameterError(f"job.certify={num_rows} is not allowed: {what}")
        self.num_rows = num_rows

    def numbers(
        self, paths: Sequence[Path], llm: LLM, *, interrupted: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Scores the chosen rows of the files `paths`, part files of results; None without any.

        The rows are chosen by digests of their names, so that it does not matter in which files
        and in which order they stand. Only those chosen are held in memory. One whose adapter
        has been given another content since then is left out, and counted.
        """
        chosen = list(_read(heapq.nsmallest(self.num_rows, _places(paths))))
        if not chosen:
            return None
        rows = [row for row in chosen if _is_of_these_weights(row, llm)]
        # What is kept of prompts came of the forwards that are to be checked.
        llm.engine.clear_prefix_cache()
        ordered = in_order_of_work([_text(index, row) for index, row in enumerate(rows)])
        texts = {text.request_id: text for text in ordered}
        requests = (text.request(num_top=0, entropy=False) for text in texts.values())
        pairs = []
        for output in llm.run(requests, interrupted=interrupted):
            score = texts[output.request_id].score(output)
            if score.error is None:
                pairs.append((rows[score.index]["raw_logprobs"], score.logprobs))
        counts = {
            "rows": len(pairs),
            "errors": len(rows) - len(pairs),
            "of_other_weights": len(chosen) - len(rows),
        }
        return counts | mismatch([np.array(pair, np.float64) for pair in pairs])


def _text(index: int, row: dict[str, Any]) -> ScoredText:
    """What is scored again: the completion, in the context of its prompt."""
    prompt = row["prompt_token_ids"]
    token_ids = prompt + row["completion_token_ids"]
    return ScoredText(index, 0, token_ids, len(prompt), adapter=row["adapter"])


def _is_of_these_weights(row: dict[str, Any], llm: LLM) -> bool:
    """Whether the model, with what the row's adapter stands for now, gave all of its tokens."""
    loaded = None if row["adapter"] is None else llm.adapters.get(row["adapter"])
    return row["adapter_digest"] == loaded and len(row["weight_versions"] or ()) <= 1


def _places(paths: Sequence[Path]) -> Iterator[Place]:
    """Every result row that has a whole completion of at least a token."""
    for path in paths:
        table = _table(path)
        is_long = pc.greater(pc.list_value_length(table["completion_token_ids"]), 0)
        is_whole = pc.is_in(table["finish_reason"], pa.array(["stop", "length"]))
        usable = pc.fill_null(pc.and_(is_long, is_whole), False).to_numpy()
        names = zip(table["row_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        for place, (row_id, index) in enumerate(names):
            if usable[place]:
                name = f"{row_id}/{index}".encode(errors="surrogatepass")
                yield blake2b(name, digest_size=8).digest(), str(path), place


def _read(places: Sequence[Place]) -> Iterator[dict[str, Any]]:
    """What is compared of the rows in these places."""
    for path, group in groupby(sorted(places, key=lambda it: it[1:]), key=lambda it: it[1]):
        numbers = [number for _, _, number in group]
        table = _table(Path(path))
        there = [column for column in _COLUMNS if column in table.schema.names]
        yield from table.select(there).take(numbers).to_pylist()


def _table(path: Path) -> pa.Table:
    """Memory-mapped: a column that is not looked at is not read."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def mismatch(pairs: Sequence[npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Compares raw logprobs of the same tokens, each pair (2, tokens): as sampled, as scored.

    `mismatch_kl` is the mean of r - log r - 1, where r is the probability as scored over that as
    sampled (k3 of Schulman, "Approximating KL Divergence", 2020). For tokens drawn at temperature 1
    from all of the vocabulary it estimates the divergence of the scored distribution from the
    sampled one without bias; for others it still is 0 where both agree, and positive elsewhere.
    """
    sampled, scored = np.concatenate([np.zeros((2, 0)), *pairs], axis=1)
    # Where both say that a token is impossible they agree, and inf - inf would be no number.
    with np.errstate(over="ignore", invalid="ignore"):
        logs = np.where(sampled == scored, 0.0, scored - sampled)
        divergences = np.expm1(logs) - logs
    distances = np.abs(logs)
    return {
        "tokens": len(logs),
        "max_difference": _finite(distances.max(initial=0.0)),
        "mean_difference": _mean(distances),
        "mismatch_kl": _mean(divergences),
        "share_bit_equal": _mean(sampled == scored),
    }


def _mean(values: npt.NDArray[Any]) -> float | None:
    return _finite(math.fsum(values) / len(values)) if len(values) else None


def _finite(number: float) -> float | None:
    """The number, or None for one that JSON cannot hold."""
    return float(number) if math.isfinite(number) else None
