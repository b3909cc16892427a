"""The server against its own OpenAPI document: what it says that it takes and gives."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_server import live_server
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance,
]  # fmt: skip


@pytest.fixture(scope="module")
def live(tiny_directory, tmp_path_factory):
    with live_server(
        tiny_directory, max_n=3, adapter_root=str(tmp_path_factory.mktemp("adapters"))
    ) as served:
        yield served


@pytest.fixture(scope="module")
def document(live):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def test_nothing_that_the_document_allows_breaks_it(document):
    asked = 0
    for found in document.get_all_operations():

        @settings(
            max_examples=20,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=found.ok().as_strategy())
        def answers(case):
            nonlocal asked
            asked += 1
            case.call_and_validate(checks=CHECKS)

        answers()
    assert asked > 100


def test_nothing_is_left_of_it(live):
    """The last of this module."""
    assert live.becomes_idle() and live.service.engine.num_restarts == 0
