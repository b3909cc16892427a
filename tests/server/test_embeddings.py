"""`/v1/embeddings`: the vectors of `LLM.embed`, in the batch of everything else."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import ask, tiny_service

from runner import LLM
from runner.server.engine_thread import EngineThread
from runner.server.service import Service


def embed(service: Service, **body: Any) -> Any:
    response = ask(service, "POST", "/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_vectors_are_those_of_the_llm(service: Service, tiny_directory: Path) -> None:
    texts = ["one", "another text", "a third, longer than both"]
    expected = [it.vector for it in LLM(tiny_directory).embed(texts, use_tqdm=False)]
    answer = embed(service, input=texts)
    assert [it["index"] for it in answer["data"]] == [0, 1, 2]
    vectors = [it["embedding"] for it in answer["data"]]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    num_tokens = len("".join(texts))
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    packed = embed(service, input=texts, encoding_format="base64")["data"]
    for it, vector in zip(packed, vectors, strict=True):
        found = np.frombuffer(base64.b64decode(it["embedding"]), "<f4")
        np.testing.assert_allclose(found, vector, atol=1e-6)


def test_an_engine_that_has_started_over_embeds(service: Service, engine: EngineThread) -> None:
    before = embed(service, input=[[5, 6, 7]])["data"][0]["embedding"]
    step = engine.llm.engine.step

    def failing() -> Any:
        engine.llm.engine.step = step  # type: ignore[method-assign]
        raise RuntimeError("on purpose")

    engine.llm.engine.step = failing  # type: ignore[method-assign]
    response = ask(service, "POST", "/v1/embeddings", json={"input": "hi"})
    assert response.status_code == 503 and "on purpose" in response.text
    assert embed(service, input=[[5, 6, 7]])["data"][0]["embedding"] == before


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input"),
        ({"input": "a", "dimensions": 10**6}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a", "stream": True}, 400, "stream"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": "x" * 300}, 400, "input"),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    service: Service, body: dict[str, Any], status: int, param: str
) -> None:
    response = ask(service, "POST", "/v1/embeddings", json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_the_log_counts_its_tokens(engine: EngineThread, tmp_path: Path) -> None:
    service = tiny_service(engine, log_file=str(tmp_path / "log.jsonl"))
    embed(service, input=["abc", "de"])
    service.log.close()
    assert '"prompt_tokens": 5' in (tmp_path / "log.jsonl").read_text()
