"""Numbers over the committed rows of an output directory, read part by part."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_COLUMNS = ("row_id", "completion_token_ids", "finish_reason", "reward", "error")


@dataclass
class _Moments:
    """Running count, mean and spread of numbers (Welford, 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)
        self.least, self.most = min(self.least, value), max(self.most, value)

    def as_dict(self) -> dict[str, float] | None:
        """Mean, population standard deviation, least and most; None without numbers."""
        if not self.count:
            return None
        std = math.sqrt(self.squares / self.count)
        return {"mean": self.mean, "std": std, "min": self.least, "max": self.most}


@dataclass
class _Totals:
    num_samples: int = 0
    num_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    reward: _Moments = field(default_factory=_Moments)
    row_ids: set[str] = field(default_factory=set)

    def add(self, table: pa.Table) -> None:
        self.num_samples += table.num_rows
        lengths = pc.list_value_length(table["completion_token_ids"])
        self.num_tokens += pc.sum(lengths).as_py() or 0
        self.finish_reasons.update(table["finish_reason"].drop_null().to_pylist())
        self.errors.update(error["type"] for error in table["error"].drop_null().to_pylist())
        self.row_ids.update(table["row_id"].to_pylist())
        for reward in table["reward"].drop_null().to_pylist():
            self.reward.add(reward)


def summarize(parts: Iterable[Path]) -> dict[str, Any]:
    """Counts of rows, samples, tokens, errors and finish reasons, and the spread of the reward."""
    totals = _Totals()
    for part in parts:
        with pa.memory_map(str(part)) as file:
            totals.add(pa.ipc.open_file(file).read_all().select(_COLUMNS))
    return {
        "rows": len(totals.row_ids),
        "samples": totals.num_samples,
        "completion_tokens": totals.num_tokens,
        "finish_reasons": dict(totals.finish_reasons.most_common()),
        "errors": dict(totals.errors.most_common()),
        "reward": totals.reward.as_dict(),
    }
