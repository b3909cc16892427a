"""The rows of a job and which of their columns make the prompt."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from runner.data.locations import open_source
from runner.data.sources import FileSource
from runner.errors import DataError, ParameterError

_PROMPT_OPTIONS = ("prompt_column", "messages_column", "token_ids_column", "prompt_template")


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_list_of(kind: pa.DataType, is_item: Callable[[pa.DataType], bool]) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool((is_list or pa.types.is_fixed_size_list(kind)) and is_item(kind.value_type))


def _is_token_ids(kind: pa.DataType) -> bool:
    return _is_list_of(kind, pa.types.is_integer)


def _is_messages(kind: pa.DataType) -> bool:
    return _is_list_of(kind, pa.types.is_struct)


def _is_prompt(kind: pa.DataType) -> bool:
    return _is_text(kind) or _is_messages(kind)


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


_COLUMN_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "id_column": (_is_id, "text or an integer"),
    "prompt_column": (_is_prompt, "text, or a list of {role, content}"),
    "messages_column": (_is_messages, "a list of {role, content}"),
    "token_ids_column": (_is_token_ids, "a list of integers"),
    "tools_column": (_is_prompt, "a list of JSON schemas, or its text"),
}


class Dataset:
    """Rows as dicts, read lazily, and the options that say how a row becomes a prompt.

    `path` is a .parquet, .jsonl, .jsonl.gz, .arrow or .txt file, a directory or glob of them,
    `pkg://package/file`, or a Hugging Face id (`name` and `split` are for that alone). The same
    rows give the same dicts in every format; a .txt file is one row, or with `text_lines` each of
    its lines. Rows are shuffled first, then `offset` of them are
    skipped and at most `limit` taken. Exactly one of `prompt_column`, `messages_column`,
    `token_ids_column` and `prompt_template` makes the prompt; without any, a column `prompt`,
    `messages` or `text` does, and the attribute is set. A prompt column that holds messages
    becomes `messages_column`.

    Raises `DataError` for rows that cannot be read, `ParameterError` for options that cannot be.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str | None = None,
        id_column: str | None = None,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        token_ids_column: str | None = None,
        prompt_template: str | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools_column: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        shuffle_seed: int | None = None,
        text_lines: bool = False,
    ) -> None:
        self.path = path
        self.name = name
        self.split = split
        self.id_column = id_column
        self.prompt_column = prompt_column
        self.messages_column = messages_column
        self.token_ids_column = token_ids_column
        self.prompt_template = prompt_template
        self.chat = chat
        self.system_prompt = system_prompt
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.tools_column = tools_column
        self.limit = limit
        self.offset = offset
        self.shuffle_seed = shuffle_seed
        self._check_options()
        self._source = open_source(path, name=name, split=split, text_lines=text_lines)
        self.schema: pa.Schema = self._source.schema
        self._check_rows()
        self._choose_prompt()
        self._check_columns()

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.schema.names)

    @property
    def num_rows(self) -> int | None:
        """Rows that iterating yields; None where only reading them all would tell."""
        total = self._source.num_rows
        if total is None:
            return None
        left = max(total - self.offset, 0)
        return left if self.limit is None else min(left, self.limit)

    @property
    def is_local(self) -> bool:
        """Whether the rows lie in files here, so that reading them once more is cheap."""
        return isinstance(self._source, FileSource)

    @property
    def fingerprint(self) -> list[list[Any]] | None:
        """Name, size and time of change of each file; None where there are no local files."""
        return self._source.fingerprint if isinstance(self._source, FileSource) else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields every row as a dict with all columns; may be called again."""
        return self._source.rows(
            offset=self.offset, limit=self.limit, shuffle_seed=self.shuffle_seed
        )

    def _check_options(self) -> None:
        for option in ("limit", "offset", "shuffle_seed"):
            value = getattr(self, option)
            if value is not None and value < 0:
                raise ParameterError(f"{option}={value!r} is not allowed: at least 0")
        given = [option for option in _PROMPT_OPTIONS if getattr(self, option) is not None]
        if len(given) > 1:
            raise ParameterError(f"{' and '.join(given)} exclude each other; give one of them")

    def _check_rows(self) -> None:
        total = self._source.num_rows
        if total == 0:
            raise DataError(f"{self.path}: has no rows")
        if total is not None and self.offset >= total:
            raise DataError(f"{self.path}: offset={self.offset} skips all of its {total} rows")

    def _choose_prompt(self) -> None:
        if all(getattr(self, option) is None for option in _PROMPT_OPTIONS):
            if "prompt" in self.columns:
                self.prompt_column = "prompt"
            elif "messages" in self.columns:
                self.messages_column = "messages"
            elif "text" in self.columns:
                self.prompt_column = "text"
            else:
                raise DataError(
                    f"{self.path}: has no column prompt, messages or text; give one of "
                    f"{', '.join(_PROMPT_OPTIONS)} (columns: {', '.join(self.columns)})"
                )
        column = self.prompt_column
        if column in self.columns and _is_messages(self.schema.field(column).type):
            self.prompt_column, self.messages_column = None, column

    def _check_columns(self) -> None:
        for option, (fits, expected) in _COLUMN_TYPES.items():
            column = getattr(self, option)
            if column is None:
                continue
            if column not in self.columns:
                raise DataError(
                    f"{self.path}: {option}={column!r} is not a column; "
                    f"there are {', '.join(self.columns)}"
                )
            kind = self.schema.field(column).type
            if not fits(kind):
                raise DataError(
                    f"{self.path}: {option}={column!r} has the type {kind}, not {expected}"
                )
