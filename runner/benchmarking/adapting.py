"""Adapters to benchmark with: of a usual size, with weights that are drawn and do little."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from runner.llm import LLM

RANK = 16
_SCALE = 2.0
_SMALL = 0.01


def adapter_name(place: int) -> str:
    """Of the adapter in this place."""
    return f"benchmark-{place}"


def load_adapters(llm: LLM, count: int) -> None:
    """Gives an `LLM` adapters of rank 16 on every linear layer of its blocks."""
    for place in range(count):
        arrays = dict(_arrays(llm.model, mx.random.key(place)))
        llm.load_adapter(adapter_name(place), arrays=arrays, scale=_SCALE)


def _arrays(model: nn.Module, key: mx.array) -> Iterator[tuple[str, mx.array]]:
    """By mlx-lm's names: `lora_a` (in, r) and `lora_b` (r, out)."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or ".layers." not in path:
            continue
        width_out, width_in = module.weight.shape
        for name, shape in (("lora_a", (width_in, RANK)), ("lora_b", (RANK, width_out))):
            key, drawn = mx.random.split(key)
            yield f"{path}.{name}", _SMALL * mx.random.normal(shape, key=drawn)
