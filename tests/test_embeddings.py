"""`LLM.embed`: texts and token ids to vectors."""

import mlx.core as mx
import numpy as np
import pytest

from runner import LLM, Embedding
from runner.errors import ParameterError, PromptError

TEXTS = ["a text", "another, longer text", "b", "Grüße an die Welt", "one more text of some length"]


def naive(llm: LLM, text: str, pooling: str = "mean") -> np.ndarray:
    ids = mx.array([llm.tokenizer.encode(text)])
    states = np.array(llm.model.model(ids))[0].astype(np.float64)
    pooled = states.mean(0) if pooling == "mean" else states[-1]
    return pooled / np.linalg.norm(pooled)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_those_of_a_full_forward_in_the_order_of_the_texts(llm, pooling):
    found = llm.embed(TEXTS, pooling=pooling, use_tqdm=False)
    assert [it.index for it in found] == list(range(5))
    for text, it in zip(TEXTS, found, strict=True):
        assert isinstance(it, Embedding) and it.error is None
        assert it.num_tokens == len(llm.tokenizer.encode(text))
        np.testing.assert_allclose(it.vector, naive(llm, text, pooling), atol=1e-5)
        (alone,) = llm.embed(text, pooling=pooling, use_tqdm=False)
        np.testing.assert_allclose(alone.vector, it.vector, atol=1e-5)


def test_token_ids_are_embedded_as_their_text(llm):
    ids = llm.tokenizer.encode(TEXTS[1])
    one, other = llm.embed([ids, TEXTS[1]], use_tqdm=False)
    np.testing.assert_allclose(one.vector, other.vector, atol=1e-6)
    assert llm.embed([], use_tqdm=False) == []


def test_dimensions_and_length(llm):
    size = llm.engine.admission.embedding_size
    (whole,) = llm.embed(TEXTS[:1], normalize=False, use_tqdm=False)
    (cut,) = llm.embed(TEXTS[:1], dimensions=8, use_tqdm=False)
    assert len(whole.vector) == size == 32 and len(cut.vector) == 8
    expected = np.array(whole.vector[:8]) / np.linalg.norm(whole.vector[:8])
    np.testing.assert_allclose(cut.vector, expected, atol=1e-6)
    assert np.linalg.norm(whole.vector) != pytest.approx(1, abs=1e-2)


def test_a_text_that_cannot_be_embedded_spares_the_others(llm):
    given = ["good", "x" * 300, "", [5, 10**6], [], "y" * 256]
    found = {it.index: it for it in llm.embed_as_completed(given)}
    assert sorted(found) == list(range(6))
    messages = {i: it.error.message for i, it in found.items() if it.error is not None}
    assert sorted(messages) == [1, 2, 3, 4] and "300 tokens" in messages[1]
    assert "no tokens" in messages[2] and "1000000" in messages[3]
    assert found[1].vector == [] and len(found[5].vector) == 32
    with pytest.raises(PromptError, match="input 1: the prompt has 300 tokens"):
        llm.embed(given, use_tqdm=False)
    assert llm.embed(["good"], use_tqdm=False)[0].vector == pytest.approx(found[0].vector, abs=1e-6)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["a"], {"pooling": "max"}, "pooling='max'"),
        (["a"], {"dimensions": 33}, "dimensions=33 is not allowed: at most 32"),
        (["a", "b"], {"adapter": ["x"]}, "adapter has 1 entries for 2"),
        ([("a", "b")], {}, "input 0 cannot be embedded: .*neither a text nor a list of token ids"),
        ([1, 2], {}, "input 0 cannot be embedded: 1 is"),
        (["a", b"b"], {}, "input 1 cannot be embedded"),
    ],
)
def test_what_cannot_be_asked_is_refused(llm, inputs, options, message):
    with pytest.raises(ParameterError, match=message):
        llm.embed(inputs, **options, use_tqdm=False)


@pytest.mark.real_model
def test_texts_of_like_meaning_are_nearer_than_others(smollm2):
    pairs = [
        ("A cat sits on the mat.", "A kitten is lying on the rug."),
        ("The stock market fell sharply today.", "Share prices dropped a lot this afternoon."),
        ("Boil the pasta for ten minutes.", "Cook the noodles in hot water until soft."),
    ]
    found = smollm2.embed([text for pair in pairs for text in pair], use_tqdm=False)
    vectors = np.array([it.vector for it in found])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    likeness = vectors[::2] @ vectors[1::2].T  # (3, 3): the pairs on the diagonal.
    assert (likeness.argmax(0) == np.arange(3)).all() and (likeness.argmax(1) == np.arange(3)).all()
