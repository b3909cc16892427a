"""mlx-lm's side of a benchmark, by mlx and mlx-lm alone.

Imported, it runs on the weights and the BLAS of this process. As a script (`python -P FILE MODEL`)
it is mlx-lm as pip installs it: nothing of this package is there, nor the BLAS that it loads.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model


def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_tokens: list[int],
    *,
    temperature: float,
    batch_size: int,
) -> int:
    """Runs mlx-lm's continuous batching; returns the tokens sampled, which no token ends early."""
    sampler = make_sampler(temp=temperature)
    generator = BatchGenerator(model, sampler=sampler, completion_batch_size=batch_size)
    generator.insert(prompts, max_tokens)
    num_tokens = 0
    while responses := generator.next_generated():
        num_tokens += len(responses)
    generator.close()
    return num_tokens


def score(model: nn.Module, prompts: list[list[int]], *, batch_size: int = 8) -> int:
    """The loop of `mlx_lm.perplexity`: batches of 8, all logits of a batch, their cross-entropy.

    Its rows are of one length; these are sorted by it, so that few pads are forwarded. Returns the
    tokens scored, pads left out.
    """
    prompts = sorted(prompts, key=len)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        padded = np.zeros((len(batch), len(batch[-1])), np.int32)
        for row, prompt in enumerate(batch):
            padded[row, : len(prompt)] = prompt
        logits = model(mx.array(padded[:, :-1])).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(padded[:, 1:]), reduction="none")
        mx.eval(losses)
    return sum(len(prompt) - 1 for prompt in prompts)


def run(model: nn.Module, work: dict[str, Any]) -> dict[str, Any]:
    """Generates, or scores where no `max_tokens` are given: tokens, seconds, peak memory."""
    mx.reset_peak_memory()
    started = time.perf_counter()
    num_tokens = generate(model, **work) if "max_tokens" in work else score(model, **work)
    seconds = time.perf_counter() - started
    return {"num_tokens": num_tokens, "seconds": seconds, "peak_bytes": mx.get_peak_memory()}


def main(directory: str) -> None:
    """Loads a model, then answers each line of JSON with one, as `Child` asks."""
    # What a library prints must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    model, _ = load_model(Path(directory))
    generate(model, [[1, 2, 3], [1, 2]], [3, 3], temperature=0.0, batch_size=2)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
