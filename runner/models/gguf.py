"""GGUF files of the llama family: configuration, weights and tokenizer as mlx-lm knows them.

The format is ggml's (docs/gguf.md); what the keys mean is read off llama.cpp.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.errors import ModelError
from runner.models.hub import one_line
from runner.models.tokenizer import PRE_TOKENIZERS, Vocabulary, build_tokenizer

Arrays: TypeAlias = dict[str, mx.array]

_GROUP_SIZE = 32
_CONTROL, _USER_DEFINED = 3, 4
_TOP_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file holds."""

    config: dict[str, Any]
    """As in a Hugging Face `config.json`."""
    weights: Arrays
    """By mlx-lm's names, dense float32."""
    tokenizer: TokenizerWrapper
    dtype: str
    """The floating type that the file keeps its weights, or their scales, in."""


def load_gguf(path: Path) -> GGUFModel:
    """Reads a GGUF file. Raises ModelError, which names what is missing or not covered."""
    arrays, metadata = _read(path)
    architecture = metadata.require("general.architecture")
    if architecture != "llama":
        raise metadata.refuse(f"architecture {architecture!r} is not covered, only 'llama' is")
    _refuse_variants(metadata, arrays)
    config = _config(metadata, arrays)
    weights = _weights(metadata, arrays, config)
    stored = arrays.get("token_embd.scales", arrays["token_embd.weight"])
    return GGUFModel(config, weights, _tokenizer(metadata), str(stored.dtype).split(".")[-1])


@dataclass(frozen=True)
class _Metadata:
    """The key-value part of a file."""

    path: Path
    values: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key, default)
        return value.tolist() if isinstance(value, mx.array) else value

    def require(self, key: str) -> Any:
        if key not in self.values:
            raise self.refuse(f"it lacks the metadata {key!r}")
        return self.get(key)

    def refuse(self, why: str) -> ModelError:
        return ModelError(f"{self.path.name} cannot be loaded: {why}")


def _read(path: Path) -> tuple[Arrays, _Metadata]:
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {one_line(error)}") from error
    arrays, values = loaded
    return arrays, _Metadata(path, values)


def _head_dim(metadata: _Metadata) -> int:
    even_share = metadata.require("llama.embedding_length") // metadata.require(
        "llama.attention.head_count"
    )
    return int(metadata.get("llama.attention.key_length", even_share))


def _refuse_variants(metadata: _Metadata, arrays: Arrays) -> None:
    """Raises ModelError for what the file asks for and mlx-lm's llama would silently leave out."""
    head_dim = _head_dim(metadata)
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    value_dim = metadata.get("llama.attention.value_length", head_dim)
    per_layer = [
        key
        for key in ("llama.attention.head_count", "llama.attention.head_count_kv")
        if isinstance(metadata.get(key), list)
    ]
    refused = (
        (metadata.get("llama.expert_count", 0) > 0, "a mixture of experts is not covered"),
        ("rope_freqs.weight" in arrays, "Llama 3 RoPE scaling (rope_freqs.weight) is not covered"),
        (rotated != head_dim, f"RoPE over {rotated} of {head_dim} dimensions is not covered"),
        (value_dim != head_dim, f"values of {value_dim} and keys of {head_dim} dimensions differ"),
        (bool(per_layer), f"{', '.join(per_layer)} per layer is not covered"),
    )
    for found, why in refused:
        if found:
            raise metadata.refuse(why)


def _config(metadata: _Metadata, arrays: Arrays) -> dict[str, Any]:
    heads = metadata.require("llama.attention.head_count")
    if "token_embd.weight" not in arrays:
        raise metadata.refuse("it lacks the tensor token_embd.weight")
    return {
        "model_type": "llama",
        "hidden_size": metadata.require("llama.embedding_length"),
        "num_hidden_layers": metadata.require("llama.block_count"),
        "intermediate_size": metadata.require("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata),
        "rms_norm_eps": metadata.require("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata),
        "max_position_embeddings": metadata.require("llama.context_length"),
        "vocab_size": arrays["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in arrays,
        "attention_bias": _has_bias(arrays, _ATTENTION),
        "mlp_bias": _has_bias(arrays, _MLP),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(metadata),
    }


def _rope_scaling(metadata: _Metadata) -> dict[str, Any] | None:
    factor = metadata.get("llama.rope.scaling.factor") or metadata.get("llama.rope.scale_linear")
    kind = metadata.get("llama.rope.scaling.type", "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and not factor):
        return None
    if kind != "linear":
        raise metadata.refuse(f"RoPE scaling {kind!r} is not covered, only 'linear' is")
    return {"rope_type": "linear", "factor": factor}


def _has_bias(arrays: Arrays, parts: Iterable[str]) -> bool:
    return any(name.endswith(tuple(f".{part}.bias" for part in parts)) for name in arrays)


def _weights(metadata: _Metadata, arrays: Arrays, config: dict[str, Any]) -> Arrays:
    weights: Arrays = {}
    unknown = []
    for name in arrays:
        stem, _, kind = name.rpartition(".")
        module = _module(stem)
        if kind in ("weight", "bias") and module is not None:
            dense = _dense(metadata, arrays, stem, kind)
            weights[f"{module}.{kind}"] = _unpermuted(dense, stem, config)
        elif kind not in ("scales", "biases"):
            unknown.append(name)
    if unknown:
        raise metadata.refuse(f"its tensors {_listed(unknown)} are not covered")
    _complete_biases(weights, config)
    missing = [name for name in _expected(config) if name not in weights]
    if missing:
        raise metadata.refuse(f"it lacks the tensors of {_listed(missing)}")
    return weights


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _module(stem: str) -> str | None:
    """Returns mlx-lm's name for what ggml calls `stem`, None if mlx-lm's llama has no such part."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is None:
        return _TOP_MODULES.get(stem)
    part = _LAYER_MODULES.get(layer[2])
    return part and f"model.layers.{layer[1]}.{part}"


def _dense(metadata: _Metadata, arrays: Arrays, stem: str, kind: str) -> mx.array:
    """Returns a tensor in float32, unpacked if it is quantised (groups of 32 along a row)."""
    packed = arrays[f"{stem}.{kind}"]
    scales = arrays.get(f"{stem}.scales")
    if scales is None or kind == "bias":
        return packed.astype(mx.float32)
    bits, rest = divmod(packed.shape[-1], scales.shape[-1])  # 32-bit words, `bits` to a group of 32
    if rest or bits not in (4, 8):
        raise metadata.refuse(f"the quantisation of {stem} is not 4 or 8 bits in groups of 32")
    biases = arrays[f"{stem}.biases"].astype(mx.float32)
    scales = scales.astype(mx.float32)
    return mx.dequantize(packed, scales, biases, group_size=_GROUP_SIZE, bits=bits)


def _unpermuted(dense: mx.array, stem: str, config: dict[str, Any]) -> mx.array:
    """Puts the rows of queries and keys back in the order of split-half RoPE.

    llama.cpp's converter interleaves the two halves of every head (`LlamaModel.permute`).
    """
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(stem.rpartition(".")[2])
    if heads is None:
        return dense
    half = dense.shape[0] // heads // 2
    interleaved = dense.reshape(heads, half, 2, *dense.shape[1:])
    return interleaved.swapaxes(1, 2).reshape(dense.shape)


def _complete_biases(weights: Arrays, config: dict[str, Any]) -> None:
    """Adds zeros where only some projections have a bias: mlx-lm gives one to all or to none."""
    parts = (_ATTENTION if config["attention_bias"] else ()) + (_MLP if config["mlp_bias"] else ())
    for layer in range(config["num_hidden_layers"]):
        for part in parts:
            module = f"model.layers.{layer}.{_LAYER_MODULES[part]}"
            if f"{module}.weight" in weights:
                outputs = weights[f"{module}.weight"].shape[0]
                weights.setdefault(f"{module}.bias", mx.zeros((outputs,)))


def _expected(config: dict[str, Any]) -> list[str]:
    layers = range(config["num_hidden_layers"])
    parts = _LAYER_MODULES.values()
    inside = [f"model.layers.{layer}.{part}.weight" for layer in layers for part in parts]
    return ["model.embed_tokens.weight", "model.norm.weight", *inside]


def _tokenizer(metadata: _Metadata) -> TokenizerWrapper:
    model = metadata.require("tokenizer.ggml.model")
    if model != "gpt2":
        raise metadata.refuse(f"tokenizer {model!r} is not covered, only byte-level 'gpt2' is")
    kind = metadata.require("tokenizer.ggml.pre")
    if kind not in PRE_TOKENIZERS:
        raise metadata.refuse(
            f"pre-tokenizer {kind!r} is not covered, only {', '.join(PRE_TOKENIZERS)} are"
        )
    types = metadata.require("tokenizer.ggml.token_type")
    vocabulary = Vocabulary(
        tokens=metadata.require("tokenizer.ggml.tokens"),
        merges=metadata.require("tokenizer.ggml.merges"),
        pre_tokenizer=kind,
        special_ids=[id for id, type in enumerate(types) if type == _CONTROL],
        added_ids=[id for id, type in enumerate(types) if type == _USER_DEFINED],
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=_eos_ids(metadata),
        unk_id=metadata.get("tokenizer.ggml.unknown_token_id"),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
        # llama.cpp adds it for Llama 3 where the file does not say.
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", kind == "llama-bpe"),
        add_eos=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
    )
    return build_tokenizer(vocabulary)


def _eos_ids(metadata: _Metadata) -> list[int]:
    """Ids of every token that the file says ends a sequence, a turn or a message."""
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    return list(dict.fromkeys(metadata.get(key) for key in keys if key in metadata.values))
