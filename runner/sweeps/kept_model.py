"""One loaded model that runs share, one after the other."""

import gc
from typing import Any

from runner.models.digest import model_digest
from runner.models.hub import resolve_model
from runner.models.load import LoadedModel, load_model


class KeptModel:
    """Loads as `load_model` does, and keeps what it loaded last.

    The same files under the same options are not read again; other ones are read once the model
    before is gone, so that two are never in memory together.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._loaded: LoadedModel | None = None

    def load(
        self, path: str, *, trust_remote_code: bool = False, check_fit: Any = None, **options: Any
    ) -> LoadedModel:
        """A model and its tokenizer; the options and errors are those of `load_model`.

        `check_fit` is asked before one is read, and not about one that was kept.
        """
        import mlx.core as mx

        # The engine of the run before refers to itself: without this its caches would stay.
        gc.collect()
        place = {"revision": options.pop("revision", None), "trust_remote_code": trust_remote_code}
        digest = model_digest(resolve_model(path, **place))
        key = (path, *sorted(place.items()), *sorted(options.items()), digest)
        if self._loaded is None or key != self._key:
            self._key = self._loaded = None
            gc.collect()
            mx.clear_cache()
            self._loaded = load_model(path, **place, **options, check_fit=check_fit)
            self._key = key
        # Each run says how much memory it took, not what those before it did.
        mx.reset_peak_memory()
        return self._loaded
