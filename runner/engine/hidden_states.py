"""What a model's projection onto the vocabulary reads: the hidden states after the final norm.

mlx-lm's models name their parts in many ways, and some scale the states between the norm and the
projection. So the projection is found by watching a forward, and its input is taken off there.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from runner.engine.lora import EMBEDDING, LINEAR
from runner.errors import ModelError

_SEEN = "_seen"
"""Where a watched module finds whom to tell."""
_NUM_PROBED = 2

Seen = Callable[[Any, mx.array, mx.array], None]
"""Takes a module, what it reads and what it gives."""


class _WatchedLinear:
    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(x)  # type: ignore[misc]
        vars(self)[_SEEN](self, x, y)
        return y


class _WatchedEmbedding:
    def as_linear(self, x: mx.array) -> mx.array:
        y: mx.array = super().as_linear(x)  # type: ignore[misc]
        vars(self)[_SEEN](self, x, y)
        return y


@cache
def _watched(kind: Any) -> type[nn.Module]:
    """The class of modules of a kind while they are watched."""
    watched = _WatchedLinear if issubclass(kind, LINEAR) else _WatchedEmbedding
    return type(f"Watched{kind.__name__}", (watched, kind), {})


@contextmanager
def _watching(modules: Iterable[Any], seen: Seen) -> Iterator[None]:
    """Tells of what these modules project while something is forwarded inside."""
    kinds: list[tuple[Any, Any]] = [(module, type(module)) for module in modules]
    for module, kind in kinds:
        vars(module)[_SEEN] = seen
        module.__class__ = _watched(kind)
    try:
        yield
    finally:
        for module, kind in kinds:
            module.__class__ = kind
            del vars(module)[_SEEN]


class Head:
    """The projection onto the vocabulary of one model."""

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        """Finds it in a forward of a few tokens.

        Raises:
            ModelError: none of the model's modules is it.
        """
        found: list[tuple[Any, int]] = []

        def look(module: Any, x: mx.array, y: mx.array) -> None:
            if y.shape == (1, _NUM_PROBED, vocab_size):
                found.append((module, x.shape[-1]))

        parts = {id(part): part for part in model.modules()}.values()
        projections = [part for part in parts if isinstance(part, LINEAR + EMBEDDING)]
        with _watching(projections, look):
            model(mx.zeros((1, _NUM_PROBED), mx.int32), cache=make_prompt_cache(model))
        if not found:
            what = "its projection onto the vocabulary is no linear layer"
            raise ModelError(f"this model gives no embeddings: {what}")
        self.module, self.size = found[-1]

    @contextmanager
    def watched(self) -> Iterator[list[mx.array]]:
        """What is forwarded inside leaves its hidden states, (B, N, size), in the list.

        Logits are made as well, but nothing evaluates them.
        """
        states: list[mx.array] = []
        with _watching([self.module], lambda module, x, y: states.append(x)):
            yield states
