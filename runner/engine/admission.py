"""What an engine takes, and how much of it at once: policy over counters, without arrays."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runner.engine.checks import ParamsCheck, check_prompt
from runner.engine.memory import MemoryBudget
from runner.engine.model_runner import ModelRunner
from runner.engine.scheduler import FreeRows
from runner.engine.sequence import Sequence as Row
from runner.engine.sequence import num_columns
from runner.engine.stop import Decode
from runner.errors import ParameterError, PromptError
from runner.types import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Admission:
    """The limits of one engine."""

    runner: ModelRunner
    memory: MemoryBudget
    eos_token_ids: frozenset[int]
    max_model_len: int | None
    """Tokens of prompt and completion together; None for no limit."""
    has_decode: bool

    @classmethod
    def of(
        cls,
        runner: ModelRunner,
        memory: MemoryBudget,
        max_model_len: int | None,
        eos_token_ids: Collection[int],
        decode: Decode | None,
    ) -> "Admission":
        """Those of an engine with these parts."""
        # A tokenizer may name one that the model cannot give; min_tokens would scatter to it.
        eos = frozenset(i for i in eos_token_ids if i < runner.vocab_size)
        return cls(runner, memory, eos, max_model_len, has_decode=decode is not None)

    @property
    def vocab_size(self) -> int:
        """Token ids that there are."""
        return self.runner.vocab_size

    @property
    def embedding_size(self) -> int:
        """Components of an embedding; raises ModelError where the model gives none."""
        return self.runner.head.size

    def check(self, request: Request) -> None:
        """Raises PromptError or ParameterError for a request that cannot be run, or not whole; or
        ModelError for one of an embedding, where the model gives none."""
        length, most = len(request.prompt_token_ids), self.max_model_len
        check_prompt(request, self.vocab_size, most)
        if request.pooling is not None:
            _ = self.embedding_size  # Raises where there is none.
        if request.params.max_tokens is not None or most is not None:
            columns = num_columns(request, most)
            if shortage := self.memory.shortage(columns):
                what = f"{length} tokens of prompt and up to {columns - length} of completion"
                raise PromptError(f"{what} {shortage}")
        self.check_params(request.params, request.bad_words_token_ids)

    def check_params(
        self, params: SamplingParams, bad_words_token_ids: Collection[Collection[int]]
    ) -> None:
        """Raises ParameterError for what no request can ask.

        That is stop strings without a `decode`, no limit at all, bad words that are not tokenised,
        token ids that the vocabulary does not have, options that leave no token to sample, and a
        max_tokens that the memory budget does not hold.
        """
        check = ParamsCheck(
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            has_decode=self.has_decode,
            has_limit=self.max_model_len is not None,
        )
        check(params, bad_words_token_ids)
        most = [self.max_model_len, None if params.max_tokens is None else params.max_tokens + 1]
        if shortage := self.memory.shortage(min(limit for limit in most if limit is not None)):
            raise ParameterError(f"max_tokens={params.max_tokens} is not allowed: a row {shortage}")

    def free_rows(self, rows: Sequence[Row], max_batch_size: int) -> FreeRows:
        """How many could start beside `rows`, by the columns that the longest of them comes to."""
        most = max((row.num_columns for row in rows), default=0)
        return lambda columns: self.max_rows(max(columns, most), max_batch_size) - len(rows)

    def max_rows(self, num_columns: int, max_batch_size: int) -> int:
        """Rows of up to `num_columns` that may run together."""
        return min(max_batch_size, self.memory.max_rows(num_columns))
