"""Texts and continuations -> token ids to score -> scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from runner.errors import ParameterError
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

    Raises ParameterError for what is neither text nor token ids nor a pair of them.
    """
    texts = []
    for index, given in enumerate(inputs):
        if _is_tokens(given):
            texts.append(ScoredText(index, 0, _encode(given, tokenizer), 0))
            continue
        context, choices = _pair(index, given)
        for choice, continuation in enumerate(choices):
            whole, num_context = encode_pair(context, continuation, tokenizer)
            texts.append(ScoredText(index, choice, whole, num_context))
    return texts


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


def _encode(given: Any, tokenizer: Any, *, special: bool = True) -> list[int]:
    if not isinstance(given, str):
        return list(given)
    return list(tokenizer.encode(given, add_special_tokens=special))


def encode_pair(context: Tokens, continuation: Tokens, tokenizer: Any) -> tuple[list[int], int]:
    """Returns the token ids of both together, and how many of them are the context's.

    The rule of EleutherAI's lm-evaluation-harness (`TemplateLM._encode_pair`): spaces at the end of
    the context go to the continuation, the two are tokenised as one text, and the context has as
    many of the tokens as it has by itself.
    """
    if not isinstance(context, str) or not isinstance(continuation, str):
        before = _encode(context, tokenizer)
        return before + _encode(continuation, tokenizer, special=False), len(before)
    stripped = context.rstrip()
    whole = _encode(context + continuation, tokenizer)
    return whole, len(_encode(stripped, tokenizer))


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
