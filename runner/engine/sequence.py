"""A sequence: one sample of a request while it is in flight, one row of the batch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isfinite, isnan

from runner.engine.lora import Adapter
from runner.engine.stop import Decode, StopStringMatcher
from runner.types import (
    Completion,
    ErrorInfo,
    FinishReason,
    Logprob,
    Request,
    SamplingParams,
    TokenLogprobs,
    WeightSpan,
)

_NAN = "a logprob is not a number: the model's own, or the options left no token"


def stream_key(seed: int, key: str, index: int) -> int:
    """The 64-bit key of a sample's random stream: a digest, so that rows never share a stream."""
    digest = blake2b(f"{seed}/{index}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def num_columns(request: Request, max_model_len: int | None) -> int:
    """Most tokens of prompt and completion together that a sample of `request` can have."""
    most, length = request.params.max_tokens, len(request.prompt_token_ids)
    limits = [length + most if most is not None else None, max_model_len]
    return min(limit for limit in limits if limit is not None)


@dataclass(frozen=True, slots=True)
class Draw:
    """What one step gave one row."""

    token_id: int
    raw_logprob: float
    processed_logprob: float
    logprobs: dict[int, Logprob] | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A row in flight: what was asked, what was sampled so far, and where it stands."""

    request: Request
    index: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int] = frozenset()
    """The model's own, also where `ignore_eos` leaves them out of `stop_token_ids`."""
    stop_matcher: StopStringMatcher | None = None
    prompt_logprobs: Callable[[], TokenLogprobs] | None = None
    """Reads the prompt's logprobs off the device, where they are wanted and there."""
    embedding: Callable[[], list[float]] | None = None
    """Reads the prompt's embedding off the device, where it is wanted and there."""
    adapter: Adapter | None = None
    versions: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    """Weight versions, each with the first token that it gave."""
    row: int = -1
    num_launched: int = 0
    """Forwards launched for this row; `token_ids` lags it by those not yet read."""
    token_ids: list[int] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    processed_logprobs: list[float] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: ErrorInfo | None = None
    stream: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1 or not self.request.needs_row, "a row samples a token"
        assert self.request.params.seed is not None, "the seed is settled before the engine"
        self.stream = stream_key(self.request.params.seed, self.request.key, self.index)

    @property
    def position(self) -> int:
        """The column that the next forward of this row writes."""
        return len(self.request.prompt_token_ids) - 1 + self.num_launched

    @property
    def last_token_id(self) -> int:
        """What the next forward of this row starts with, where everything launched is read."""
        return self.token_ids[-1] if self.token_ids else self.request.prompt_token_ids[-1]

    @property
    def num_columns(self) -> int:
        """The most columns that this row comes to fill."""
        return len(self.request.prompt_token_ids) + self.max_tokens

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """What min_tokens holds back; as in vLLM also the end of sequence that is ignored."""
        return self.stop_token_ids | self.eos_token_ids

    @property
    def wants_forward(self) -> bool:
        """Whether this row has a token left to sample, as far as the launches tell."""
        return self.finish_reason is None and self.num_launched < self.max_tokens

    def push(self, draw: Draw) -> None:
        """Adds a sampled token, and finishes the row where it ends it."""
        self.token_ids.append(draw.token_id)
        self.raw_logprobs.append(draw.raw_logprob)
        self.processed_logprobs.append(draw.processed_logprob)
        if draw.logprobs is not None:
            self.logprobs.append(draw.logprobs)
        self._check_end(draw)

    def _check_end(self, draw: Draw) -> None:
        params = self.request.params
        stop = self.stop_matcher.push(draw.token_id) if self.stop_matcher else None
        if isnan(draw.raw_logprob) or isnan(draw.processed_logprob):
            self.fail(ErrorInfo("ModelOutputError", _NAN))
        elif draw.token_id in self.stop_token_ids:
            self.finish_reason = "stop"
            if draw.token_id in params.stop_token_ids:
                self.stop_reason = draw.token_id
        elif stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        elif len(self.token_ids) == self.max_tokens:
            self.finish_reason = "length"

    def go_on_under(self, adapter: Adapter | None, version: int) -> None:
        """Lets other weights give the tokens that are not launched yet."""
        self.adapter = adapter
        # The first one stays: it has read the prompt.
        if len(self.versions) > 1 and self.versions[-1][1] == self.num_launched:
            self.versions.pop()
        self.versions.append((version, self.num_launched))

    def _weight_versions(self) -> list[WeightSpan]:
        """The versions of the tokens that there are, after that which read the prompt."""
        length = len(self.token_ids)
        spans = [it for place, it in enumerate(self.versions) if place == 0 or it[1] < length]
        ends = [*(start for _, start in spans[1:]), length]
        return [WeightSpan(*span, end) for span, end in zip(spans, ends, strict=True)]

    def fail(self, error: ErrorInfo) -> None:
        """Ends the row with an error."""
        self.finish_reason, self.error = "error", error

    def completion(self) -> Completion:
        """The finished sample."""
        assert self.finish_reason is not None, "only a finished sequence is a completion"
        prompt_logprobs = self.prompt_logprobs() if self.prompt_logprobs is not None else None
        if prompt_logprobs is not None and any(map(isnan, prompt_logprobs.logprobs)):
            self.finish_reason = "error"
        embedding = self.embedding() if self.embedding is not None else None
        if embedding is not None and not all(map(isfinite, embedding)):
            self.fail(ErrorInfo("ModelOutputError", "the embedding holds what is not a number"))
        return Completion(
            request_id=self.request.request_id,
            index=self.index,
            token_ids=self.token_ids,
            raw_logprobs=self.raw_logprobs,
            processed_logprobs=self.processed_logprobs,
            logprobs=self.logprobs if self.request.params.logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            embedding=embedding,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            adapter=self.request.adapter,
            adapter_digest=None if self.adapter is None else self.adapter.digest,
            weight_versions=self._weight_versions(),
        )


@dataclass(frozen=True, slots=True)
class SequenceFactory:
    """Makes the sequences of one engine."""

    eos_token_ids: frozenset[int]
    max_model_len: int | None
    decode: Decode | None

    def __call__(
        self,
        request: Request,
        index: int,
        *,
        prompt_logprobs: Callable[[], TokenLogprobs] | None = None,
        embedding: Callable[[], list[float]] | None = None,
        adapter: Adapter | None = None,
        versions: Iterable[int] = (0,),
    ) -> Sequence:
        """A sample of `request`, with nothing sampled yet."""
        params = request.params
        stop_token_ids = frozenset(params.stop_token_ids)
        return Sequence(
            request,
            index,
            max_tokens=num_columns(request, self.max_model_len) - len(request.prompt_token_ids),
            stop_token_ids=stop_token_ids
            | (frozenset() if params.ignore_eos else self.eos_token_ids),
            eos_token_ids=self.eos_token_ids,
            stop_matcher=self._matcher(params),
            prompt_logprobs=prompt_logprobs,
            embedding=embedding,
            adapter=adapter,
            versions=[(version, 0) for version in versions],
        )

    def failed(
        self, left: Iterable[tuple[Request, list[int]]], error: ErrorInfo
    ) -> list[Completion]:
        """The end of samples, by request, that cannot be run."""
        sequences = [self(request, index) for request, indices in left for index in indices]
        for sequence in sequences:
            sequence.fail(error)
        return [sequence.completion() for sequence in sequences]

    def _matcher(self, params: SamplingParams) -> StopStringMatcher | None:
        if not params.stop:
            return None
        assert self.decode is not None, "checked when the request was added"
        return StopStringMatcher(
            params.stop,
            self.decode,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
