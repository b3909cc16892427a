"""`drafting_cost.py` does all of the work with and without drafts, on a tiny model."""

import json
import os
import subprocess
import sys

from command_line import ROOT


def test_the_script_times_all_engines_over_the_same_work(tiny_directory):
    command = [sys.executable, str(ROOT / "tests" / "drafting_cost.py"), str(tiny_directory)]
    done = subprocess.run(
        [*command, "2", "decode", "adapters"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["workload"] for one in found] == ["decode", "adapters"]
    for one in found:
        assert one["median"].keys() == one["rounds"].keys() == {"again", "drafting"}
        assert all(len(ratios) == 2 and min(ratios) > 0 for ratios in one["rounds"].values())
        # How much a few steps of a tiny model lose goes by the machine; test_gate.py bounds it.
        assert 0 <= one["lost"] < 1
