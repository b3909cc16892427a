"""The nouns that every part of the package shares: plain dataclasses, standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from runner.errors import ParameterError

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `role`, `content` and whatever else the model's chat template reads."""


def _as_tuple(value: Any, item: type) -> tuple[Any, ...]:
    return (value,) if isinstance(value, item) else tuple(value or ())


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample the completions of one prompt; the words and defaults are vLLM's."""

    n: int = 1
    """Completions per prompt; they share one prefill."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keeps the smallest set of most likely tokens with at least this mass; 1 keeps all."""
    top_k: int = 0
    """Keeps the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drops tokens less likely than this fraction of the most likely one; 0 keeps all."""
    max_tokens: int | None = 16
    """Tokens per completion at most; None fills the context."""
    seed: int | None = None
    """Seed of the draws; None takes the seed of the `LLM`."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, also when they straddle tokens; a str or a list of str."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion, besides the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Goes on past the model's end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """Leaves the stop string at the end of `text`."""
    skip_special_tokens: bool = True
    """Leaves special tokens out of `text`; the token ids always hold them."""
    logprobs: int | None = None
    """Alternatives per token in `Completion.logprobs`; 0 gives the sampled token alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop, str))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids, int))
        most = self.max_tokens
        checks = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "at least 1, or 0 or -1 to keep all"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("max_tokens", most is None or most >= 1, "at least 1, or null to fill the context"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "between 0 and 100"),
            ("stop", "" not in self.stop, "strings of at least one character"),
        )
        for name, allowed, what in checks:
            if not allowed:
                raise ParameterError(f"{name}={getattr(self, name)!r} is not allowed: {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a row asks: text, chat messages or token ids, exactly one of them."""

    text: str | None = None
    messages: Sequence[Message] | None = None
    """Goes through the model's chat template, with a generation prompt at its end."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.text, self.messages, self.token_ids)]
        assert sum(given) == 1, "a prompt is text, messages or token ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One prompt and how to sample from it: the unit that an `LLM` takes."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    key: str
    """With the seed and the sample index, decides every random draw of the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt in token ids and how to sample from it: the unit that the engine takes."""

    request_id: str
    """Names the request in what comes back; unique among those in flight."""
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    key: str
    """With `params.seed` and the sample index, decides every random draw of the request."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token in the model's own distribution (before temperature)."""

    logprob: float
    """Natural logarithm, computed in float32."""
    rank: int | None = None
    """1 for the most likely token of the vocabulary."""
    decoded_token: str | None = None


@dataclass(slots=True, kw_only=True)
class Completion:
    """One finished sample of a request."""

    request_id: str
    index: int
    """Which of the request's n samples this is, from 0."""
    token_ids: list[int]
    """Every sampled token, the one that ended the row included."""
    raw_logprobs: list[float]
    """Per token, float32: log-probability in the model's own distribution."""
    processed_logprobs: list[float]
    """Per token, float32: log-probability in the distribution that was sampled from, after
    temperature and truncation; at temperature 0, that of the model at temperature 1."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Where `SamplingParams.logprobs` asks: per token, the sampled one and the alternatives."""
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended the row; None for end of sequence and length."""
    text: str = ""

    @property
    def cumulative_logprob(self) -> float:
        """Sum of `raw_logprobs`."""
        return sum(self.raw_logprobs)


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """Why a row could not be done, as it stands in the `error` column."""

    type: str
    message: str


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All samples of one request, in order of their index."""

    request_id: str
    prompt: str | None
    """The text that was tokenised; None where the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    error: ErrorInfo | None = None
    """Set where the request could not be run; `outputs` is then empty."""
    finished: bool = True
