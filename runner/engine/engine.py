"""The engine: requests in, completions out, one batch of padded rows between them."""

import warnings
from collections.abc import Collection, Iterable, Iterator

import mlx.nn as nn

from runner.engine.admission import Admission
from runner.engine.batch import Batch, InFlight
from runner.engine.checks import check_at_least
from runner.engine.kv_options import KVOptions
from runner.engine.model_runner import ModelRunner, Prefill, ReadyPrompt
from runner.engine.recovery import (
    Unfinished,
    is_allocation_failure,
    smaller_batch_size,
    unfinished,
)
from runner.engine.scheduler import FreeRows, Order, Scheduler
from runner.engine.sequence import Sequence, SequenceFactory, num_columns
from runner.engine.speculation import Launched, Speculation
from runner.engine.stats import EngineStats
from runner.engine.stop import Decode
from runner.types import Completion, ErrorInfo, Request, SamplingParams


class Engine:
    """Continuous batching over padded row slots, aligned at column 0.

    Knows token ids only: no text (stop strings come with a `decode`), no files, no HTTP. One
    thread may use it.
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
            eos_token_ids: tokens that end every row that does not set `ignore_eos`.
            decode: token ids -> text; needed for stop strings alone.
            speculation: tokens guessed ahead, which change no result; it is this engine's alone.

        Raises:
            ModelError: the model cannot be run in a padded batch, as `layer_kinds` says.
            ParameterError: an option's value is not allowed, or the memory budget holds no row.
        """
        check_at_least(1, max_batch_size=max_batch_size, prefill_step_size=prefill_step_size)
        check_at_least(1, max_model_len=max_model_len, memory_budget=memory_budget)
        check_at_least(0, prefix_cache_bytes=prefix_cache_bytes)
        self.max_batch_size, self.max_model_len = max_batch_size, max_model_len
        self.stats = EngineStats()
        self.speculation = speculation
        self._num_spare = speculation.num_draft_tokens if speculation is not None else 0
        self._runner = ModelRunner(
            model,
            prefill_step_size=prefill_step_size,
            prefix_cache_bytes=prefix_cache_bytes,
            kv_options=(kv_options or KVOptions()).with_spare(self._num_spare),
        )
        # A tokenizer may name one that the model cannot give; min_tokens would scatter to it.
        eos = frozenset(i for i in eos_token_ids if i < self._runner.vocab_size)
        if speculation is not None:
            speculation.bind(self._runner, max_model_len)
        self.memory = self._runner.memory_budget(memory_budget)
        self._admission = Admission(
            memory=self.memory,
            vocab_size=self._runner.vocab_size,
            eos_token_ids=eos,
            max_model_len=max_model_len,
            has_decode=decode is not None,
        )
        self._new_sequence = SequenceFactory(
            eos_token_ids=eos, max_model_len=max_model_len, decode=decode
        )
        self._scheduler = Scheduler(
            max_batch_size=max_batch_size,
            max_prefill_tokens=self._runner.max_prefill_tokens,
            max_scored_positions=self._runner.max_scored_positions,
            order=order,
            max_model_len=max_model_len,
            shares_prefixes=prefix_cache_bytes > 0 and not self._runner.is_recurrent,
        )
        self._started_over: dict[str, list[int]] = {}
        self._clear()
        self._aborting: set[str] = set()

    def _clear(self) -> None:
        """Nothing is in flight."""
        self._batch = Batch(vocab_size=self._runner.vocab_size)
        self._prefill: Prefill | None = None
        self._ready: list[ReadyPrompt] = []
        self._scored: list[ReadyPrompt] = []
        self._in_flight: InFlight | Launched | None = None

    @property
    def wants_requests(self) -> bool:
        """Whether adding more requests now keeps the batch full later."""
        return self._scheduler.wants_requests

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has samples that are not finished."""
        waiting = len(self._scheduler) or self._prefill or self._ready or self._scored
        return bool(waiting or self._batch.sequences)

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
        """
        self._admission.check(request)
        self.stats.num_requests += 1
        self._scheduler.add(request)

    def check_params(
        self, params: SamplingParams, bad_words_token_ids: Collection[Collection[int]]
    ) -> None:
        """Raises ParameterError for what no request to this engine can ask, as `Admission` says."""
        self._admission.check_params(params, bad_words_token_ids)

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

    def clear_prefix_cache(self) -> None:
        """Forgets the prompts of before."""
        self._runner.clear_prefix_cache()

    def abort(self, request_id: str) -> None:
        """Ends a request: its unfinished samples come out of the next step as `abort`."""
        self._aborting.add(request_id)
        waiting = self._scheduler.remove(request_id)
        if waiting is not None:
            self._ready.append(ReadyPrompt(waiting, [], 0, indices=self._indices(waiting)))

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
        scored = list(self._scored)  # Read once the next prefill is on its way.
        if self._needs_draws:
            done += self._collect()
        self._advance_prefill()
        self._start_ready()
        launched = self._launch()
        done += [self._only_scored(prompt) for prompt in scored] + self._collect()
        del self._scored[: len(scored)]
        self._in_flight = launched

    @property
    def _needs_draws(self) -> bool:
        """Whether the step in flight is read before the next one is launched."""
        return self.speculation is not None and self.speculation.needs_draws

    def _only_scored(self, prompt: ReadyPrompt) -> Completion:
        """The end of a request that samples nothing and so needs no row."""
        sequence = self._sequence(prompt, 0)
        sequence.finish_reason = "length"
        return sequence.completion()

    def _advance_prefill(self) -> None:
        if self._prefill is None and not self._ready:
            requests = self._scheduler.next_prompts(self._free_rows())
            if requests:
                self._prefill = self._runner.start_prefill(requests)
                self.stats.num_cached_tokens += self._prefill.num_saved
        if self._prefill is None:
            return
        self.stats.num_prefill_tokens += self._runner.prefill_chunk(self._prefill)
        if self._prefill.num_left == 0:
            prompts = self._runner.finish_prefill(self._prefill)
            self.stats.num_prompt_tokens += sum(len(p.request.prompt_token_ids) for p in prompts)
            self.stats.num_scored_tokens += sum(p.request.num_scored for p in prompts)
            for prompt in prompts:
                prompt.indices = self._indices(prompt.request)
            self._ready += [p for p in prompts if p.request.needs_row]
            self._scored += [p for p in prompts if not p.request.needs_row]
            self._prefill = None

    def _free_rows(self, placed: Iterable[Sequence] = ()) -> FreeRows:
        """How many rows could start now, by the columns that the longest of them comes to."""
        return self._admission.free_rows([*self._batch.sequences, *placed], self.max_batch_size)

    def _start_ready(self) -> None:
        """Starts as many samples of prefilled prompts as there are free rows."""
        started: list[tuple[ReadyPrompt, list[Sequence]]] = []
        for prompt in self._ready:
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
        self._ready = [prompt for prompt in self._ready if prompt.indices]

    def _place(self, started: list[Sequence]) -> None:
        """Gives rows their slots, all at once: where the slots grow, they are copied whole."""
        most = max(row.num_columns for row in [*self._batch.sequences, *started])
        if len(self._batch.rows) > self._admission.max_rows(most, self.max_batch_size):
            # Rows may be fewer where they are longer, and an empty slot is as long as any.
            self._runner.caches.keep_rows(self._batch.compact())
        for sequence in started:
            self._batch.place(sequence)
        self._reserve()

    def _sequence(self, prompt: ReadyPrompt, index: int) -> Sequence:
        return self._new_sequence(prompt.request, index, prompt_logprobs=prompt.reader)

    def _reserve(self) -> None:
        live = self._batch.sequences
        columns = max(sequence.position for sequence in live) + 1 + self._num_spare
        most = max(sequence.num_columns for sequence in live) + self._num_spare
        self._runner.reserve(len(self._batch.rows), columns, most)

    def _launch(self) -> InFlight | Launched | None:
        """Sends the next decode on its way, without waiting for the one before it."""
        batch = self._batch
        if not batch.wants_forward or self._fills_up_first():
            return None
        self._compact()
        self._reserve()
        self.stats.num_steps += 1
        self.stats.num_row_steps += len(batch.rows)
        if self.speculation is None:
            return self._launch_plain()
        launched = self.speculation.launch(batch, self._launch_plain)
        self.stats.num_row_steps += (launched.width - 1) * len(batch.rows)
        return launched

    def _launch_plain(self) -> InFlight:
        batch = self._batch
        logits = self._runner.decode(batch.input_token_ids(), batch.positions())
        return batch.launched(batch.sample(logits))

    def _fills_up_first(self) -> bool:
        """Whether decode waits for the prefill: a batch that is mostly empty is filled first."""
        coming = not self._ready and self._scheduler.wants_rows
        if self._prefill is not None:
            coming = any(request.needs_row for request in self._prefill.requests)
        num_free = self._free_rows()(self._scheduler.next_num_columns)
        return coming and num_free > len(self._batch.sequences)

    def _compact(self) -> None:
        """Drops empty slots once they are a quarter of the batch and nothing waits to fill them."""
        batch = self._batch
        coming = len(self._scheduler) or self._prefill or self._ready
        if not coming and len(batch.sequences) <= 3 * len(batch.rows) // 4:
            self._runner.caches.keep_rows(batch.compact())

    def _collect(self) -> list[Completion]:
        """Reads the step in flight; the rows that it ended."""
        if self._in_flight is None:
            return []
        finished: list[Sequence] = []
        for sequence, draw in self._in_flight.read():
            if sequence.finish_reason is not None:
                continue
            sequence.push(draw)
            self.stats.num_completion_tokens += 1
            if sequence.finish_reason is not None:
                finished.append(sequence)
                self._release(sequence)
        self._in_flight = None
        return [sequence.completion() for sequence in finished]

    def _release(self, sequence: Sequence) -> None:
        if sequence.finish_reason == "error":
            self._runner.caches.clear_row(sequence.row)
        if self.speculation is not None:
            self.speculation.end(sequence)
        self._batch.release(sequence)

    def _end_aborted(self) -> list[Completion]:
        if not self._aborting:
            return []
        ended = [s for s in self._batch.sequences if s.request.request_id in self._aborting]
        for sequence in ended:
            self._release(sequence)
        for queue in (self._ready, self._scored):
            for prompt in [p for p in queue if p.request.request_id in self._aborting]:
                ended += [self._sequence(prompt, i) for i in prompt.indices]
                queue.remove(prompt)
        for sequence in ended:
            sequence.finish_reason = "abort"
        # A request in the middle of its prefill is ended once it is ready.
        prefilling = self._prefill.requests if self._prefill is not None else []
        self._aborting &= {request.request_id for request in prefilling}
        return [sequence.completion() for sequence in ended]

    def _start_over(self, reason: str) -> list[Completion]:
        """Lets all in flight wait again, for a smaller batch; what stood alone is an error.

        Every draw is keyed by its position, so a row that starts over draws what it had drawn.
        """
        rows = self._batch.sequences
        ready = [(p.request, p.indices) for p in (*self._ready, *self._scored)]
        prefilling = self._prefill.requests if self._prefill is not None else []
        left = unfinished(rows, ready, [(r, self._indices(r)) for r in prefilling])
        size = smaller_batch_size(
            self.max_batch_size, num_rows=len(rows), ready=ready, num_prefilling=len(prefilling)
        )
        self._clear()
        if self.speculation is not None:
            self.speculation.clear(rows)
        self._runner.drop_caches()
        if size == 0:
            return self._failed(left, f"memory ran out for this row alone: {reason}")
        self.max_batch_size = size
        self.stats.num_halvings += 1
        self.stats.num_prompt_tokens -= sum(
            len(request.prompt_token_ids) for request, _ in left if request not in prefilling
        )
        self.stats.num_completion_tokens -= sum(len(row.token_ids) for row in rows)
        self._started_over |= {request.request_id: indices for request, indices in left}
        self._scheduler.put_back(request for request, _ in left)
        warnings.warn(f"memory ran out; {size} rows at most from now on: {reason}", stacklevel=3)
        return []

    def _indices(self, request: Request) -> list[int]:
        """The samples of a request that is prefilled which are to be started."""
        return self._started_over.pop(request.request_id, list(range(request.params.n)))

    def _failed(self, left: list[Unfinished], message: str) -> list[Completion]:
        prompts = [(ReadyPrompt(request, [], 0), indices) for request, indices in left]
        sequences = [self._sequence(prompt, i) for prompt, indices in prompts for i in indices]
        for sequence in sequences:
            sequence.fail(ErrorInfo("MemoryError", message))
        return [sequence.completion() for sequence in sequences]
