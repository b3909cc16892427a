"""Forwards: prompts into caches of their own, then all rows of the batch together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from runner.engine.attention import fold_decode_attention
from runner.engine.layer_cache import PromptCache
from runner.engine.layer_kinds import layer_kinds
from runner.engine.memory import MemoryBudget
from runner.engine.prefix_cache import PrefixCache
from runner.engine.row_caches import RowCaches
from runner.types import Request

_MIN_TOGETHER = 512
"""Tokens of prompts that are prefilled together however small the chunks are."""


@dataclass(slots=True)
class Prefill:
    """Prompts being prefilled together, all but the last token of each.

    The last token is the row's first decode input, so that every logit that is sampled from comes
    out of the same forward, and prefill never projects onto the vocabulary.
    """

    requests: list[Request]
    caches: list[PromptCache]
    token_ids: mx.array
    """(P, L) int32, padded on the right."""
    num_done: int = 0
    """Columns forwarded so far."""

    num_cached: int = 0
    """Columns that came from the prefix cache."""

    @property
    def num_left(self) -> int:
        """Columns that are not forwarded yet."""
        return int(self.token_ids.shape[1]) - self.num_done

    @property
    def lengths(self) -> list[int]:
        """Columns of each prompt: all its tokens but the last."""
        return [len(request.prompt_token_ids) - 1 for request in self.requests]

    @property
    def num_to_next_end(self) -> int:
        """Columns that are left before the next of the prompts ends."""
        return min(length for length in self.lengths if length > self.num_done) - self.num_done

    def advance(self, num_columns: int) -> None:
        """Counts columns that every cache holds now, and tells the caches which prompts ended."""
        self.num_done += num_columns
        ended = [row for row, length in enumerate(self.lengths) if length == self.num_done]
        for cache in self.caches:
            cache.end_rows(ended)


@dataclass(slots=True, eq=False)
class ReadyPrompt:
    """A prefilled prompt whose samples have not all started."""

    request: Request
    caches: list[PromptCache]
    row: int
    """Where the prompt stands in its prefill."""
    indices: list[int] = field(default_factory=list)
    """The samples that have not started."""

    @property
    def num_cached(self) -> int:
        """Columns of the prompt that are cached: all but its last token."""
        return len(self.request.prompt_token_ids) - 1


class ModelRunner:
    """A model and the row slots of its caches."""

    def __init__(
        self, model: nn.Module, *, prefill_step_size: int, prefix_cache_bytes: int
    ) -> None:
        self._model = model
        fold_decode_attention(model)
        self.kinds, self.vocab_size = layer_kinds(model)
        self.is_recurrent = any(kind.is_recurrent for kind in self.kinds)
        self._prefill_step_size = prefill_step_size
        self._prefix_cache_bytes = prefix_cache_bytes
        self.caches = RowCaches(self.kinds)
        self._prefix_cache = PrefixCache(
            max_bytes=prefix_cache_bytes, whole_entries=self.is_recurrent
        )

    def start_prefill(self, requests: list[Request]) -> Prefill:
        """Lays out prompts for `prefill_chunk`, from the longest prefix that is cached for all."""
        lengths = [len(request.prompt_token_ids) - 1 for request in requests]
        padded = np.zeros((len(requests), max(lengths)), np.int32)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            padded[row, :length] = request.prompt_token_ids[:length]
        caches = [kind.prompt_cache(*padded.shape) for kind in self.kinds]
        prefill = Prefill(requests, caches, mx.array(padded))
        if found := self._prefix_cache.find([r.prompt_token_ids[:-1] for r in requests]):
            entry, prefill.num_cached = found
            for cache, past in zip(caches, entry.pasts, strict=True):
                cache.start_from(past, prefill.num_cached)
        prefill.advance(prefill.num_cached)
        return prefill

    def prefill_chunk(self, prefill: Prefill) -> int:
        """Forwards the next columns of all prompts; returns the positions forwarded.

        A recurrent model's chunk ends where a prompt ends, whose state is read off there.
        """
        num_prompts = len(prefill.requests)
        size = min(prefill.num_left, max(1, self._prefill_step_size // num_prompts))
        if size == 0:
            return 0
        if self.is_recurrent:
            size = min(size, prefill.num_to_next_end)
        end = prefill.num_done + size
        self._model(prefill.token_ids[:, prefill.num_done : end], cache=prefill.caches)
        prefill.advance(size)
        mx.async_eval([cache.arrays for cache in prefill.caches])  # type: ignore[no-untyped-call]
        return num_prompts * size

    def finish_prefill(self, prefill: Prefill) -> list[ReadyPrompt]:
        """Ends a prefill that has nothing left; its prompts go into the prefix cache."""
        for row, request in enumerate(prefill.requests):
            token_ids = request.prompt_token_ids[:-1]
            # A copy: a view would keep the columns of the whole prefill in memory.
            pasts = [
                tuple(mx.contiguous(array) for array in cache.past(row, len(token_ids)))
                for cache in prefill.caches
            ]
            # Now: until it is made, the copy holds on to the whole prefill.
            mx.async_eval(pasts)  # type: ignore[no-untyped-call]
            self._prefix_cache.add(token_ids, pasts)
        return [ReadyPrompt(r, prefill.caches, row) for row, r in enumerate(prefill.requests)]

    @property
    def max_prefill_tokens(self) -> int:
        """Tokens, pads included, of prompts that are prefilled together."""
        return max(self._prefill_step_size, _MIN_TOGETHER)

    def memory_budget(self, num_bytes: int | None) -> MemoryBudget:
        """What a run with this model may take, of `num_bytes` in all."""
        parameters = tree_flatten(self._model.parameters())
        return MemoryBudget(
            num_bytes=num_bytes,
            kinds=self.kinds,
            weights_bytes=sum(array.nbytes for _, array in parameters),
            prefix_cache_bytes=self._prefix_cache_bytes,
            max_prefill_tokens=self.max_prefill_tokens,
        )

    def clear_prefix_cache(self) -> None:
        """Forgets the prompts of before."""
        self._prefix_cache.clear()

    def drop_caches(self) -> None:
        """Gives back the memory of everything but the weights; all rows are gone."""
        self._prefix_cache.clear()
        self.caches = RowCaches(self.kinds)
        mx.synchronize()
        mx.clear_cache()

    def reserve(self, num_rows: int, num_columns: int, most_columns: int) -> None:
        """Makes room in the row slots, of which none will need more than `most_columns`."""
        self.caches.reserve(num_rows, num_columns, most_columns)

    def fork(self, prompt: ReadyPrompt, rows: Sequence[int]) -> None:
        """Copies a prompt's past into row slots, also an empty one: a slot may hold a state."""
        for layer, cache in zip(self.caches.layers, prompt.caches, strict=True):
            layer.write_prefix(rows, cache.past(prompt.row, prompt.num_cached))

    def decode(self, token_ids: mx.array, positions: Sequence[int]) -> mx.array:
        """Forwards one token per row, (B,), written at `positions`; logits (B, V)."""
        self.caches.begin_step(positions)
        logits: mx.array = self._model(token_ids[:, None], cache=self.caches.layers)
        return logits[:, -1]
