"""OpenAI's batch files: a request per line in, an answer or an error per line out."""

import codecs
import gzip
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from runner.data.digests import DigestCounts
from runner.errors import DataError

_KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """A request that is whole as far as the line goes; its body is for others to judge."""

    id: str
    """`batch_req_…`, a digest of the custom_id and of what is asked: never of the line's place."""
    custom_id: str
    url: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that is no request, and why, in the words of OpenAI's validation."""

    id: str
    custom_id: str | None
    number: int
    """The line's place in the file, from 1."""
    code: str
    message: str
    param: str | None = None

    @property
    def answer(self) -> dict[str, Any]:
        """What stands in the file of errors."""
        told = {"code": self.code, "message": self.message, "param": self.param}
        error = told | {"line": self.number}
        return answer_line(self.id, self.custom_id, response=None, error=error)


class _Refusal(Exception):
    """Why a line is no request: code, message and param of its error."""


class BatchFile:
    """A batch file that can be read any number of times, a line at a time.

    Reading holds a digest of each custom_id and of each bad line. Raises `DataError` for a path
    that is no .jsonl or .jsonl.gz file.
    """

    def __init__(self, path: str, *, urls: tuple[str, ...]) -> None:
        """`urls` are those that a line may name."""
        self.path = Path(path).expanduser()
        self._urls = urls
        if not self.path.name.endswith((".jsonl", ".jsonl.gz")):
            raise DataError(f"{path}: a batch file is a .jsonl or .jsonl.gz file")
        if not self.path.is_file():
            raise DataError(f"{path}: no such file")

    def __iter__(self) -> Iterator[BatchLine | BadLine]:
        """Yields every line that is not blank; of lines with one custom_id, the first counts."""
        seen, bad = DigestCounts(), DigestCounts()
        for number, raw in self._lines():
            custom_id: str | None = None
            try:
                content = _parsed(raw)
                custom_id = _custom_id(content)
                line = self._checked(content, custom_id)
                if seen.add(_digest(custom_id.encode())):
                    what = f"The custom_id {custom_id!r} is that of another line."
                    raise _Refusal("duplicate_custom_id", what, "custom_id")
                yield line
            except _Refusal as refusal:
                # Named by what stands there, and by how often it stood there before.
                content_digest = _digest(b"bad", raw.strip())
                place = str(bad.add(content_digest)).encode()
                code, message, param = refusal.args
                yield BadLine(
                    id=_request_id(_digest(content_digest, place)),
                    custom_id=custom_id,
                    number=number,
                    code=code,
                    message=message,
                    param=param,
                )

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        try:
            with cast(BinaryIO, opener(self.path, "rb")) as file:
                for number, line in enumerate(file, start=1):
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if line.strip():
                        yield number, line
        except (OSError, EOFError) as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from error

    def _checked(self, content: dict[str, Any], custom_id: str) -> BatchLine:
        method, url, body = (content.get(key) for key in _KEYS[1:])
        if unknown := sorted(content.keys() - set(_KEYS)):
            what = f"Unknown parameter: {unknown[0]!r}; a line has {', '.join(_KEYS)}."
            raise _Refusal("unknown_parameter", what, unknown[0])
        if method != "POST":
            raise _Refusal("invalid_method", f"The method is {method!r}, not 'POST'.", "method")
        if url not in self._urls:
            what = f"The url is {url!r}, not one of {', '.join(self._urls)}."
            raise _Refusal("invalid_url", what, "url")
        if not isinstance(body, dict):
            raise _Refusal("invalid_request", "The body is not an object.", "body")
        asked = {"custom_id": custom_id, "url": url, "body": body}
        digest = _digest(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode())
        return BatchLine(id=_request_id(digest), custom_id=custom_id, url=url, body=body)


def answer_line(
    id: str,
    custom_id: str | None,
    *,
    response: Mapping[str, Any] | None,
    error: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A line of the output file or the error file."""
    return {"id": id, "custom_id": custom_id, "response": response, "error": error}


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode(), parse_constant=_not_json, parse_float=_finite)
        # A lone half of a surrogate pair is JSON, but no text that could be tokenised.
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        what = f"The line is not valid JSON: {error}"
        raise _Refusal("invalid_json_line", what, None) from error
    if not isinstance(content, dict):
        raise _Refusal("invalid_json_line", "The line is not a JSON object.", None)
    return content


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond what a number can be")
    return number


def _custom_id(content: Mapping[str, Any]) -> str:
    custom_id = content.get("custom_id")
    if custom_id is None:
        what = "Missing required parameter: 'custom_id'."
        raise _Refusal("missing_required_parameter", what, "custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        what = f"The custom_id is {custom_id!r}, not a string of at least one character."
        raise _Refusal("invalid_type", what, "custom_id")
    return custom_id


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _request_id(digest: bytes) -> str:
    return f"batch_req_{digest.hex()}"
