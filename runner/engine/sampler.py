"""From logits to tokens: per-row parameters, random numbers of the row's own, float32 throughout.

A token is drawn by a race: of tokens with weights w and numbers e from the exponential distribution
the one of the largest w / e wins, and each wins as often as its weight says. So what a row draws
depends on its logits, its parameters and its own numbers alone, and hardly on the last bits of the
logits: another token wins only where two are level. Inverting the cumulative distribution would
draw another one wherever a rare token's share of it is less than its rounding error.

The same code runs on NumPy arrays where MLX computes on the CPU, and on MLX's own arrays elsewhere:
`xp` is the one or the other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from runner.engine.cpu_math import log_sum_exp, on_cpu, view
from runner.engine.random_streams import exponentials
from runner.types import SamplingParams

Array: TypeAlias = Any
"""A NumPy array or one of MLX, as the sampler's `xp` says."""

_GREEDY = SamplingParams(temperature=0.0)
_CANDIDATE_WIDTHS = (64, 1024)
"""Top-k rows are sorted to one of these widths, chosen by the row's own k, never by its mates'."""
_BLOCK = 256
"""Tokens that race together; blocks of them race before, each with the sum of its weights."""
_COLDEST, _HOTTEST = 2.0**-64, 2.0**64
"""Beyond these a row draws its likeliest token, or any, all the same, and float32 runs out."""


def race_numbers(
    streams: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64], vocab_size: int
) -> npt.NDArray[np.float32]:
    """What each row's next draw takes: a number for each token of a block, then for each block."""
    return exponentials(streams, counters, _BLOCK + -(-vocab_size // _BLOCK))


@dataclass(frozen=True, slots=True)
class _Truncation:
    """Rows whose candidates are sorted to the same width, and their limits, each (R,)."""

    rows: Array
    width: int
    top_k: Array
    top_p: Array
    log_min_p: Array


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """The sampling parameters of all rows as arrays; rebuilt when a row joins or leaves."""

    temperature: Array | None
    """(B, 1) float32, 1 for greedy rows; None where every row has 1."""
    greedy: Array | None
    """(B,) bool; None where no row is greedy."""
    all_greedy: bool
    truncations: tuple[_Truncation, ...]
    log_min_p: Array | None
    """(B, 1) float32 for rows cut by min_p alone, -inf for others; None where there is none."""
    num_top_logprobs: int | None
    """The most alternatives that a row asks for; None where no row does."""


class Sampler:
    """Builds tables of sampling parameters and draws with them."""

    def __init__(self, *, on_host: bool | None = None) -> None:
        """Computes with NumPy if `on_host`; by default where MLX computes on the CPU."""
        self._on_host = on_cpu() if on_host is None else on_host
        self._xp: Any = np if self._on_host else mx
        self._scratch = np.empty((0, 0), np.float32)

    def table(self, rows: Sequence[SamplingParams | None], vocab_size: int) -> SamplingTable:
        """Arrays for the rows of a batch; None stands for an empty slot."""
        params = [row or _GREEDY for row in rows]
        greedy = [p.temperature == 0 for p in params]
        temperature = [min(max(p.temperature or 1.0, _COLDEST), _HOTTEST) for p in params]
        wanted = [p.logprobs for p in params if p.logprobs is not None]
        alone = [
            p.min_p if not g and _width(p, vocab_size) is None else 0.0
            for p, g in zip(params, greedy, strict=True)
        ]
        plain = set(temperature) == {1.0}
        return SamplingTable(
            temperature=None if plain else self._floats(temperature)[:, None],
            greedy=self._xp.array(greedy) if any(greedy) else None,
            all_greedy=all(greedy),
            truncations=self._truncations(params, vocab_size),
            log_min_p=self._floats(map(_log, alone))[:, None] if any(alone) else None,
            num_top_logprobs=max(wanted) if wanted else None,
        )

    def _floats(self, values: Iterable[float]) -> Array:
        return self._xp.array(list(values), dtype=self._xp.float32)

    def _truncations(
        self, params: Sequence[SamplingParams], vocab_size: int
    ) -> tuple[_Truncation, ...]:
        by_width: dict[int, list[int]] = {}
        for row, p in enumerate(params):
            width = _width(p, vocab_size)
            if width is not None:
                by_width.setdefault(width, []).append(row)
        return tuple(
            _Truncation(
                rows=self._xp.array(rows),
                width=width,
                top_k=self._xp.array([_num_kept(params[r], width) for r in rows]),
                top_p=self._floats(max(params[r].top_p, _COLDEST) for r in rows),
                log_min_p=self._floats(_log(params[r].min_p) for r in rows),
            )
            for width, rows in sorted(by_width.items())
        )

    def sample(
        self,
        logits: mx.array,
        table: SamplingTable,
        numbers: npt.NDArray[np.float32],
        process: Callable[[mx.array], mx.array] | None = None,
    ) -> "Samples":
        """Draws a token for each row of `logits`, (B, V) of any float dtype, with `race_numbers`.

        `process` maps the logits, (B, V) float32, to those that are sampled from. On the host the
        draws are done on return, elsewhere they are on their way.
        """
        logits = logits.astype(mx.float32)
        processed = logits if process is None else process(logits)
        if not self._on_host:
            samples = self._draw(logits, processed, table, mx.array(numbers))
            mx.async_eval(samples.packed, samples.token_ids)  # type: ignore[no-untyped-call]
            return samples
        mx.eval(logits, processed)
        same = processed is logits
        raw = view(logits)
        samples = self._draw(raw, raw if same else view(processed), table, numbers)
        return Samples(mx.array(samples.token_ids), samples.packed)

    def _draw(
        self, logits: Array, processed: Array, table: SamplingTable, numbers: Array
    ) -> "Samples":
        xp = self._xp
        scaled = processed if table.temperature is None else processed / table.temperature
        kept = _truncate(xp, scaled, table)
        weights, raw = self._normalized(logits)
        normalizer = raw
        # The exponentials cost most: a batch without temperature or truncation needs one set.
        if kept is not logits:
            weights, normalizer = self._normalized(kept)
        token_ids = _choose(xp, processed, weights, table, numbers)
        index = token_ids[:, None]
        raw_logprobs = xp.take_along_axis(logits, index, axis=-1) - raw  # (B, 1)
        processed_logprobs = xp.take_along_axis(kept, index, axis=-1) - normalizer
        columns = [index, raw_logprobs.view(xp.int32), processed_logprobs.view(xp.int32)]
        if table.num_top_logprobs is not None:
            columns += _alternatives(xp, logits, raw, index, table.num_top_logprobs)
        return Samples(token_ids=token_ids, packed=xp.concatenate(columns, axis=-1))

    def _normalized(self, logits: Array) -> tuple[Array, Array]:
        """Weights relative to the most likely token, (B, V), and the log-sum-exp, (B, 1).

        On the host the weights are good until the next call: they are written where the last ones
        were, because fresh memory of that size costs more than the exponentials.
        """
        if self._on_host:
            if self._scratch.shape != logits.shape:
                self._scratch = np.empty_like(logits)
            return self._scratch, log_sum_exp(logits, self._scratch)
        top = mx.max(logits, axis=-1, keepdims=True)
        weights = mx.exp(logits - top)
        return weights, top + mx.log(mx.sum(weights, axis=-1, keepdims=True))


def _log(value: float) -> float:
    return log(value) if value > 0 else -inf


def _num_kept(params: SamplingParams, width: int) -> int:
    return params.top_k if 0 < params.top_k < width else width


def _width(params: SamplingParams, vocab_size: int) -> int | None:
    """How many candidates the row has to sort; None where it needs no sorting."""
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    if params.temperature == 0 or (not top_k and params.top_p == 1.0):
        return None
    widths = [width for width in _CANDIDATE_WIDTHS if top_k <= width < vocab_size]
    return widths[0] if top_k and widths else vocab_size


@dataclass(frozen=True, slots=True)
class Samples:
    """What one step drew: the next tokens, and everything the host reads, packed."""

    token_ids: mx.array
    """(B,) int32, still on the device: the input of the next step."""
    packed: Array
    """(B, 3) or (B, 4 + 2k) int32: token, raw and processed logprob (float32 bits), then rank,
    k alternative ids and their k raw logprobs."""


def _choose(xp: Any, logits: Array, weights: Array, table: SamplingTable, numbers: Array) -> Array:
    if table.all_greedy:
        return xp.argmax(logits, axis=-1).astype(xp.int32)
    drawn = _winners(xp, weights, numbers)
    if table.greedy is None:
        return drawn
    return xp.where(table.greedy, xp.argmax(logits, axis=-1).astype(xp.int32), drawn)


def _winners(xp: Any, weights: Array, numbers: Array) -> Array:
    """The token that wins each row's race, (B,) int32; never one of weight zero.

    In two rounds, blocks of tokens and then the tokens of one block: so a row needs a few hundred
    numbers, not one for each token.
    """
    vocab_size = weights.shape[-1]
    whole = vocab_size - vocab_size % _BLOCK
    sums = weights[:, :whole].reshape(weights.shape[0], -1, _BLOCK).sum(axis=-1)
    if whole < vocab_size:
        rest = weights[:, whole:].sum(axis=-1, keepdims=True)
        sums = xp.concatenate([sums, rest], axis=-1)
    block = xp.argmax(sums / numbers[:, _BLOCK:], axis=-1)[:, None]
    columns = block * _BLOCK + xp.arange(_BLOCK)  # (B, tokens of a block)
    inside = xp.take_along_axis(weights, xp.minimum(columns, vocab_size - 1), axis=-1)
    inside = xp.where(columns < vocab_size, inside, xp.zeros_like(inside))
    token = xp.argmax(inside / numbers[:, :_BLOCK], axis=-1)
    # A row of NaN has no winner; its token is of the vocabulary all the same.
    return xp.minimum(block[:, 0] * _BLOCK + token, vocab_size - 1).astype(xp.int32)


def _truncate(xp: Any, scaled: Array, table: SamplingTable) -> Array:
    """`scaled` with -inf where top_k, top_p or min_p drop a token; ties at the edge stay."""
    edge = None
    if table.log_min_p is not None:
        edge = scaled.max(axis=-1, keepdims=True) + table.log_min_p
    if table.truncations:
        if edge is None:
            edge = xp.full((scaled.shape[0], 1), -inf, dtype=xp.float32)
        for truncation in table.truncations:
            edge[truncation.rows, 0] = _smallest_kept(xp, scaled[truncation.rows], truncation)
    return scaled if edge is None else xp.where(scaled >= edge, scaled, xp.array(-inf, xp.float32))


def _smallest_kept(xp: Any, scaled: Array, truncation: _Truncation) -> Array:
    """The smallest logit, (R,), that survives min_p, then top_k, then top_p, as in vLLM."""
    width = truncation.width
    smallest_first = -scaled
    if width < scaled.shape[-1]:
        smallest_first = xp.partition(smallest_first, width - 1, axis=-1)[:, :width]
    candidates = -xp.sort(smallest_first, axis=-1)  # (R, W), largest first
    kept = xp.arange(width) < truncation.top_k[:, None]
    kept &= candidates >= candidates[:, :1] + truncation.log_min_p[:, None]
    weights = xp.where(kept, xp.exp(candidates - candidates[:, :1]), xp.zeros_like(candidates))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    kept &= xp.cumsum(weights, axis=-1) - weights < truncation.top_p[:, None]
    return xp.where(kept, candidates, xp.array(inf, xp.float32)).min(axis=-1)


def _alternatives(
    xp: Any, logits: Array, normalizer: Array, index: Array, num_top: int
) -> list[Array]:
    """Rank of the drawn token, ids and raw logprobs of the most likely ones, best first."""
    chosen = xp.take_along_axis(logits, index, axis=-1)
    rank = (logits > chosen).sum(axis=-1, keepdims=True).astype(xp.int32) + 1
    num_top = min(num_top, logits.shape[-1])
    if num_top == 0:
        return [rank]
    ids = xp.argpartition(-logits, num_top - 1, axis=-1)[:, :num_top]
    values = xp.take_along_axis(logits, ids, axis=-1)
    order = xp.argsort(-values, axis=-1)
    ids = xp.take_along_axis(ids, order, axis=-1).astype(xp.int32)
    values = xp.take_along_axis(values, order, axis=-1) - normalizer
    return [rank.astype(xp.int32), ids, values.view(xp.int32)]
