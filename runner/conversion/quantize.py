"""Quantises the layers of a dense model, and says in its configuration how."""

from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from runner.conversion.packing import Packing, PackingOptions
from runner.errors import ParameterError


@dataclass(frozen=True, slots=True)
class Quantized:
    """What was done to the layers, by name."""

    packed: dict[str, Packing]
    misfits: list[str]
    """Layers left dense because no group of that size divides them."""


def quantize(model: nn.Module, config: dict[str, Any], options: PackingOptions) -> Quantized:
    """Packs a model's layers in place and adds how to `config`.

    Raises ParameterError where an option does not suit the model, or nothing would be packed.
    """
    packing_of = options.packing_of(model)
    done = Quantized({}, [])

    def predicate(name: str, module: nn.Module) -> bool | dict[str, Any]:
        packing = packing_of(name, module) if hasattr(module, "to_quantized") else None
        if packing is None:
            return False
        if module.weight.shape[-1] % packing.group_size:
            done.misfits.append(name)
            return False
        done.packed[name] = packing
        return asdict(packing)

    nn.quantize(model, class_predicate=predicate)
    if not done.packed:
        what = f"no layer of the model has a width that {_sizes(options)} divides"
        raise ParameterError(f"nothing would be quantised: {what}")
    default = options.default or next(iter(done.packed.values()))
    others = {name: asdict(it) for name, it in done.packed.items() if it != default}
    config["quantization"] = {**asdict(default), **others}
    return done


def _sizes(options: PackingOptions) -> str:
    chosen = [options.default, *options.patterns.values()]
    sizes = {it.group_size for it in chosen if it is not None}
    return " or ".join(f"group_size={size}" for size in sorted(sizes))
