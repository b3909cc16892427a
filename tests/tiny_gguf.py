"""Small GGUF files: vocabularies of each kind, and the stress texts that they are tried on.

Nothing here needs mlx: `golden/gguf_by_llama_cpp.py` runs it beside llama.cpp.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

STRESS = {
    "prose": "The lighthouse keeper's log: he'd written it, WE'LL see; "
    "\"don't\", they SAID. It's I'M.",
    "code": "def f(x: int) -> str:\n\treturn f'{x!r}'  # a comment\n\n\n"
    "class A(B):\n    y = [1,2]*3\r\n",
    "digits": "7 42 123 1234 12345.678 1,000,000 0x1F 3.14159e-10 ٣٤٥ ½ ² 2026-11-21",
    "emoji": "🙂🙂 👩‍👩‍👧‍👦 🇨🇭 ✈️ a🎉b 👍🏽",
    "cjk": "世界は広い。東京タワー、한국어 텍스트 中文字符，标点！",
    "scripts": "Grüße aus Zürich, où est-ce? Привет, мир. שלום العربية हिन्दी ภาษาไทย",
    "marks": "e\u0301 n\u0303 \u200b\ufeff\u00a0\u3000 ﬁ Å Ⅷ ǅ ﷺ",
    "spaces": "  two   three    four     \t\t tab\n\n\n\n newlines \r\n\r\n  \n \n end   ",
    "runs": " " * 37 + "x" + "\n" * 35 + "aaaaaaaaaaaaaaaaa" + "-" * 70 + "=" * 5 + "._." * 9,
    "punctuation": "!!!... ?! (a) [b] {c} <d> a_b a-b a/b \\n $5 €3 100% #tag @you ~ ^ `x` "
    "| && ++ «q» “q”",
    "special": "a<|im_start|>user\nhi<|im_end|>\n<bos>b <eos><start_of_turn>c</s> <unk>  "
    "<|endoftext|>d",
    "word": "The",
    "space": " ",
    "camel": "camelCaseHTTPServer XMLHttpRequest iPhone OpenAI's ÉCOLE naïve straße ΑΒΓδ",
    "control": "nul\x00bell\x07esc\x1b[0m del\x7f",
}
"""Texts that tokenizers part ways on."""

PRE_TOKENIZER_KINDS = (
    *("default", "gpt-2", "phi-2", "olmo", "llama-bpe", "dbrx", "smaug-bpe", "tekken", "falcon"),
    *("qwen2", "deepseek-r1-qwen", "stablelm2", "smollm", "starcoder", "refact", "command-r"),
    *("codeshell", "gpt-4o", "llama4", "deepseek-coder", "deepseek-v3"),
)
"""The pre-tokenizers that are covered, by llama.cpp's names."""

_WORDS = (
    "he an in er the ▁t ▁a ▁th ▁the ▁an aa aaa aaaa ab ba aba abab ▁▁ ▁▁▁ ▁▁▁▁ 世界 .. ... lo ▁lo"
)
_CHARACTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-_=()世界é🙂"


def bytes_and_pieces() -> tuple[list[str], list[int]]:
    """Tokens and their types: three marks, all bytes, a tool's mark, words and characters."""
    marks = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*_WORDS.split(), *_CHARACTERS]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * len(pieces)]
    return [*marks, *byte_tokens, "<tool>", *pieces], types


def sentencepiece(*, equal_scores: bool = False, **changes: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary whose words are merged by their scores."""
    tokens, types = bytes_and_pieces()
    words = len(_WORDS.split())
    scores = [-1.0 * place for place in range(words)] + [-1e3] * len(_CHARACTERS)
    if equal_scores:
        scores = [-1.0] * len(scores)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*[0.0] * (len(tokens) - len(scores)), *scores],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def unigram(**changes: Any) -> dict[str, Any]:
    """Metadata of a unigram vocabulary."""
    rng = np.random.default_rng(5)
    metadata = sentencepiece()
    scores = [-round(float(value), 3) for value in rng.uniform(2, 9, len(_WORDS.split()))]
    scores += [-round(float(value), 3) for value in rng.uniform(5, 12, len(_CHARACTERS))]
    start = len(metadata["tokenizer.ggml.tokens"]) - len(scores)
    return (
        metadata
        | {
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.scores": [*[0.0] * start, *scores],
            "tokenizer.ggml.add_space_prefix": True,
            "tokenizer.ggml.remove_extra_whitespaces": False,
        }
        | changes
    )


SENTENCEPIECE_VARIANTS = {
    "sentencepiece": sentencepiece(),
    "no prefix": sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}),
    "no bos, eos": sentencepiece(
        **{"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    ),
}
UNIGRAM_VARIANTS = {
    "unigram": unigram(),
    "unigram squeezed": unigram(**{"tokenizer.ggml.remove_extra_whitespaces": True}),
    "unigram no prefix": unigram(**{"tokenizer.ggml.add_space_prefix": False}),
}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
) -> Path:
    """Writes a file as llama.cpp's converter would; a tensor may be (raw blocks, their type)."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


_LAYER_TENSORS = {
    "attn_norm": ("hidden",),
    "attn_q": ("queries", "hidden"),
    "attn_k": ("keys", "hidden"),
    "attn_v": ("keys", "hidden"),
    "attn_output": ("hidden", "queries"),
    "ffn_norm": ("hidden",),
    "ffn_gate": ("inner", "hidden"),
    "ffn_up": ("inner", "hidden"),
    "ffn_down": ("hidden", "inner"),
}
_QK_NORMS = {"attn_q_norm": ("head",), "attn_k_norm": ("head",)}
_AFTER_NORMS = {"post_attention_norm": ("hidden",), "post_ffw_norm": ("hidden",)}
_FUSED = {"attn_qkv": ("qkv", "hidden"), "ffn_up": ("gate_up", "hidden")}
_TENSORS = {
    "llama": _LAYER_TENSORS,
    "qwen2": _LAYER_TENSORS,
    "qwen3": _LAYER_TENSORS | _QK_NORMS,
    "gemma2": _LAYER_TENSORS | _AFTER_NORMS,
    "gemma3": _LAYER_TENSORS | _AFTER_NORMS | _QK_NORMS,
    "phi3": {
        name: shape
        for name, shape in (_LAYER_TENSORS | _FUSED).items()
        if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")
    },
}
HIDDEN, HEADS, KV_HEADS, INNER = 64, 4, 2, 96
TOKEN_IDS = [3 + 7 * place % 330 for place in range(28)]
"""A text for the tiny models, longer than their windows."""

Tensors = dict[str, np.ndarray]


def tiny_gguf(
    architecture: str,
    *,
    head_dim: int = 16,
    num_layers: int = 2,
    untied: bool = False,
    biases: tuple[str, ...] = (),
    factors: Mapping[str, list[float]] | None = None,
    **own: Any,
) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors of a random model; `own` are keys of the architecture, `__` for dots."""
    metadata = sentencepiece() | {"general.architecture": architecture}
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    sizes = {
        "hidden": HIDDEN,
        "head": head_dim,
        "queries": HEADS * head_dim,
        "keys": KV_HEADS * head_dim,
        "qkv": (HEADS + 2 * KV_HEADS) * head_dim,
        "inner": INNER,
        "gate_up": 2 * INNER,
    }
    shapes = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if untied:
        shapes["output.weight"] = (vocabulary, HIDDEN)
    for layer in range(num_layers):
        for name, sides in _TENSORS[architecture].items():
            shapes[f"blk.{layer}.{name}.weight"] = tuple(sizes[side] for side in sides)
            if name in biases:
                shapes[f"blk.{layer}.{name}.bias"] = (sizes[sides[0]],)
    rng = np.random.default_rng(11)
    tensors = {
        name: (rng.normal(scale=0.2, size=shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, values in (factors or {}).items():
        tensors[f"{name}.weight"] = np.array(values, np.float32)
    numbers = {
        "embedding_length": HIDDEN,
        "block_count": num_layers,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 1024,
        "rope.dimension_count": head_dim,
        "rope.freq_base": 5000.0,
    } | {key.replace("__", "."): value for key, value in own.items()}
    return metadata | {f"{architecture}.{key}": it for key, it in numbers.items()}, tensors


_FACTORS = [1.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 8.0]
TINY_MODELS = {
    "llama": tiny_gguf("llama"),
    "llama untied": tiny_gguf("llama", untied=True),
    "llama biases": tiny_gguf("llama", biases=("attn_q", "attn_k", "attn_v", "ffn_up")),
    "llama wide heads": tiny_gguf("llama", head_dim=32),
    "llama linear": tiny_gguf("llama", rope__scaling__type="linear", rope__scaling__factor=4.0),
    "llama yarn": tiny_gguf(
        "llama",
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=256,
    ),
    "llama 3": tiny_gguf("llama", factors={"rope_freqs": _FACTORS}),
    "qwen2": tiny_gguf("qwen2", biases=("attn_q", "attn_k", "attn_v")),
    "qwen2 untied": tiny_gguf("qwen2", biases=("attn_q", "attn_k", "attn_v"), untied=True),
    "qwen3": tiny_gguf("qwen3", head_dim=32),
    "gemma2": tiny_gguf(
        "gemma2",
        head_dim=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        attention__sliding_window=64,
    ),
    "gemma3": tiny_gguf("gemma3", head_dim=32, num_layers=7, attention__sliding_window=8),
    "gemma3 linear": tiny_gguf(
        "gemma3",
        head_dim=32,
        num_layers=7,
        attention__sliding_window=8,
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
    ),
    "phi3": tiny_gguf("phi3", untied=True),
    "phi3 part": tiny_gguf("phi3", untied=True, rope__dimension_count=8),
    "phi3 longrope": tiny_gguf(
        "phi3",
        untied=True,
        factors={"rope_factors_short": _FACTORS, "rope_factors_long": [9.0] * 8},
        rope__scaling__original_context_length=256,
        rope__scaling__attn_factor=float(np.sqrt(1 + np.log(4) / np.log(256))),
    ),
}
"""A file of each family, and of each way to rotate positions, as (metadata, tensors)."""

BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
NUM_BLOCK_VALUES = 512


def random_blocks(kind: str) -> np.ndarray:
    """Bytes of 512 values in a row: every bit at random, but the float16s are small numbers."""
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (NUM_BLOCK_VALUES // values, size), np.uint8)
    # Where ggml-common.h has the float16s of a block.
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    places |= dict.fromkeys(("Q4_1", "Q5_1"), (0, 2))
    for place in places.get(kind, (0,)):
        scales = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(1, -1)
