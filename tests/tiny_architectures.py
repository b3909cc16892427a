"""A tiny random model of each architecture that mlx-lm has."""

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_map

VOCAB_SIZE = 97
NUM_LAYERS = 4

CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SCALED_ROPE = ROPE | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
KDA = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2, 4],
    "num_heads": 4,
    "head_dim": 8,
    "short_conv_kernel_size": 4,
}

FILLER: dict[str, Any] = {
    "a_low_rank_dim": 8,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "attention_bias": False,
    "attention_multiplier": 0.3,
    "attention_window_size": 6,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "conv1d_width": 4,
    "conv_L_cache": 3,
    "conv_bias": True,
    "conv_kernel": 4,
    "conv_window": 2,
    "decay_low_rank_dim": 8,
    "decoder_sparse_step": 1,
    "dense_attention_every_n_layers": 2,
    "dense_intermediate_size": 48,
    "dim_model_base": 16,
    "embedding_multiplier": 2.0,
    "embedding_size": VOCAB_SIZE,
    "expert_ffn_hidden_size": 16,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "ff_intermediate_size": 48,
    "ffn_dim_divisor": 8,
    "ffn_hidden_size": 48,
    "final_logit_softcapping": 20.0,
    "first_k_dense_replace": 1,
    "gate_low_rank_dim": 8,
    "gegelu_limit": 20.0,
    "group_norm_size": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_dim": 32,
    "hidden_size": 32,
    "hidden_size_per_head": 8,
    "hidden_size_per_layer_input": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 6,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "kv_channels": 8,
    "kv_lora_rank": 8,
    "laurel_rank": 4,
    "layer_group_size": 2,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "layernorm_epsilon": 1e-5,
    "linear_allow_neg_eigval": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "logits_scaling": 2.0,
    "logits_soft_cap": 30.0,
    "mamba_chunk_size": 8,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 8,
    "mamba_d_ssm": 32,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_proj_bias": False,
    "max_position_embeddings": 256,
    "mla_scale_kv_lora": True,
    "mla_scale_q_lora": True,
    "mlp_bias": False,
    "mlp_hidden_size": 48,
    "mlp_only_layers": [],
    "model_dim": 32,
    "model_max_length": 256,
    "moe_hidden_size": 16,
    "moe_intermediate_size": 16,
    "moe_k": 2,
    "moe_latent_size": None,
    "moe_layer_freq": 1,
    "moe_num_experts": 4,
    "moe_shared_expert_intermediate_size": 16,
    "moe_top_k": 2,
    "moe_topk": 2,
    "n_ctx": 256,
    "n_embd": 32,
    "n_group": 1,
    "n_groups": 1,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 48,
    "n_kv_heads": 2,
    "n_layer": NUM_LAYERS,
    "n_layers": NUM_LAYERS,
    "n_positions": 256,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_eps": 1e-5,
    "norm_topk_prob": True,
    "num_attention_groups": 2,
    "num_attention_heads": 4,
    "num_dense_layers": 1,
    "num_expert_group": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_heads": 4,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "num_kv_reuse_layers": 2,
    "num_kv_shared_layers": 2,
    "num_layers": NUM_LAYERS,
    "num_local_experts": 4,
    "num_shared_expert": 1,
    "num_shared_experts": 1,
    "num_vocab": VOCAB_SIZE,
    "ngram_vocab_size_ratio": 3,
    "output_multiplier": 0.5,
    "partial_rotary_factor": 0.5,
    "post_norm": False,
    "post_norm_eps": 1e-5,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_norm": True,
    "qk_rope_head_dim": 4,
    "residual_multiplier": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_local_base_freq": 1000.0,
    "rope_theta": 10000.0,
    "rotary_dim": 4,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "routed_scaling_factor": 1.0,
    "scale_depth": 1.4,
    "scale_emb": 2.0,
    "scoring_func": "sigmoid",
    "share_expert_dim": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "sliding_window": 6,
    "sliding_window_layers": [0, 2],
    "sliding_window_pattern": 2,
    "sliding_window_size": 6,
    "ssm_state_size": 8,
    "state_size": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_rope_theta": 1000.0,
    "swa_v_head_dim": 8,
    "tie_word_embeddings": False,
    "time_step_limit": (0.0, 100.0),
    "time_step_rank": 4,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_bias": False,
    "use_conv_bias": True,
    "use_expert_bias": True,
    "use_parallel_residual": True,
    "use_qk_norm": True,
    "use_qkv_bias": True,
    "v_head_dim": 8,
    "v_low_rank_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "window_size": 6,
    "zero_expert_num": 1,
    "zero_expert_type": "identity",
    "attention_method": "MLA",
}
"""What a configuration field is given, by its name, in whichever architecture it occurs."""

CHANGES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v41": {"o_groups": 2, "o_lora_rank": 8, "sliding_window": 8},
    "deepseek_v2": {"rope_scaling": {"factor": 1.0, "mscale_all_dim": 0}},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, False, True]},
    "gear": {"layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"]},
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 10.0},
    },
    "kimi_k3": {
        "text_config": {"hidden_act": "situ", "linear_attn_config": KDA, "attn_res_block_size": 2}
    },
    "kimi_linear": {"linear_attn_config": KDA},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4, 4]},
    "lfm2": CONVOLUTIONS
    | {
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    },
    "lfm2_moe": CONVOLUTIONS,
    "lille-130m": {"block_size": 256, "n_embd": 64},
    "llama4": {
        "text_config": {
            "attention_chunk_size": 6,
            "interleave_moe_layer_step": 2,
            "rope_scaling": None,
            "num_experts_per_tok": 1,
        }
    },
    "llama4_text": {"no_rope_layers": [1, 1, 0, 1]},
    "mellum": {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm3": {"rope_scaling": {"short_factor": 1.0, "long_factor": 1.0}},
    "minimax_m3_vl": {
        "text_config": {
            "moe_layer_freq": [0, 1, 1, 1],
            "layer_types": None,
            "sparse_attention_freq": [0, 1, 0, 1],
            "index_block_size": 4,
            "index_topk_blocks": 2,
        }
    },
    "ministral3": {"rope_parameters": SCALED_ROPE},
    "mistral4": {"rope_parameters": SCALED_ROPE},
    "muse_spark": {
        "text_config": {
            "rope_parameters": ROPE,
            "layer_rope_theta": [1e4, 0, 1e4, 0],
            "num_shared_experts": 0,
        }
    },
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 1}, "ffn": {"replace_with_linear": True}},
        ]
    },
    "nemotron_h": {"layer_types": ["mamba", "attention", "moe", "mamba"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {
        "num_transformer_layers": 2,
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 1.0],
    },
    "phimoe": {
        "rope_scaling": {
            "short_mscale": 1.0,
            "long_mscale": 1.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
        }
    },
    "plamo": {"n_shared_head": 2},
    "spark2_5": {
        "hidden_act": "gelu",
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}
"""Fields that one architecture needs otherwise."""

WRAPPED = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "glm_moe_dsa": "deepseek_v32",
    "kimi_k25": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
"""Vision models, whose `text_config` is the configuration of another module."""


NOT_TRIED = {
    "bitnet": "its kernel needs Metal",
    "muse_spark": "its kernel needs Metal",
    "olmo": "it needs the package `ai2-olmo`",
    "prism_hadamard_qwen35": "it is only there for one quantised checkpoint",
}
"""Modules that cannot be built or run here, and why."""


def architectures() -> list[str]:
    """The names of the modules of mlx-lm that define a model which can be tried."""
    found = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    names = [name for name in found if name not in NOT_TRIED]
    return [name for name in names if {"Model", "ModelArgs"} <= vars(_module(name)).keys()]


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}")


def _filled(args: Any, changes: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(args)]
    return {name: FILLER[name] for name in names if name in FILLER} | changes


def _arguments(name: str, **own_changes: Any) -> dict[str, Any]:
    module = _module(name)
    changes = {"model_type": name} | CHANGES.get(name, {}) | own_changes
    if "text_config" not in {field.name for field in dataclasses.fields(module.ModelArgs)}:
        return _filled(module.ModelArgs, changes)
    own = getattr(module, "TextArgs", None) or getattr(module, "TextModelArgs", None)
    own = own or getattr(module, "TextConfig", None)
    if name in WRAPPED:
        text = _arguments(WRAPPED[name])
        text = text.get("text_config", text)
    else:
        text = _filled(own, {"model_type": name} | changes.get("text_config", {}))
    return _filled(module.ModelArgs, changes | {"text_config": text})


def tiny_architecture(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random float32 model; weights are large enough that the context matters."""
    module, random = _module(name), np.random.default_rng(seed)
    model = module.Model(module.ModelArgs.from_dict(_arguments(name, **changes)))
    size = sum(parameter.size for _, parameter in tree_flatten(model.parameters()))
    assert size < 500_000, f"{name} has {size} parameters: a field of it is not filled"

    def fresh(parameter: mx.array) -> mx.array:
        if parameter.ndim == 1 or not mx.issubdtype(parameter.dtype, mx.floating):
            return parameter
        return mx.array((random.standard_normal(parameter.shape) * 0.25).astype(np.float32))

    model.update(tree_map(fresh, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model
