"""`lora.watch`: takes each new adapter of a directory into a run, between two steps."""

import time
import warnings
from pathlib import Path

from runner.errors import AdapterError
from runner.llm import LLM
from runner.models.adapters import CONFIG_FILE, MLX_FILE, PEFT_FILE

_SECONDS = 0.2
"""Between two looks; what is the same in both is taken to be written whole."""

_Signature = tuple[tuple[str, int, int], ...]


class AdapterWatch:
    """Follows a directory that is an adapter, or has adapters in it, of which the newest serves."""

    def __init__(self, directory: str, name: str) -> None:
        self._directory = Path(directory).expanduser()
        self._name = name
        self._seen: _Signature = ()
        self._taken: _Signature = ()
        self._looked = 0.0

    def start(self, llm: LLM) -> None:
        """Loads the newest adapter; raises AdapterError where there is none, or it does not fit."""
        newest = self._newest()
        if newest is None:
            raise AdapterError(f"lora.watch={str(self._directory)!r} has no adapter yet")
        self._seen = self._taken = newest
        llm.load_adapter(self._name, Path(newest[0][0]).parent)

    def look(self, llm: LLM, mode: str) -> None:
        """Takes in a new adapter, once it has stood unchanged; says so where it cannot be used."""
        if time.monotonic() - self._looked < _SECONDS:
            return
        self._looked = time.monotonic()
        newest = self._newest() or self._taken
        is_whole, self._seen = newest == self._seen, newest
        if newest == self._taken or not is_whole:
            return
        self._taken = newest
        try:
            llm.load_adapter(self._name, Path(newest[0][0]).parent, mode=mode)  # type: ignore[arg-type]
        except AdapterError as error:
            warnings.warn(f"lora.watch goes on with the adapter of before: {error}", stacklevel=2)

    def _newest(self) -> _Signature | None:
        """The files of the adapter that was written last: their paths, times and sizes."""
        found = []
        for config in (
            *self._directory.glob(CONFIG_FILE),
            *self._directory.glob(f"*/{CONFIG_FILE}"),
        ):
            files = [config, config.with_name(MLX_FILE), config.with_name(PEFT_FILE)]
            try:
                stats = [(str(it), it.stat()) for it in files if it.is_file()]
            except FileNotFoundError:  # It is being replaced.
                continue
            if len(stats) > 1:
                found.append(tuple((name, it.st_mtime_ns, it.st_size) for name, it in stats))
        return max(found, key=lambda files: max(it[1] for it in files), default=None)
