"""How an embedding is made of pooled hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from runner.errors import ParameterError
from runner.types import Pooling


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """What is made of the hidden states of a text's tokens."""

    pooling: Pooling = "mean"
    """mean: over all tokens of the text, special ones included; last: those of its last token."""
    normalize: bool = True
    """Gives the vector the length 1 (L2)."""
    dimensions: int | None = None
    """Keeps the first so many components, as models trained for it allow (Matryoshka); the length
    is that of what is kept. None keeps all."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ParameterError(f"pooling={self.pooling!r} is not allowed: mean or last")
        if not isinstance(self.normalize, bool):
            raise ParameterError(f"normalize={self.normalize!r} is not allowed: true or false")
        given = self.dimensions
        if given is not None and (type(given) is not int or given < 1):
            raise ParameterError(f"dimensions={given!r} is not allowed: at least 1, or null")

    def check(self, size: int) -> None:
        """Raises ParameterError where embeddings of `size` components have not enough of them."""
        if self.dimensions is not None and self.dimensions > size:
            what = f"at most {size}, the hidden size of the model"
            raise ParameterError(f"dimensions={self.dimensions} is not allowed: {what}")

    def vector(self, embedding: Sequence[float]) -> list[float]:
        """The embedding of a text, float32, of what the engine has pooled."""
        kept = np.asarray(embedding[: self.dimensions], np.float64)
        length = np.linalg.norm(kept) if self.normalize else 1.0
        # Where all is zero there is no direction to keep.
        vector: list[float] = (kept / (length or 1.0)).astype(np.float32).tolist()
        return vector
