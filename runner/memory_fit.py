"""Whether a model fits into memory, told before its weights are read."""

import warnings
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from runner.device_memory import default_memory_budget
from runner.engine.engine import Engine
from runner.engine.kv_options import KVOptions
from runner.engine.memory import MemoryBudget, in_units
from runner.errors import ModelError

_PACKED_BITS = {"8 bits": 8.5, "4 bits": 4.5}
"""Of a weight, with its share of a group's scale and bias in 16 bits each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """What a run will take beside the weights, to be compared with what there is.

    Rows that do not fit together run one after the other, so that one row has to fit; what many
    of them take, `MemoryBudget` watches over as they come.
    """

    memory_budget: int | None
    """Bytes; None for what the device has."""
    max_batch_size: int | None = None
    """The rows asked for; None for no number."""
    max_model_len: int | None = None
    """The tokens of a row asked for; None for no number."""
    prefill_step_size: int
    prefix_cache_bytes: int
    kv_options: KVOptions

    def __call__(self, model: nn.Module) -> None:
        """Raises ModelError for a model that does not fit, with what would; warns where fewer rows
        of the length asked for fit than are asked for.

        Its arrays have their shapes and types, and no content yet.
        """
        memory = Engine(
            model,
            max_batch_size=1,
            prefill_step_size=self.prefill_step_size,
            prefix_cache_bytes=self.prefix_cache_bytes,
            kv_options=self.kv_options,
        ).memory
        most = default_memory_budget() if self.memory_budget is None else self.memory_budget
        need = memory.batch_bytes(1, 1)
        if need > most:
            whose = "the device has" if self.memory_budget is None else "memory_budget is"
            raise ModelError(
                f"the model does not fit into memory: its weights take "
                f"{in_units(memory.weights_bytes)} and a run with one row {in_units(need)}; "
                f"{whose} {in_units(most)}; {_what_would(model, memory, most)}"
            )
        self._warn(replace(memory, num_bytes=most))

    def _warn(self, memory: MemoryBudget) -> None:
        if self.max_batch_size is None or self.max_model_len is None:
            return
        rows = memory.max_rows(self.max_model_len)
        if rows < self.max_batch_size:
            longest = memory.max_columns(self.max_batch_size, self.max_model_len)
            warnings.warn(
                f"of rows with max_model_len={self.max_model_len} tokens {rows} fit into memory "
                f"together; all max_batch_size={self.max_batch_size} do with up to {longest} each",
                stacklevel=2,
            )


def _what_would(model: nn.Module, memory: MemoryBudget, most: int) -> str:
    """The ways to make the run smaller that are enough."""
    is_packed = any("scales" in module for _, module in model.named_modules())
    smaller = {"model.dtype=bfloat16": replace(memory, weights_bytes=_bytes_as(model, 16))}
    # On a CPU packed weights become dense, so that they save nothing there.
    if mx.default_device() == mx.gpu and not is_packed:
        for name, bits in _PACKED_BITS.items():
            packed = replace(memory, weights_bytes=_bytes_as(model, bits))
            smaller[f"{name} (runner convert)"] = packed
    smaller["engine.prefix_cache_bytes=0"] = replace(memory, prefix_cache_bytes=0)
    needs = {name: budget.batch_bytes(1, 1) for name, budget in smaller.items()}
    enough = [f"{name} would take {in_units(it)}" for name, it in needs.items() if it <= most]
    return ", ".join(enough) or "take a smaller model"


def _bytes_as(model: nn.Module, bits: float) -> int:
    """Bytes of the parameters with `bits` for each number of a matrix; others have 16."""
    return sum(
        int(array.size * (bits if array.ndim > 1 else 16)) // 8
        for _, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating)
    )
