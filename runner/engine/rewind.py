"""Whether a model's rows can take several tokens at once and go back from them, tried at load."""

import mlx.core as mx

from runner.engine.model_runner import ModelRunner
from runner.errors import ParameterError

_TOLERANCE = 0.05
"""Of the largest logit; a token at a wrong place, or seen where it is hidden, changes far more."""
_STARTS = (0, 2)
_MOST = 3


def check_rewind(runner: ModelRunner, which: str = "this model") -> None:
    """Forwards a few tokens one by one, and several at once over the ones of before.

    Raises:
        ParameterError: a layer keeps a state, or the logits differ.
    """
    for index, kind in enumerate(runner.kinds):
        if kind.is_recurrent:
            why = f"layer {index} keeps a state, which cannot go back from a rejected token"
            raise ParameterError(f"speculative is not allowed with {which}: {why}")
    try:
        is_same = _is_same(runner)
    except (TypeError, ValueError):  # A shape that the model did not think of.
        is_same = False
    finally:
        runner.drop_caches()
    if not is_same:
        why = "it does not take several tokens at once in rows of different lengths"
        raise ParameterError(f"speculative is not allowed with {which}: {why}")


def _is_same(runner: ModelRunner) -> bool:
    width, none = min(_MOST, 1 + runner.num_spare), [None] * len(_STARTS)
    end = max(_STARTS) + width
    runner.reserve(len(_STARTS), end, end)
    # Any model has the first few tokens.
    token_ids = mx.array([[(5 * i + 7 * row) % 16 for i in range(end)] for row in (0, 1)])
    for column in range(max(_STARTS)):
        runner.forward_rows(token_ids[:, column : column + 1], [column, column], none)
    columns = mx.array(_STARTS)[:, None] + mx.arange(width)
    asked = mx.take_along_axis(token_ids, columns, axis=1)
    ones = [
        runner.forward_rows(asked[:, i : i + 1], [start + i for start in _STARTS], none)
        for i in range(width)
    ]
    expected = mx.concatenate(ones, axis=1).astype(mx.float32)
    runner.forward_rows((asked + 3) % 16, list(_STARTS), none)  # To be rejected.
    found = runner.forward_rows(asked, list(_STARTS), none).astype(mx.float32)
    error = mx.abs(found - expected).max()
    return bool((error <= _TOLERANCE * mx.abs(expected).max()).item())
