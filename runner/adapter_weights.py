"""The one form that adapters of any file format are brought into before an engine takes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRankWeights:
    """What an adapter adds to one module: the product of two small matrices, scaled.

    Arrays are `mx.array`. For a linear layer `a` is (in, r) and `b` (r, out); for an embedding
    (vocabulary, r) and (r, width); for a layer of experts (experts, r, in) and (experts, out, r).
    """

    a: Any
    b: Any
    scale: float
    """Multiplies the product."""
    magnitude: Any = None
    """DoRA: the norm, (out,), that each row of the adapted weight is brought to; None for LoRA."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What `a`, `b` and `magnitude` are called where they come from, for messages."""
    ties_head: bool = False
    """Of an embedding: whether a vocabulary projection that is tied to it is adapted as well."""

    @property
    def rank(self) -> int:
        """Columns of `a` and rows of `b`; of experts the middle axis of `a`."""
        return int(self.a.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """An adapter as it was read: modules by their path in the model."""

    targets: Mapping[str, LowRankWeights]
    digest: str
    """Names the content: tensors, their places and scales; 32 hex digits."""
    source: str
    """Where it comes from, for messages."""
