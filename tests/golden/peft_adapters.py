"""Makes `peft/`: adapters as PEFT saves them, and what PEFT on PyTorch says with each of them.

In two steps, since the project needs no PyTorch: this project's environment writes the tests' tiny
model as a transformers checkpoint, and one with torch, transformers and peft makes the rest.

    PYTHONPATH=tests python tests/golden/peft_adapters.py export DIRECTORY
    python-with-peft tests/golden/peft_adapters.py make DIRECTORY
"""

import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("peft")
IDS = [7, 31, 5, 64, 90, 12, 45, 3, 77, 21, 50, 8, 33, 60, 18, 41]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR},
    "rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"q_proj": 5},
    },
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True, "target_modules": LINEAR},
    "embedding": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head"]},
}


def export(directory: Path) -> None:
    """Writes the tiny model; in this project's environment."""
    import mlx.core as mx
    import tiny
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(tiny.tiny_model(tie_word_embeddings=False).parameters()))
    directory.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "pt"})
    stated = tiny.CONFIG | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(stated))


def make(directory: Path) -> None:
    """Writes the adapters and the golden file; where torch and peft are."""
    import peft
    import torch
    import transformers

    golden: dict[str, Any] = {"ids": IDS, "logprobs": {}}
    golden["made_with"] = {it.__name__: it.__version__ for it in (torch, transformers, peft)}
    for seed, (name, options) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "magnitude" in path:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                elif "lora_" in path:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
            model.eval()
            logprobs = model(torch.tensor([IDS])).logits.log_softmax(-1)[0, :-1]
        values = logprobs.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
        golden["logprobs"][name] = values.tolist()
        model.save_pretrained(GOLDEN / name, save_embedding_layers=False)
        (GOLDEN / name / "README.md").unlink(missing_ok=True)
    (GOLDEN / "logprobs.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    {"export": export, "make": make}[sys.argv[1]](Path(sys.argv[2]))
