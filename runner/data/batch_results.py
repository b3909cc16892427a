"""The directory of an OpenAI batch: answers and errors in two append-only files."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.data.digests import DigestCounts, RowIds
from runner.data.durable import replace_file, stopping
from runner.data.line_log import LineLog
from runner.data.lock import DirectoryLock
from runner.data.openai_batch import BadLine, BatchFile, BatchLine
from runner.errors import DataError, OutputError

OUTPUT_FILE = "output.jsonl"
ERROR_FILE = "errors.jsonl"
BATCH_FILE = "batch.json"
_FORMAT_VERSION = 1

_COMMIT_LINES = 64
_COMMIT_SECONDS = 2.0

_OWN_LINE = re.compile(
    rb'\{"id": "batch_req_([0-9a-f]{32})", "custom_id": (null|"(?:[^"\\]|\\.)*"), '
)
"""How every line of ours begins; the rest of an answer need not be parsed to know whose it is."""


class BatchResults:
    """Answers to a batch file, each of them there once, however often the job was killed.

    `identity` holds the flat options that decide answers. A directory of the same identity is
    continued; another one raises `OutputError`. Lines are told apart by what they ask under which
    custom_id, so that the input may be extended, cut or put in another order. The error of a
    malformed line is as final as an answer: mended, it is another line, of its own.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        # As JSON gives it back, where a tuple is a list.
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self.num_answers = 0
        self.errors: Counter[str] = Counter()
        """Lines of the error file by their code."""
        self._done = DigestCounts()
        self._custom_ids = RowIds()
        self._logs = {name: LineLog(directory / name) for name in (OUTPUT_FILE, ERROR_FILE)}
        self._num_waiting = 0
        self._committed = time.monotonic()
        self._lock = DirectoryLock(directory)
        self._lock.check()
        before = self._identity_there()
        self._read()
        differences = _differences(before, self._identity)
        if self.num_lines and differences:
            raise OutputError(
                f"{directory}: holds answers of other options ({'; '.join(differences)}); "
                "choose another directory or the same options"
            )

    @property
    def num_lines(self) -> int:
        """Lines of both files."""
        return self.num_answers + self.errors.total()

    def is_done(self, line: BatchLine | BadLine) -> bool:
        """Whether a line has its answer or error; `DataError` for another question under a
        custom_id that was answered."""
        if self._done.get(bytes.fromhex(line.id.rpartition("_")[2])):
            return True
        if isinstance(line, BatchLine) and line.custom_id in self._custom_ids:
            raise DataError(
                f"custom_id {line.custom_id!r}: {self.directory} has the answer to another body "
                "or url; choose another directory or another custom_id"
            )
        return False

    def count(self, batch: BatchFile) -> tuple[int, int]:
        """Lines of a batch file, and those of them that are done."""
        total = done = 0
        for line in batch:
            total += 1
            done += self.is_done(line)
        if not total:
            raise DataError(f"{batch.path}: has no lines")
        return total, done

    def start(self) -> None:
        """Claims the directory; until then nothing is written.

        Raises OutputError where another process is in it, StoppedError where the disk refuses.
        """
        self._lock.acquire()
        for log in self._logs.values():
            log.open()
        content = {"format_version": _FORMAT_VERSION, "identity": self._identity}
        self.save(BATCH_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")
        self.commit()

    def save(self, name: str, text: str) -> None:
        """Writes a file whole or not at all; raises StoppedError where the disk refuses."""
        with stopping(self.directory):
            replace_file(self.directory / name, lambda file: _write(file, text))

    def write(self, answer: Mapping[str, Any]) -> bool:
        """Takes a line, an error if it says so; whether it was time to commit."""
        error = answer["error"]
        # ASCII: of the other ends of line that Unicode has, no reader sees one in the middle.
        line = json.dumps(answer, allow_nan=False).encode()
        self._logs[ERROR_FILE if error else OUTPUT_FILE].append(line)
        if error:
            self.errors[error["code"]] += 1
        else:
            self.num_answers += 1
        self._num_waiting += 1
        waited = time.monotonic() - self._committed
        is_time = self._num_waiting >= _COMMIT_LINES or waited >= _COMMIT_SECONDS
        if is_time:
            self.commit()
        return is_time

    def commit(self) -> None:
        """Makes what was written survive whatever comes."""
        for log in self._logs.values():
            log.commit()
        self._num_waiting, self._committed = 0, time.monotonic()

    def close(self) -> None:
        """Commits, and lets go of the directory."""
        try:
            for log in self._logs.values():
                log.close()
        finally:
            self._lock.release()

    def _read(self) -> None:
        for custom_id, _ in self._own_lines(OUTPUT_FILE):
            self.num_answers += 1
            self._custom_ids.update([json.loads(custom_id)])
        for _, line in self._own_lines(ERROR_FILE):
            answer = json.loads(line)
            self.errors[answer["error"]["code"]] += 1
            # A bad line does not claim its custom_id, which may be that of another line.
            if answer["response"] is not None:
                self._custom_ids.update([answer["custom_id"]])

    def _own_lines(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """The custom_id, as JSON, and the whole of each line; their ids are taken as done."""
        for number, line in enumerate(self._logs[name].read(), start=1):
            found = _OWN_LINE.match(line)
            if found is None:
                where = f"{self.directory / name}, line {number}"
                raise OutputError(f"{where}: not a line of this job; choose another directory")
            self._done.add(bytes.fromhex(found[1].decode()))
            yield found[2], line

    def _identity_there(self) -> dict[str, Any]:
        path = self.directory / BATCH_FILE
        if there := [*self.directory.glob("manifest.json*"), *self.directory.glob("part-*")]:
            raise OutputError(f"{there[0]}: holds results of another job; choose another directory")
        try:
            content = json.loads(path.read_bytes())
            version, identity = content["format_version"], dict(content["identity"])
        except FileNotFoundError:
            self._check_no_files()
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}: not a batch of this program ({error})") from error
        if version != _FORMAT_VERSION:
            raise OutputError(f"{path}: format_version {version!r}, not {_FORMAT_VERSION}")
        return identity

    def _check_no_files(self) -> None:
        """The files are opened before `batch.json` is there, and may be empty then."""
        for log in self._logs.values():
            if log.path.exists() and log.path.stat().st_size:
                raise OutputError(
                    f"{log.path}: is there without {BATCH_FILE}; choose another directory"
                )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    shown = [
        {key: json.dumps(value, sort_keys=True) for key, value in identity.items()}
        for identity in (before, now)
    ]
    keys = sorted(before.keys() | now.keys())
    pairs = [(key, *(one.get(key, "not set") for one in shown)) for key in keys]
    return [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]


def _write(file: Any, text: str) -> None:
    file.write(text.encode())
