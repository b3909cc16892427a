"""The metadata of a GGUF file as a `config.json` has it, and what cannot be said there."""

from typing import Any

from runner.models.gguf.architectures import ARCHITECTURES, Architecture
from runner.models.gguf.file import GGUFFile
from runner.models.gguf.metadata import Metadata, listed
from runner.models.gguf.rope import rope_scaling

# A key of the architecture that is neither here nor harmless would change what the model computes.
_HEEDED = frozenset(
    (
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    )
)
_HARMLESS = frozenset(
    (
        "vocab_size",
        "tensor_data_layout",
        "rope.scaling.finetuned",
        "attention.layer_norm_epsilon",
        "expert_used_count",
        "mm.tokens_per_image",
        "use_parallel_residual",
    )
)
_NEUTRAL = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
"""Keys that are taken where they ask for nothing."""


def architecture_of(metadata: Metadata) -> Architecture:
    """What the file holds. Raises ModelError for an architecture that is not covered."""
    name = metadata.architecture
    if name not in ARCHITECTURES:
        raise metadata.refuse(
            f"architecture {name!r} is not covered, only {', '.join(ARCHITECTURES)} are"
        )
    return ARCHITECTURES[name]


def configuration(file: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """Returns the configuration. Raises ModelError for what mlx-lm's model would leave out."""
    metadata = file.metadata
    _refuse_unknown_keys(metadata)
    _refuse_variants(metadata, architecture)
    if "token_embd.weight" not in file.tensors:
        raise metadata.refuse("it lacks the tensor token_embd.weight")
    heads = metadata.require_own("attention.head_count")
    biased = {
        field: any(name.endswith(tuple(f".{part}.bias" for part in parts)) for name in file.tensors)
        for field, parts in architecture.biases.items()
    }
    common = {
        "model_type": architecture.model_type,
        "hidden_size": metadata.require_own("embedding_length"),
        "num_hidden_layers": metadata.require_own("block_count"),
        "intermediate_size": metadata.require_own("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.own("attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata),
        "rms_norm_eps": metadata.require_own("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.own("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(file, architecture.scalings),
        "max_position_embeddings": metadata.require_own("context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
    }
    return common | biased | architecture.configure(file)


def context_length(file: GGUFFile, architecture: Architecture) -> int:
    """The most tokens for which mlx-lm's model computes what the file asks for.

    It ends with a sliding window that mlx-lm's model does not have, and with the length that a
    longrope began from.
    """
    metadata = file.metadata
    lengths = [metadata.require_own("context_length")]
    window = metadata.own("attention.sliding_window", 0)
    if window and not architecture.has_windows:
        lengths.append(window)
    if "rope_factors_short.weight" in file.tensors:
        lengths.append(metadata.require_own("rope.scaling.original_context_length"))
    return int(min(lengths))


def _head_dim(metadata: Metadata) -> int:
    hidden, heads = (
        metadata.require_own("embedding_length"),
        metadata.require_own("attention.head_count"),
    )
    if isinstance(heads, list):
        raise metadata.refuse("attention.head_count per layer is not covered")
    return int(metadata.own("attention.key_length", hidden // heads))


def _refuse_unknown_keys(metadata: Metadata) -> None:
    own = f"{metadata.architecture}."
    known = _HEEDED | _HARMLESS | _NEUTRAL.keys()
    keys = [key for key in metadata.values if key.startswith(own)]
    unknown = [key for key in keys if key.removeprefix(own) not in known]
    if unknown:
        raise metadata.refuse(f"its metadata {listed(unknown)} are not covered")
    for key, nothing in _NEUTRAL.items():
        if metadata.own(key, nothing) != nothing:
            raise metadata.refuse(f"{own}{key}={metadata.own(key)} is not covered")
    per_layer = ("attention.head_count_kv", "feed_forward_length")
    for key in per_layer:
        if isinstance(metadata.own(key), list):
            raise metadata.refuse(f"{own}{key} per layer is not covered")


def _refuse_variants(metadata: Metadata, architecture: Architecture) -> None:
    head_dim = _head_dim(metadata)
    heads = metadata.require_own("attention.head_count")
    even_share = metadata.require_own("embedding_length") / heads
    rotated = metadata.own("rope.dimension_count", head_dim)
    value_dim = metadata.own("attention.value_length", head_dim)
    factor = metadata.own("rope.scaling.attn_factor", 1.0)
    uncovered = (
        (
            rotated != head_dim and not architecture.rotates_part,
            f"RoPE over {rotated} of {head_dim} dimensions is not covered",
        ),
        (value_dim != head_dim, f"values of {value_dim} and keys of {head_dim} dimensions differ"),
        (
            architecture.even_heads and head_dim != even_share,
            f"heads of {head_dim} dimensions where {even_share:g} are an even share",
        ),
        (
            factor != 1.0 and not architecture.rotates_part,
            f"rope.scaling.attn_factor={factor:g} is not covered",
        ),
    )
    for found, why in uncovered:
        if found:
            raise metadata.refuse(why)
