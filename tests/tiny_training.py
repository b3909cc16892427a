"""Random completions of the tiny model, and a trainer to learn from them."""

from typing import Any

import mlx.core as mx
import numpy as np
import tiny

from runner.training.grpo import Experience, GRPOTrainer, LoraShape, Objective

PROMPT = [5, 6, 7, 8]


def logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> Any:
    """Of each completion token, in float64, by a full forward."""
    logits = np.array(model(mx.array([prompt + completion])))[0].astype(np.float64) / temperature
    rows = logits[len(prompt) - 1 : -1]
    normalizer = np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1)) + rows.max(-1)
    return rows[np.arange(len(completion)), completion] - normalizer


def experiences(model: Any, *, temperature: float = 1.0, count: int = 6) -> list[Experience]:
    """Random completions with the logprobs that `model` gives them, half of them good."""
    random = np.random.default_rng(3)
    found = []
    for index in range(count):
        prompt = PROMPT[: 1 + index % 4]
        completion = random.integers(3, tiny.VOCAB_SIZE, size=2 + index).tolist()
        found.append(
            Experience(
                prompt_token_ids=prompt,
                completion_token_ids=completion,
                behaviour_logprobs=logprobs(model, prompt, completion, temperature).tolist(),
                advantage=1.0 if index % 2 else -0.5,
            )
        )
    return found


def trainer(model: Any, objective: Objective | None = None, **options: Any) -> GRPOTrainer:
    named = {name: options.pop(name) for name in ("num_layers", "keys") if name in options}
    shape = LoraShape(rank=4, scale=2.0, **named)
    given = {"learning_rate": 1e-2, "seed": 1} | options
    return GRPOTrainer(model, shape, objective or Objective(temperature=1.0), **given)
