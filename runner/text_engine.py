"""`TextEngine`: prompts in, samples out, a step at a time; over an engine that knows token ids."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from runner.engine.engine import Engine
from runner.errors import PromptError, RowError
from runner.prompts import encode_bad_words, encode_prompt
from runner.text_stream import SampleStream, TextDelta
from runner.texts import Texts
from runner.types import (
    Completion,
    ErrorInfo,
    PromptRequest,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

OnDelta: TypeAlias = Callable[[TextDelta], None]
"""Takes what a step has added to a sample of a request, from within the step."""


@dataclass(slots=True)
class _Pending:
    """A request in flight, and the samples of it that have finished."""

    request: PromptRequest
    output: RequestOutput
    on_delta: OnDelta | None
    streams: dict[int, SampleStream] = field(default_factory=dict)
    """Of its samples by their index, where they are watched."""

    def stream(self, index: int, texts: Texts) -> SampleStream:
        """That of a sample."""
        if index not in self.streams:
            self.streams[index] = SampleStream(self.output, texts.decode, self.request.params)
        return self.streams[index]


class TextEngine:
    """The requests of one engine, as text. One thread may use it."""

    def __init__(self, engine: Engine, texts: Texts, tokenizer: Any, *, seed: int) -> None:
        """`seed` is that of requests which name none."""
        self.engine, self._texts, self._tokenizer, self._seed = engine, texts, tokenizer, seed
        self._bad_words: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        self._pending: dict[str, _Pending] = {}

    @property
    def request_ids(self) -> list[str]:
        """Of the requests in flight."""
        return list(self._pending)

    def check(self, params: SamplingParams) -> None:
        """Raises ParameterError where no request can be sampled as `params` say."""
        self.engine.admission.check_params(params, self._bad_words_token_ids(params))

    def add(self, request: PromptRequest, on_delta: OnDelta | None = None) -> RequestOutput | None:
        """Takes a request; returns the output of one that cannot be run.

        With `on_delta` every step tells what it has added to the request's samples.
        """
        if request.request_id in self._pending:
            raise ValueError(f"request id {request.request_id!r} is in flight already")
        params = request.params
        if params.seed is None or params.echo:
            seed = self._seed if params.seed is None else params.seed
            asked = params.num_prompt_logprobs
            params = replace(params, seed=seed, prompt_logprobs=asked, echo=False)
        output = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt.text,
            prompt_token_ids=list(request.prompt.token_ids or ()),
            adapter=request.adapter,
        )
        try:
            encoded = request.encoded or encode_prompt(request.prompt, self._tokenizer)
            if isinstance(encoded, PromptError):
                raise encoded
            output.prompt, output.prompt_token_ids = encoded
            self.engine.add(
                Request(
                    request_id=request.request_id,
                    prompt_token_ids=output.prompt_token_ids,
                    params=params,
                    key=request.key,
                    bad_words_token_ids=self._bad_words_token_ids(params),
                    logprobs_start=request.logprobs_start,
                    prompt_entropy=request.prompt_entropy,
                    adapter=request.adapter,
                    pooling=request.pooling,
                    priority=request.priority,
                )
            )
        except RowError as error:
            output.error = ErrorInfo(type(error).__name__, str(error))
            return output
        self._pending[request.request_id] = _Pending(request, output, on_delta)
        return None

    def step(self) -> list[RequestOutput]:
        """A step of the engine; the outputs that have all their samples now."""
        completions = self.engine.step()
        self._tell_watchers()
        return [output for it in completions if (output := self._finish(it))]

    def abort(self, request_id: str) -> None:
        """Ends a request in flight without an output."""
        if self._pending.pop(request_id, None) is not None:
            self.engine.abort(request_id)

    def abort_all(self) -> None:
        """Takes all that is in flight out of the engine."""
        for request_id in self.request_ids:
            self.abort(request_id)
        while self.engine.has_unfinished:
            self.engine.step()

    def _bad_words_token_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The bad words in token ids; a job's rows share them, so the last are remembered."""
        words = params.bad_words
        found = self._bad_words.get(words)
        if found is None:
            found = encode_bad_words(words, self._tokenizer)
            # Replaced as a whole: a server checks requests beside the thread that runs them.
            self._bad_words = {words: found}
        return found

    def _tell_watchers(self) -> None:
        """Says what is new of the samples in flight, of the requests that are watched."""
        if all(pending.on_delta is None for pending in self._pending.values()):
            return
        for sequence in self.engine.sequences:
            pending = self._pending.get(sequence.request.request_id)
            if pending is None or pending.on_delta is None:
                continue
            if sequence.prompt_logprobs is not None and sequence.token_ids:
                self._note_prompt(pending, sequence.prompt_logprobs)
            if delta := pending.stream(sequence.index, self._texts).advance(sequence):
                pending.on_delta(delta)

    def _note_prompt(self, pending: _Pending, read: Callable[[], TokenLogprobs]) -> None:
        """Gives the output what is known of its prompt since the prefill."""
        output = pending.output
        if output.prompt_token_logprobs is None:
            scored = output.prompt_token_logprobs = read()
            token_ids = output.prompt_token_ids
            output.prompt_logprobs = self._texts.prompt_logprobs(scored, token_ids)

    def _finish(self, completion: Completion) -> RequestOutput | None:
        """Adds a sample to its request; the output once it has them all."""
        pending = self._pending.get(completion.request_id)
        if pending is None:
            return None  # Its request was ended.
        params, output = pending.request.params, pending.output
        completion.text = self._texts.completion(completion, params)
        if completion.logprobs is not None:
            completion.logprobs = [self._texts.with_text(step) for step in completion.logprobs]
        if (scored := completion.prompt_logprobs) is not None:
            self._note_prompt(pending, lambda: scored)
        if pending.on_delta is not None:
            stream = pending.stream(completion.index, self._texts)
            pending.on_delta(stream.finish(completion))
        output.outputs.append(completion)
        if len(output.outputs) < params.n:
            return None
        output.outputs.sort(key=lambda sample: sample.index)
        if params.echo:
            self._texts.echo(output)
        return self._pending.pop(completion.request_id).output
