"""The tiny model with a tokenizer of bytes, as files that a user could point at."""

from pathlib import Path
from typing import Any

import tiny
from mlx_lm.utils import save_config, save_model
from tokenizers import pre_tokenizers

from runner.models.tokenizer import Vocabulary, build_tokenizer

TOKENS = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'boom' %}{{ raise_exception('no booms') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    "{{ mood or '' }}"
)
CONFIG = tiny.CONFIG | {
    "vocab_size": len(TOKENS),
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def save_tiny_model(directory: Path, **changes: Any) -> Path:
    """Writes config, weights and tokenizer; every byte is a token, </s> ends a text."""
    changes = {"vocab_size": len(TOKENS), "max_position_embeddings": CONTEXT} | changes
    save_model(directory, tiny.tiny_model(**changes))
    save_config(CONFIG | changes, directory / "config.json")
    vocabulary = Vocabulary(
        tokens=TOKENS,
        merges=[],
        pre_tokenizer="gpt-2",
        special_ids=[0, 1],
        bos_id=0,
        eos_ids=[1],
        chat_template=CHAT_TEMPLATE,
    )
    build_tokenizer(vocabulary).save_pretrained(directory)
    return directory
