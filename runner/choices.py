"""A row to score -> what is scored in which context -> the columns of its result rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from runner.data import Dataset
from runner.errors import ParameterError, PromptError
from runner.rows import NamedRow, encode_rows
from runner.scores import EncodedPair, Pair, ScoredText, ScoreInput, Tokens, encode_pairs, pairs_of
from runner.types import ErrorInfo, Score

NORMALIZATIONS = ("", "_per_token", "_per_byte")
"""The suffixes of the columns that say what is chosen: by the sum, or by what it is divided by."""


def _is_tokens(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or (_is_list(kind) and pa.types.is_integer(kind.value_type))
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_choices(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_tokens(kind.value_type)


def _is_answer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind))


_COLUMNS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "completion_column": (_is_tokens, "text or a list of token ids"),
    "choices_column": (_is_choices, "a list of texts or of lists of token ids"),
    "answer_column": (_is_answer, "text or an integer"),
}


@dataclass(frozen=True, kw_only=True)
class ScoreColumns:
    """Which columns hold what is scored; without any, it is the prompt itself."""

    completion_column: str | None = None
    choices_column: str | None = None
    answer_column: str | None = None

    def __post_init__(self) -> None:
        if self.completion_column is not None and self.choices_column is not None:
            raise ParameterError("job.completion_column and job.choices_column: give one of them")
        if self.answer_column is not None and self.choices_column is None:
            given = f"job.answer_column={self.answer_column}"
            raise ParameterError(f"{given} is not allowed: an answer is one of job.choices_column")

    def check(self, dataset: Dataset) -> None:
        """Raises ParameterError for a column that is not there or holds something else."""
        for option, (fits, what) in _COLUMNS.items():
            column = getattr(self, option)
            if column is None:
                continue
            there = ", ".join(dataset.columns)
            if column not in dataset.columns:
                raise ParameterError(f"job.{option}={column} is not a column; there are {there}")
            kind = dataset.schema.field(column).type
            if not fits(kind):
                raise ParameterError(f"job.{option}={column} has the type {kind}, not {what}")

    def read(self, rows: Sequence[NamedRow], tokenizer: Any) -> list["ScoredRow"]:
        """What is to be scored of each of some rows; a row without it gets an error."""
        read = [self._read(row) for row in encode_rows(rows, tokenizer)]
        encoded = iter(encode_pairs([pair for row in read for pair in row.pairs], tokenizer))
        for row in read:
            row.take([next(encoded) for _ in row.pairs])
        return read

    def _read(self, row: NamedRow) -> "ScoredRow":
        try:
            return self._planned(row)
        except PromptError as error:
            return ScoredRow(row=row, error=_info(error))

    def _planned(self, row: NamedRow) -> "ScoredRow":
        """A row whose prompt is encoded, with the pairs that are to be."""
        if row.prompt is None or row.encoded is None:
            raise row.error or PromptError("the row has no prompt")
        if isinstance(row.encoded, PromptError):
            raise row.encoded
        text, token_ids = row.encoded
        given: ScoreInput = token_ids
        continuations: list[Any] = [text]
        column = self.completion_column or self.choices_column
        if column is not None:
            continuations = _continuations(row.row[column], column, one=self.choices_column is None)
            # As text where it is one: the tokens are then those of both together.
            given = (token_ids if row.prompt.text is None else row.prompt.text, continuations)
        return ScoredRow(
            row=row,
            pairs=pairs_of(0, given),
            continuations=continuations,
            answer=self._answer(row.row, continuations),
        )

    def _answer(self, row: Mapping[str, Any], choices: Sequence[Any]) -> int | None:
        if self.answer_column is None:
            return None
        value = row[self.answer_column]
        if isinstance(value, int) and 0 <= value < len(choices):
            return value
        if value not in choices:
            what = f"is none of the {len(choices)} choices"
            raise PromptError(f"{self.answer_column}: {value!r} {what}")
        return list(choices).index(value)


def _continuations(value: Any, column: str, *, one: bool) -> list[Tokens]:
    found = [value] if one else list(value or ())
    if not found or any(it is None for it in found):
        what = "null" if one or value is None else "null in it" if found else "empty"
        raise PromptError(f"{column}: the column is {what}")
    return found


@dataclass(slots=True, kw_only=True)
class ScoredRow:
    """One input row, what is scored of it, and the scores that are there."""

    row: NamedRow
    pairs: list[Pair] = field(default_factory=list)
    """What is tokenised to have the texts."""
    texts: list[ScoredText] = field(default_factory=list)
    continuations: list[Any] = field(default_factory=list)
    answer: int | None = None
    error: ErrorInfo | None = None
    scores: dict[int, Score] = field(default_factory=dict)

    def take(self, encoded: Sequence[EncodedPair | PromptError]) -> None:
        """Makes texts of its pairs; they leave, for they are as large."""
        self.pairs = []
        for choice, pair in enumerate(encoded):
            if isinstance(pair, PromptError):
                self.texts, self.error = [], _info(pair)
                return
            self.texts.append(ScoredText(0, choice, *pair, adapter=self.row.adapter))

    @property
    def is_whole(self) -> bool:
        """Whether everything is scored."""
        return len(self.scores) == len(self.texts)

    def results(self) -> list[dict[str, Any]]:
        """The columns of its result rows: one for each continuation."""
        if self.error is not None:
            return [{"choice": 0, "error": asdict(self.error)}]
        rows = [
            _columns(self.scores[choice], text) for choice, text in enumerate(self.continuations)
        ]
        for suffix in NORMALIZATIONS:
            self._choose(rows, "sum_logprob" if not suffix else f"logprob{suffix}", suffix)
        return rows

    def _choose(self, rows: list[dict[str, Any]], column: str, suffix: str) -> None:
        """Marks the likeliest continuation, where all have a number; the first of equals."""
        values = [row.get(column) for row in rows]
        if len(rows) < 2 or None in values:
            return
        best = values.index(max(value for value in values if value is not None))
        for place, row in enumerate(rows):
            row[f"is_chosen{suffix}"] = place == best
        if self.answer is not None:
            rows[self.answer][f"is_correct{suffix}"] = self.answer == best


def _info(error: PromptError) -> ErrorInfo:
    return ErrorInfo(type(error).__name__, str(error))


def _columns(score: Score, text: Any) -> dict[str, Any]:
    """The columns of one continuation, before it is compared with others."""
    shared = {"choice": score.choice, "text": text if isinstance(text, str) else None}
    if score.error is not None:
        return shared | {"error": asdict(score.error)}
    total, count = score.sum_logprob, score.num_tokens
    num_bytes = len(text.encode()) if isinstance(text, str) else 0
    return shared | {
        "token_ids": score.token_ids,
        "logprobs": score.logprobs,
        "sum_logprob": total,
        "num_scored": count,
        "is_greedy": score.is_greedy,
        "logprob_per_token": total / count if count else None,
        "logprob_per_byte": total / num_bytes if num_bytes else None,
    }
