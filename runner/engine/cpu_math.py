"""Elementwise work on a CPU by NumPy's vector instructions, in MLX's own memory.

MLX's CPU kernels take exp and its like one element at a time, some 30 times slower than NumPy. An
evaluated float32 array is memory that NumPy reads and writes in place, so nothing is copied.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models import activations

Floats = npt.NDArray[np.float32]

_plain_swiglu = activations.swiglu
_LANES = 32
"""Weights are summed in this many running sums, so that zeros behind them change no bit."""


def on_cpu() -> bool:
    """Whether arrays live where NumPy can reach them at no cost, and MLX is the slower one."""
    return bool(mx.default_device() == mx.cpu)


def view(array: mx.array) -> npt.NDArray[Any]:
    """The memory of an array, evaluated first; a write changes the array."""
    mx.eval(array)
    return np.array(array, copy=False)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, of any one shape; arrays that are not float32 go to mlx-lm's."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32:
        plain: mx.array = _plain_swiglu(gate, x)
        return plain
    product = gate * x
    mx.eval(product, gate)
    divisor = np.negative(view(gate))
    with np.errstate(over="ignore"):  # exp(-gate) is infinite below -88, and the quotient 0.
        np.exp(divisor, out=divisor)
    divisor += 1
    out = view(product)
    out /= divisor
    return product


def softmax_in_place(scores: Floats, sinks: Floats | None = None) -> None:
    """Turns scores (..., C) into weights; -inf gets 0. `sinks` (..., 1) take part and get nothing.

    A row without any score above -inf has nothing to attend to and becomes NaN, as in MLX.
    """
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks)
    with np.errstate(invalid="ignore"):  # A NaN or an infinity of the model's own passes through.
        scores -= top
    np.exp(scores, out=scores)
    total = sum_in_order(scores)
    if sinks is not None:
        total += np.exp(sinks - top)
    scores /= total


def log_sum_exp(logits: Floats, weights: Floats) -> Floats:
    """The log-sum-exp, (R, 1), of logits (R, V); leaves exp(logits - the largest) in `weights`.

    Sampling and scoring both take it from here, so that they agree to the bit.
    """
    top = logits.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # A NaN of the model's own passes through.
        np.subtract(logits, top, out=weights)
    np.exp(weights, out=weights)
    normalizer: Floats = top + np.log(weights.sum(axis=-1, keepdims=True))
    return normalizer


def entropy_of(logits: Floats, weights: Floats) -> Floats:
    """The entropies, (R, 1), in nats, of logits (R, V), with what `log_sum_exp` left in `weights`.

    What is impossible adds nothing, where 0 x -inf would be no number. Overwrites `weights`.
    """
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted[weights == 0] = 0
    weights *= shifted
    entropies: Floats = np.log(total) - weights.sum(axis=-1, keepdims=True) / total
    return entropies


def sum_in_order(values: Floats) -> Floats:
    """Sums over the last axis, kept, in an order that zeros added behind do not change.

    NumPy's own sum halves the axis again and again, so where it splits depends on its length.
    """
    size = values.shape[-1]
    whole = size - size % _LANES
    lanes = values[..., :whole].reshape(*values.shape[:-1], -1, _LANES).sum(axis=-2)
    lanes[..., : size - whole] += values[..., whole:]
    total: Floats = lanes.sum(axis=-1, keepdims=True)
    return total
