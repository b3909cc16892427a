"""Models of every family, written as GGUF and read back: against llama.cpp, and against mlx-lm."""

import importlib
import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny_gguf import HEADS, HIDDEN, INNER, KV_HEADS, TINY_MODELS, TOKEN_IDS, tiny_gguf, write_gguf

from runner.models.gguf import GGUFModel, build_model, load_gguf
from runner.models.load import load_model

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "gguf_by_llama_cpp.json").read_text())[
    "tiny models"
]


def _read(tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> GGUFModel:
    return load_gguf(write_gguf(tmp_path / "tiny.gguf", metadata, tensors))


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array([TOKEN_IDS]))[0])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_gives_the_logits_that_llama_cpp_gives(tmp_path: Path, name: str) -> None:
    # llama.cpp's GELU is a table of float16, which the logits of gemma show.
    logits = _logits(build_model(_read(tmp_path, *TINY_MODELS[name])))[::9, ::30]
    np.testing.assert_allclose(logits.ravel(), GOLDEN[name], atol=TOLERANCES[name.split()[0]])
    assert np.abs(GOLDEN[name]).max() > 1


TOLERANCES = {"llama": 1e-3, "qwen2": 1e-3, "qwen3": 1e-3, "phi3": 1e-3} | dict.fromkeys(
    ("gemma2", "gemma3"), 3e-3
)
_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 345,
    "rope_theta": 5000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
}
_FAMILIES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3": "gemma3_text", "phi3": "phi3",
}  # fmt: skip
_OWN_KEYS = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attention__sliding_window": 8, "attention__sliding_window_pattern": 2},
}
_GGML_NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv",
    "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "gate_up_proj": "ffn_up", "down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def _original(model_type: str, vocab_size: int) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    config = _SIZES | {"model_type": model_type, "vocab_size": vocab_size}
    model = module.Model(module.ModelArgs.from_dict(config))
    if model_type == "gemma3_text":
        model.sanitize({})
    mx.random.seed(3)
    model.update(tree_map(lambda it: mx.random.normal(it.shape, scale=0.2), model.parameters()))
    return model


def _converted(model: nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """What llama.cpp's convert_hf_to_gguf.py makes of a model's parameters."""
    is_gemma = architecture.startswith("gemma")
    after_attention = "post_attention_norm" if is_gemma else "ffn_norm"
    names = _GGML_NAMES | {"post_attention_layernorm": after_attention}
    tensors = {}
    for path, array in tree_flatten(model.parameters()):
        module, _, kind = path.rpartition(".")
        layer = f"blk.{module.split('.')[2]}." if ".layers." in module else ""
        name = names.get(module) or names[module.rpartition(".")[2]]
        rows = np.array(array)
        if architecture == "llama" and name in ("attn_q", "attn_k"):
            heads = HEADS if name == "attn_q" else KV_HEADS
            rows = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        tensors[f"{layer}{name}.{kind}"] = rows + 1 if is_gemma and "norm" in name else rows
    return tensors


@pytest.mark.parametrize("architecture", _FAMILIES)
def test_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path, architecture: str) -> None:
    metadata, written = tiny_gguf(architecture, **_OWN_KEYS.get(architecture, {}))
    source = _original(_FAMILIES[architecture], len(metadata["tokenizer.ggml.tokens"]))
    tensors = _converted(source, architecture)
    biases = {name for name in tensors if name.endswith(".bias")}
    assert tensors.keys() - biases == written.keys(), "the converter's names are not the file's"
    rebuilt = build_model(_read(tmp_path, metadata, tensors))
    np.testing.assert_allclose(_logits(rebuilt), _logits(source), atol=1e-3)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_0"])
def test_weights_of_every_type_are_the_numbers_that_they_stand_for(
    tmp_path: Path, kind: str
) -> None:
    metadata, tensors = TINY_MODELS["llama untied"]
    number = gguf.GGMLQuantizationType[kind]
    raw, dense = {}, {}
    for name, array in tensors.items():
        packed = gguf.quants.quantize(array, number) if array.ndim > 1 else array
        raw[name] = (packed, number) if array.ndim > 1 else array
        dense[name] = gguf.quants.dequantize(packed, number) if array.ndim > 1 else array
    unpacked = build_model(_read(tmp_path, metadata, dense))
    path = write_gguf(tmp_path / "stored.gguf", metadata, raw)
    content = load_gguf(path)
    is_packed = kind in ("Q4_0", "Q4_1", "Q8_0")
    assert ("quantization" in content.config) == is_packed
    assert content.dtype == {"BF16": "bfloat16"}.get(kind, "float16")
    stored = {str(array.dtype) for name, array in content.weights.items() if "_proj.w" in name}
    assert stored == {"mlx.core.uint32" if is_packed else "mlx.core.float32"}
    # On a CPU the engine is given dense float32 weights, whatever the file has.
    model = load_model(str(path)).model
    assert {str(it.dtype) for _, it in tree_flatten(model.parameters())} == {"mlx.core.float32"}
    np.testing.assert_array_equal(_logits(model), _logits(unpacked))


def test_packed_weights_run_as_they_are(tmp_path: Path) -> None:
    metadata, tensors = TINY_MODELS["gemma3"]
    kinds = {"attn_q": gguf.GGMLQuantizationType.Q8_0, "ffn_up": gguf.GGMLQuantizationType.Q4_1}
    raw, dense = dict(tensors), dict(tensors)
    for name, array in tensors.items():
        kind = kinds.get(name.split(".")[-2])
        if kind is not None:
            packed = gguf.quants.quantize(array, kind)
            raw[name], dense[name] = (packed, kind), gguf.quants.dequantize(packed, kind)
    content = _read(tmp_path, metadata, raw)
    model = build_model(content)
    modules = {name for name, it in model.named_modules() if isinstance(it, nn.QuantizedLinear)}
    parts = ("self_attn.q_proj", "mlp.up_proj")
    assert modules == {f"model.layers.{layer}.{part}" for layer in range(7) for part in parts}
    assert content.config["quantization"]["bits"] in (4, 8)
    expected = _logits(build_model(_read(tmp_path, metadata, dense)))
    # The scales are float16, and so is the product of what they scale.
    np.testing.assert_allclose(_logits(model), expected, atol=0.05)


def test_a_bias_on_some_projections_leaves_the_others_without(tmp_path: Path) -> None:
    content = _read(tmp_path, *TINY_MODELS["llama biases"])
    assert content.config["attention_bias"] and content.config["mlp_bias"]
    assert not content.weights["model.layers.1.self_attn.o_proj.bias"].any()
    assert content.weights["model.layers.1.self_attn.q_proj.bias"].any()


@pytest.mark.parametrize(
    ("name", "length"), [("llama", 1024), ("gemma2", 64), ("gemma3", 1024), ("phi3 longrope", 256)]
)
def test_the_context_ends_where_the_model_would_leave_the_file(
    tmp_path: Path, name: str, length: int
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", *TINY_MODELS[name])
    assert load_gguf(path).context_length == load_model(str(path)).max_model_len == length


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "float16"), ("gemma2", "bfloat16")])
def test_an_accelerator_runs_gemma_in_a_type_with_room(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    metadata, tensors = tiny_gguf(architecture)
    halves = {name: it.astype(np.float16) for name, it in tensors.items()}
    assert _read(tmp_path, metadata, halves).dtype == dtype
    assert _read(tmp_path, metadata, tensors).dtype == "float32"
