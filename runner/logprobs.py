"""Log-probabilities of tokens, as requests give them back; standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token in the model's own distribution (before temperature)."""

    logprob: float
    """Natural logarithm, computed in float32."""
    rank: int | None = None
    """1 for the most likely token of the vocabulary."""
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of given tokens in the model's own distribution, an entry for each.

    All of them natural logarithms, computed in float32.
    """

    start: int
    """The first token's place in its prompt."""
    logprobs: list[float]
    ranks: list[int]
    """1 for the most likely token of the vocabulary."""
    top_token_ids: list[list[int]]
    """The most likely tokens in the same place, as many as were asked for, best first."""
    top_logprobs: list[list[float]]
    entropies: list[float] | None = None
    """In nats, of the distribution that the token is from; None where not asked for."""

    def with_nulls(self) -> list[float | None]:
        """The logprobs, an entry per token of the prompt, null for those before `start`."""
        return [*[None] * self.start, *self.logprobs]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokens:
    """The tokens of a text, an entry for each."""

    token_ids: list[int]
    logprobs: list[float | None]
    """In the model's own distribution, float32; None for one that nothing precedes, and for those
    of a prompt that were not asked for."""
    text_offsets: list[int]
    """Where it begins in the text, in characters, never beyond the text's end. Tokens that share a
    character begin where it does; one that the text leaves out, as it does special ones and what
    ended the row, where the next one does."""
