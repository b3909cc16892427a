from pathlib import Path

import pytest
import which_models
from alone import assert_batched_equals_alone
from tiny_architectures import architectures, tiny_architecture

from runner.engine.layer_kinds import REFUSED, layer_kinds
from runner.errors import ModelError

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("name", which_models.held())
def test_batched_equals_alone(name):
    assert_batched_equals_alone(tiny_architecture(name))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_be_wrong_is_refused_with_the_reason(name):
    assert name in architectures()
    with pytest.raises(ModelError, match=f"{name}.*{REFUSED[name]}"):
        layer_kinds(tiny_architecture(name))


def test_the_table_in_the_readme_is_this_one():
    assert which_models.render() in README.read_text(), "print it: python tests/which_models.py"
