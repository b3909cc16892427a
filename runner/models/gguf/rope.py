"""How positions are rotated, from the metadata and tensors of a GGUF file."""

from typing import Any

import numpy as np

from runner.models.gguf.blocks import unpack
from runner.models.gguf.file import GGUFFile

FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that are no weights of mlx-lm's models, but part of their configuration."""
_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


def rope_scaling(file: GGUFFile, allowed: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns `rope_scaling` as in a `config.json`; `allowed` is what mlx-lm's model can do.

    Factors for each frequency (`rope_freqs.weight`, Llama 3) become a longrope whose context was
    never lengthened: the frequencies are divided by the factors and nothing else is done.
    """
    scaling = _scaling(file)
    if scaling is not None and scaling["rope_type"] not in allowed:
        raise file.metadata.refuse(
            f"RoPE scaling {scaling['rope_type']!r} is not covered for the architecture "
            f"{file.metadata.architecture!r}"
        )
    return scaling


def _scaling(file: GGUFFile) -> dict[str, Any] | None:
    metadata = file.metadata
    factor = metadata.own("rope.scaling.factor") or metadata.own("rope.scale_linear") or 0.0
    kind = metadata.own("rope.scaling.type", "linear" if factor else "none")
    stretched = kind in ("linear", "yarn") and factor not in (0.0, 1.0)
    factors = _factors(file, "rope_freqs.weight")
    if factors is not None and all(factor == 1.0 for factor in factors):
        factors = None
    if metadata.architecture != "phi3" and (kind == "longrope" or _is_longrope(file)):
        raise metadata.refuse("longrope is covered for the architecture 'phi3' alone")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise metadata.refuse(f"RoPE scaling {kind!r} is not covered")
    if factors is not None and stretched:
        raise metadata.refuse(f"RoPE scaling {kind!r} with rope_freqs.weight is not covered")
    if factors is not None:
        return _longrope(factors, metadata.require_own("context_length"))
    if kind == "yarn" and factor > 1.0:
        return _yarn(file, factor)
    return {"rope_type": "linear", "type": "linear", "factor": factor} if stretched else None


def _yarn(file: GGUFFile, factor: float) -> dict[str, Any]:
    metadata = file.metadata
    betas = {name: metadata.own(key) for key, name in _YARN.items() if metadata.own(key)}
    original = metadata.own("rope.scaling.original_context_length")
    if original is None:
        raise metadata.refuse("YaRN without rope.scaling.original_context_length is not covered")
    known = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return known | betas


def _is_longrope(file: GGUFFile) -> bool:
    return any(name in file.tensors for name in FACTORS[1:])


def _longrope(factors: list[float], original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": original,
    }


def phi3_longrope(file: GGUFFile) -> dict[str, Any]:
    """Fields for mlx-lm's phi3, which always takes the long factors: it is given the short ones.

    llama.cpp takes these for contexts up to the original length, which becomes the limit. The
    attention factor is what mlx-lm makes of the two lengths; one that it cannot make is refused.
    """
    metadata = file.metadata
    stated = metadata.own("rope.scaling.attn_factor", 1.0)
    factors = _factors(file, "rope_factors_short.weight")
    if factors is None and (stated != 1.0 or _is_longrope(file)):
        raise metadata.refuse("a longrope without rope_factors_short.weight is not covered")
    if factors is None:
        return {}
    longest = metadata.require_own("context_length")
    original = metadata.require_own("rope.scaling.original_context_length")
    stretch = longest / original
    made = float(np.sqrt(1 + np.log(stretch) / np.log(original))) if stretch > 1 else 1.0
    if abs(made - stated) > 1e-5:
        raise metadata.refuse(f"the attention factor {stated:.6g} of its longrope is not covered")
    return {
        "rope_scaling": _longrope(factors, original),
        "original_max_position_embeddings": original,
    }


def _factors(file: GGUFFile, name: str) -> list[float] | None:
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    factors = unpack(tensor.kind, tensor.shape, tensor.data)["weight"]
    return [float(factor) for factor in np.array(factors)]
