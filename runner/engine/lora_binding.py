"""Binds adapters to the modules of a model while it forwards; between forwards it is plain."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import switch_layers

from runner.engine.checks import check_at_least
from runner.engine.lora import EMBEDDING, EXPERTS, HEAD, LINEAR, Adapter
from runner.engine.lora_products import ManyAdapters, OneAdapter, Products, RowSlots
from runner.engine.lora_slots import AdapterSlots

_OWN, _TIED = "_low_rank", "_low_rank_head"
"""Where a bound module finds its products: for its own output, and as a tied projection."""


class _AdaptedLinear:
    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = super().__call__(x)  # type: ignore[misc]
        return _products(self, _OWN).linear(x, y)


class _AdaptedEmbedding:
    def __call__(self, ids: mx.array) -> mx.array:
        y: mx.array = super().__call__(ids)  # type: ignore[misc]
        return _products(self, _OWN).lookup(ids, y) if _OWN in vars(self) else y

    def as_linear(self, x: mx.array) -> mx.array:
        y: mx.array = super().as_linear(x)  # type: ignore[misc]
        return _products(self, _TIED).linear(x, y) if _TIED in vars(self) else y


class _AdaptedExperts:
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y: mx.array = super().__call__(x, indices, sorted_indices)  # type: ignore[misc]
        return _products(self, _OWN).experts(x, indices, y, is_sorted=sorted_indices)


def _products(module: Any, place: str) -> Products:
    found: Products = vars(module)[place]
    return found


@cache
def _adapted(kind: Any) -> type[nn.Module]:
    """The class of modules of a kind while an adapter is bound to them."""
    for kinds, adapted in (
        (LINEAR, _AdaptedLinear),
        (EMBEDDING, _AdaptedEmbedding),
        (EXPERTS, _AdaptedExperts),
    ):
        if issubclass(kind, kinds):
            return type(f"Adapted{kind.__name__}", (adapted, kind), {})
    raise AssertionError(f"{kind} was checked when the adapter was loaded")


class AdapterBinding:
    """A model's modules, and the adapters of the rows that it forwards."""

    def __init__(self, model: nn.Module, *, max_adapters: int) -> None:
        self.modules: dict[str, Any] = dict(model.named_modules())
        """By their paths."""
        check_at_least(1, max_adapters=max_adapters)
        self.max_adapters = max_adapters
        self._slots = AdapterSlots(max_adapters=max_adapters)
        self._rows: tuple[list[int], RowSlots] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters that are stacked."""
        return self._slots.nbytes

    def forget(self, adapters: Sequence[Adapter]) -> None:
        """Drops the copies of adapters whose arrays have changed."""
        self._slots.forget(adapters)

    @contextmanager
    def bound(self, rows: Sequence[Adapter | None]) -> Iterator[None]:
        """What is forwarded inside has these adapters, one a row; rows without any cost nothing
        where all are."""
        used = set(rows)
        if used <= {None}:
            yield
            return
        if len(used) == 1:
            (adapter,) = used
            assert adapter is not None, "there is one"
            one = {path: OneAdapter(low) for path, low in adapter.targets.items()}
            with self._in_place(one):
                yield
            return
        slots = self._row_slots(self._slots.take(rows))
        paths = {path for adapter in used if adapter is not None for path in adapter.targets}
        many = {path: ManyAdapters(self._slots.stacks[path], slots) for path in paths}
        plain, switch_layers._gather_sort = switch_layers._gather_sort, slots.sort
        try:
            with self._in_place(many):
                yield
        finally:
            switch_layers._gather_sort = plain

    def _row_slots(self, slots: list[int]) -> RowSlots:
        """The last ones where they have not changed: a batch mostly stays as it is."""
        if self._rows is None or self._rows[0] != slots:
            self._rows = slots, RowSlots(slots)
        return self._rows[1]

    @contextmanager
    def _in_place(self, products: Mapping[str, Products]) -> Iterator[None]:
        bound: list[tuple[Any, type[nn.Module]]] = []
        try:
            for path, product in products.items():
                module = self.modules[path.removesuffix(HEAD)]
                place = _TIED if path.endswith(HEAD) else _OWN
                if not vars(module).keys() & {_OWN, _TIED}:
                    bound.append((module, type(module)))
                    kind: Any = type(module)
                    module.__class__ = _adapted(kind)
                vars(module)[place] = product
            yield
        finally:
            for module, kind in bound:
                module.__class__ = kind
                for place in (_OWN, _TIED):
                    vars(module).pop(place, None)
