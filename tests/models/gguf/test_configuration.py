"""What a file says and mlx-lm's model would leave out is refused by name; the rest is heeded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import TINY_MODELS, tiny_gguf, write_gguf

from runner.errors import ModelError
from runner.models.gguf import load_gguf

_ZEROS = np.zeros(3, np.float32)
_HEAD_KEYS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_Edit = Callable[[dict[str, np.ndarray], dict[str, Any]], Any]


def _set(key: str, value: Any) -> _Edit:
    return lambda _, metadata: metadata.update({key: value})


def _refusal(tmp_path: Path, name: str, edit: _Edit) -> str:
    given, arrays = TINY_MODELS[name]
    metadata, tensors = dict(given), dict(arrays)
    edit(tensors, metadata)
    with pytest.raises(ModelError) as caught:
        load_gguf(write_gguf(tmp_path / "tiny.gguf", metadata, tensors))
    assert str(caught.value).startswith("tiny.gguf cannot be loaded: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "edit", "problem"),
    [
        (
            "llama",
            _set("general.architecture", "mamba"),
            "'mamba' is not covered, only llama, qwen2, qwen3, gemma2, gemma3, phi3 are",
        ),
        ("llama", lambda _, m: m.pop("llama.block_count"), "lacks the metadata 'llama.block_count"),
        ("llama", lambda t, _: t.pop("token_embd.weight"), "lacks the tensor token_embd.weight"),
        ("llama", lambda t, _: t.pop("blk.1.ffn_up.weight"), "of model.layers.1.mlp.up_proj.weigh"),
        (
            "llama",
            lambda t, _: t.update({"blk.0.odd.weight": _ZEROS}),
            "blk.0.odd.weight are",
        ),
        (
            "llama",
            lambda t, _: t.update({"output.bias": _ZEROS}),
            "output.bias are not cover",
        ),
        (
            "qwen3",
            lambda t, _: t.update({"blk.0.attn_q.bias": _ZEROS}),
            "blk.0.attn_q.bias",
        ),
        (
            "gemma2",
            lambda t, _: t.update({"output.weight": _ZEROS}),
            "output.weight are not",
        ),
        ("llama", _set("llama.expert_count", 8), "llama.expert_count=8 is not covered"),
        ("llama", _set("llama.logit_scale", 0.5), "llama.logit_scale=0.5 is not covered"),
        ("llama", _set("llama.novel_thing", 1), "its metadata llama.novel_thing are not covered"),
        ("llama", _set("llama.attention.head_count_kv", [1, 2]), "head_count_kv per layer is not"),
        ("llama", _set("llama.attention.head_count", [1, 2]), "head_count per layer is not covere"),
        ("llama", _set("llama.attention.value_length", 8), "values of 8 and keys of 16"),
        ("llama", _set("llama.rope.dimension_count", 8), "RoPE over 8 of 16 dimensions"),
        ("llama", _set("llama.rope.scaling.type", "other"), "RoPE scaling 'other' is not covered"),
        ("llama", _set("llama.rope.scaling.attn_factor", 1.5), "attn_factor=1.5 is not covered"),
        ("llama yarn", _set("llama.rope.scaling.yarn_log_multiplier", 0.1), "yarn_log_multiplier"),
        (
            "llama yarn",
            lambda _, m: m.pop("llama.rope.scaling.original_context_length"),
            "YaRN without rope.scaling.original_context_length",
        ),
        (
            "llama linear",
            lambda t, _: t.update({"rope_freqs.weight": np.full(8, 2, np.float32)}),
            "RoPE scaling 'linear' with rope_freqs.weight",
        ),
        ("gemma2", _set("gemma2.rope.scaling.factor", 2.0), "scaling 'linear' is not covered for"),
        ("gemma3", _set("gemma3.final_logit_softcapping", 30.0), "soft cap on the logits of gemma"),
        (
            "gemma3",
            _set("gemma3.attention.sliding_window_pattern", [True, False, False] * 2 + [True]),
            "its pattern of sliding windows is not covered",
        ),
        (
            "qwen2",
            lambda _, m: m.update({f"qwen2.{key}": 32 for key in _HEAD_KEYS}),
            "heads of 32 dimensions where 16 are an even share",
        ),
        ("phi3 longrope", _set("phi3.rope.scaling.attn_factor", 2.0), "attention factor 2 of its"),
        ("phi3", _set("phi3.rope.scaling.attn_factor", 2.0), "without rope_factors_short.weight"),
        (
            "phi3 longrope",
            lambda t, _: t.pop("rope_factors_short.weight"),
            "without rope_factors_short.weight",
        ),
        ("llama", lambda t, _: t.update({"rope_factors_long.weight": _ZEROS}), "longrope is cover"),
        (
            "qwen3",
            lambda t, _: t.update({"rope_freqs.weight": np.full(16, 2, np.float32)}),
            "RoPE scaling 'longrope' is not covered for the architecture 'qwen3'",
        ),
    ],
)
def test_what_is_missing_or_not_covered_is_named(
    tmp_path: Path, name: str, edit: _Edit, problem: str
) -> None:
    assert problem in _refusal(tmp_path, name, edit)


def test_what_the_file_says_is_in_the_configuration(tmp_path: Path) -> None:
    metadata, tensors = TINY_MODELS["llama untied"]
    path = write_gguf(tmp_path / "tiny.gguf", metadata | {"llama.vocab_size": 5}, tensors)
    config = load_gguf(path).config
    assert config["vocab_size"] == tensors["token_embd.weight"].shape[0]
    assert config["tie_word_embeddings"] is False and config["rope_scaling"] is None
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == [2]


@pytest.mark.parametrize(
    ("own", "scaling"),
    [
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "type": "linear", "factor": 2.0}),
        ({"factors": {"rope_freqs": [1.0] * 8}}, None),
    ],
)
def test_scaling_is_what_the_file_asks_for(
    tmp_path: Path, own: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", *tiny_gguf("llama", **own))
    assert load_gguf(path).config["rope_scaling"] == scaling


def test_a_pattern_of_windows_may_be_spelt_out(tmp_path: Path) -> None:
    metadata, tensors = TINY_MODELS["gemma3"]
    key = "gemma3.attention.sliding_window_pattern"
    spelt = metadata | {key: [(layer + 1) % 3 != 0 for layer in range(7)]}
    content = load_gguf(write_gguf(tmp_path / "a.gguf", spelt, tensors))
    assert content.config["sliding_window_pattern"] == 3
    without = {k: v for k, v in metadata.items() if "sliding_window" not in k}
    content = load_gguf(write_gguf(tmp_path / "b.gguf", without, tensors))
    assert content.config["sliding_window_pattern"] == 1


@pytest.mark.parametrize(("layers", "scalar"), [(26, 32.0), (46, 16.0)])
def test_the_largest_gemma_scales_its_attention_otherwise(
    tmp_path: Path, layers: int, scalar: float
) -> None:
    path = write_gguf(tmp_path / "a.gguf", *tiny_gguf("gemma2", head_dim=32, num_layers=layers))
    assert load_gguf(path).config["query_pre_attn_scalar"] == scalar
