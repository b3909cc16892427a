"""`/v1/embeddings`: bodies as OpenAI's clients send and parse them, over a tiny model."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse

from runner import LLM, SamplingParams
from runner.answerer import Answerer
from runner.engine.admission import Admission
from runner.errors import ModelError
from runner.openai.embeddings import MOST_INPUTS, parse_embedding_request
from runner.openai.errors import ApiError


@pytest.fixture(scope="module")
def answerer(llm: LLM) -> Answerer:
    return Answerer(llm, SamplingParams(max_tokens=None, seed=0), ["tiny"])


def ask(answerer: Answerer, **body: Any) -> dict[str, Any]:
    """The body of the response; what comes back went through JSON."""
    request = answerer.understand_embedding(body)
    done = {it.request_id: it for it in answerer.llm.run(request.prompt_requests("r", key="k"))}
    outputs = [done[f"r/{place}"] for place in range(len(request.prompts))]
    made = answerer.embedding_body(request, outputs)
    back: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    assert back == made
    return back


@pytest.mark.parametrize(
    ("given", "count"),
    [("hello", 1), (["hello", "a", "bcd"], 3), ([5, 6, 7], 1), ([[5, 6, 7], [8]], 2)],
)
def test_every_form_of_input_is_answered_in_order_as_the_client_parses_it(answerer, given, count):
    body = ask(answerer, input=given, model="tiny", user="me")
    assert CreateEmbeddingResponse.model_validate(body, strict=True).to_dict() == body
    assert [it["index"] for it in body["data"]] == list(range(count))
    assert {it["object"] for it in body["data"]} == {"embedding"} and body["object"] == "list"
    listed = given if isinstance(given[0], list) or count > 1 else [given]
    expected = answerer.llm.embed(listed, use_tqdm=False)
    for it, one in zip(body["data"], expected, strict=True):
        np.testing.assert_allclose(it["embedding"], one.vector, atol=1e-6)
    tokens = sum(one.num_tokens for one in expected)
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert body["model"] == "tiny"


def test_base64_is_the_same_floats_as_the_client_reads_them(answerer):
    plain = ask(answerer, input="hello", encoding_format="float", dimensions=5)["data"][0]
    coded = ask(answerer, input="hello", encoding_format="base64", dimensions=5)["data"][0]
    floats = np.frombuffer(base64.b64decode(coded["embedding"]), dtype="float32")
    assert floats.tolist() == plain["embedding"] and len(floats) == 5
    assert np.linalg.norm(floats) == pytest.approx(1, abs=1e-6)


def test_the_pooling_is_the_servers(llm):
    last = Answerer(llm, SamplingParams(seed=0), ["tiny"], pooling="last")
    (expected,) = llm.embed(["hello"], pooling="last", use_tqdm=False)
    found = ask(last, input="hello")["data"][0]["embedding"]
    np.testing.assert_allclose(found, expected.vector, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ["a", ""]}, "invalid_value", "input"),
        ({"input": [[5], []]}, "invalid_value", "input"),
        ({"input": ["a", 5]}, "invalid_value", "input"),
        ({"input": {"text": "a"}}, "invalid_value", "input"),
        ({"input": ["a"] * (MOST_INPUTS + 1)}, "invalid_value", "input"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_type", "encoding_format"),
        ({"input": "a", "encoding_format": ["float"]}, "invalid_type", "encoding_format"),
        ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 33}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 2.5}, "invalid_type", "dimensions"),
        ({"input": "a", "dimensions": True}, "invalid_type", "dimensions"),
        ({"input": "a", "model": "gpt-4o"}, "model_not_found", "model"),
        ({"input": "a", "dimension": 3}, "unknown_parameter", "dimension"),
        ({"input": "a", "truncate_prompt_tokens": 3}, "unsupported_parameter", None),
        ({"input": "x" * 300}, "context_length_exceeded", "input"),
        ({"input": ["a", [5, 10**6]]}, "invalid_value", "input"),
        ({"input": [[5, 10**6], [3]]}, "invalid_value", "input"),
    ],
    ids=lambda it: str(it)[:40],
)
def test_what_cannot_be_answered_is_refused_as_openai_does(answerer, body, code, param):
    with pytest.raises(ApiError) as refused:
        ask(answerer, **body)
    assert refused.value.code == code
    assert refused.value.param == (param or "truncate_prompt_tokens")
    assert refused.value.status == (404 if code == "model_not_found" else 400)


def test_null_is_a_field_left_out_and_the_most_inputs_are_taken():
    nothing = dict.fromkeys(("model", "user", "encoding_format", "dimensions", "priority"))
    request = parse_embedding_request({"input": ["a"] * MOST_INPUTS} | nothing)
    assert len(request.prompts) == MOST_INPUTS and not request.is_base64
    assert (request.params.dimensions, request.params.pooling, request.model) == (
        None,
        "mean",
        None,
    )


def test_a_model_that_gives_no_embeddings_says_so(answerer, monkeypatch):
    def none(self: Admission) -> int:
        raise ModelError("this model gives no embeddings")

    monkeypatch.setattr(Admission, "embedding_size", property(none))
    with pytest.raises(ApiError, match="gives no embeddings") as refused:
        ask(answerer, input="a")
    assert (refused.value.code, refused.value.status) == ("unsupported_endpoint", 400)
