"""How the layers of a model are to be quantised: by one choice, a recipe, or name patterns."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from runner.errors import ParameterError

_BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}
_GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,), "nvfp4": (16,), "mxfp8": (32,)}
"""What mlx packs in each mode, the default first."""
_DEFAULT_BITS = 4


@dataclass(frozen=True, slots=True)
class Packing:
    """How one layer is packed. Raises ParameterError for what mlx does not offer."""

    bits: int
    group_size: int
    mode: str

    @classmethod
    def of(
        cls, option: str, *, bits: Any = None, group_size: Any = None, mode: Any = None
    ) -> "Packing":
        """Fills in what is not given, for the option that messages name."""
        mode = "affine" if mode is None else mode
        if mode not in _BITS:
            raise _refused(f"{option}mode={mode}", ", ".join(_BITS))
        one = _DEFAULT_BITS if _DEFAULT_BITS in _BITS[mode] else _BITS[mode][0]
        bits = one if bits is None else bits
        group_size = _GROUP_SIZES[mode][0] if group_size is None else group_size
        for name, value, allowed in (
            ("bits", bits, _BITS[mode]),
            ("group_size", group_size, _GROUP_SIZES[mode]),
        ):
            if isinstance(value, bool) or value not in allowed:
                among = ", ".join(map(str, sorted(allowed)))
                raise _refused(f"{option}{name}={value}", f"with mode={mode} {among}")
        return cls(bits, group_size, mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingOptions:
    """The options of `runner convert` that quantise."""

    default: Packing | None
    """Of layers that no pattern names; None leaves them dense."""
    recipe: str | None = None
    """One of mlx-lm's mixtures of bits, in place of `default`'s."""
    patterns: Mapping[str, Packing | None] = field(default_factory=dict)
    """By pattern over the names of layers, the first that fits; None keeps a layer dense."""

    @classmethod
    def of(
        cls, *, bits: Any, group_size: Any, mode: Any, recipe: Any, layers: Any
    ) -> "PackingOptions | None":
        """Takes the plain options; None where nothing is to be quantised."""
        given = {"bits": bits, "group_size": group_size, "mode": mode}
        named = bits is not None or mode is not None
        if not named and group_size is not None and recipe is None:
            raise _refused(
                f"job.group_size={group_size}", "beside job.bits, job.mode or job.recipe"
            )
        patterns = _patterns(layers)
        if recipe is not None:
            _check_recipe(recipe, bits=bits, mode=mode)
        elif not named and not patterns:
            return None
        has_default = named or recipe is not None
        default = Packing.of("job.", **given) if has_default else None
        return cls(default=default, recipe=recipe, patterns=patterns)

    def packing_of(self, model: nn.Module) -> Callable[[str, nn.Module], Packing | None]:
        """What is chosen for a layer of the model, by its name.

        Raises ParameterError for a pattern that fits no layer, or a recipe that the model has no
        layers for.
        """
        names = [name for name, module in model.named_modules() if hasattr(module, "to_quantized")]
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise _refused(f"job.layers: {pattern}", f"a name of layers, as {names[-1]}")
        otherwise = self._default(model)

        def packing(name: str, module: nn.Module) -> Packing | None:
            for pattern, chosen in self.patterns.items():
                if fnmatchcase(name, pattern):
                    return chosen
            return otherwise(name, module)

        return packing

    def _default(self, model: nn.Module) -> Callable[[str, nn.Module], Packing | None]:
        default = self.default
        if default is None:
            return lambda name, module: None
        # Some architectures keep a few layers finer, or dense, such as the routers of experts.
        says: Any = getattr(model, "quant_predicate", None) or (lambda name, module: True)
        if self.recipe is not None:
            says = _recipe(self.recipe, model, default.group_size)

        def packing(name: str, module: nn.Module) -> Packing | None:
            said = says(name, module)
            if isinstance(said, Mapping):
                return Packing(**(asdict(default) | {"mode": "affine"} | dict(said)))
            return default if said else None

        return packing


def _patterns(layers: Any) -> dict[str, Packing | None]:
    if layers is None:
        return {}
    if not isinstance(layers, Mapping):
        raise _refused(f"job.layers={layers}", "{pattern: bits, false or {bits, group_size, mode}}")
    found: dict[str, Packing | None] = {}
    for pattern, chosen in layers.items():
        option = f"job.layers: {pattern}: "
        if chosen is False:
            found[str(pattern)] = None
        elif isinstance(chosen, Mapping):
            if unknown := chosen.keys() - {"bits", "group_size", "mode"}:
                raise _refused(f"{option}{min(unknown)}", "bits, group_size and mode")
            found[str(pattern)] = Packing.of(option, **chosen)
        else:
            found[str(pattern)] = Packing.of(option, bits=chosen)
    return found


def _check_recipe(recipe: Any, *, bits: Any, mode: Any) -> None:
    if recipe not in QUANT_RECIPES:
        raise _refused(f"job.recipe={recipe}", ", ".join(QUANT_RECIPES))
    if bits is not None:
        raise _refused(f"job.bits={bits}", "not beside job.recipe, which has bits of its own")
    if mode not in (None, "affine"):
        raise _refused(f"job.mode={mode}", "affine beside job.recipe")


def _recipe(recipe: str, model: nn.Module, group_size: int) -> Any:
    try:
        return mixed_quant_predicate_builder(recipe, model, group_size)
    except ValueError as error:
        raise _refused(f"job.recipe={recipe}", "a model with layers named down_proj") from error


def _refused(given: str, allowed: str) -> ParameterError:
    return ParameterError(f"{given} is not allowed: {allowed}")
