"""`manifest.jsonl`: which parts of an output directory count, and the options that made them.

The first line is the header. Every other line is one commit, `{"add": [part, ...], "drop": [file,
...]}`, or says whether the job is done, `{"complete": true, "input": ...}`. A line counts once it
ends; what follows the last such line was never committed.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runner.data.durable import append_line, replace_file
from runner.errors import OutputError

MANIFEST_FILE = "manifest.jsonl"
OLD_MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2
_ADVICE = "choose another directory, or output.overwrite=true"
_NOT_SET = "not set"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One committed file of result rows."""

    file: str
    """Name inside the output directory."""
    rows: int
    groups: int
    """Input rows, each with its samples."""
    bytes: int
    digest: str
    """BLAKE2b of the file's content, 16 bytes in hex."""
    totals: dict[str, Any] = field(default_factory=dict)
    """What `runner.data.summary.Totals` counts in it."""


@dataclass(kw_only=True)
class Manifest:
    """The only truth about an output directory; a line is written after what it lists."""

    identity: dict[str, Any]
    """The options that decide results, as JSON values."""
    by_file: dict[str, Part] = field(default_factory=dict)
    """The parts that count by their names, in the order of their commits."""
    complete: bool = False
    """Set where the job has written every row."""
    input: Any = None
    """What the input looked like when the job was complete."""
    next_number: int = 0
    """The number of the next part; none is ever used again."""
    size: int = 0
    """Bytes of the file that count."""

    def __post_init__(self) -> None:
        # Compared with what JSON gives back, where a tuple is a list.
        self.identity = json.loads(json.dumps(self.identity))

    @property
    def parts(self) -> list[Part]:
        """The parts that count, in the order of their commits."""
        return list(self.by_file.values())

    def create(self, directory: Path) -> None:
        """Makes this the manifest of a directory, durably and at once: nothing is in it yet."""
        line = _line({"format_version": FORMAT_VERSION, "identity": self.identity})
        replace_file(directory / MANIFEST_FILE, lambda file: _write(file, line))
        self.size = len(line)

    def commit(self, directory: Path, add: Iterable[Part], drop: Iterable[str] = ()) -> None:
        """Lets files count, and others no longer, all at once and for good."""
        entry = {"add": [asdict(part) for part in add], "drop": list(drop)}
        self._append(directory, entry)

    def finish(self, directory: Path, *, complete: bool, input: Any = None) -> None:
        """Says whether the job has written every row of an input that looked like `input`."""
        self._append(directory, {"complete": complete, "input": input})

    @classmethod
    def load(cls, directory: Path, *, tolerant: bool = False) -> "Manifest | None":
        """Reads the manifest of a directory; None without one.

        A broken one raises OutputError; with `tolerant` it is taken for an empty one.
        """
        path = directory / MANIFEST_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if (directory / OLD_MANIFEST_FILE).exists():
                raise _other_version(directory / OLD_MANIFEST_FILE, 1) from None
            return None
        except OSError as error:
            raise _broken(path, str(error)) from error
        try:
            return _parsed(path, content)
        except OutputError:
            if not tolerant:
                raise
            return cls(identity={})

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Lists the options whose value here is not that of `identity`, as `key: old -> new`."""
        other = Manifest(identity=dict(identity)).identity
        return [
            f"{key}: {_shown(self.identity, key)} -> {_shown(other, key)}"
            for key in sorted(self.identity.keys() | other.keys())
            if _shown(self.identity, key) != _shown(other, key)
        ]

    def _append(self, directory: Path, entry: dict[str, Any]) -> None:
        line = _line(entry)
        append_line(directory / MANIFEST_FILE, line, size=self.size)
        self.apply(entry)
        self.size += len(line)

    def apply(self, entry: Mapping[str, Any]) -> None:
        """Takes in a line after the header; raises ValueError or TypeError for no such line."""
        if entry.keys() == {"complete", "input"} and isinstance(entry["complete"], bool):
            self.complete, self.input = entry["complete"], entry["input"]
            return
        if entry.keys() != {"add", "drop"}:
            raise ValueError(f"a line with the keys {', '.join(sorted(entry))}")
        for part in map(_parsed_part, entry["add"]):
            self.by_file[part.file] = part
            self.next_number = max(self.next_number, part_number(part.file) + 1)
        for name in entry["drop"]:
            self.by_file.pop(name)
        self.complete, self.input = False, None


def part_name(number: int) -> str:
    """The name of the part with a number."""
    return f"part-{number:05d}.arrow"


def part_number(name: str) -> int:
    """The number in the name of a part; raises ValueError for another name."""
    number = int(name.removeprefix("part-").removesuffix(".arrow"))
    if name != part_name(number):
        raise ValueError(f"{name!r} is not the name of a part")
    return number


def _write(file: Any, content: bytes) -> None:
    file.write(content)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _shown(identity: Mapping[str, Any], key: str) -> str:
    return json.dumps(identity[key], sort_keys=True) if key in identity else _NOT_SET


def _parsed(path: Path, content: bytes) -> Manifest:
    # What a crash tore has no end of line, or bytes that never reached the disk.
    lines = content.split(b"\n")[:-1]
    while len(lines) > 1 and _is_torn(lines[-1]):
        lines.pop()
    try:
        manifest = _parsed_header(path, json.loads(lines[0]))
        for line in lines[1:]:
            manifest.apply(json.loads(line))
    except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise _broken(path, f"{type(error).__name__}: {error}") from error
    manifest.size = sum(len(line) + 1 for line in lines)
    return manifest


def _is_torn(line: bytes) -> bool:
    with suppress(ValueError):
        json.loads(line)
        return False
    return True


def _parsed_header(path: Path, header: Any) -> Manifest:
    if isinstance(header, dict) and header.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise _other_version(path, header["format_version"])
    if not isinstance(header, dict) or header.keys() != {"format_version", "identity"}:
        raise ValueError("its first line is not a header with format_version and identity")
    if not isinstance(header["identity"], dict):
        raise ValueError("identity is not an object")
    return Manifest(identity=header["identity"])


def _parsed_part(content: Any) -> Part:
    part = Part(**content)
    part_number(part.file)
    for name, kind in ((item.name, item.type) for item in fields(Part)):
        value = getattr(part, name)
        if kind in (int, str) and type(value) is not kind:
            raise ValueError(f"{name}={value!r} of a part is not of type {kind.__name__}")
    return part


def _broken(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path}: not a manifest of results ({reason}); {_ADVICE}")


def _other_version(path: Path, version: Any) -> OutputError:
    return OutputError(
        f"{path}: format_version {version!r}, this program knows {FORMAT_VERSION}; {_ADVICE}"
    )
