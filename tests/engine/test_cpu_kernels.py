import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama
from tiny import make_engine, request, run, tiny_model

from runner.engine.attention import attention, plain_attention
from runner.engine.cpu_kernels import CPUKernels
from runner.engine.cpu_math import swiglu

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="for a CPU alone")


def test_names_are_bound_inside_alone_also_after_an_error():
    kernels, plain = CPUKernels(tiny_model()), llama.swiglu
    with pytest.raises(ZeroDivisionError), kernels.bound():
        assert llama.scaled_dot_product_attention is attention and llama.swiglu is swiglu
        1 / 0  # noqa: B018
    assert llama.scaled_dot_product_attention is plain_attention and llama.swiglu is plain


def test_the_engine_forwards_with_them(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "runner.engine.attention.softmax_in_place", lambda scores, sinks: seen.append(scores.shape)
    )
    run(make_engine(tiny_model()), [request([5, 6, 7], max_tokens=2)])
    assert seen[0] == (1, 4, 2, 2) and seen[-1][2] == 1, "in prefill and in decode"


def test_a_gradient_is_that_of_mlx_lm_beside_an_engine():
    """A training step on the model that an engine serves, between two of its steps."""

    def loss(model: nn.Module) -> mx.array:
        return model(mx.array([[5, 6, 7, 8]])).sum()

    alone, served = tiny_model(), tiny_model()
    engine = make_engine(served)
    engine.add(request([5, 6, 7]))
    engine.step()
    one, other = (nn.value_and_grad(m, loss)(m)[1] for m in (alone, served))
    gradients = [g["model"]["layers"][0]["self_attn"]["q_proj"]["weight"] for g in (one, other)]
    assert np.abs(gradients[0]).max() > 0 and mx.array_equal(*gradients)
