"""Adds an adapter to the weights of a dense model for good."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from runner.adapter_weights import AdapterWeights
from runner.engine.lora import EMBEDDING, EXPERTS, HEAD, LowRank, fitted
from runner.errors import AdapterError


def fuse(model: nn.Module, adapter: AdapterWeights) -> int:
    """Changes the weights in place, summed in float32; returns the number of modules.

    Raises AdapterError where the adapter does not fit, or adapts one of the two uses of an
    embedding that is tied to the vocabulary projection.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    targets = fitted(modules, adapter)
    _check_tied(modules, targets, adapter)
    for path, low in targets.items():
        if not path.endswith(HEAD):
            module = modules[path]
            module.weight = _adapted(module, low).astype(module.weight.dtype)
    return len(targets)


def _adapted(module: nn.Module, low: LowRank) -> mx.array:
    if isinstance(module, EXPERTS):
        delta = low.b @ low.a  # (E, out, in)
    else:
        product = low.a @ low.b
        delta = product if isinstance(module, EMBEDDING) else product.T  # (out, in)
    adapted: mx.array = module.weight.astype(mx.float32) + delta
    # DoRA's gain leaves a bias as it is, so that the weights alone change.
    return adapted if low.gain is None else low.gain[:, None] * adapted


def _check_tied(
    modules: dict[str, Any], targets: dict[str, LowRank], adapter: AdapterWeights
) -> None:
    has_head = any(name.rpartition(".")[2] == "lm_head" for name in modules)
    ties = any(low.ties_head for low in adapter.targets.values())
    for path in targets:
        embedding = path.removesuffix(HEAD)
        if not isinstance(modules[embedding], EMBEDDING) or has_head:
            continue
        if not (ties and {embedding, f"{embedding}{HEAD}"} <= targets.keys()):
            raise AdapterError(
                f"{adapter.source}: cannot be fused: it adapts {embedding} either as the embedding "
                "or as the vocabulary projection, and the model has one matrix for both"
            )
