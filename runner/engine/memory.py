"""How many rows of which length fit into memory: policy over counters, without arrays."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from runner.engine.layer_cache import LayerKind
from runner.engine.row_caches import rounded_up
from runner.errors import ParameterError

_WORKSPACE = 0.2
"""What a forward needs beside weights and caches, as a share of these."""
_MANY = 1_000_000


def in_units(num_bytes: float) -> str:
    """Bytes for people to read."""
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    size, unit = next((it for it in units if num_bytes >= it[0]), (1, "bytes"))
    return f"{num_bytes / size:.4g} {unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The bytes that a run may take, and what takes them.

    The cost of a batch is that of its longest row for every row, and of prompts in prefill beside
    it; the forward's own workspace is a share of all that.
    """

    num_bytes: int | None
    """None for no limit."""
    kinds: Sequence[LayerKind]
    weights_bytes: int
    prefix_cache_bytes: int
    max_prefill_tokens: int
    num_spare: int = 0
    """Columns of each slot for tokens that are drafted behind a row's last."""
    _known: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_rows(1) < 1:
            raise ParameterError(
                f"memory_budget={in_units(self.num_bytes or 0)} is not allowed: the weights have "
                f"{in_units(self.weights_bytes)} and the prefix cache "
                f"{in_units(self.prefix_cache_bytes)}, so that one row needs at least "
                f"{in_units(self.batch_bytes(1, 1))}"
            )

    def slot_bytes(self, num_columns: int) -> int:
        """Bytes of one row slot, all layers."""
        columns = rounded_up(num_columns + self.num_spare)
        return sum(kind.nbytes(columns) for kind in self.kinds)

    def batch_bytes(self, num_rows: int, num_columns: int) -> int:
        """Bytes of a run whose longest row has `num_columns`, weights and workspace included."""
        prefill_columns = max(num_columns, min(self.max_prefill_tokens, num_rows * num_columns))
        caches = num_rows * self.slot_bytes(num_columns)
        prefill = self.slot_bytes(prefill_columns) + num_rows * self.slot_bytes(0)
        kept = self.weights_bytes + self.prefix_cache_bytes
        return int((kept + caches + prefill) * (1 + _WORKSPACE))

    def shortage(self, num_columns: int) -> str | None:
        """Why not even one row of `num_columns` fits; None where it does."""
        if self.max_rows(num_columns) > 0:
            return None
        needed, most = self.batch_bytes(1, num_columns), self.num_bytes or 0
        return (
            f"would take the run to {in_units(needed)}; memory_budget is {in_units(most)}, which "
            f"holds a row of {self.max_columns(1, num_columns)} tokens"
        )

    def max_columns(self, num_rows: int, most: int) -> int:
        """Columns, up to `most`, that so many rows can have together; 0 where they do not fit."""
        if self.num_bytes is None:
            return most
        lengths = range(1, most + 1)
        return bisect_right(lengths, self.num_bytes, key=lambda n: self.batch_bytes(num_rows, n))

    def max_rows(self, num_columns: int) -> int:
        """Rows of up to `num_columns` that fit together; a million stands for no limit."""
        if self.num_bytes is None:
            return _MANY
        columns = rounded_up(num_columns)
        if columns not in self._known:
            least_over = bisect_right(
                range(1, _MANY), self.num_bytes, key=lambda n: self.batch_bytes(n, columns)
            )
            self._known[columns] = least_over
        return self._known[columns]
