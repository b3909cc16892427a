"""What `scoring_memory.py` measures, in small; `tests/engine/test_scoring.py` has the bound."""

import json
import os
import subprocess
import sys

from command_line import ROOT


def test_the_script_measures_what_scoring_takes_beside_the_weights(tiny_directory):
    command = [sys.executable, str(ROOT / "tests" / "scoring_memory.py"), str(tiny_directory)]
    done = subprocess.run(
        [*command, "8", "200", "5"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    # Keys and values of 1600 tokens, 0.8 MiB, and 1600 x 258 float32 logits, 1.6 MiB, a few times.
    assert 0 < found["mlx_peak_beside_weights"] < 16 and found["weights"] > 0
    assert found["process_peak"] >= found["process_peak_when_loaded"]
