"""The options that change what layers keep of keys and values: coarser entries, fewer columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runner.engine.cache_list import ListKind
from runner.engine.kv_cache import KVKind
from runner.engine.kv_segments import Quantization
from runner.engine.layer_cache import LayerKind
from runner.errors import ParameterError

NUM_KEPT = 4
"""First tokens of a row that `max_kv_size` never drops, as in mlx-lm: much attention goes there."""

_BITS = (2, 3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVOptions:
    """What `EngineConfig` says of keys and values, under the same names; checked when made.

    Raises:
        ParameterError: a value is not allowed, or would have no effect.
    """

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    max_kv_size: int | None = None
    num_spare: int = 0
    """Tokens that may be drafted behind a row's next one; see `KVKind`."""

    def __post_init__(self) -> None:
        least = NUM_KEPT + 1
        if self.kv_bits not in (None, *_BITS):
            raise _refused("kv_bits", self.kv_bits, f"null, {_listed(_BITS)}")
        if self.kv_group_size not in _GROUP_SIZES:
            raise _refused("kv_group_size", self.kv_group_size, _listed(_GROUP_SIZES))
        if self.quantized_kv_start < 0:
            raise _refused("quantized_kv_start", self.quantized_kv_start, "at least 0")
        if self.max_kv_size is not None and self.max_kv_size < least:
            what = f"null or at least {least}, the first {NUM_KEPT} tokens and one more"
            raise _refused("max_kv_size", self.max_kv_size, what)
        for name, default in (("kv_group_size", 64), ("quantized_kv_start", 0)):
            if self.kv_bits is None and getattr(self, name) != default:
                raise _refused(name, getattr(self, name), f"{default} where kv_bits is null")

    def with_spare(self, num_spare: int) -> "KVOptions":
        """The same with at least so many spare columns."""
        return replace(self, num_spare=max(self.num_spare, num_spare))

    def applied(self, kinds: Sequence[LayerKind]) -> list[LayerKind]:
        """The kinds of a model's layers, changed as the options say.

        Keys and values beside recurrent states are changed, the states never; nor are layers that
        keep keys and values twice.

        Raises:
            ParameterError: an option has no layer to act on, or `kv_group_size` does not divide.
        """
        for name in ("max_kv_size", "kv_bits"):
            if getattr(self, name) is not None and not any(_attention(kind) for kind in kinds):
                what = "null, since no layer of this model keeps keys and values, and that once"
                raise _refused(name, getattr(self, name), what)
        if self.kv_bits is not None:
            self._check_dims(kinds)
        changed = [self._changed(kind) for kind in kinds]
        return [self._spared(kind) for kind in changed] if self.num_spare else changed

    def _spared(self, kind: LayerKind) -> LayerKind:
        if isinstance(kind, ListKind):
            return ListKind(tuple(self._spared(part) for part in kind.parts))
        return replace(kind, num_spare=self.num_spare) if isinstance(kind, KVKind) else kind

    def _changed(self, kind: LayerKind) -> LayerKind:
        if not _attention(kind):
            return kind
        if isinstance(kind, ListKind):
            return ListKind(tuple(self._changed(part) for part in kind.parts))
        assert isinstance(kind, KVKind), "nothing else keeps keys and values"
        return self._quantized(self._bounded(kind))

    def _bounded(self, kind: KVKind) -> KVKind:
        if self.max_kv_size is None:
            return kind
        if kind.window is not None:
            return replace(kind, window=min(kind.window, self.max_kv_size))
        return replace(kind, window=self.max_kv_size - NUM_KEPT, kept=NUM_KEPT)

    def _quantized(self, kind: KVKind) -> KVKind:
        if self.kv_bits is None:
            return kind
        how = Quantization(self.kv_bits, self.kv_group_size, self.quantized_kv_start)
        return replace(kind, quantization=how)

    def _check_dims(self, kinds: Sequence[LayerKind]) -> None:
        dims = [
            (index, name, dim)
            for index, kind in enumerate(kinds)
            for part in _attention(kind)
            for name, (_, dim) in (("keys", part.key_shape), ("values", part.value_shape))
        ]
        allowed = [size for size in _GROUP_SIZES if all(dim % size == 0 for *_, dim in dims)]
        what = _listed(allowed) if allowed else "no size is, so that kv_bits has to be null"
        for index, name, dim in dims:
            if dim % self.kv_group_size:
                reason = f"it has to divide {dim}, the dim of the {name} of layer {index}"
                raise _refused("kv_group_size", self.kv_group_size, f"{what}; {reason}")


def _attention(kind: LayerKind) -> list[KVKind]:
    """The part of a layer that keeps keys and values, or none where several do or nothing does.

    Of several, one may hold what the layer picks the columns of another by (deepseek_v32).
    """
    if isinstance(kind, ListKind):
        parts = [found for part in kind.parts for found in _attention(part)]
        return parts if len(parts) == 1 else []
    # A layer that never writes to its cache has no heads.
    return [kind] if isinstance(kind, KVKind) and kind.key_shape[0] else []


def _refused(name: str, value: object, allowed: str) -> ParameterError:
    return ParameterError(f"{name}={value} is not allowed: {allowed}")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
