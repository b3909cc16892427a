import mlx.core as mx
import pytest
from tiny import make_engine, tiny_model
from tiny_architectures import tiny_architecture

from runner.engine.cache_list import ListKind
from runner.engine.kv_cache import KVKind
from runner.engine.kv_options import KVOptions
from runner.engine.kv_segments import Quantization
from runner.engine.layer_kinds import layer_kinds
from runner.engine.state_cache import StateKind
from runner.errors import ParameterError

WIDE = tiny_model(head_dim=32)
ATTENTION = KVKind((2, 64), (2, 32), mx.float32)
SLIDING = KVKind((2, 64), (2, 32), mx.float32, window=20)
STATE = StateKind(((3,),), (mx.float32,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_bits": 7}, "kv_bits=7 is not allowed: null, 2, 3, 4, 5, 6, 8"),
        ({"kv_bits": 0}, "kv_bits=0 is not allowed: null, 2, 3, 4, 5, 6, 8"),
        ({"kv_bits": 4, "kv_group_size": 16}, "kv_group_size=16 is not allowed: 32, 64, 128"),
        (
            {"kv_bits": 4, "kv_group_size": 64},
            "kv_group_size=64 is not allowed: 32; it has to divide 32, the dim of the keys of "
            "layer 0",
        ),
        ({"kv_group_size": 32}, "kv_group_size=32 is not allowed: 64 where kv_bits is null"),
        ({"quantized_kv_start": 5}, "quantized_kv_start=5 is not allowed: 0 where kv_bits is null"),
        (
            {"kv_bits": 4, "quantized_kv_start": -1},
            "quantized_kv_start=-1 is not allowed: at least 0",
        ),
        (
            {"max_kv_size": 4},
            "max_kv_size=4 is not allowed: null or at least 5, the first 4 tokens and one more",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, said):
    with pytest.raises(ParameterError) as error:
        make_engine(WIDE, **options)
    assert str(error.value) == said


def test_heads_that_no_group_divides_cannot_be_quantised():
    with pytest.raises(ParameterError, match=r"^kv_group_size=32 .* kv_bits has to be null; .* 8,"):
        make_engine(tiny_model(), kv_bits=8, kv_group_size=32)


@pytest.mark.parametrize("model", ["mamba", "deepseek_v32"])
@pytest.mark.parametrize("options", [{"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 9}])
def test_an_option_without_a_layer_to_act_on_is_refused(model, options):
    with pytest.raises(ParameterError, match="null, since no layer of this model keeps keys and"):
        make_engine(tiny_architecture(model), **options)


def test_keys_and_values_of_mixed_models_are_quantised_and_states_are_not():
    kinds = [STATE, ATTENTION, ListKind((STATE, SLIDING)), KVKind((0, 0), (0, 0), mx.float32)]
    options = KVOptions(kv_bits=4, kv_group_size=32, quantized_kv_start=3)
    state, attention, both, none = options.applied(kinds)
    how = Quantization(bits=4, group_size=32, start=3)
    assert state is STATE and none is kinds[3]
    assert attention.quantization == both.parts[1].quantization == how
    assert both.parts[0] is STATE and both.parts[1].window == 20


def test_latent_keys_and_values_are_quantised_where_both_divide():
    model = tiny_architecture("deepseek_v3", kv_lora_rank=64, qk_rope_head_dim=32)
    options = {"kv_bits": 4, "kv_group_size": 32}
    kinds = KVOptions(**options).applied(layer_kinds(model)[0])
    assert all(kind.quantization for kind in kinds)
    with pytest.raises(ParameterError, match="64 is not allowed: 32; it has to divide 32"):
        make_engine(model, kv_bits=4)


@pytest.mark.parametrize(("size", "window"), [(12, 12), (50, 20)])
def test_a_bound_keeps_the_first_four_and_narrows_windows(size, window):
    kinds = [ATTENTION, SLIDING, ListKind((STATE, ATTENTION))]
    full, sliding, both = KVOptions(max_kv_size=size).applied(kinds)
    assert (full.window, full.kept) == (both.parts[1].window, both.parts[1].kept) == (size - 4, 4)
    assert (sliding.window, sliding.kept) == (window, 0)


def test_a_layer_that_keeps_keys_and_values_twice_is_left_alone():
    twice = ListKind((ATTENTION, ATTENTION))
    options = KVOptions(kv_bits=4, kv_group_size=32, max_kv_size=9)
    assert options.applied([ATTENTION, twice])[1] is twice


def test_without_options_nothing_changes():
    assert KVOptions().applied([ATTENTION, STATE]) == [ATTENTION, STATE]
