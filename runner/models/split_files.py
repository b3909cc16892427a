"""The parts of a `.gguf` file that is split: `name-00001-of-00003.gguf` and its like."""

import re
from pathlib import Path

_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")


def split_parts(path: Path) -> list[Path]:
    """Returns every part, there or not, of what `path` is a part of; `path` where it is whole."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    names = [
        f"{found['stem']}-{number + 1:05}-of-{found['count']}.gguf"
        for number in range(int(found["count"]))
    ]
    return [path.with_name(name) for name in names]
