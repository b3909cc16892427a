"""The adapters of one engine: names, what they stand for now, and the weight version."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import mlx.nn as nn

from runner.adapter_weights import AdapterWeights
from runner.engine.lora import Adapter, fitted
from runner.errors import AdapterError, ParameterError, UnknownAdapterError

SwapMode: TypeAlias = Literal["keep", "update"]
"""Whether rows in flight end with the adapter they began with, or go on under the new one."""


def check_swap_mode(mode: str) -> None:
    """Raises ParameterError for a mode that there is none of."""
    if mode not in get_args(SwapMode):
        raise ParameterError(f"mode={mode!r} is not allowed: {', '.join(get_args(SwapMode))}")


@dataclass(slots=True, eq=False)
class Adapters:
    """What each name stands for. A name may get another content while rows use the one before."""

    modules: Mapping[str, nn.Module]
    """Those of the model, by their paths."""
    weight_version: int = 0
    """Counts the changes: of an adapter, or of the model's own weights."""
    model_version: int = 0
    """The weight version since when the model's own weights serve."""
    _by_name: dict[str, Adapter] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of those that are loaded, in the order in which they came."""
        return list(self._by_name)

    @property
    def digests(self) -> dict[str, str]:
        """The names of those that are loaded, and of the content of each."""
        # A copy: a server looks while its engine's thread loads another.
        return {name: adapter.digest for name, adapter in self._by_name.copy().items()}

    def get(self, name: str | None) -> Adapter | None:
        """What a name stands for now; None for None.

        Raises:
            UnknownAdapterError: there is no adapter of that name.
        """
        if name is None:
            return None
        if name not in self._by_name:
            known = ", ".join(self._by_name) or "none"
            raise UnknownAdapterError(f"the adapter {name!r} is not loaded; loaded are: {known}")
        return self._by_name[name]

    def now(self, adapter: Adapter | None) -> tuple[Adapter | None, int]:
        """What an adapter's name stands for now, or itself where that is gone; and its version."""
        found = None if adapter is None else self._by_name.get(adapter.name, adapter)
        return found, self.version_of(found)

    def load(self, name: str, weights: AdapterWeights) -> bool:
        """Lets a name stand for new content; False where it does already.

        Raises:
            AdapterError: the name is empty, or the content does not fit; the old one serves on.
        """
        if not name:
            raise AdapterError(f"{weights.source}: an adapter needs a name")
        before = self._by_name.get(name)
        if before is not None and before.digest == weights.digest:
            return False
        targets = fitted(self.modules, weights)
        self.weight_version += 1
        self._by_name[name] = Adapter(name, self.weight_version, weights, targets)
        return True

    def unload(self, name: str) -> None:
        """Forgets a name; rows that use it go on. Raises UnknownAdapterError."""
        self.get(name)
        del self._by_name[name]
        self.weight_version += 1

    def version_of(self, adapter: Adapter | None) -> int:
        """The weight version since when a row with this adapter would get what it gets now."""
        return max(self.model_version, 0 if adapter is None else adapter.version)

    def take_over(self, before: "Adapters") -> None:
        """Goes on where those of an engine of the same model were."""
        self.weight_version, self.model_version = before.weight_version, before.model_version
        self._by_name = before._by_name

    def refit(self, in_use: Iterable[Adapter]) -> list[Adapter]:
        """Notes that the model's own weights have changed; the adapters whose arrays have too."""
        self.weight_version += 1
        self.model_version = self.weight_version
        changed = [
            adapter
            for adapter in {*self._by_name.values(), *in_use}
            if any(low.magnitude is not None for low in adapter.weights.targets.values())
        ]
        for adapter in changed:
            adapter.targets = fitted(self.modules, adapter.weights)
        return changed
