"""Texts and continuations -> token ids to score -> scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from runner.encoding import Text, encode_texts, in_batches
from runner.errors import ParameterError, PromptError
from runner.types import (
    ErrorInfo,
    Prompt,
    PromptRequest,
    RequestOutput,
    SamplingParams,
    Score,
)

Tokens: TypeAlias = str | Sequence[int]
"""A text, or its token ids."""

ScoreInput: TypeAlias = Tokens | tuple[Tokens, Tokens | Sequence[Tokens]]
"""What to score: a text, or the continuation, or each of a list of them, of a context."""


@dataclass(frozen=True, slots=True)
class ScoredText:
    """One sequence of tokens, of which the first `num_context` are not scored."""

    index: int
    choice: int
    token_ids: list[int]
    num_context: int
    adapter: str | None = None
    """The name of the adapter that it is scored with."""

    @property
    def request_id(self) -> str:
        """Names the text among all that are scored together."""
        return f"{self.index}/{self.choice}"

    @property
    def scored_ids(self) -> list[int]:
        """The tokens without their context."""
        return self.token_ids[self.num_context :]

    def request(self, *, num_top: int, entropy: bool) -> PromptRequest | RequestOutput:
        """What an `LLM` runs to score it; the output of one that has nothing to score."""
        if not self.scored_ids:
            what = "continuation has no tokens of its own" if self.token_ids else "text is empty"
            return RequestOutput(
                request_id=self.request_id,
                prompt=None,
                prompt_token_ids=self.token_ids,
                error=ErrorInfo("PromptError", f"nothing to score: the {what}"),
            )
        return PromptRequest(
            request_id=self.request_id,
            prompt=Prompt(token_ids=self.token_ids),
            params=SamplingParams(max_tokens=0, prompt_logprobs=num_top),
            key=self.request_id,
            logprobs_start=max(1, self.num_context),
            prompt_entropy=entropy,
            adapter=self.adapter,
        )

    def score(self, output: RequestOutput) -> Score:
        """The scores that came out of the request."""
        error, given = output.error, output.prompt_token_logprobs
        if error is None and any(sample.finish_reason == "error" for sample in output.outputs):
            error = ErrorInfo("ModelOutputError", "a logprob of the model's is not a number")
        if error is not None or given is None:
            return Score(
                index=self.index, choice=self.choice, token_ids=self.scored_ids, error=error
            )
        # Nothing precedes the first token of a text; the first of a continuation has its context.
        first: list[None] = [None] * (given.start - self.num_context)
        alternatives = [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(given.top_token_ids, given.top_logprobs, strict=True)
        ]
        return Score(
            index=self.index,
            choice=self.choice,
            token_ids=self.scored_ids,
            logprobs=[*first, *given.logprobs],
            ranks=[*first, *given.ranks],
            entropies=None if given.entropies is None else [*first, *given.entropies],
            top_logprobs=[*first, *alternatives] if any(alternatives) else None,
        )


def scored_texts(inputs: Sequence[ScoreInput], tokenizer: Any) -> list[ScoredText]:
    """Tokenises what is to be scored, in order, each continuation of a context on its own.

    Raises ParameterError for what is neither text nor token ids nor a pair of them, and
    PromptError for a text that cannot be encoded.
    """
    texts = []
    placed = (
        (index, choice, pair)
        for index, given in enumerate(inputs)
        for choice, pair in enumerate(pairs_of(index, given))
    )
    for batch in in_batches(placed, lambda it: it[2].length):
        encoded = iter(encode_pairs([pair for _, _, pair in batch], tokenizer))
        for index, choice, _ in batch:
            found = next(encoded)
            if isinstance(found, PromptError):
                raise found
            texts.append(ScoredText(index, choice, *found))
    return texts


def pairs_of(index: int, given: Any) -> list["Pair"]:
    """What is scored of an input, the place of which is told where it is no `ScoreInput`."""
    if _is_tokens(given):
        return [Pair(None, given)]
    context, choices = _pair(index, given)
    return [Pair(context, continuation) for continuation in choices]


def _pair(index: int, given: Any) -> tuple[Tokens, Sequence[Tokens]]:
    """A context and its continuations."""
    if isinstance(given, tuple) and len(given) == 2 and _is_tokens(given[0]):
        context, continuation = given
        choices = [continuation] if _is_tokens(continuation) else continuation
        if isinstance(choices, Sequence) and all(map(_is_tokens, choices)):
            return context, choices
    what = "a text, token ids, or a tuple of a context and its continuation or a list of them"
    raise ParameterError(f"input {index} cannot be scored: {given!r:.60} is not {what}")


def _is_tokens(given: Any) -> bool:
    if isinstance(given, str):
        return True
    return isinstance(given, Sequence) and all(type(item) is int for item in given)


@dataclass(frozen=True, slots=True)
class Pair:
    """A continuation that is scored in a context, or a text by itself."""

    context: Tokens | None
    continuation: Tokens

    @property
    def length(self) -> int:
        """Characters, or token ids: about how much there is to encode."""
        return len(self.context or ()) + len(self.continuation)

    @property
    def texts(self) -> tuple[Text | Sequence[int], Text | Sequence[int]]:
        """What is tokenised: the context by itself, and what follows it or both together."""
        context, continuation = self.context, self.continuation
        if isinstance(context, str) and isinstance(continuation, str):
            return Text(context.rstrip()), Text(context + continuation)
        return _as_text(() if context is None else context), _as_text(
            continuation, special=context is None
        )

    def encoded(self, before: list[int], rest: list[int]) -> "EncodedPair":
        """The token ids of all, and how many are the context's, from those of its `texts`."""
        is_one_text = isinstance(self.context, str) and isinstance(self.continuation, str)
        return (rest if is_one_text else before + rest), len(before)


def _as_text(tokens: Tokens, *, special: bool = True) -> Text | Sequence[int]:
    return Text(tokens, special) if isinstance(tokens, str) else tokens


EncodedPair: TypeAlias = tuple[list[int], int]
"""The token ids of all, and how many of them are the context's."""


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any) -> list[EncodedPair | PromptError]:
    """Returns for each pair the token ids of both together, and how many are the context's.

    The rule of EleutherAI's lm-evaluation-harness (`TemplateLM._encode_pair`): spaces at the end of
    the context go to the continuation, the two are tokenised as one text, and the context has as
    many of the tokens as it has by itself. Where a text cannot be encoded, there is the error.
    """
    # The continuations of a context share it.
    texts = list(dict.fromkeys(it for pair in pairs for it in pair.texts if isinstance(it, Text)))
    known = dict(zip(texts, encode_texts(texts, tokenizer), strict=True))
    found: list[EncodedPair | PromptError] = []
    for pair in pairs:
        parts = [known[it] if isinstance(it, Text) else list(it) for it in pair.texts]
        before, rest = parts
        if isinstance(before, PromptError):
            found.append(before)
        elif isinstance(rest, PromptError):
            found.append(rest)
        else:
            found.append(pair.encoded(before, rest))
    return found


def in_order_of_work(texts: Sequence[ScoredText]) -> list[ScoredText]:
    """Longest first, for little padding; the continuations of a context beside each other."""
    contexts = [tuple(text.token_ids[: text.num_context]) for text in texts]
    longest: dict[tuple[int, ...], int] = {}
    for text, context in zip(texts, contexts, strict=True):
        longest[context] = max(len(text.token_ids), longest.get(context, 0))

    def key(place: int) -> tuple[int, tuple[int, ...], int, int]:
        length = len(texts[place].token_ids)
        most = longest[contexts[place]] if contexts[place] else length
        return -most, contexts[place], -length, place

    return [texts[place] for place in sorted(range(len(texts)), key=key)]
