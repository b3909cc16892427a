"""From logits to tokens: per-row parameters, one uniform per row and step, float32 throughout.

A token is drawn by inverting the cumulative distribution over the vocabulary in token order, so
that what a row draws depends on its logits, its parameters and its own uniform alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.types import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)
_CANDIDATE_WIDTHS = (64, 1024)
"""Top-k rows are sorted to one of these widths, chosen by the row's own k, never by its mates'."""


def uniforms(streams: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> mx.array:
    """One uniform in (0, 1) per row from its stream key and a counter; (B,) float32.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) used
    as a counter-based generator. 22 bits and a half keep u * total below total in float32.
    """
    with np.errstate(over="ignore"):
        z = streams + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return mx.array(((z >> np.uint64(42)).astype(np.float32) + 0.5) * np.float32(2.0**-22))


@dataclass(frozen=True, slots=True)
class _Truncation:
    """Rows whose candidates are sorted to the same width, and their limits, each (R,)."""

    rows: mx.array
    width: int
    top_k: mx.array
    top_p: mx.array
    log_min_p: mx.array


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """The sampling parameters of all rows as arrays; rebuilt when a row joins or leaves."""

    temperature: mx.array | None
    """(B, 1) float32, 1 for greedy rows; None where every row has 1."""
    greedy: mx.array | None
    """(B,) bool; None where no row is greedy."""
    all_greedy: bool
    truncations: tuple[_Truncation, ...]
    log_min_p: mx.array | None
    """(B, 1) float32 for rows cut by min_p alone, -inf for others; None where there is none."""
    num_top_logprobs: int | None
    """The most alternatives that a row asks for; None where no row does."""

    @classmethod
    def build(cls, rows: Sequence[SamplingParams | None], vocab_size: int) -> "SamplingTable":
        """Arrays for the rows of a batch; None stands for an empty slot."""
        params = [row or _GREEDY for row in rows]
        greedy = [p.temperature == 0 for p in params]
        temperature = [p.temperature or 1.0 for p in params]
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        alone = [
            p.min_p if not g and _width(p, vocab_size) is None else 0.0
            for p, g in zip(params, greedy, strict=True)
        ]
        return cls(
            temperature=None if set(temperature) == {1.0} else mx.array(temperature)[:, None],
            greedy=mx.array(greedy) if any(greedy) else None,
            all_greedy=all(greedy),
            truncations=_truncations(params, vocab_size),
            log_min_p=_log(alone)[:, None] if any(alone) else None,
            num_top_logprobs=max(wanted) if wanted else None,
        )


def _log(values: Sequence[float]) -> mx.array:
    return mx.log(mx.array(list(values), mx.float32))


def _width(params: SamplingParams, vocab_size: int) -> int | None:
    """How many candidates the row has to sort; None where it needs no sorting."""
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    if params.temperature == 0 or (not top_k and params.top_p == 1.0):
        return None
    widths = [width for width in _CANDIDATE_WIDTHS if top_k <= width < vocab_size]
    return widths[0] if top_k and widths else vocab_size


def _truncations(params: Sequence[SamplingParams], vocab_size: int) -> tuple[_Truncation, ...]:
    by_width: dict[int, list[int]] = {}
    for row, p in enumerate(params):
        width = _width(p, vocab_size)
        if width is not None:
            by_width.setdefault(width, []).append(row)
    return tuple(
        _Truncation(
            rows=mx.array(rows),
            width=width,
            top_k=mx.array([params[r].top_k if params[r].top_k > 0 else width for r in rows]),
            top_p=mx.array([params[r].top_p for r in rows]),
            log_min_p=_log([params[r].min_p for r in rows]),
        )
        for width, rows in sorted(by_width.items())
    )


@dataclass(frozen=True, slots=True)
class Samples:
    """What one step drew: the next tokens, and everything the host reads, packed."""

    token_ids: mx.array
    """(B,) int32, still on the device: the input of the next step."""
    packed: mx.array
    """(B, 3) or (B, 4 + 2k) int32: token, raw and processed logprob (float32 bits), then rank,
    k alternative ids and their k raw logprobs."""


def sample(
    logits: mx.array,
    table: SamplingTable,
    uniform: mx.array,
    process: Callable[[mx.array], mx.array] | None = None,
) -> Samples:
    """Draws a token for each row of `logits`, (B, V) of any float dtype, with `uniform`, (B,).

    `process` maps the logits, (B, V) float32, to those that are sampled from.
    """
    logits = logits.astype(mx.float32)
    weights, raw = _normalized(logits)
    processed = logits if process is None else process(logits)
    scaled = processed if table.temperature is None else processed / table.temperature
    kept = _truncate(scaled, table)
    # The exponentials are what costs here: a batch without temperature or truncation needs one set.
    kept_weights, normalizer = (weights, raw) if kept is logits else _normalized(kept)
    token_ids = _choose(processed, kept_weights, table, uniform)
    index = token_ids[:, None]
    raw_logprobs = mx.take_along_axis(logits, index, axis=-1) - raw  # (B, 1)
    processed_logprobs = mx.take_along_axis(kept, index, axis=-1) - normalizer
    columns = [index, raw_logprobs.view(mx.int32), processed_logprobs.view(mx.int32)]
    if table.num_top_logprobs is not None:
        columns += _alternatives(logits, raw, index, table.num_top_logprobs)
    return Samples(token_ids=token_ids, packed=mx.concatenate(columns, axis=-1))


def _normalized(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Weights relative to the most likely token, (B, V), and the log-sum-exp, (B, 1)."""
    top = mx.max(logits, axis=-1, keepdims=True)
    weights = mx.exp(logits - top)
    return weights, top + mx.log(mx.sum(weights, axis=-1, keepdims=True))


def _choose(
    logits: mx.array, weights: mx.array, table: SamplingTable, uniform: mx.array
) -> mx.array:
    if table.all_greedy:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    drawn = _invert_cdf(weights, uniform)
    if table.greedy is None:
        return drawn
    return mx.where(table.greedy, mx.argmax(logits, axis=-1).astype(mx.int32), drawn)


def _invert_cdf(weights: mx.array, uniform: mx.array) -> mx.array:
    """The first token at which the cumulative weight passes the uniform; (B,) int32."""
    cumulative = mx.cumsum(weights, axis=-1)
    passed = cumulative > uniform[:, None] * cumulative[:, -1:]
    # A parallel scan may dip by a rounding: a token of weight zero is never the answer.
    return mx.argmax(passed & (weights > 0), axis=-1).astype(mx.int32)


def _truncate(scaled: mx.array, table: SamplingTable) -> mx.array:
    """`scaled` with -inf where top_k, top_p or min_p drop a token; ties at the edge stay."""
    edge = None
    if table.log_min_p is not None:
        edge = mx.max(scaled, axis=-1, keepdims=True) + table.log_min_p
    if table.truncations:
        edge = mx.full((scaled.shape[0], 1), -mx.inf) if edge is None else edge
        for truncation in table.truncations:
            edge[truncation.rows, 0] = _smallest_kept(scaled[truncation.rows], truncation)
    return scaled if edge is None else mx.where(scaled >= edge, scaled, -mx.inf)


def _smallest_kept(scaled: mx.array, truncation: _Truncation) -> mx.array:
    """The smallest logit, (R,), that survives min_p, then top_k, then top_p, as in vLLM."""
    width = truncation.width
    largest = scaled if width == scaled.shape[-1] else mx.topk(scaled, width, axis=-1)
    candidates = -mx.sort(-largest, axis=-1)  # (R, W), largest first
    kept = mx.arange(width) < truncation.top_k[:, None]
    kept &= candidates >= candidates[:, :1] + truncation.log_min_p[:, None]
    weights = mx.softmax(mx.where(kept, candidates, -mx.inf), axis=-1)
    kept &= mx.cumsum(weights, axis=-1) - weights < truncation.top_p[:, None]
    return mx.min(mx.where(kept, candidates, mx.inf), axis=-1)


def _alternatives(
    logits: mx.array, normalizer: mx.array, index: mx.array, num_top: int
) -> list[mx.array]:
    """Rank of the drawn token, ids and raw logprobs of the most likely ones, best first."""
    chosen = mx.take_along_axis(logits, index, axis=-1)
    rank = mx.sum(logits > chosen, axis=-1, keepdims=True).astype(mx.int32) + 1
    num_top = min(num_top, logits.shape[-1])
    if num_top == 0:
        return [rank]
    ids = mx.argpartition(-logits, kth=num_top - 1, axis=-1)[:, :num_top]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1).astype(mx.int32)
    values = mx.take_along_axis(values, order, axis=-1) - normalizer
    return [rank, ids, values.view(mx.int32)]
