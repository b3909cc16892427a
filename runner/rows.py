"""The identity of an input row: what it holds and how it is sampled, never its place."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from runner.data import Dataset
from runner.data.digests import DigestCounts, RowIds, digest
from runner.errors import DataError, PromptError
from runner.prompts import PromptBuilder, encode_prompts, prompt_digest
from runner.types import Encoded, Prompt, SamplingParams

Row = Mapping[str, Any]
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRow:
    """An input row with its identity, and its prompt or why it has none."""

    row: Row
    row_id: str
    key: str
    """Decides its random draws, so that they are the same at any temperature."""
    prompt: Prompt | None
    error: PromptError | None = None
    adapter: str | None = None
    """The name of the adapter that it is run with."""
    encoded: Encoded | PromptError | None = None
    """What `encode_prompts` gives of the prompt, once that is known."""


class RowNamer:
    """Names rows by the id column, or by a digest of all they hold and an occurrence number.

    The digest covers every column, the prompt made of them and the sampling parameters that are
    not the default. So rows that are inserted, removed or reordered change the name of no other
    row: two rows that share a name but for the occurrence are alike in everything. A row whose
    columns change is another row. `adapters` says which a row is run with, by name: each of
    several makes a row, the name behind an @. Without `are_unique`, ids are checked as they come.
    """

    def __init__(
        self,
        dataset: Dataset,
        params: SamplingParams,
        *,
        are_unique: bool,
        adapters: Callable[[Row], Sequence[str | None]] = lambda row: [None],
    ) -> None:
        self._dataset = dataset
        self._prompts = prompt_builder(dataset)
        self._params = _json(_deciding(params)).encode()
        self._are_unique = are_unique
        self._adapters = adapters

    def __iter__(self) -> Iterator[NamedRow]:
        """Reads the data from the start; raises DataError where an id does not name one row."""
        seen = DigestCounts()
        for number, row in enumerate(self._dataset, start=1):
            prompt: Prompt | None = None
            error: PromptError | None = None
            try:
                prompt = self._prompts(row)
            except PromptError as failure:
                error = failure
            row_id, key = self._names(number, row, prompt, seen)
            names = self._adapters(row)
            for name in names:
                # A row that is run with several adapters draws alike with each of them.
                own_id = row_id if len(names) == 1 else f"{row_id}@{name or ''}"
                yield NamedRow(
                    row=row, row_id=own_id, key=key, prompt=prompt, error=error, adapter=name
                )

    def _names(
        self, number: int, row: Row, prompt: Prompt | None, seen: DigestCounts
    ) -> tuple[str, str]:
        column = self._dataset.id_column
        if column is not None:
            name = str(row[column])
            is_again = not self._are_unique and seen.add(digest(name.encode())) > 0
            if row[column] is None or is_again:
                what = "is null" if row[column] is None else f"is {name!r}, as an earlier one is"
                raise DataError(f"id_column={column}: row {number} {what}; give each its own")
            return name, name
        content = digest(f"{prompt and prompt_digest(prompt)}{_json(row)}".encode())
        occurrence = seen.add(content)
        row_id = digest(content + self._params).hex()
        return f"{row_id}-{occurrence}", f"{content.hex()}-{occurrence}"


def encode_rows(
    rows: Sequence[NamedRow], tokenizer: Any, *, special: bool = True
) -> list[NamedRow]:
    """Encodes the prompts of rows as `encode_prompts` does; those without one stay as they are."""
    prompts = [row.prompt for row in rows if row.prompt is not None]
    encoded = iter(encode_prompts(prompts, tokenizer, special=special))
    return [row if row.prompt is None else replace(row, encoded=next(encoded)) for row in rows]


def check_ids(dataset: Dataset) -> None:
    """Raises DataError that shows rows which share an id, or have none, by id and row number.

    Reads the data once, and once more to find the other row of each pair.
    """
    column, seen = dataset.id_column, DigestCounts()
    assert column is not None, "there are ids to check"
    empty: list[int] = []
    repeated: dict[str, list[int]] = {}
    for number, row in enumerate(dataset, start=1):
        name = str(row[column])
        if row[column] is None:
            empty.append(number)
        elif seen.add(digest(name.encode())):
            repeated.setdefault(name, []).append(number)
    if empty:
        raise DataError(f"id_column={column}: null in {_listed('row', empty)}; give each its own")
    if repeated:
        raise DataError(_repetition(dataset, column, repeated))


def _repetition(dataset: Dataset, column: str, repeated: dict[str, list[int]]) -> str:
    shown = list(repeated)[:_SHOWN]
    firsts: dict[str, int] = {}
    for number, row in enumerate(dataset, start=1):
        if (name := str(row[column])) in shown:
            firsts.setdefault(name, number)
    texts = [f"{name!r} names {_listed('row', [firsts[name], *repeated[name]])}" for name in shown]
    more = f"; and {len(repeated) - _SHOWN} more" if len(repeated) > _SHOWN else ""
    return f"id_column={column}: {'; '.join(texts)}{more}; give each row its own"


def _listed(noun: str, numbers: list[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    plural = "s" if len(numbers) > 1 else ""
    return f"{noun}{plural} {', '.join(map(str, numbers[:_SHOWN]))}{more}"


def corpus_digest(rows: Iterable[Row]) -> str:
    """Names rows by all they hold and their order."""
    found = b""
    for row in rows:
        found = digest(found + _json(row).encode())
    return found.hex()


def prompt_builder(dataset: Dataset) -> PromptBuilder:
    """What makes the prompts of a dataset's rows."""
    return PromptBuilder(
        prompt_column=dataset.prompt_column,
        messages_column=dataset.messages_column,
        token_ids_column=dataset.token_ids_column,
        template=dataset.prompt_template,
        chat=dataset.chat,
        system_prompt=dataset.system_prompt,
        chat_template_kwargs=dataset.chat_template_kwargs,
        tools_column=dataset.tools_column,
    )


def _deciding(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not the default: a new one leaves the names of rows as they are."""
    given = {
        it.name: getattr(params, it.name) for it in fields(params) if it.default is not MISSING
    }
    defaults = {it.name: it.default for it in fields(params)}
    decide_nothing = {"logprobs"}
    return {k: v for k, v in given.items() if k not in decide_nothing and v != defaults[k]}


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)


def are_done(rows: Iterable[NamedRow], done: RowIds) -> bool:
    """Whether every row is among those that are done."""
    return all(row.row_id in done for row in rows)
