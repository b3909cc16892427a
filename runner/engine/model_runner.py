"""Forwards: prompts into caches of their own, then all rows of the batch together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from runner.engine.cpu_kernels import CPUKernels
from runner.engine.hidden_states import Head
from runner.engine.kv_options import KVOptions
from runner.engine.layer_cache import Past, PromptCache
from runner.engine.layer_kinds import layer_kinds
from runner.engine.lora import Adapter
from runner.engine.lora_binding import AdapterBinding
from runner.engine.memory import MemoryBudget
from runner.engine.pooling import PromptEmbeddings
from runner.engine.prefix_cache import MIN_TOKENS, PrefixCache, num_shared
from runner.engine.row_caches import RowCaches
from runner.engine.scoring import PromptScores, max_scored_positions
from runner.engine.sequence import Sequence as Row
from runner.engine.sequence import SequenceFactory
from runner.types import Request, TokenLogprobs

_MIN_TOGETHER = 512
"""Tokens of prompts that are prefilled together however small the chunks are."""


@dataclass(slots=True)
class Prefill:
    """Prompts being prefilled together, all but the last token of each.

    The last token is the row's first decode input, so that every logit that is sampled from comes
    out of the same forward, and prefill projects onto the vocabulary only to score the prompt. Of a
    prompt that is pooled, the last token is prefilled too.
    """

    requests: list[Request]
    caches: list[PromptCache]
    token_ids: mx.array
    """(P, L) int32, padded on the right."""
    num_done: int = 0
    """Columns forwarded so far."""

    num_saved: int = 0
    """Positions, of all prompts, that are not forwarded here."""
    scores: PromptScores | None = None
    """Where logprobs of the prompts are wanted."""
    embeddings: PromptEmbeddings | None = None
    """Where the prompts are pooled, all of them then."""
    adapter: Adapter | None = None
    """That of all the prompts."""
    context: "Prefill | None" = None
    """What all the prompts begin with, while it is being forwarded as a prompt of its own."""

    @property
    def content(self) -> str:
        """Names the content of the adapter; empty for none."""
        return "" if self.adapter is None else self.adapter.digest

    @property
    def num_left(self) -> int:
        """Columns that are not forwarded yet."""
        return int(self.token_ids.shape[1]) - self.num_done

    @property
    def lengths(self) -> list[int]:
        """Columns of each prompt."""
        return [request.num_prefilled for request in self.requests]

    @property
    def num_to_next_end(self) -> int:
        """Columns that are left before the next of the prompts ends."""
        return min(length for length in self.lengths if length > self.num_done) - self.num_done

    def start_from(self, pasts: Sequence[Past], num_columns: int) -> None:
        """Starts every prompt from the pasts, one a layer, of its first `num_columns` tokens."""
        if num_columns > 0:
            for cache, past in zip(self.caches, pasts, strict=True):
                cache.start_from(past, num_columns)
        self.advance(num_columns)

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
    scores: PromptScores | None = None
    embeddings: PromptEmbeddings | None = None
    adapter: Adapter | None = None
    versions: list[int] = field(default_factory=list)
    """The weight version that has read the prompt; and that of samples that start now, if it is
    another."""
    indices: list[int] = field(default_factory=list)
    """The samples that have not started."""

    @property
    def num_cached(self) -> int:
        """Columns of the prompt that are cached: all but its last token."""
        return len(self.request.prompt_token_ids) - 1

    def go_on_under(self, adapter: Adapter | None, version: int) -> None:
        """Lets other weights give the samples that have not started; what is prefilled stays."""
        self.adapter = adapter
        self.versions[1:] = [version]

    def sequence(self, factory: SequenceFactory, index: int) -> Row:
        """A sample of it, with nothing sampled yet."""
        return factory(
            self.request,
            index,
            prompt_logprobs=self.reader,
            embedding=None if self.embeddings is None else partial(self.embeddings.read, self.row),
            adapter=self.adapter,
            versions=self.versions or [0],
        )

    @property
    def reader(self) -> Callable[[], TokenLogprobs] | None:
        """Reads the prompt's logprobs, without the caches; None where none are wanted."""
        if self.scores is None or not self.request.is_scored:
            return None
        return partial(self.scores.read, self.request, self.row)


def _context(request: Request, num_columns: int) -> Request:
    """The first columns of a prompt as one of its own, of which nothing is scored or pooled.

    One token more is there: the last one of a prompt is not prefilled.
    """
    return replace(
        request,
        prompt_token_ids=request.prompt_token_ids[: num_columns + 1],
        params=replace(request.params, prompt_logprobs=None, max_tokens=1, min_tokens=0),
        logprobs_start=1,
        pooling=None,
    )


class ModelRunner:
    """A model and the row slots of its caches."""

    def __init__(
        self,
        model: nn.Module,
        *,
        prefill_step_size: int,
        prefix_cache_bytes: int,
        kv_options: KVOptions,
        max_adapters: int,
    ) -> None:
        self._model = model
        self.adapters = AdapterBinding(model, max_adapters=max_adapters)
        self._kernels = CPUKernels(model)
        kinds, self.vocab_size = layer_kinds(model)
        self.kinds = kv_options.applied(kinds)
        self.num_spare = kv_options.num_spare
        self.is_recurrent = any(kind.is_recurrent for kind in self.kinds)
        self._prefill_step_size = prefill_step_size
        self._prefix_cache_bytes = prefix_cache_bytes
        self.max_scored_positions = max_scored_positions(self.vocab_size)
        self.caches = RowCaches(self.kinds)
        self._prefix_cache = PrefixCache(
            max_bytes=prefix_cache_bytes, whole_entries=self.is_recurrent
        )

    def start_prefill(self, requests: list[Request], adapter: Adapter | None = None) -> Prefill:
        """Lays out prompts for `prefill_chunk`, from the longest prefix that is cached for all.

        What they begin with alike beyond that is forwarded first, for all of them at once. All of
        them use `adapter`.
        """
        prefill = self._laid_out(requests, adapter)
        prompts = [request.prompt_token_ids[: request.num_context] for request in requests]
        entry, num_cached = self._prefix_cache.find(prompts, content=prefill.content) or (None, 0)
        num_alike = min(num_shared(prompts[0], prompt) for prompt in prompts)
        prefill.num_saved = len(requests) * num_cached
        start = prefill
        if num_alike - num_cached >= MIN_TOKENS and (len(requests) > 1 or prefill.scores):
            prefill.num_saved += (len(requests) - 1) * (num_alike - num_cached)
            start = prefill.context = self._laid_out([_context(requests[0], num_alike)], adapter)
        start.start_from(entry.pasts if entry is not None else [], num_cached)
        return prefill

    def _laid_out(self, requests: list[Request], adapter: Adapter | None) -> Prefill:
        lengths = [request.num_prefilled for request in requests]
        padded = np.zeros((len(requests), max(lengths)), np.int32)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            padded[row, :length] = request.prompt_token_ids[:length]
        caches = [kind.prompt_cache(*padded.shape) for kind in self.kinds]
        scores = PromptScores(requests) if any(r.is_scored for r in requests) else None
        pooled = PromptEmbeddings(requests) if requests[0].pooling is not None else None
        return Prefill(
            requests, caches, mx.array(padded), scores=scores, embeddings=pooled, adapter=adapter
        )

    def prefill_chunk(self, prefill: Prefill) -> int:
        """Forwards the next columns of all prompts; returns the positions forwarded.

        A recurrent model's chunk ends where a prompt ends, whose state is read off there.
        """
        if prefill.context is not None:
            return self._context_chunk(prefill, prefill.context)
        size = self._chunk_size(prefill)
        if size == 0:
            return 0
        start = prefill.num_done
        token_ids = prefill.token_ids[:, start : start + size]
        adapters = [prefill.adapter] * len(prefill.requests)
        if prefill.embeddings is not None:
            states = self._hidden_states(token_ids, prefill.caches, adapters)
            read: Sequence[mx.array] = prefill.embeddings.push(states, start)
        else:
            logits = self._forward(token_ids, prefill.caches, adapters)
            scores, read = prefill.scores, ()
            if scores is not None and start >= scores.first_column:
                read = scores.push(logits, start)
        prefill.advance(size)
        arrays = [*(cache.arrays for cache in prefill.caches), read]
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        return int(token_ids.size)

    def _chunk_size(self, prefill: Prefill) -> int:
        """Columns to forward next; those whose logits are read are few at a time."""
        num_prompts, scores = len(prefill.requests), prefill.scores
        size = min(prefill.num_left, max(1, self._prefill_step_size // num_prompts))
        if scores is not None and prefill.num_done < scores.first_column:
            size = min(size, scores.first_column - prefill.num_done)
        elif scores is not None:
            size = min(size, max(1, self.max_scored_positions // num_prompts))
        if self.is_recurrent and size > 0:
            size = min(size, prefill.num_to_next_end)
        return size

    def _context_chunk(self, prefill: Prefill, context: Prefill) -> int:
        """Forwards more of the context that prompts share; hands it to them once it is done."""
        num_forwarded = self.prefill_chunk(context)
        if context.num_left == 0:
            pasts = self._keep(context, row=0)
            prefill.start_from(pasts, context.num_done)
            prefill.context = None
        return num_forwarded

    def finish_prefill(self, prefill: Prefill) -> list[ReadyPrompt]:
        """Ends a prefill that has nothing left; prompts to complete go into the prefix cache."""
        for row, request in enumerate(prefill.requests):
            if request.needs_row:
                self._keep(prefill, row)
        return [
            ReadyPrompt(
                request, prefill.caches, row, prefill.scores, prefill.embeddings, prefill.adapter
            )
            for row, request in enumerate(prefill.requests)
        ]

    def _keep(self, prefill: Prefill, row: int) -> list[Past]:
        """Puts a prompt that is wholly done into the prefix cache; what the layers keep of it."""
        token_ids = prefill.requests[row].prompt_token_ids[:-1]
        # A copy: a view would keep the columns of the whole prefill in memory.
        pasts = [
            tuple(mx.contiguous(array) for array in cache.past(row, len(token_ids)))
            for cache in prefill.caches
        ]
        # Now: until it is made, the copy holds on to the whole prefill.
        mx.async_eval(pasts)  # type: ignore[no-untyped-call]
        self._prefix_cache.add(token_ids, pasts, content=prefill.content)
        return pasts

    @property
    def max_prefill_tokens(self) -> int:
        """Tokens, pads included, of prompts that are prefilled together."""
        return max(self._prefill_step_size, _MIN_TOGETHER)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the model's parameters."""
        return sum(array.nbytes for _, array in tree_flatten(self._model.parameters()))

    def memory_budget(
        self, num_bytes: int | None, beside: Sequence["ModelRunner"] = ()
    ) -> MemoryBudget:
        """What a run with this model may take, of `num_bytes` in all; `beside` have rows too."""
        runners = [self, *beside]
        return MemoryBudget(
            num_bytes=num_bytes,
            kinds=[kind for runner in runners for kind in runner.kinds],
            weights_bytes=sum(runner.weights_bytes for runner in runners),
            prefix_cache_bytes=self._prefix_cache_bytes,
            max_prefill_tokens=self.max_prefill_tokens,
            num_spare=max(runner.num_spare for runner in runners),
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

    def settle(self) -> None:
        """Waits for all that was asked for so far, so that what comes next is timed by itself."""
        mx.eval([layer.arrays for layer in self.caches.layers])
        mx.synchronize()

    def reserve(self, num_rows: int, num_columns: int, most_columns: int) -> None:
        """Makes room in the row slots, of which none will need more than `most_columns`."""
        self.caches.reserve(num_rows, num_columns, most_columns)

    def fork(self, prompt: ReadyPrompt, rows: Sequence[int]) -> None:
        """Copies a prompt's past into row slots, also an empty one: a slot may hold a state."""
        for layer, cache in zip(self.caches.layers, prompt.caches, strict=True):
            layer.write_prefix(rows, cache.past(prompt.row, prompt.num_cached))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the row slots, and of the prompts that are kept."""
        return self.caches.nbytes + self._prefix_cache.nbytes

    def decode(
        self, token_ids: mx.array, positions: Sequence[int], adapters: Sequence[Adapter | None]
    ) -> mx.array:
        """Forwards one token per row, (B,), written at `positions`; logits (B, V)."""
        return self.forward_rows(token_ids[:, None], positions, adapters)[:, -1]

    def forward_rows(
        self, token_ids: mx.array, positions: Sequence[int], adapters: Sequence[Adapter | None]
    ) -> mx.array:
        """Forwards tokens, (B, N), each row's written from its position on; logits (B, N, V)."""
        self.caches.begin_step(positions, token_ids.shape[1])
        return self._forward(token_ids, self.caches.layers, adapters)

    def _forward(
        self, token_ids: mx.array, caches: Sequence[Any], adapters: Sequence[Adapter | None]
    ) -> mx.array:
        """Logits, (B, N, V), of tokens (B, N) behind what the caches hold, an adapter a row."""
        with self._kernels.bound(), self.adapters.bound(adapters):
            logits: mx.array = self._model(token_ids, cache=caches)
        return logits

    @cached_property
    def head(self) -> Head:
        """The projection onto the vocabulary; raises ModelError where it cannot be found."""
        return Head(self._model, self.vocab_size)

    def _hidden_states(
        self, token_ids: mx.array, caches: Sequence[Any], adapters: Sequence[Adapter | None]
    ) -> mx.array:
        """Like `_forward`, but what the projection reads, (B, N, D)."""
        with self.head.watched() as states:
            self._forward(token_ids, caches, adapters)
        return states[-1]
