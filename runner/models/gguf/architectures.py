"""The architectures that are covered: which part is which, and what mlx-lm's model can do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.models.gguf.file import GGUFFile
from runner.models.gguf.metadata import Metadata
from runner.models.gguf.rope import phi3_longrope

TOP_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA = _ATTENTION | _MLP | {"ffn_norm": "post_attention_layernorm"}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = _ATTENTION | _MLP | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_ALL_SCALINGS = ("linear", "yarn", "longrope")


def _nothing(file: GGUFFile) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What ggml's name of an architecture stands for."""

    model_type: str
    """mlx-lm's name of the model."""
    modules: Mapping[str, str]
    """mlx-lm's name of every part of a layer, by ggml's."""
    configure: Callable[[GGUFFile], dict[str, Any]] = _nothing
    """Gives the fields of the configuration that others do not have."""
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts that have a bias all together or not at all, by the field that says so."""
    always_biased: tuple[str, ...] = ()
    is_interleaved: bool = False
    """Whether the rows of queries and keys are in the order of ggml's other RoPE."""
    norm_offset: float = 0.0
    """What ggml's norms are larger by: mlx-lm adds it when it runs."""
    has_windows: bool = False
    """Whether mlx-lm's model has sliding windows; the context ends with them elsewhere."""
    scalings: tuple[str, ...] = _ALL_SCALINGS
    """The ways to scale RoPE that mlx-lm's model has."""
    rotates_part: bool = False
    """Whether mlx-lm's model can leave a part of every head as it is."""
    even_heads: bool = False
    """Whether mlx-lm's model shares the hidden size out evenly among the heads."""
    is_tied: bool = False
    """Whether mlx-lm's model always has its input embeddings as output."""


def _attention_scale(metadata: Metadata, layers_of_27b: int) -> float:
    """`query_pre_attn_scalar`, which llama.cpp knows from the number of layers."""
    heads = metadata.require_own("attention.head_count")
    if metadata.require_own("block_count") == layers_of_27b:
        return float(metadata.require_own("embedding_length") // heads)
    return float(metadata.require_own("attention.key_length"))


def _gemma2(file: GGUFFile) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": file.metadata.own("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.metadata.own("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _attention_scale(file.metadata, 46),
    }


def _gemma3(file: GGUFFile) -> dict[str, Any]:
    metadata = file.metadata
    if metadata.own("final_logit_softcapping"):
        raise metadata.refuse("a soft cap on the logits of gemma3 is not covered")
    window = metadata.own("attention.sliding_window", 0)
    return {
        "query_pre_attn_scalar": _attention_scale(metadata, 62),
        "rope_local_base_freq": metadata.own("rope.freq_base_swa", 10000.0),
        "sliding_window": window or metadata.require_own("context_length"),
        "sliding_window_pattern": _pattern(metadata) if window else 1,
    }


def _pattern(metadata: Metadata) -> int:
    """After how many layers one without a window follows."""
    stated = metadata.own("attention.sliding_window_pattern", 6)
    if not isinstance(stated, list):
        return int(stated)
    period = stated.index(False) + 1 if False in stated else len(stated) + 1
    if any(bool(is_local) != bool((layer + 1) % period) for layer, is_local in enumerate(stated)):
        raise metadata.refuse("its pattern of sliding windows is not covered: it has no period")
    return period


def _phi3(file: GGUFFile) -> dict[str, Any]:
    metadata = file.metadata
    head_dim = metadata.require_own("embedding_length") // metadata.require_own(
        "attention.head_count"
    )
    share = metadata.own("rope.dimension_count", head_dim) / head_dim
    return {"partial_rotary_factor": share} | phi3_longrope(file)


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        modules=_LLAMA,
        biases={
            "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
            "mlp_bias": tuple(_MLP),
        },
        is_interleaved=True,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        modules=_LLAMA,
        always_biased=("attn_q", "attn_k", "attn_v"),
        scalings=("linear", "yarn"),
        even_heads=True,
    ),
    "qwen3": Architecture(
        model_type="qwen3", modules=_LLAMA | _QK_NORMS, scalings=("linear", "yarn")
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        modules=_GEMMA,
        configure=_gemma2,
        norm_offset=1.0,
        scalings=(),
        is_tied=True,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        modules=_GEMMA | _QK_NORMS,
        configure=_gemma3,
        norm_offset=1.0,
        has_windows=True,
        scalings=("linear",),
    ),
    "phi3": Architecture(
        model_type="phi3",
        modules=_PHI3,
        configure=_phi3,
        scalings=("linear",),
        rotates_part=True,
        even_heads=True,
    ),
}
"""By the name in `general.architecture`. Mistral's files say llama."""
