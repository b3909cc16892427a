"""Whether a row gets the same bits in any batch, tried out with the model and machine at hand.

Matrix kernels may round differently by the number of rows that they multiply, and by a row's place
among them. Where they do not, nothing else in the engine depends on a row's neighbours: it starts
at column 0, sums run over columns in blocks that begin at fixed places, and a draw hangs on the
row's own key.
"""

from collections.abc import Callable, Iterable

import numpy as np

from runner.engine.engine import Engine
from runner.errors import ParameterError
from runner.types import Completion, Request, SamplingParams

_LENGTHS = (3, 21, 40)
"""Tokens of the prompts that are compared."""
_MOST_ROWS = 32
_NUM_TOKENS = 3


def check_batch_invariance(make_engine: Callable[..., Engine], *, max_batch_size: int) -> None:
    """Compares rows that run alone, prefilled in small chunks, with the same in a full batch.

    `make_engine` takes `max_batch_size` and `prefill_step_size`.

    Raises:
        ParameterError: their logprobs do not have the same bits.
    """
    mates = [_request(f"mate {i}", 2) for i in range(min(max_batch_size, _MOST_ROWS))]
    compared = [_request(f"row {length}", length) for length in _LENGTHS]
    alone = _bits(make_engine(max_batch_size=1, prefill_step_size=7).run(compared))
    full = make_engine(max_batch_size=max(len(mates), 2), prefill_step_size=512)
    together = _bits(full.run([*mates[::2], *compared, *mates[1::2]]))
    if any(together[name] != bits for name, bits in alone.items()):
        raise ParameterError(
            "batch_invariant=True is not possible here: a row's logprobs change with the batch it "
            "is in. On an x86 CPU with OpenBLAS, set OPENBLAS_CORETYPE=Sandybridge before Python "
            "starts (the command line does)"
        )


def _request(name: str, length: int) -> Request:
    # Any model has the first few tokens.
    prompt = [(7 * place + length) % 16 for place in range(length)]
    params = SamplingParams(max_tokens=_NUM_TOKENS, ignore_eos=True, seed=0)
    return Request(request_id=name, prompt_token_ids=prompt, params=params, key=name)


def _bits(completions: Iterable[Completion]) -> dict[str, tuple[list[int], bytes]]:
    return {
        done.request_id: (done.token_ids, np.array(done.raw_logprobs, np.float32).tobytes())
        for done in completions
    }
