"""Numbers over result rows that can be added up part by part."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from runner.data.result_kinds import result_kind
from runner.data.score_schemas import BY_ADAPTER, SUMMED

NO_ADAPTER = "(none)"
"""Stands for the model as it is, where numbers are for each adapter."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and spread of numbers, kept so that two of them can be added."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""
    least: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Moments":
        """Those of a column's numbers, or of those in its lists; nulls left out."""
        if pa.types.is_list(column.type):
            column = pc.list_flatten(column)
        values = column.drop_null().cast(pa.float64()).to_numpy()
        if not len(values):
            return cls()
        mean = float(values.mean())
        return cls(
            count=len(values),
            mean=mean,
            squares=float(np.square(values - mean).sum()),
            least=float(values.min()),
            most=float(values.max()),
        )

    def __add__(self, other: "Moments") -> "Moments":
        """Those of both (Chan, Golub and LeVeque, 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        assert self.least is not None and self.most is not None
        assert other.least is not None and other.most is not None
        count, delta = self.count + other.count, other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * other.count / count,
            squares=self.squares + other.squares + delta**2 * self.count * other.count / count,
            least=min(self.least, other.least),
            most=max(self.most, other.most),
        )

    @property
    def total(self) -> float:
        """Sum of the numbers."""
        return self.mean * self.count

    @property
    def standard_error(self) -> float | None:
        """Of the mean, for numbers that are independent; None of fewer than two."""
        if self.count < 2:
            return None
        return math.sqrt(self.squares / (self.count - 1) / self.count)

    def report(self) -> dict[str, float | None] | None:
        """Mean, population standard deviation, least and most; None without numbers."""
        if not self.count:
            return None
        std = math.sqrt(self.squares / self.count)
        return {"mean": self.mean, "std": std, "min": self.least, "max": self.most}


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts of rows, samples, tokens, errors and finish reasons, and moments of some columns."""

    rows: int = 0
    """Input rows."""
    samples: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    reward: Moments = field(default_factory=Moments)
    columns: dict[str, Moments] = field(default_factory=dict)
    """Of the columns whose field says that it is summed."""

    @classmethod
    def of(cls, table: pa.Table) -> "Totals":
        """Those of result rows; the samples of an input row follow one another."""
        errors = table["error"].drop_null().to_pylist()
        summed = [field.name for field in table.schema if SUMMED in (field.metadata or {})]
        counted = cls(
            rows=num_groups(table),
            samples=table.num_rows,
            errors=Counter(error["type"] for error in errors),
            columns={name: Moments.of(table[name]) for name in summed} | _each(table, summed),
        )
        if result_kind(table.schema) != "samples":
            return counted
        lengths = pc.list_value_length(table["completion_token_ids"])
        return replace(
            counted,
            completion_tokens=pc.sum(lengths).as_py() or 0,
            finish_reasons=Counter(table["finish_reason"].drop_null().to_pylist()),
            reward=Moments.of(table["reward"]),
        )

    @property
    def by_adapter(self) -> dict[str, dict[str, Moments]]:
        """The moments of the columns for each adapter that has any."""
        found: dict[str, dict[str, Moments]] = {}
        for key, moments in self.columns.items():
            column, _, adapter = key.partition("@")
            if adapter and moments.count:
                found.setdefault(adapter, {})[column] = moments
        return found

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Totals":
        """Takes back what `as_json` gave."""
        plain = dict(content)
        reasons, errors = Counter(plain.pop("finish_reasons")), Counter(plain.pop("errors"))
        reward = Moments(**plain.pop("reward"))
        columns = {name: Moments(**it) for name, it in plain.pop("columns", {}).items()}
        return cls(finish_reasons=reasons, errors=errors, reward=reward, columns=columns, **plain)

    def as_json(self) -> dict[str, Any]:
        """Everything that adding needs."""
        counters = {"finish_reasons": dict(self.finish_reasons), "errors": dict(self.errors)}
        columns = {name: asdict(moments) for name, moments in self.columns.items()}
        return vars(self) | counters | {"reward": asdict(self.reward), "columns": columns}

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            rows=self.rows + other.rows,
            samples=self.samples + other.samples,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            finish_reasons=self.finish_reasons + other.finish_reasons,
            errors=self.errors + other.errors,
            reward=self.reward + other.reward,
            columns={
                name: self.columns.get(name, Moments()) + other.columns.get(name, Moments())
                for name in {**self.columns, **other.columns}
            },
        )

    def report(self) -> dict[str, Any]:
        """The numbers as `summary.json` has them."""
        return {
            "rows": self.rows,
            "samples": self.samples,
            "completion_tokens": self.completion_tokens,
            "finish_reasons": dict(self.finish_reasons.most_common()),
            "errors": dict(self.errors.most_common()),
            "reward": self.reward.report(),
        }


def _each(table: pa.Table, summed: list[str]) -> dict[str, Moments]:
    """The moments of the rows of each adapter, where they are wanted, by `column@adapter`."""
    places = table.schema.get_field_index("adapter")
    if places < 0 or BY_ADAPTER not in (table.schema.field(places).metadata or {}):
        return {}
    names = table["adapter"].fill_null(NO_ADAPTER)
    return {
        f"{column}@{name}": Moments.of(table.filter(pc.equal(names, name))[column])
        for name in pc.unique(names).to_pylist()
        for column in summed
    }


def num_groups(table: pa.Table) -> int:
    """Runs of equal row ids, which is how many input rows the result rows come from."""
    row_ids = table["row_id"].combine_chunks()
    if len(row_ids) < 2:
        return len(row_ids)
    changes = pc.not_equal(row_ids.slice(1), row_ids.slice(0, len(row_ids) - 1))
    return 1 + int(pc.sum(changes).as_py())
