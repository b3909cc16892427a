"""The runner itself, with a stub for the model: fast, and in memory that no row grows."""

import json
import os
import subprocess
import sys

import pytest
from command_line import ROOT

ROWS = 120_000


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What `million_rows.py` measures for an eighth of a million."""
    place = tmp_path_factory.mktemp("rows")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "million_rows.py"), str(place), str(ROWS)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def test_it_keeps_up_with_any_model(numbers):
    assert numbers["rows_per_cpu_second"] > 5000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(numbers):
    # Digests in Python objects take 100 bytes a row and more, which would be 10 MiB here; what an
    # allocator keeps differs by 4 between two runs.
    assert numbers["mib_of_all"] < numbers["mib_of_few"] + 7
    assert numbers["mib_of_finding_all_done"] < numbers["mib_of_few"]
    assert numbers["mib_of_finding_all_done_in_a_touched_input"] < numbers["mib_of_few"]
    assert numbers["mib_of_merging"] < numbers["mib_of_few"] + 20


def test_a_finished_directory_is_found_done_at_once(numbers):
    # Of the processor time of the run that did them: how fast a machine is, and what else it does,
    # is in both.
    assert numbers["cpu_share_of_finding_all_done"] < 0.1
    assert numbers["cpu_share_of_finding_all_done_in_a_touched_input"] < 0.45
