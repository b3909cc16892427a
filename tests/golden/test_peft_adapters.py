"""Adapters that PEFT saved, against what PEFT on PyTorch says with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import make_engine, request, run, tiny_model

from runner.models.adapters import read_adapter

PEFT = Path(__file__).with_name("peft")
GOLDEN = json.loads((PEFT / "logprobs.json").read_text())


def test_there_is_an_adapter_of_every_kind():
    assert set(GOLDEN["logprobs"]) == {"lora", "rslora", "dora", "embedding"}
    assert sum(it.stat().st_size for it in PEFT.rglob("*") if it.is_file()) < 200_000


@pytest.mark.parametrize("kind", GOLDEN["logprobs"])
def test_an_adapter_says_what_peft_says(kind):
    engine = make_engine(tiny_model(tie_word_embeddings=False))
    engine.load_adapter(kind, read_adapter(PEFT / kind))
    asked = [
        request(GOLDEN["ids"], str(name), max_tokens=0, prompt_logprobs=0, adapter=name)
        for name in (kind, None)
    ]
    done = {c.adapter: c.prompt_logprobs.logprobs for c in run(engine, asked).values()}
    np.testing.assert_allclose(done[kind], GOLDEN["logprobs"][kind], atol=1e-4)
    assert np.abs(np.subtract(done[None], GOLDEN["logprobs"][kind])).max() > 0.1
