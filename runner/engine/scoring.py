"""Log-probabilities of given tokens, read off the logits that prefill would leave unused.

All of them are *raw*: in the model's own distribution, before temperature and truncation. A
prefill's logits come a chunk at a time, so that they never exist for a whole prompt: what stays of
a chunk is a few numbers per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from runner.engine.cpu_math import entropy_of, log_sum_exp, on_cpu, view
from runner.types import Request, TokenLogprobs

MAX_LOGITS_BYTES = 2**26
"""Float32 logits that one forward may make to score prompts (rows x positions x vocabulary)."""


def max_scored_positions(vocab_size: int) -> int:
    """Positions, of all rows together, that one forward may score."""
    return max(1, MAX_LOGITS_BYTES // (4 * vocab_size))


_BLOCK = 256
_ROWS = 8
"""Rows of logits that NumPy takes at a time."""

_NOTHING: list[Any] = [np.zeros((0, 0), np.float32)] * 5


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the logits at some positions say of the tokens that follow there."""

    logprobs: mx.array
    """(B, N) float32."""
    ranks: mx.array
    """(B, N) int32, 1 for the most likely token."""
    top_token_ids: mx.array
    """(B, N, k) int32, best first."""
    top_logprobs: mx.array
    """(B, N, k) float32."""
    entropies: mx.array
    """(B, N) float32, in nats; (B, 0) where not asked for."""

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """All of them, in the order of the fields."""
        fields = (self.logprobs, self.ranks, self.top_token_ids, self.top_logprobs)
        return (*fields, self.entropies)


def score_tokens(
    logits: mx.array, token_ids: mx.array, *, num_top: int = 0, entropy: bool = False
) -> TokenScores:
    """Scores `token_ids`, (B, N) int32, in the distributions of `logits`, (B, N, V) of any dtype.

    `num_top` alternatives at each position, at most the vocabulary; `entropy` as well if asked.
    """
    logits = logits.astype(mx.float32)
    normalizer, entropies = _normalized(logits, entropy=entropy)
    chosen = mx.take_along_axis(logits, token_ids[..., None], axis=-1)  # (B, N, 1)
    ids, values = _largest(logits, min(num_top, logits.shape[-1]))
    return TokenScores(
        logprobs=(chosen - normalizer)[..., 0],
        ranks=mx.sum(logits > chosen, axis=-1).astype(mx.int32) + 1,
        top_token_ids=ids,
        top_logprobs=values - normalizer,
        entropies=entropies,
    )


def _normalized(logits: mx.array, *, entropy: bool) -> tuple[mx.array, mx.array]:
    """The log-sum-exp, (B, N, 1), and the entropy, (B, N) or, where not asked for, (B, 0).

    The one place where a vocabulary is exponentiated to score.
    """
    if on_cpu():
        return _on_host(logits, entropy=entropy)
    blocks = _in_blocks(logits)
    partial = mx.logsumexp(blocks, axis=-1)
    normalizer = mx.logsumexp(partial, axis=-1, keepdims=True)
    if not entropy:
        return normalizer, mx.zeros((logits.shape[0], 0))
    logprobs = blocks - normalizer[..., None]
    weights = mx.exp(logprobs)
    # A token that is impossible adds nothing, where 0 x -inf would be no number.
    products = mx.where(weights > 0, weights * logprobs, 0)
    return normalizer, -mx.sum(mx.sum(products, axis=-1), axis=-1)


def _on_host(logits: mx.array, *, entropy: bool) -> tuple[mx.array, mx.array]:
    """The same by NumPy, a few rows at a time that stay in its caches."""
    rows = view(logits).reshape(-1, logits.shape[-1])
    scratch, shape = np.empty_like(rows[:_ROWS]), logits.shape[:-1]
    normalizers, entropies = [], []
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        weights = scratch[: len(part)]
        normalizers.append(log_sum_exp(part, weights))
        if entropy:
            entropies.append(entropy_of(part, weights))
    normalizer = mx.array(np.concatenate(normalizers)).reshape(*shape, 1)
    if not entropy:
        return normalizer, mx.zeros((shape[0], 0))
    return normalizer, mx.array(np.concatenate(entropies)).reshape(shape)


def log_normalizer(logits: mx.array) -> mx.array:
    """The log-sum-exp, (B, N, 1), of logits (B, N, V) float32, in what can be differentiated."""
    partial = mx.logsumexp(_in_blocks(logits), axis=-1)
    return mx.logsumexp(partial, axis=-1, keepdims=True)


def _in_blocks(logits: mx.array) -> mx.array:
    """(B, N, V) as (B, N, blocks, _BLOCK), padded with the impossible.

    On a CPU MLX adds up an axis in order: 1e-4 is lost on 50 000 terms, and 1e-6 in two stages.
    """
    extra = -logits.shape[-1] % _BLOCK
    if extra:
        widths = [(0, 0)] * (logits.ndim - 1) + [(0, extra)]
        logits = mx.pad(logits, widths, constant_values=-mx.inf)
    return logits.reshape(*logits.shape[:-1], -1, _BLOCK)


def _largest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The ids and values of the largest logits, each (B, N, count), the largest first."""
    if count == 0:
        empty = (*logits.shape[:-1], 0)
        return mx.zeros(empty, mx.int32), mx.zeros(empty)
    ids = mx.argpartition(-logits, kth=count - 1, axis=-1)[..., :count]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1).astype(mx.int32)
    return ids, mx.take_along_axis(values, order, axis=-1)


class PromptScores:
    """The scores of prompts that are prefilled together; on the device until they are read.

    The logits of column c are those of the token in column c + 1, so that a prompt's last token is
    scored before it is forwarded.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        """Takes the requests of a prefill, of which at least one is scored."""
        scored = [request for request in requests if request.is_scored]
        self.first_column = min(request.num_context for request in scored)
        """The first column whose logits are wanted."""
        self._num_top = max(request.params.prompt_logprobs or 0 for request in scored)
        self._entropy = any(request.prompt_entropy for request in scored)
        width = max(len(request.prompt_token_ids) for request in requests)
        padded = np.zeros((len(requests), width), np.int32)
        for row, request in enumerate(requests):
            padded[row, : len(request.prompt_token_ids)] = request.prompt_token_ids
        self._token_ids = mx.array(padded)
        self._chunks: list[TokenScores] = []
        self._host: list[Any] | None = None

    def push(self, logits: mx.array, column: int) -> tuple[mx.array, ...]:
        """Takes the logits, (P, N, V), of the columns from `column` on; what to evaluate of them.

        The columns come in order, from `first_column` on.
        """
        targets = self._token_ids[:, column + 1 : column + 1 + logits.shape[1]]
        chunk = score_tokens(logits, targets, num_top=self._num_top, entropy=self._entropy)
        self._chunks.append(chunk)
        return chunk.arrays

    def read(self, request: Request, row: int) -> TokenLogprobs:
        """The scores of one of the prompts, once all of its columns have come."""
        start, num_top = request.logprobs_start, request.params.prompt_logprobs or 0
        first = start - 1 - self.first_column
        columns = slice(first, first + len(request.prompt_token_ids) - start)
        read = [array[row, columns] for array in self._read()] if self._has_any else _NOTHING
        logprobs, ranks, ids, values, entropies = read
        return TokenLogprobs(
            start=start,
            logprobs=logprobs.tolist(),
            ranks=ranks.tolist(),
            top_token_ids=ids[:, :num_top].tolist(),
            top_logprobs=values[:, :num_top].tolist(),
            entropies=entropies.tolist() if request.prompt_entropy else None,
        )

    @property
    def _has_any(self) -> bool:
        """Whether a column was scored: the logprobs of prompts of one token are none."""
        return bool(self._chunks) or self._host is not None

    def _read(self) -> list[Any]:
        """All chunks as one, copied to the host once."""
        if self._host is None:
            parts = zip(*(chunk.arrays for chunk in self._chunks), strict=True)
            self._host = [np.array(mx.concatenate(list(part), axis=1)) for part in parts]
            self._chunks.clear()
        return self._host
