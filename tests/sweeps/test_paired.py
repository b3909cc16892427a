"""The ratio estimator and the paired difference, against formulas and resampling."""

import math

import numpy as np
import polars as pl
import pytest

from runner.sweeps.paired import of_rows, pair, ratio

RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(5, 400, 300).astype(float)
NATS = BYTES * RANDOM.normal(0.7, 0.1, 300)


def rows(values, weights, **columns):
    given = {"key": [str(i) for i in range(len(values))], "value": values, "weight": weights}
    return pl.DataFrame(given | columns, strict=False)


def test_a_ratio_is_sums_divided_once_and_not_a_mean_of_ratios():
    found = ratio(NATS, BYTES)
    assert found.value == NATS.sum() / BYTES.sum() != (NATS / BYTES).mean()
    residuals = [y - found.value * w for y, w in zip(NATS, BYTES, strict=True)]
    expected = 300 / 299 * math.fsum(it * it for it in residuals) / BYTES.sum() ** 2
    assert found.stderr == pytest.approx(math.sqrt(expected), rel=1e-12)


def test_the_standard_error_is_what_resampling_documents_shows():
    drawn = RANDOM.integers(0, 300, (4000, 300))
    again = NATS[drawn].sum(1) / BYTES[drawn].sum(1)
    assert ratio(NATS, BYTES).stderr == pytest.approx(again.std(), rel=0.05)


def test_with_equal_weights_it_is_the_standard_error_of_a_mean():
    found = ratio(NATS, np.ones(300))
    assert found.stderr == pytest.approx(NATS.std(ddof=1) / math.sqrt(300), rel=1e-12)


def test_a_pair_cancels_what_both_share():
    """Two points that differ by a little on documents that differ by a lot."""
    other = NATS + BYTES * RANDOM.normal(0.01, 0.002, 300)
    found = pair(rows(NATS, BYTES), rows(other, BYTES))
    difference = other - NATS
    assert found.difference == pytest.approx(difference.sum() / BYTES.sum())
    assert found.difference == pytest.approx(found.value_b - found.value_a)
    drawn = RANDOM.integers(0, 300, (4000, 300))
    again = difference[drawn].sum(1) / BYTES[drawn].sum(1)
    assert found.stderr == pytest.approx(again.std(), rel=0.05)
    alone = math.hypot(ratio(NATS, BYTES).stderr, ratio(other, BYTES).stderr)
    assert found.stderr < alone / 10


def test_the_order_of_a_pair_is_its_sign_and_a_point_equals_itself():
    a, b = rows(NATS, BYTES), rows(NATS * 1.1, BYTES).sample(fraction=1, shuffle=True, seed=1)
    there, back = pair(a, b), pair(b, a)
    assert there.difference == pytest.approx(-back.difference) and there.difference > 0
    assert there.stderr == pytest.approx(back.stderr)
    same = pair(a, a)
    assert (same.difference, same.stderr, same.left_out) == (0, 0, 0)


def test_documents_without_a_number_in_both_are_left_out_and_counted():
    a = rows([1.0, 2.0, None, 4.0, None], [1.0, 2.0, 3.0, 4.0, 5.0])
    b = rows([2.0, None, 3.0, 5.0, None], [1.0, 2.0, 3.0, 4.0, 5.0])
    b = pl.concat([b, rows([9.0], [1.0]).with_columns(key=pl.lit("only in b"))])
    found = pair(a, b)
    assert (found.documents, found.left_out) == (2, 4)
    assert (found.value_a, found.value_b, found.difference) == (1.0, 7 / 5, 2 / 5)
    assert of_rows(a).documents == 3


def test_documents_of_another_length_are_not_the_same_documents():
    found = pair(rows([1.0, 2.0], [1.0, 2.0]), rows([1.0, 3.0], [1.0, 3.0]))
    assert (found.documents, found.left_out, found.stderr) == (1, 1, None)


def test_nothing_is_said_per_token_where_the_tokens_differ():
    a = rows([1.0, 2.0], [3.0, 4.0], tokens=[b"x", b"y"])
    assert pair(a, a).documents == 2
    assert pair(a, rows([1.0, 2.0], [3.0, 4.0], tokens=[b"x", b"z"])) is None
    missing = rows([1.0, None], [3.0, 4.0], tokens=[b"x", None])
    assert pair(a, missing).documents == 1


def test_a_single_document_has_no_standard_error_and_none_no_number():
    assert ratio(np.ones(1), np.ones(1)).stderr is None
    assert ratio(np.ones(0), np.ones(0)) is None
    assert pair(rows([1.0], [1.0]), rows([None], [1.0])) is None
