"""A model with adapters bound to it, and what is left of them afterwards: nothing."""

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import switch_layers
from tiny import tiny_model
from tiny_adapters import ATTENTION, random_adapter

from runner.engine.lora import Adapter, fitted
from runner.engine.lora_binding import AdapterBinding
from runner.errors import ParameterError

MODEL = tiny_model()
IDS = mx.array([[5, 9, 60], [7, 31, 5]])
KEYS = (*ATTENTION, "model.embed_tokens")


@pytest.fixture
def binding() -> AdapterBinding:
    return AdapterBinding(MODEL, max_adapters=4)


def made(binding: AdapterBinding, seed: int) -> tuple[Adapter, Any]:
    weights, adapted = random_adapter(MODEL, seed, keys=KEYS)
    return Adapter(str(seed), 1, weights, fitted(binding.modules, weights)), adapted


def is_plain(binding: AdapterBinding) -> bool:
    kinds = {type(module).__name__ for module in binding.modules.values()}
    bound = [name for it in binding.modules.values() for name in vars(it) if "low_rank" in name]
    return not bound and not any(kind.startswith("Adapted") for kind in kinds)


def test_rows_have_their_adapters_inside_and_the_model_is_itself_outside(binding):
    (one, with_one), (other, with_other) = made(binding, 1), made(binding, 2)
    plain = MODEL(IDS)
    for rows, models in (
        ([one, one], [with_one, with_one]),
        ([one, other], [with_one, with_other]),
        ([None, one], [MODEL, with_one]),
        ([None, None], [MODEL, MODEL]),
        ([other, None], [with_other, MODEL]),
    ):
        with binding.bound(rows):
            found = MODEL(IDS)
            mx.eval(found)
        assert is_plain(binding)
        for row, model in enumerate(models):
            expected = model(IDS[row : row + 1])[0]
            assert mx.allclose(found[row], expected, atol=1e-4)
        assert mx.array_equal(MODEL(IDS), plain)


@pytest.mark.parametrize("mixed", [False, True])
def test_an_error_in_a_forward_leaves_a_plain_model(binding, mixed):
    one, _ = made(binding, 1)
    before = switch_layers._gather_sort
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        binding.bound([one, None if mixed else one]),
    ):
        assert not is_plain(binding)
        assert (switch_layers._gather_sort is before) != mixed
        raise RuntimeError("out of memory")
    assert is_plain(binding) and switch_layers._gather_sort is before


def test_rows_without_an_adapter_bind_nothing(binding):
    for rows in ([], [None], [None, None]):
        with binding.bound(rows):
            assert is_plain(binding)
    assert binding.nbytes == 0


def test_one_adapter_alone_is_not_copied(binding):
    one, _ = made(binding, 1)
    with binding.bound([one, one]):
        pass
    assert binding.nbytes == 0
    with binding.bound([one, None]):
        pass
    assert binding.nbytes > 0


def test_the_batch_that_stays_as_it_is_keeps_its_order_of_rows(binding):
    (one, _), (other, _) = made(binding, 1), made(binding, 2)

    def order(rows: list[Adapter | None]) -> Any:
        with binding.bound(rows):
            return binding._rows

    first = order([one, other])
    assert order([one, other])[1] is first[1]
    swapped = order([other, one])
    assert swapped[1] is not first[1] and swapped[0] == first[0][::-1]


def test_at_least_one_adapter_has_to_have_a_place():
    with pytest.raises(ParameterError, match="max_adapters=0 is not allowed"):
        AdapterBinding(MODEL, max_adapters=0)
