"""The engine: requests in, completions out, one batch of padded rows between them."""

from collections.abc import Collection, Iterable, Iterator

import mlx.nn as nn

from runner.engine.batch import Batch, InFlight
from runner.engine.kv_options import KVOptions
from runner.engine.model_runner import ModelRunner, Prefill, ReadyPrompt
from runner.engine.scheduler import Scheduler
from runner.engine.sequence import Sequence
from runner.engine.stats import EngineStats
from runner.engine.stop import Decode, StopStringMatcher
from runner.errors import ParameterError, PromptError
from runner.types import Completion, Request, SamplingParams


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
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
        max_kv_size: int | None = None,
        eos_token_ids: Collection[int] = (),
        decode: Decode | None = None,
    ) -> None:
        """Takes a model with mlx-lm's interface.

        Args:
            model: maps (B, L) token ids and a list of caches to (B, L, V) logits.
            max_batch_size: rows decoded together.
            prefill_step_size: prompt tokens, pads included, forwarded at once.
            prefix_cache_bytes: keys, values and states kept for prompts that begin like an earlier
                one; 0 keeps none.
            max_model_len: tokens of prompt and completion together; None for no limit.
            kv_bits, kv_group_size, quantized_kv_start, max_kv_size: coarser or fewer keys and
                values, as `EngineConfig` says; these change results.
            eos_token_ids: tokens that end every row that does not set `ignore_eos`.
            decode: token ids -> text; needed for stop strings alone.

        Raises:
            ModelError: a layer of the model keeps a kind of past that is not covered, or the model
                is one of those that are wrong in a padded batch.
            ParameterError: a size is below 1, or an option does not suit the model.
        """
        _check_sizes(max_batch_size, prefill_step_size, prefix_cache_bytes, max_model_len)
        self.max_batch_size = max_batch_size
        self.max_model_len = max_model_len
        self.stats = EngineStats()
        self._decode = decode
        self._runner = ModelRunner(
            model,
            prefill_step_size=prefill_step_size,
            prefix_cache_bytes=prefix_cache_bytes,
            kv_options=KVOptions(
                kv_bits=kv_bits,
                kv_group_size=kv_group_size,
                quantized_kv_start=quantized_kv_start,
                max_kv_size=max_kv_size,
            ),
        )
        # A tokenizer may name one that the model cannot give; min_tokens would scatter to it.
        self._eos = frozenset(i for i in eos_token_ids if i < self._runner.vocab_size)
        self._scheduler = Scheduler(
            max_batch_size=max_batch_size,
            max_scored_tokens=prefill_step_size,
            max_scored_positions=self._runner.max_scored_positions,
        )
        self._batch = Batch(max_batch_size=max_batch_size, vocab_size=self._runner.vocab_size)
        self._prefill: Prefill | None = None
        self._ready: list[ReadyPrompt] = []
        self._scored: list[ReadyPrompt] = []
        self._in_flight: InFlight | None = None
        self._aborting: set[str] = set()

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
                that the vocabulary does not have.
            ParameterError: the sampling parameters cannot be followed by this engine, as
                `check_params` says.
        """
        self._check(request)
        self.stats.num_requests += 1
        self._scheduler.add(request)

    def _check(self, request: Request) -> None:
        length, most = len(request.prompt_token_ids), self.max_model_len
        if length == 0:
            raise PromptError("the prompt has no tokens")
        if most is not None and length + request.needs_row > most:
            raise PromptError(f"the prompt has {length} tokens; the context holds {most} in all")
        for token_id in request.prompt_token_ids:
            if not 0 <= token_id < self._runner.vocab_size:
                size = self._runner.vocab_size
                raise PromptError(f"token id {token_id} is not in the vocabulary of {size}")
        self.check_params(request.params, request.bad_words_token_ids)

    def check_params(
        self, params: SamplingParams, bad_words_token_ids: Collection[Collection[int]]
    ) -> None:
        """Raises ParameterError for what no request to this engine can ask.

        That is stop strings without a `decode`, no limit at all, bad words that are not tokenised,
        token ids that the vocabulary does not have, and options that leave no token to sample.
        """
        if params.stop and self._decode is None:
            raise ParameterError("stop strings need an engine that was given `decode`")
        if params.max_tokens is None and self.max_model_len is None:
            raise ParameterError("max_tokens=None needs an engine that was given max_model_len")
        if params.bad_words and not bad_words_token_ids:
            raise ParameterError("bad_words need a request that has bad_words_token_ids")
        for name, token_ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            *(("bad_words", word) for word in bad_words_token_ids),
        ):
            self._check_token_ids(name, token_ids)
        never = {next(iter(word)) for word in bad_words_token_ids if len(word) == 1}
        if params.min_tokens > 0:
            never |= self._eos | set(params.stop_token_ids)
        if params.allowed_token_ids and never.issuperset(params.allowed_token_ids):
            what = "what bad_words and min_tokens leave of it is empty"
            raise ParameterError(f"allowed_token_ids={params.allowed_token_ids}: {what}")

    def _check_token_ids(self, name: str, token_ids: Collection[int]) -> None:
        size = self._runner.vocab_size
        if name == "bad_words" and not token_ids:
            raise ParameterError("bad_words holds a word without tokens")
        for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
            if not 0 <= token_id < size:
                raise ParameterError(
                    f"{name} has the token id {token_id}; the vocabulary has 0 to {size - 1}"
                )

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
            self._ready.append(ReadyPrompt(waiting, caches=[], row=0))

    def step(self) -> list[Completion]:
        """Prefills a chunk, launches a decode of all rows, reads the decode before that."""
        aborted = self._end_aborted()
        # Read once the next prefill is on its way.
        scored, self._scored = self._scored, []
        self._advance_prefill()
        self._start_ready()
        launched = self._launch()
        finished = [self._only_scored(prompt) for prompt in scored] + self._collect()
        self._in_flight = launched
        return aborted + finished

    def _only_scored(self, prompt: ReadyPrompt) -> Completion:
        """The end of a request that samples nothing and so needs no row."""
        sequence = self._sequence(prompt, 0)
        sequence.finish_reason = "length"
        return sequence.completion()

    def _advance_prefill(self) -> None:
        if self._prefill is None and not self._ready:
            requests = self._scheduler.next_prompts(self._batch.num_free_rows)
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
            self._ready += [p for p in prompts if p.request.needs_row]
            self._scored += [p for p in prompts if not p.request.needs_row]
            self._prefill = None

    def _start_ready(self) -> None:
        """Starts as many samples of prefilled prompts as there are free rows."""
        started: list[tuple[ReadyPrompt, list[int]]] = []
        while self._ready and self._batch.num_free_rows:
            prompt = self._ready[0]
            indices = range(prompt.num_started, prompt.request.params.n)
            sequences = [self._sequence(prompt, i) for i in indices]
            sequences = sequences[: self._batch.num_free_rows]
            for sequence in sequences:
                self._batch.place(sequence)
            started.append((prompt, [sequence.row for sequence in sequences]))
            prompt.num_started += len(sequences)
            if prompt.num_left == 0:
                self._ready.pop(0)
        if started:
            self._reserve()  # Once for all of them: what grows is copied whole.
        for prompt, rows in started:
            self._runner.fork(prompt, rows)

    def _room(self, request: Request) -> int | None:
        """Tokens that the context has left after the prompt; None where it has no limit."""
        most = self.max_model_len
        return None if most is None else most - len(request.prompt_token_ids)

    def _sequence(self, prompt: ReadyPrompt, index: int) -> Sequence:
        request, matcher = prompt.request, None
        params = request.params
        if params.stop:
            assert self._decode is not None, "checked when the request was added"
            matcher = StopStringMatcher(
                params.stop,
                self._decode,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )
        most = [params.max_tokens, self._room(request)]
        stop_token_ids = frozenset(params.stop_token_ids)
        return Sequence(
            request,
            index,
            max_tokens=min(limit for limit in most if limit is not None),
            stop_token_ids=stop_token_ids | (frozenset() if params.ignore_eos else self._eos),
            eos_token_ids=self._eos,
            stop_matcher=matcher,
            prompt_logprobs=prompt.reader,
        )

    def _reserve(self) -> None:
        columns = max(sequence.position for sequence in self._batch.sequences) + 1
        self._runner.reserve(len(self._batch.rows), columns)

    def _launch(self) -> InFlight | None:
        """Sends the next decode on its way, without waiting for the one before it."""
        batch = self._batch
        if not batch.wants_forward or self._fills_up_first():
            return None
        self._compact()
        self._reserve()
        logits = self._runner.decode(batch.input_token_ids(), batch.positions())
        samples = batch.sample(logits)
        self.stats.num_steps += 1
        self.stats.num_row_steps += len(batch.rows)
        return batch.launched(samples)

    def _fills_up_first(self) -> bool:
        """Whether decode waits for the prefill: a batch that is mostly empty is filled first."""
        prefilling = self._prefill.requests if self._prefill is not None else []
        waiting = self._scheduler.wants_rows and not self._ready
        coming = waiting or any(request.needs_row for request in prefilling)
        return coming and self._batch.num_free_rows > len(self._batch.sequences)

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
        return [sequence.completion() for sequence in finished]

    def _release(self, sequence: Sequence) -> None:
        if sequence.finish_reason == "error":
            self._runner.caches.clear_row(sequence.row)
        self._batch.release(sequence)

    def _end_aborted(self) -> list[Completion]:
        if not self._aborting:
            return []
        ended = [s for s in self._batch.sequences if s.request.request_id in self._aborting]
        for sequence in ended:
            self._batch.release(sequence)
        for queue in (self._ready, self._scored):
            for prompt in [p for p in queue if p.request.request_id in self._aborting]:
                unstarted = range(prompt.num_started, prompt.request.params.n)
                ended += [self._sequence(prompt, i) for i in unstarted]
                queue.remove(prompt)
        for sequence in ended:
            sequence.finish_reason = "abort"
        # A request in the middle of its prefill is ended once it is ready.
        prefilling = self._prefill.requests if self._prefill is not None else []
        self._aborting &= {request.request_id for request in prefilling}
        return [sequence.completion() for sequence in ended]


def _check_sizes(
    max_batch_size: int, prefill_step_size: int, prefix_cache_bytes: int, max_model_len: int | None
) -> None:
    for name, size, least in (
        ("max_batch_size", max_batch_size, 1),
        ("prefill_step_size", prefill_step_size, 1),
        ("prefix_cache_bytes", prefix_cache_bytes, 0),
        ("max_model_len", 1 if max_model_len is None else max_model_len, 1),
    ):
        if size < least:
            raise ParameterError(f"{name}={size} is not allowed: at least {least}")
