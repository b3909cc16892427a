"""Embeddings of prompts: their hidden states, pooled while they are prefilled."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.engine.cpu_math import on_cpu, view
from runner.types import Request


class PromptEmbeddings:
    """The embeddings of prompts that are prefilled together, with one pooling.

    States come a chunk at a time and are added up as they come, so that they never exist for a
    whole prompt. What follows a prompt's last token is padding and left out.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        """Takes the requests of a prefill, all of them pooled alike."""
        (pooling,) = {request.pooling for request in requests}
        self._lengths = np.array([len(request.prompt_token_ids) for request in requests])
        self._is_mean = pooling == "mean"
        self._sums: Any = None

    def push(self, states: mx.array, column: int) -> list[mx.array]:
        """Takes the states, (P, N, D), of the columns from `column` on; what to evaluate of them.

        The columns come in order.
        """
        columns = column + np.arange(states.shape[1])
        ends = self._lengths[:, None]
        counted = columns < ends if self._is_mean else columns == ends - 1  # (P, N)
        if not counted.any():
            return []
        add = self._add_on_host if on_cpu() else self._add
        return add(states.astype(mx.float32), counted)

    def _add(self, states: mx.array, counted: npt.NDArray[np.bool_]) -> list[mx.array]:
        # Not by multiplying: what stands in a pad may be no number.
        kept = mx.where(mx.array(counted)[..., None], states, 0)
        found = mx.sum(kept, axis=1)  # (P, D)
        self._sums = found if self._sums is None else self._sums + found
        return [self._sums]

    def _add_on_host(self, states: mx.array, counted: npt.NDArray[np.bool_]) -> list[mx.array]:
        """The same, one state after the other in float64: the same bits in whatever chunks."""
        rows = view(states)
        if self._sums is None:
            self._sums = np.zeros((len(rows), rows.shape[-1]))
        for total, row, places in zip(self._sums, rows, counted, strict=True):
            for place in np.flatnonzero(places):
                total += row[place]
        return []

    def read(self, row: int) -> list[float]:
        """The embedding of one of the prompts, float32, once all of its columns have come."""
        found = np.asarray(self._sums[row])
        if self._is_mean:
            found = found / self._lengths[row]
        embedding: list[float] = found.astype(np.float32).tolist()
        return embedding
