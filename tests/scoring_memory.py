"""Measures the memory that scoring takes beside the weights, as JSON in MiB.

`python scoring_memory.py MODEL ROWS LENGTH [TOP]`: ROWS random texts of LENGTH tokens at once,
with TOP alternatives and the entropy of each token where TOP is given. In a process of its own,
since the peak of a process never falls.
"""

import json
import random
import resource
import sys

from runner.llm import LLM  # First: it loads the BLAS, then mlx.

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from runner.types import Request, SamplingParams

MIB = 2**20


def peak_rss() -> float:
    """Most that the process held in memory, in MiB; macOS counts bytes, Linux kibibytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def main(path: str, num_rows: int, length: int, top: int | None) -> None:
    """Scores, and prints what it took."""
    llm = LLM(path, max_batch_size=num_rows)
    weights = sum(array.nbytes for _, array in tree_flatten(llm.model.parameters())) / MIB
    draw, loaded = random.Random(0), peak_rss()
    vocab_size = len(llm.tokenizer.get_vocab())
    params = SamplingParams(max_tokens=0, prompt_logprobs=top or 0, seed=0)
    mx.reset_peak_memory()
    for number in range(num_rows):
        ids = [draw.randrange(vocab_size) for _ in range(length)]
        name = str(number)
        llm.engine.add(
            Request(
                request_id=name, prompt_token_ids=ids, params=params, key=name,
                prompt_entropy=top is not None,
            )
        )  # fmt: skip
    num_done = 0
    while llm.engine.has_unfinished:
        num_done += len(llm.engine.step())
    assert num_done == num_rows
    numbers = {
        "weights": weights,
        "mlx_peak_beside_weights": mx.get_peak_memory() / MIB - weights,
        "process_peak": peak_rss(),
        "process_peak_when_loaded": loaded,
    }
    print(json.dumps({name: round(number, 1) for name, number in numbers.items()}))


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[2:]]
    main(sys.argv[1], given[0], given[1], given[2] if len(given) > 2 else None)
