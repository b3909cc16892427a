"""Documents -> streams of tokens -> windows to score -> each document's own logprobs."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import fsum
from typing import Any

from runner.perplexity import Definition, Window, windows
from runner.rows import NamedRow, encode_rows
from runner.scores import ScoredText
from runner.types import ErrorInfo, Score


@dataclass(slots=True, kw_only=True)
class Document:
    """One input row, and what is known of it so far."""

    row: NamedRow
    text: str | None = None
    token_ids: list[int] = field(default_factory=list)
    error: ErrorInfo | None = None
    is_wanted: bool = True
    """Whether it has no result yet; another one is context for those that have none."""
    start: int = 0
    """The place of its first token in the stream."""
    logprobs: list[float | None] = field(default_factory=list)
    num_missing: int = 0
    """Windows that have not been scored."""

    @property
    def end(self) -> int:
        """The place after its last token."""
        return self.start + len(self.token_ids)

    def result(self, definition: Definition) -> dict[str, Any]:
        """The columns of its result row."""
        if self.error is not None:
            return {"error": asdict(self.error)}
        scored = [logprob for logprob in self.logprobs if logprob is not None]
        has_text = self.text is not None
        return {
            "token_ids": self.token_ids,
            "logprobs": self.logprobs,
            "sum_logprob": fsum(scored),
            "num_scored": len(scored),
            "num_tokens": len(self.token_ids),
            "num_words": definition.count_words(self.text or "") if has_text else None,
            "num_bytes": len((self.text or "").encode()) if has_text else None,
        }


def read_documents(
    rows: Sequence[NamedRow], tokenizer: Any, *, is_done: Callable[[NamedRow], bool]
) -> list[Document]:
    """Tokenises rows without special tokens; one that has no tokens gets an error."""
    found = encode_rows(rows, tokenizer, special=False)
    return [_document(row, is_wanted=not is_done(row)) for row in found]


def _document(row: NamedRow, *, is_wanted: bool) -> Document:
    encoded = row.error if row.encoded is None else row.encoded
    if isinstance(encoded, tuple):
        text, token_ids = encoded
        return Document(row=row, text=text, token_ids=token_ids, is_wanted=is_wanted)
    info = ErrorInfo(type(encoded).__name__, str(encoded))
    return Document(row=row, error=info, is_wanted=is_wanted)


class Stream:
    """The tokens that are cut into windows: those of one document, or of several."""

    def __init__(self, index: int, documents: Iterable[Document], definition: Definition) -> None:
        self._index = index
        self._definition = definition
        self._token_ids: list[int] = []
        self.documents = [document for document in documents if document.error is None]
        self._adapter = self.documents[0].row.adapter if self.documents else None
        prefix = definition.prefix_token_id
        for document in self.documents:
            # llama.cpp tokenises all text at once, which is to have one prefix.
            is_first = not self._token_ids or not definition.is_llama_cpp
            if prefix is not None and is_first:
                self._token_ids.append(prefix)
            document.start = len(self._token_ids)
            document.logprobs = [None] * len(document.token_ids)
            self._token_ids += document.token_ids
        self._starts = [document.start for document in self.documents]
        self._windows = list(windows(len(self._token_ids), definition))
        for window in self._windows:
            for document in self._within(window):
                document.num_missing += 1

    def texts(self) -> Iterator[ScoredText]:
        """The windows that hold tokens of documents without a result."""
        for number, window in enumerate(self._windows):
            if any(document.is_wanted for document in self._within(window)):
                token_ids = self._token_ids[window.start : window.end]
                if self._definition.is_llama_cpp and self._definition.prefix_token_id is not None:
                    token_ids[0] = self._definition.prefix_token_id
                num_context = window.first - window.start
                yield ScoredText(self._index, number, token_ids, num_context, self._adapter)

    def take(self, score: Score) -> list[Document]:
        """Gives the scores of a window to its documents; those that are whole by that."""
        window, done = self._windows[score.choice], []
        for document in self._within(window):
            document.num_missing -= 1
            if score.error is not None:
                document.error = document.error or score.error
            else:
                first, end = max(window.first, document.start), min(window.end, document.end)
                values = score.logprobs[first - window.first : end - window.first]
                document.logprobs[first - document.start : end - document.start] = values
            if document.num_missing == 0 and document.is_wanted:
                done.append(document)
        return done

    def _within(self, window: Window) -> list[Document]:
        """The documents that have tokens among those that a window scores."""
        place = max(0, bisect_right(self._starts, window.first) - 1)
        found = []
        while place < len(self.documents) and self.documents[place].start < window.end:
            if self.documents[place].end > window.first:
                found.append(self.documents[place])
            place += 1
        return found
