"""API keys: who may ask, told apart without telling anybody which keys there are."""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from runner.errors import ParameterError

VARIABLE = "RUNNER_API_KEYS"
"""The environment variable with keys, a comma between two."""
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]+")
"""What a header can hold without a space, and what is no comma."""
_SHOWN = 12
"""Characters of a key's digest that tell it apart."""


class ApiKeys:
    """The keys that a server takes; with none, everybody may ask."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raises ParameterError for a key that no header can hold; it does not show it."""
        listed = list(keys)
        for place, key in enumerate(listed, start=1):
            if not _KEY.fullmatch(key):
                what = "a key is printable ASCII without spaces or commas"
                raise ParameterError(f"API key {place} of {len(listed)} is not allowed: {what}")
        self._digests = [_digest(key.encode()) for key in listed]

    @classmethod
    def of(cls, environment: Mapping[str, str], path: str | None) -> "ApiKeys":
        """Those of the environment and those of a file, one a line.

        Raises ParameterError where either is given and has none.
        """
        keys: list[str] = []
        if VARIABLE in environment:
            found = [part.strip() for part in environment[VARIABLE].split(",")]
            keys += _some(VARIABLE, found)
        if path is not None:
            name = f"server.api_key_file={path}"
            try:
                lines = Path(path).expanduser().read_text().splitlines()
            except (OSError, UnicodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is no text"
                raise ParameterError(f"{name} cannot be read: {why}") from None
            keys += _some(name, [line.strip() for line in lines])
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, authorization: bytes) -> str | None:
        """What a log may show of the key in an `Authorization` header; None where it is none.

        It takes as long for whichever key is given, right or wrong.
        """
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip() if scheme.lower() == b"bearer" else b"")
        found = [hmac.compare_digest(digest, given) for digest in self._digests]
        return given.hex()[:_SHOWN] if any(found) else None


def _digest(key: bytes) -> bytes:
    # Of digests, which are all of one length, a comparison does not even tell the key's.
    return hashlib.sha256(key).digest()


def _some(source: str, found: Iterable[str]) -> list[str]:
    keys = [key for key in found if key]
    if not keys:
        raise ParameterError(f"{source} has no key in it: give one, or leave it out")
    return keys
