"""The nouns that every part of the package shares: plain dataclasses, standard library only."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from runner.errors import ParameterError, PromptError
from runner.logprobs import Logprob as Logprob
from runner.logprobs import TextTokens as TextTokens
from runner.logprobs import TokenLogprobs as TokenLogprobs

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]

Pooling: TypeAlias = Literal["mean", "last"]
"""Which hidden states make the embedding of a text: the mean over its tokens, or the last token's.
They are those that the projection onto the vocabulary reads, after the final norm."""

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `role`, `content` and whatever else the model's chat template reads."""


def _as_tuple(value: Any, item: type) -> tuple[Any, ...]:
    return (value,) if isinstance(value, item) else tuple(value or ())


def _as_logit_bias(given: Any) -> dict[int, float]:
    """Ids as int, also where JSON or YAML made them str; raises ParameterError for another."""
    try:
        biases = {int(token_id): float(bias) for token_id, bias in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        what = "a number for each token id"
        raise ParameterError(f"logit_bias={given!r} is not allowed: {what}") from error
    if len(biases) < len(given):
        raise ParameterError(f"logit_bias={given!r} is not allowed: an id comes twice")
    return biases


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
    """Tokens per completion at most; None fills the context, 0 only scores the prompt."""
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
    prompt_logprobs: int | None = None
    """Alternatives per prompt token in `RequestOutput.prompt_logprobs`; 0 gives the prompt's tokens
    alone. Of the model's own distribution, whatever the other options say."""
    echo: bool = False
    """Puts the prompt before the completion in `Completion.text`, and says in `Completion.echoed`
    where the tokens of both are in it; where `logprobs` asks, the prompt's own come as well."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that the prompt or the completion holds, and multiplies
    the negative ones; 1 changes nothing."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion holds."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens once for each time that the completion holds them."""
    logit_bias: Mapping[int, float] | None = None
    """Token id -> what is added to its logit; the id may be written as a str."""
    min_tokens: int = 0
    """Tokens before the first that may end a completion; max_tokens and the context still do."""
    bad_words: tuple[str, ...] = ()
    """Words that a completion never holds, at its start or after a space, as far as they are
    tokenised alike there; a str or a list of str."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only token ids that a completion may hold; None allows all."""

    def __post_init__(self) -> None:
        for name, item in (("stop", str), ("stop_token_ids", int), ("bad_words", str)):
            object.__setattr__(self, name, _as_tuple(getattr(self, name), item))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _as_tuple(self.allowed_token_ids, int))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _as_logit_bias(self.logit_bias))
        for name, allowed, what in (*self._checks(), *self._logits_checks()):
            if not allowed:
                raise ParameterError(f"{name}={getattr(self, name)!r} is not allowed: {what}")

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Like `prompt_logprobs`, with those that `echo` asks for by itself."""
        if self.prompt_logprobs is not None or not self.echo:
            return self.prompt_logprobs
        # To sample nothing is to score the prompt.
        return 0 if self.logprobs is None and self.max_tokens == 0 else self.logprobs

    def _checks(self) -> Iterable[tuple[str, bool, str]]:
        """Each field with whether its value is allowed, and what is."""
        most, wanted = self.max_tokens, self.prompt_logprobs
        only_scores = most == 0 and self.num_prompt_logprobs is not None
        some = "at least 1, null to fill the context, or 0 beside prompt_logprobs or echo"
        return (
            ("n", self.n == 1 or (self.n > 1 and most != 0), "at least 1, and 1 for max_tokens=0"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "at least 0 and finite"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "at least 1, or 0 or -1 to keep all"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("max_tokens", most is None or most >= 1 or only_scores, some),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "between 0 and 100"),
            ("prompt_logprobs", wanted is None or 0 <= wanted <= 100, "between 0 and 100"),
            ("stop", "" not in self.stop, "strings of at least one character"),
        )

    def _logits_checks(self) -> Iterable[tuple[str, bool, str]]:
        """Like `_checks`, for the fields that change the logits."""
        repetition, biases = self.repetition_penalty, (self.logit_bias or {}).values()
        allowed, most = self.allowed_token_ids, self.max_tokens
        in_range = self.min_tokens >= 0 and (most is None or self.min_tokens <= most)
        return (
            ("repetition_penalty", 0.0 < repetition < float("inf"), "above 0 and finite"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("logit_bias", all(-100 <= it <= 100 for it in biases), "between -100 and 100 each"),
            ("min_tokens", in_range, "at least 0 and at most max_tokens"),
            ("bad_words", all(word.strip() for word in self.bad_words), "words, not blanks alone"),
            ("allowed_token_ids", allowed != (), "at least one id, or null to allow all"),
        )


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

    @property
    def length(self) -> int:
        """Characters, or token ids: about how much there is to encode."""
        if self.messages is not None:
            return sum(len(str(message.get("content") or "")) for message in self.messages)
        return len(self.token_ids or self.text or "")


Encoded: TypeAlias = tuple[str | None, list[int]]
"""The text that was tokenised, None for token ids, and the token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One prompt and how to sample from it: the unit that an `LLM` takes."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    key: str
    """With the seed and the sample index, decides every random draw of the request."""
    logprobs_start: int = 1
    """Where `params.prompt_logprobs` asks: the first prompt token that is scored."""
    prompt_entropy: bool = False
    """Where `params.prompt_logprobs` asks: the entropies as well."""
    adapter: str | None = None
    """The name of a loaded adapter; None for the model as it is."""
    pooling: Pooling | None = None
    """Asks for an embedding of the prompt in place of completions and logprobs."""
    priority: int = 0
    """Lower goes first, where requests are taken in the order of their arrival."""
    encoded: Encoded | PromptError | None = None
    """What `encode_prompts` gives of the prompt, where that is known already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt in token ids and how to sample from it: the unit that the engine takes."""

    request_id: str
    """Names the request in what comes back; unique among those in flight."""
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    key: str
    """With `params.seed` and the sample index, decides every random draw of the request."""
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    """`params.bad_words`, tokenised: the last id of each may not follow the ones before it."""
    logprobs_start: int = 1
    """Where `params.prompt_logprobs` asks: the first prompt token that is scored; what comes before
    it is context, which requests that begin alike share."""
    prompt_entropy: bool = False
    """Where `params.prompt_logprobs` asks: the entropies as well."""
    adapter: str | None = None
    """The name of a loaded adapter; None for the model as it is."""
    pooling: Pooling | None = None
    """Asks for an embedding of the prompt in place of completions and logprobs."""
    priority: int = 0
    """Lower goes first, where requests are taken in the order of their arrival."""

    def __post_init__(self) -> None:
        length = len(self.prompt_token_ids)
        assert 1 <= self.logprobs_start <= max(1, length), "nothing precedes a prompt's first token"

    @property
    def is_scored(self) -> bool:
        """Whether logprobs of prompt tokens are wanted."""
        return self.params.prompt_logprobs is not None and self.pooling is None

    @property
    def needs_row(self) -> bool:
        """Whether anything is to be sampled."""
        return self.params.max_tokens != 0 and self.pooling is None

    @property
    def num_scored(self) -> int:
        """Prompt tokens whose logprob is wanted."""
        return len(self.prompt_token_ids) - self.logprobs_start if self.is_scored else 0

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens that are prefilled: all but the last, which is a row's first to decode and
        is scored before it is forwarded; of a pooled prompt all."""
        return len(self.prompt_token_ids) - (self.pooling is None)

    @property
    def num_context(self) -> int:
        """Prompt tokens that have to be in the cache only: of those nobody reads what comes out."""
        if self.pooling == "mean":
            return 0
        return self.logprobs_start - 1 if self.is_scored else len(self.prompt_token_ids) - 1


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """Why a row could not be done, as it stands in the `error` column."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """The tokens of a completion, `start` to `end`, that one version of the weights gave."""

    version: int
    """Counts the changes of weights since the `LLM` was made: 0 is before the first."""
    start: int
    end: int


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
    penalties, biases, temperature and truncation; at temperature 0, after penalties and biases."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Where `SamplingParams.logprobs` asks: per token, the sampled one and the alternatives."""
    prompt_logprobs: TokenLogprobs | None = None
    """Where `SamplingParams.prompt_logprobs` asks: those of the prompt that the samples share."""
    embedding: list[float] | None = None
    """Where `PromptRequest.pooling` asks: the pooled hidden states, float32, not normalised."""
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended the row; None for end of sequence and length."""
    text: str = ""
    """Without special tokens and what ended it, unless asked for; behind the prompt with `echo`."""
    echoed: TextTokens | None = None
    """Where `SamplingParams.echo` asks: the tokens of `text`, the prompt's first. The other fields
    are about the completion's own tokens. Both are decoded apart, also where a character begins in
    the one and ends in the other."""
    num_drafted: int = 0
    """Tokens that were guessed ahead of the model."""
    num_accepted: int = 0
    """Those of them that the model then drew itself."""
    error: ErrorInfo | None = None
    """Why, where `finish_reason` is error."""
    adapter: str | None = None
    adapter_digest: str | None = None
    """Names the content of the adapter; where it was swapped on the way, that of the last token."""
    weight_versions: list[WeightSpan] = field(default_factory=list)
    """Which weights gave which tokens, in order. Where they were swapped before the first token,
    the first span is empty: of the version that has read the prompt."""

    @property
    def cumulative_logprob(self) -> float:
        """Sum of `raw_logprobs`."""
        return sum(self.raw_logprobs)


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All samples of one request, in order of their index."""

    request_id: str
    prompt: str | None
    """The text that was tokenised; None where the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Where `SamplingParams.prompt_logprobs` asks: per prompt token, itself and the alternatives;
    None for the first, which nothing precedes."""
    prompt_token_logprobs: TokenLogprobs | None = None
    """The same as plain lists."""
    error: ErrorInfo | None = None
    """Set where the request could not be run; `outputs` is then empty."""
    adapter: str | None = None
    """The name of the adapter that was asked for."""
    finished: bool = True

    @property
    def num_useful_tokens(self) -> int:
        """Tokens that were sampled, or else those of the prompt that were scored or embedded."""
        sampled = sum(len(sample.token_ids) for sample in self.outputs)
        scored = self.prompt_token_logprobs
        if any(sample.embedding is not None for sample in self.outputs):
            return len(self.prompt_token_ids)
        return sampled or (len(scored.logprobs) if scored is not None else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The log-probabilities of a text, or of a continuation of its context.

    In the model's own distribution (natural logarithm, computed in float32), given all tokens that
    come before. A list has an entry per token; one that nothing precedes has None.
    """

    index: int
    """The place of the text, or of its context, in what was given."""
    choice: int = 0
    """Which of the context's continuations this is."""
    token_ids: list[int]
    """What is scored: the context's own tokens are not there."""
    logprobs: list[float | None] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    """1 for the most likely token of the vocabulary."""
    entropies: list[float | None] | None = None
    """In nats, of the distribution that each token is from; None where not asked for."""
    top_logprobs: list[dict[int, float] | None] | None = None
    """The most likely tokens in each place, best first; None where not asked for."""
    error: ErrorInfo | None = None
    """Set where the text could not be scored; the lists are then empty."""

    @property
    def num_tokens(self) -> int:
        """Tokens that have a logprob."""
        return sum(logprob is not None for logprob in self.logprobs)

    @property
    def sum_logprob(self) -> float:
        """Sum of the logprobs: the log-likelihood."""
        return math.fsum(logprob for logprob in self.logprobs if logprob is not None)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one in its place."""
        return all(rank in (None, 1) for rank in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A text as a vector: hidden states of its tokens, pooled."""

    index: int
    """The text's place in what was given."""
    num_tokens: int
    """Tokens of the text, special ones included."""
    vector: list[float] = field(default_factory=list)
    """float32; of length 1 (L2) unless asked for otherwise. Empty where there is an error."""
    error: ErrorInfo | None = None
    """Set where the text could not be embedded."""
