"""A small run of the load that `load.py` puts on a server."""

import pytest
from server.load import hammer


@pytest.mark.filterwarnings("error")
def test_clients_that_come_and_go_leave_nothing_behind():
    found = hammer(600, 200)
    assert found["requests"] == 600
    assert found["gone_at_once"] > 10 and found["gone_in_a_stream"] > 10
    before, after = found["resident_mib"]
    assert after - before < 24, "what it takes for 600 requests it would not give back"
