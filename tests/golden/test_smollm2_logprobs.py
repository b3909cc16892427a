"""The embedded model's logprobs against PyTorch transformers, an independent implementation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command_line import write_jsonl
from in_process import by_text, run_job

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "smollm2_logprobs.json").read_text())


def test_the_golden_file_is_small_and_the_script_beside_it_has_its_texts():
    assert (HERE / "smollm2_logprobs.json").stat().st_size < 200_000
    made: dict = {"__name__": "golden", "__file__": str(HERE / "smollm2_logprobs.py")}
    exec((HERE / "smollm2_logprobs.py").read_text(), made)
    assert made["TEXTS"] == {name: it["text"] for name, it in GOLDEN["texts"].items()}
    assert made["MODEL"] == GOLDEN["model"]
    values = [value for it in GOLDEN["texts"].values() for value in it["logprobs"]]
    assert GOLDEN["perplexity"] == pytest.approx(math.exp(-math.fsum(values) / len(values)))


@pytest.mark.real_model
@pytest.mark.parametrize("mode", ["document", "concat"])
def test_logprobs_and_perplexity_are_those_of_transformers(tmp_path, mode):
    texts = [it["text"] for it in GOLDEN["texts"].values()]
    # One text where the mode is concat: in more, each is the context of the next.
    texts = texts if mode == "document" else [GOLDEN["texts"]["long"]["text"]]
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    rows = run_job(
        "perplexity", tmp_path, f"model.path={GOLDEN['model']}", "job.prefix=bos",
        f"job.mode={mode}", f"data.path={tmp_path / 'texts.jsonl'}",
    )  # fmt: skip
    done, ours, theirs = by_text(rows), [], []
    for golden in (it for it in GOLDEN["texts"].values() if it["text"] in texts):
        row = done[golden["text"]]
        assert row["token_ids"] == golden["token_ids"]
        np.testing.assert_allclose(row["logprobs"], golden["logprobs"], atol=2e-3)
        assert np.mean(row["logprobs"]) == pytest.approx(np.mean(golden["logprobs"]), abs=1e-4)
        ours, theirs = ours + row["logprobs"], theirs + golden["logprobs"]
    print(f"largest difference {np.abs(np.array(ours) - theirs).max():.2e}")
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=1e-4)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["perplexity"]
    assert found["token_perplexity"] == pytest.approx(math.exp(-np.mean(theirs)), rel=5e-4)
