"""Low-rank adapters, prepared for one model: (x A) B beside x W, with a gain for DoRA.

LoRA: Hu et al. 2021; DoRA: Liu et al. 2024. The model's own weights are never changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from runner.adapter_weights import AdapterWeights, LowRankWeights
from runner.errors import AdapterError

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)

HEAD = ".as_linear"
"""Ends the key of a target that is an embedding used as the vocabulary projection."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What an adapter adds to one module, float32, its scale within `b`."""

    a: mx.array
    """(in, r), of an embedding (V, r), of experts (E, r, in)."""
    b: mx.array
    """(r, out), of experts (E, out, r)."""
    gain: mx.array | None = None
    """DoRA: (out,), what the adapted output is multiplied by; of an embedding's lookup (V,)."""
    offset: mx.array | None = None
    """DoRA over a layer with a bias: (out,), what the gain took of the bias."""

    @property
    def arrays(self) -> list[mx.array]:
        """Those that are there."""
        return [it for it in (self.a, self.b, self.gain, self.offset) if it is not None]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Adapter:
    """One content of an adapter, fitted to one model; rows in flight hold on to it."""

    name: str
    version: int
    """The engine's weight version since when this content serves."""
    weights: AdapterWeights
    targets: dict[str, LowRank]
    """By the path of the module, with `HEAD` behind it for a tied vocabulary projection."""

    @property
    def digest(self) -> str:
        """Names the content."""
        return self.weights.digest


def fitted(modules: Mapping[str, Any], weights: AdapterWeights) -> dict[str, LowRank]:
    """The targets of an adapter on a model, its modules by their paths; evaluated.

    Raises:
        AdapterError: a module is not there or takes no adapter, or a tensor does not fit it.
    """
    targets: dict[str, LowRank] = {}
    for path, low in weights.targets.items():
        found = _found(modules, path, low, weights.source)
        for key, target in _targets(modules, found, low, weights.source).items():
            if key in targets:
                raise AdapterError(f"{weights.source}: two tensors are for the module {key}")
            targets[key] = target
    mx.eval([target.arrays for target in targets.values()])
    return targets


def _found(modules: Mapping[str, Any], path: str, low: LowRankWeights, source: str) -> str:
    """The module's path in this model, which may hold what the adapter's model is a part of."""
    if path in modules:
        return path
    longer = [name for name in modules if name.endswith(f".{path}")]
    if not longer and path.rpartition(".")[2] == "lm_head":
        tied = [name for name in modules if name.rpartition(".")[2] == "embed_tokens"]
        longer = [f"{name}{HEAD}" for name in tied]
    if len(longer) != 1:
        name = low.names.get("a", path)
        raise AdapterError(f"{source}: {name} is for a module that this model does not have")
    return longer[0]


def _targets(
    modules: Mapping[str, Any], path: str, low: LowRankWeights, source: str
) -> dict[str, LowRank]:
    """What the tensors of one module come to; an embedding may have its tied projection too."""
    module = modules[path.removesuffix(HEAD)]
    if isinstance(module, LINEAR):
        return {path: _linear(module, low, source)}
    if isinstance(module, EXPERTS):
        return {path: _experts(module, low, source)}
    if isinstance(module, EMBEDDING) and path.endswith(HEAD):
        return {path: _head(module, low, source)}
    if isinstance(module, EMBEDDING):
        return _embedding(module, path, low, source)
    name = low.names.get("a", path)
    kind = type(module).__name__
    raise AdapterError(f"{source}: {name} is for a {kind}, which takes no adapter")


def _check(low: LowRankWeights, source: str, **shapes: tuple[int, ...]) -> None:
    for field, shape in shapes.items():
        array = getattr(low, field)
        if array is not None and tuple(array.shape) != shape:
            name = low.names.get(field, field)
            what = f"has the shape {tuple(array.shape)}, where this model needs {shape}"
            raise AdapterError(f"{source}: {name} {what}")


def _prepared(low: LowRankWeights, *, gain: mx.array | None = None) -> LowRank:
    a, b = mx.contiguous(low.a.astype(mx.float32)), low.b.astype(mx.float32)
    return LowRank(a, mx.contiguous(b) if low.scale == 1 else low.scale * b, gain)


def _linear(module: nn.Module, low: LowRankWeights, source: str) -> LowRank:
    weight = _dense(module) if low.magnitude is not None else None
    num_out, num_in = _num_out(module), _num_in(module)
    rank = low.rank
    _check(low, source, a=(num_in, rank), b=(rank, num_out), magnitude=(num_out,))
    target = _prepared(low)
    if weight is None:
        return target
    gain = _gain(weight, (target.a @ target.b).T, low)
    bias = module.get("bias")
    return replace(target, gain=gain, offset=None if bias is None else (1 - gain) * bias)


def _embedding(
    module: nn.Module, path: str, low: LowRankWeights, source: str
) -> dict[str, LowRank]:
    weight = _dense(module)
    (num_tokens, width), rank = weight.shape, low.rank
    _check(low, source, a=(num_tokens, rank), b=(rank, width), magnitude=(num_tokens,))
    target = _prepared(low)
    if low.magnitude is not None:
        target = replace(target, gain=_gain(weight, target.a @ target.b, low))
    if not low.ties_head:
        return {path: target}
    head = LowRank(mx.contiguous(target.b.T), mx.contiguous(target.a.T), target.gain)
    return {path: target, f"{path}{HEAD}": head}


def _head(module: nn.Module, low: LowRankWeights, source: str) -> LowRank:
    """A vocabulary projection's adapter, where the model ties the projection to its embedding."""
    weight = _dense(module)
    (num_tokens, width), rank = weight.shape, low.rank
    _check(low, source, a=(width, rank), b=(rank, num_tokens), magnitude=(num_tokens,))
    target = _prepared(low)
    if low.magnitude is None:
        return target
    return replace(target, gain=_gain(weight, (target.a @ target.b).T, low))


def _experts(module: nn.Module, low: LowRankWeights, source: str) -> LowRank:
    count, rank = module.num_experts, low.rank
    a, b = (count, rank, module.input_dims), (count, module.output_dims, rank)
    _check(low, source, a=a, b=b)
    if low.magnitude is not None:
        name = low.names.get("magnitude", "magnitude")
        raise AdapterError(f"{source}: {name} is of DoRA, which a layer of experts does not take")
    return _prepared(low)


def _gain(weight: mx.array, delta: mx.array, low: LowRankWeights) -> mx.array:
    """What brings each row of the adapted weight, (out, in), to the norm that DoRA learned."""
    norm = mx.linalg.norm(weight.astype(mx.float32) + delta, axis=1)
    gain: mx.array = low.magnitude.astype(mx.float32) / norm
    return gain


def _num_out(module: nn.Module) -> int:
    return int(module.weight.shape[0])


def _num_in(module: nn.Module) -> int:
    columns = int(module.weight.shape[1])
    return columns * 32 // module.bits if isinstance(module, nn.QuantizedLinear) else columns


def _dense(module: nn.Module) -> mx.array:
    weight: mx.array = module.weight
    if "scales" not in module:
        return weight
    weight = mx.dequantize(
        module.weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
    return weight
