"""What a forward on a CPU uses in place of mlx-lm's own attention and activation."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import mlx.nn as nn
from mlx_lm.models import activations

from runner.engine.attention import attention, plain_attention
from runner.engine.cpu_math import on_cpu, swiglu

_REPLACED = {
    "scaled_dot_product_attention": (plain_attention, attention),
    "swiglu": (activations.swiglu, swiglu),
}


class CPUKernels:
    """Binds the names that a model's modules imported from mlx-lm anew, while a forward runs.

    Only then, because NumPy's results have no gradient: a training step on the same model gets
    mlx-lm's functions. Does nothing where MLX has kernels of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = {sys.modules[type(part).__module__] for part in model.modules()}
        self._places = [
            (module, name)
            for module in sorted(modules, key=lambda m: m.__name__)
            for name, (plain, _) in _REPLACED.items()
            if on_cpu() and getattr(module, name, None) is plain
        ]

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Everything that is forwarded inside uses them."""
        _bind(self._places, which=1)
        try:
            yield
        finally:
            _bind(self._places, which=0)


def _bind(places: list[tuple[ModuleType, str]], *, which: int) -> None:
    for module, name in places:
        setattr(module, name, _REPLACED[name][which])
