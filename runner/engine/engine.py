"""The engine: requests in, completions out, one batch of padded rows between them."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator

import mlx.nn as nn

from runner.adapter_weights import AdapterWeights
from runner.engine.adapters import Adapters, SwapMode, check_swap_mode
from runner.engine.admission import Admission
from runner.engine.batch import InFlight
from runner.engine.checks import check_at_least
from runner.engine.flight import Flight
from runner.engine.kv_options import KVOptions
from runner.engine.lora import Adapter
from runner.engine.memory import MemoryBudget
from runner.engine.model_runner import ModelRunner, ReadyPrompt
from runner.engine.recovery import is_allocation_failure, smaller_batch_size, unfinished
from runner.engine.scheduler import FreeRows, Order, Scheduler
from runner.engine.sequence import Sequence, SequenceFactory, num_columns
from runner.engine.speculation import Launched, Speculation
from runner.engine.stats import EngineStats
from runner.engine.stop import Decode
from runner.errors import UnknownAdapterError
from runner.types import Completion, ErrorInfo, Request


class Engine:
    """Continuous batching over padded row slots, aligned at column 0.

    Knows token ids only: no files, no HTTP, no text but for stop strings. One thread may use it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch_size: int = 32,
        prefill_step_size: int = 2048,
        prefix_cache_bytes: int = 2**28,
        max_model_len: int | None = None,
        kv_options: KVOptions | None = None,
        memory_budget: int | None = None,
        order: Order = "offline",
        max_adapters: int = 8,
        eos_token_ids: Collection[int] = (),
        decode: Decode | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """Takes a model with mlx-lm's interface.

        Args:
            model: maps (B, L) token ids and a list of caches to (B, L, V) logits.
            max_batch_size: rows decoded together.
            prefill_step_size: prompt tokens, pads included, forwarded at once.
            prefix_cache_bytes: kept of prompts for those that begin like them; 0 keeps none.
            max_model_len: tokens of prompt and completion together; None for no limit.
            kv_options: coarser or fewer keys and values; these change results.
            memory_budget: bytes for weights, caches and forwards together; None for no limit.
            order: in which requests are taken, as `Scheduler` says.
            max_adapters: those that rows of one batch use together; the others take turns.
            eos_token_ids: tokens that end every row that does not set `ignore_eos`.
            decode: token ids -> text; needed for stop strings alone.
            speculation: drafts for this engine's rows alone; `kv_options` has columns for them.

        Raises:
            ModelError: the model cannot be run in a padded batch, as `layer_kinds` says.
            ParameterError: an option's value is not allowed, or the memory budget holds no row.
        """
        check_at_least(1, max_batch_size=max_batch_size, prefill_step_size=prefill_step_size)
        check_at_least(1, max_model_len=max_model_len, memory_budget=memory_budget)
        check_at_least(0, prefix_cache_bytes=prefix_cache_bytes)
        self.max_batch_size, self.max_model_len = max_batch_size, max_model_len
        self.stats, self.speculation = EngineStats(), speculation
        self._runner = ModelRunner(
            model,
            prefill_step_size=prefill_step_size,
            prefix_cache_bytes=prefix_cache_bytes,
            kv_options=kv_options or KVOptions(),
            max_adapters=max_adapters,
        )
        self.adapters = Adapters(self._runner.adapters.modules)
        self.memory = self._made_memory(memory_budget)
        self.admission = Admission.of(
            self._runner, self.memory, max_model_len, eos_token_ids, decode
        )
        self._new_sequence = SequenceFactory(self.admission.eos_token_ids, max_model_len, decode)
        self._scheduler = self._made_scheduler(order, prefix_cache_bytes > 0)
        self._flight = Flight.of(self._runner)
        self._started_over: dict[str, list[int]] = {}
        self._aborting: set[str] = set()

    def _made_memory(self, num_bytes: int | None) -> MemoryBudget:
        drafters: list[ModelRunner] = []
        if self.speculation is not None:
            drafters = self.speculation.bind(self._runner, self.max_model_len)
        return self._runner.memory_budget(num_bytes, beside=drafters)

    def _made_scheduler(self, order: Order, shares_prefixes: bool) -> Scheduler:
        return Scheduler(
            max_batch_size=self.max_batch_size,
            max_prefill_tokens=self._runner.max_prefill_tokens,
            max_scored_positions=self._runner.max_scored_positions,
            order=order,
            max_model_len=self.max_model_len,
            shares_prefixes=shares_prefixes and not self._runner.is_recurrent,
        )

    @property
    def wants_requests(self) -> bool:
        """Whether adding more requests now keeps the batch full later."""
        return self._scheduler.wants_requests

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has samples that are not finished."""
        return len(self._scheduler) > 0 or not self._flight.is_empty

    @property
    def sequences(self) -> list[Sequence]:
        """Those in flight that have a row, to be looked at."""
        return self._flight.batch.sequences

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and states now: the row slots, and the prompts that are kept."""
        return self._runner.cache_bytes

    def add(self, request: Request) -> None:
        """Takes a request.

        Raises:
            PromptError: the prompt is empty, leaves no room in the context or holds a token id
                that the vocabulary does not have, or one row of it is more than the memory budget.
            ParameterError: the sampling parameters cannot be followed by this engine.
            ModelError: it asks for an embedding, and the model gives none.
            UnknownAdapterError: its adapter is not loaded.
        """
        self.adapters.get(request.adapter)
        self.admission.check(request)
        self.stats.num_requests += 1
        self._scheduler.add(request)

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Runs requests, pulled as they are needed; yields each sample as it finishes."""
        source = iter(requests)
        more = True
        while more or self.has_unfinished:
            while more and self.wants_requests:
                request = next(source, None)
                more = request is not None
                if request is not None:
                    self.add(request)
            yield from self.step()

    def load_adapter(self, name: str, weights: AdapterWeights, *, mode: SwapMode = "keep") -> int:
        """Lets a name stand for an adapter, from the next step on; returns its weight version.

        Where the name has been used, rows in flight end with the content they began with (`keep`)
        or go on under the new one (`update`): what they keep of their past stays, and a prompt
        that is being prefilled starts over. The same content again changes nothing.

        Raises:
            AdapterError: the adapter does not fit the model; what the name stood for serves on.
        """
        check_swap_mode(mode)
        if self.adapters.load(name, weights) and mode == "update":
            self._go_on(lambda adapter: adapter is not None and adapter.name == name)
        return self.adapters.weight_version

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Rows in flight end with it; requests that wait for it fail.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        self.adapters.unload(name)

    def weights_changed(self) -> int:
        """Says that the model's own weights are others; all rows go on under them.

        Returns the weight version from now on.
        """
        self.clear_prefix_cache()
        self._runner.adapters.forget(self.adapters.refit(self._flight.adapters))
        self._go_on(lambda adapter: True)
        return self.adapters.weight_version

    def _go_on(self, is_changed: Callable[[Adapter | None], bool]) -> None:
        if self.speculation is not None:
            self._flight.ended += self._collect()  # How many tokens a draft gave is read off it.
        self._scheduler.put_back(self._flight.go_on(is_changed, self.adapters.now))

    def clear_prefix_cache(self) -> None:
        """Forgets the prompts of before."""
        self._runner.clear_prefix_cache()

    def abort(self, request_id: str) -> None:
        """Ends a request: its unfinished samples come out of the next step as `abort`."""
        self._aborting.add(request_id)
        waiting = self._scheduler.remove(request_id)
        if waiting is not None:
            self._flight.ready.append(ReadyPrompt(waiting, [], 0, indices=self._indices(waiting)))

    def step(self) -> list[Completion]:
        """Prefills a chunk, launches a decode of all rows, reads the decode before that.

        Where memory runs out, the rows in flight start over in a batch of half the size.
        """
        done = self._end_aborted()
        try:
            self._advance(done)
            return done
        except (RuntimeError, MemoryError) as error:
            if not is_allocation_failure(error):
                raise
            reason = str(error)
        # Not in the handler: the traceback holds the arrays of the forward that failed.
        return done + self._start_over(reason)

    def _advance(self, done: list[Completion]) -> None:
        scored = list(self._flight.scored)  # Read once the next prefill is on its way.
        drafting, batch = self.speculation, self._flight.batch
        if drafting is not None and drafting.needs_draws(batch, drains=self._drains):
            done += self._collect()
        self._advance_prefill()
        self._start_ready()
        launched = self._launch()
        done += [self._only_scored(prompt) for prompt in scored] + self._collect()
        done += self._flight.ended
        self._flight.ended = []
        del self._flight.scored[: len(scored)]
        self._flight.launched = launched

    def _only_scored(self, prompt: ReadyPrompt) -> Completion:
        """The end of a request that samples nothing and so needs no row, scored or embedded."""
        sequence = self._sequence(prompt, 0)
        sequence.finish_reason = "length"
        return sequence.completion()

    def _advance_prefill(self) -> None:
        if self._flight.prefill is None and not self._flight.ready:
            requests = self._scheduler.next_prompts(self._free_rows(), self._is_admitted)
            if requests:
                self._start_prefill(requests)
        if (prefill := self._flight.prefill) is None:
            return
        self.stats.num_prefill_tokens += (self.speculation or self._runner).prefill_chunk(prefill)
        if prefill.num_left == 0:
            prompts = self._runner.finish_prefill(prefill)
            self.stats.count_prompts([prompt.request for prompt in prompts])
            for prompt in prompts:
                prompt.indices = self._indices(prompt.request)
                prompt.versions = [self.adapters.version_of(prompt.adapter)]
            self._flight.ready += [p for p in prompts if p.request.needs_row]
            self._flight.scored += [p for p in prompts if not p.request.needs_row]
            self._flight.prefill = None

    def _start_prefill(self, requests: list[Request]) -> None:
        """Begins the prefill of prompts with one adapter, which may be gone by now."""
        try:
            adapter = self.adapters.get(requests[0].adapter)
        except UnknownAdapterError as error:
            left = [(request, self._indices(request)) for request in requests]
            info = ErrorInfo(type(error).__name__, str(error))
            self._flight.ended += self._new_sequence.failed(left, info)
            return
        self._flight.prefill = self._runner.start_prefill(requests, adapter)
        self.stats.num_cached_tokens += self._flight.prefill.num_saved

    def _is_admitted(self, adapter: str | None) -> bool:
        """Whether rows with an adapter may join those in flight."""
        names, most = {it.name for it in self._flight.adapters}, self._runner.adapters.max_adapters
        return adapter is None or adapter in names or len(names) < most

    def _free_rows(self, placed: Iterable[Sequence] = ()) -> FreeRows:
        """How many rows could start now, by the columns that the longest of them comes to."""
        rows = [*self._flight.batch.sequences, *placed]
        return self.admission.free_rows(rows, self.max_batch_size)

    def _start_ready(self) -> None:
        """Starts as many samples of prefilled prompts as there are free rows."""
        started: list[tuple[ReadyPrompt, list[Sequence]]] = []
        for prompt in self._flight.ready:
            free_rows = self._free_rows(row for _, rows in started for row in rows)
            num_free = free_rows(num_columns(prompt.request, self.max_model_len))
            indices = prompt.indices[: max(0, num_free)]
            if not indices:
                break
            started.append((prompt, [self._sequence(prompt, index) for index in indices]))
        if not started:
            return
        self._place([row for _, rows in started for row in rows])
        for prompt, rows in started:
            self._runner.fork(prompt, [row.row for row in rows])
            del prompt.indices[: len(rows)]
        self._flight.ready = [prompt for prompt in self._flight.ready if prompt.indices]

    def _place(self, started: list[Sequence]) -> None:
        """Gives rows their slots, all at once: where the slots grow, they are copied whole."""
        most = max(row.num_columns for row in [*self._flight.batch.sequences, *started])
        if len(self._flight.batch.rows) > self.admission.max_rows(most, self.max_batch_size):
            # Rows may be fewer where they are longer, and an empty slot is as long as any.
            self._runner.caches.keep_rows(self._flight.batch.compact())
        for sequence in started:
            self._flight.batch.place(sequence)
        self._runner.reserve(*self._flight.batch.extent)

    def _sequence(self, prompt: ReadyPrompt, index: int) -> Sequence:
        return prompt.sequence(self._new_sequence, index)

    def _launch(self) -> InFlight | Launched | None:
        """Sends the next decode on its way, without waiting for the one before it."""
        batch = self._flight.batch
        if not batch.wants_forward or self._fills_up_first():
            return None
        self._compact()
        self._runner.reserve(*self._flight.batch.extent)
        drafting, runner = self.speculation, self._runner
        launched = drafting.launch(batch, drains=self._drains) if drafting else batch.launch(runner)
        self.stats.count_step(launched.num_positions)
        return launched

    @property
    def _drains(self) -> bool:
        """Whether nothing waits for the slots of rows that are done."""
        return not len(self._scheduler) and not self._flight.fills

    def _fills_up_first(self) -> bool:
        """Whether decode waits for the prefill: a batch that is mostly empty is filled first."""
        if not self._scheduler.fills_up_first:
            return False
        coming = not self._flight.ready and self._scheduler.wants_rows(self._is_admitted)
        if self._flight.prefill is not None:
            coming = any(request.needs_row for request in self._flight.prefilling)
        num_free = self._free_rows()(self._scheduler.next_num_columns)
        return coming and num_free > len(self._flight.batch.sequences)

    def _compact(self) -> None:
        """Drops empty slots once they are a quarter of the batch and nothing waits to fill them."""
        batch = self._flight.batch
        if self._drains and len(batch.sequences) <= 3 * len(batch.rows) // 4:
            self._runner.caches.keep_rows(batch.compact())

    def _collect(self) -> list[Completion]:
        """Reads the step in flight; the rows that it ended."""
        if self._flight.launched is None:
            return []
        finished: list[Sequence] = []
        for sequence, draw in self._flight.launched.read():
            if sequence.finish_reason is not None:
                continue
            sequence.push(draw)
            self.stats.num_completion_tokens += 1
            if sequence.finish_reason is not None:
                finished.append(sequence)
                if sequence.finish_reason == "error":
                    self._runner.caches.clear_row(sequence.row)
                self._flight.batch.release(sequence)
        self._flight.launched = None
        return [sequence.completion() for sequence in finished]

    def _end_aborted(self) -> list[Completion]:
        if not self._aborting:
            return []
        self._flight.give_up(self._aborting, self._indices)
        ended = self._flight.end(self._aborting, self._sequence)
        for sequence in ended:
            sequence.finish_reason = "abort"
        # One in a prefill with others is ended once it is ready.
        self._aborting &= {request.request_id for request in self._flight.prefilling}
        return [sequence.completion() for sequence in ended]

    def _start_over(self, reason: str) -> list[Completion]:
        """Lets all in flight wait again, for a smaller batch; what stood alone is an error.

        Every draw is keyed by its position, so a row that starts over draws what it had drawn.
        """
        flight = self._flight
        rows, prefilling, ready = flight.batch.sequences, flight.prefilling, flight.prefilled
        left = unfinished(rows, ready, [(r, self._indices(r)) for r in prefilling])
        size = smaller_batch_size(
            self.max_batch_size, num_rows=len(rows), ready=ready, num_prefilling=len(prefilling)
        )
        self._flight = flight.emptied()
        self._runner.drop_caches()
        if size == 0:
            message = f"memory ran out for this row alone: {reason}"
            return self._new_sequence.failed(left, ErrorInfo("MemoryError", message))
        self.max_batch_size = size
        self.stats.start_over(rows, [request for request, _ in left if request not in prefilling])
        self._started_over |= {request.request_id: indices for request, indices in left}
        self._scheduler.put_back(request for request, _ in left)
        warnings.warn(f"memory ran out; {size} rows at most from now on: {reason}", stacklevel=3)
        return []

    def _indices(self, request: Request) -> list[int]:
        """The samples of a request that is prefilled which are to be started."""
        return self._started_over.pop(request.request_id, list(range(request.params.n)))
