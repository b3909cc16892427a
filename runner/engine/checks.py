"""Which sampling parameters an engine can follow."""

from collections.abc import Collection
from dataclasses import dataclass

from runner.errors import ParameterError, PromptError
from runner.types import Request, SamplingParams


def check_at_least(least: int, **sizes: int | None) -> None:
    """Raises ParameterError where one of the options, by name, is below `least`."""
    for name, size in sizes.items():
        if size is not None and size < least:
            raise ParameterError(f"{name}={size} is not allowed: at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamsCheck:
    """What the options of a request are checked against."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    has_decode: bool
    has_limit: bool
    """Whether the context is limited."""

    def __call__(
        self, params: SamplingParams, bad_words_token_ids: Collection[Collection[int]]
    ) -> None:
        """Raises ParameterError, as `Admission.check_params` says."""
        if params.stop and not self.has_decode:
            raise ParameterError("stop strings need an engine that was given `decode`")
        if params.max_tokens is None and not self.has_limit:
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
            never |= self.eos_token_ids | set(params.stop_token_ids)
        if params.allowed_token_ids and never.issuperset(params.allowed_token_ids):
            what = "what bad_words and min_tokens leave of it is empty"
            raise ParameterError(f"allowed_token_ids={params.allowed_token_ids}: {what}")

    def _check_token_ids(self, name: str, token_ids: Collection[int]) -> None:
        size = self.vocab_size
        if name == "bad_words" and not token_ids:
            raise ParameterError("bad_words holds a word without tokens")
        for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
            if not 0 <= token_id < size:
                raise ParameterError(
                    f"{name} has the token id {token_id}; the vocabulary has 0 to {size - 1}"
                )


def check_prompt(request: Request, vocab_size: int, max_model_len: int | None) -> None:
    """Raises PromptError for a prompt that is empty, too long or not of the vocabulary.

    One that is only scored may fill the context; any other leaves room for a token.
    """
    length = len(request.prompt_token_ids)
    if length == 0:
        raise PromptError("the prompt has no tokens")
    if max_model_len is not None and length + request.needs_row > max_model_len:
        raise PromptError(
            f"the prompt has {length} tokens; the context holds {max_model_len} in all"
        )
    for token_id in request.prompt_token_ids:
        if not 0 <= token_id < vocab_size:
            raise PromptError(f"token id {token_id} is not in the vocabulary of {vocab_size}")
