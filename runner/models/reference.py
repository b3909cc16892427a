"""How a model on the Hugging Face hub is named: `organisation/name@revision:file.gguf`."""

import re
from dataclasses import dataclass

from runner.errors import ModelError, ParameterError

_REFERENCE = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@:\s]+))?(?::(?P<file>[^@:\\]+))?", re.ASCII
)
_SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model on the hub, or one GGUF file of it."""

    repository: str
    """organisation/name."""
    revision: str | None = None
    """Branch, tag or commit; None for the default branch."""
    file: str | None = None
    """Path of a .gguf file in the repository; None for a model of safetensors."""

    @property
    def files(self) -> list[str]:
        """The file with all others that it is split into; none for a model of safetensors."""
        if self.file is None:
            return []
        split = _SPLIT.fullmatch(self.file)
        if split is None:
            return [self.file]
        count = int(split[2])
        return [f"{split[1]}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return self.repository + at + ("" if self.file is None else f":{self.file}")


def parse_reference(path: str, *, revision: str | None = None) -> HubReference:
    """Reads the name of a model on the hub; `revision` is that of an option of its own.

    Raises ModelError for what does not exist here and is no such name, and ParameterError for two
    revisions.
    """
    found = _REFERENCE.fullmatch(path)
    if found is None or _looks_local(found["repository"]):
        if found is not None or _looks_local(path):
            raise ModelError(f"model {path!r} does not exist: give a directory or a .gguf file")
        raise ModelError(
            f"model {path!r} is neither a local path nor a Hugging Face id: an id has the form "
            "organisation/name, organisation/name@revision or organisation/name:file.gguf"
        )
    given, file = found["revision"], found["file"]
    if file is not None and (not file.endswith(".gguf") or ".." in file.split("/")):
        raise ModelError(f"model {path!r} is not covered: after the colon comes a .gguf file")
    if given is not None and revision is not None and given != revision:
        raise ParameterError(f"revision={revision!r} is not allowed for {path!r}, which names one")
    return HubReference(found["repository"], given or revision, file)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.endswith((".gguf", "/")) or path.count("/") > 1
