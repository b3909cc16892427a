"""`manifest.json`: which parts of an output directory count, and the options that made them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from runner.data.durable import replace_file
from runner.errors import OutputError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
_NOT_SET = "not set"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One committed file of result rows."""

    file: str
    """Name inside the output directory."""
    rows: int


@dataclass(kw_only=True)
class Manifest:
    """The only truth about an output directory; it is written after what it lists."""

    identity: dict[str, Any]
    """The options that decide results, as JSON values."""
    parts: list[Part] = field(default_factory=list)
    complete: bool = False
    """Set where the job has written every row."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        # Compared with what JSON gives back, where a tuple is a list.
        self.identity = json.loads(json.dumps(self.identity))

    def save(self, directory: Path) -> None:
        """Replaces the manifest of a directory, durably and at once."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        replace_file(directory / MANIFEST_FILE, lambda file: _write(file, text))

    @classmethod
    def load(cls, directory: Path) -> "Manifest | None":
        """Reads the manifest of a directory; None without one, `OutputError` for a broken one."""
        path = directory / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _broken(path, str(error)) from error
        return _parsed(path, content)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Lists the options whose value here is not that of `identity`, as `key: old -> new`."""
        other = Manifest(identity=dict(identity)).identity
        return [
            f"{key}: {_shown(self.identity, key)} -> {_shown(other, key)}"
            for key in sorted(self.identity.keys() | other.keys())
            if _shown(self.identity, key) != _shown(other, key)
        ]


def _write(file: Any, text: str) -> None:
    file.write(text.encode())


def _shown(identity: Mapping[str, Any], key: str) -> str:
    return json.dumps(identity[key], sort_keys=True) if key in identity else _NOT_SET


def _parsed(path: Path, content: Any) -> Manifest:
    names = {item.name for item in fields(Manifest)}
    if not isinstance(content, dict) or content.keys() != names:
        raise _broken(path, f"it does not have the keys {', '.join(sorted(names))}")
    if content["format_version"] != FORMAT_VERSION:
        version = content["format_version"]
        raise OutputError(
            f"{path}: format_version {version!r}, this program knows {FORMAT_VERSION}"
        )
    if not isinstance(content["identity"], dict) or not isinstance(content["complete"], bool):
        raise _broken(path, "identity is not an object or complete not true or false")
    try:
        parts = [_parsed_part(part) for part in content["parts"]]
    except (TypeError, ValueError) as error:
        raise _broken(path, f"parts: {error}") from error
    return Manifest(identity=content["identity"], parts=parts, complete=content["complete"])


def _parsed_part(content: Any) -> Part:
    part = Part(**content)
    if not isinstance(part.file, str) or Path(part.file).name != part.file:
        raise ValueError(f"{part.file!r} is not the name of a file")
    if not isinstance(part.rows, int):
        raise ValueError(f"{part.rows!r} is not a number of rows")
    return part


def _broken(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path}: not a manifest of results ({reason}); choose another directory")
