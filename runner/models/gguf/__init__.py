"""GGUF files: configuration, weights and tokenizer as mlx-lm knows them.

The format is ggml's (docs/gguf.md); what the keys mean is read off llama.cpp.
"""

from runner.models.gguf.content import GGUFModel, build_model, load_gguf

__all__ = ["GGUFModel", "build_model", "load_gguf"]
