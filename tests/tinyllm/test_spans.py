"""The answer search, against trying all spans."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autograd import Tensor
from tinyllm.spans import best_spans


def every_span(row, allowed, longest):
    """(score, (i, j)) of each answer that there may be."""
    for i in np.flatnonzero(allowed):
        for j in np.flatnonzero(allowed):
            if i <= j < i + longest:
                yield row[i, 0] + row[j, 1], (i, j)


@given(
    st.integers(0, 1000), st.integers(1, 4), st.integers(1, 12), st.integers(1, 14),
    st.one_of(st.none(), st.sampled_from([-2.0, 0.0, 1.0])),
)  # fmt: skip
def test_against_brute_force(seed, B, T, longest, threshold):
    """Whatever the batch, the length, the longest answer, and what may be one."""
    rng = np.random.default_rng(seed)
    logits, allowed = rng.normal(0, 3, (B, T, 2)).astype(np.float32), rng.random((B, T)) < 0.6
    places, scores = best_spans(Tensor(logits), allowed, longest, threshold)
    assert places.shape == (B, 2) and places.dtype == np.int64
    for row, may, place, score in zip(logits.astype(np.float64), allowed, places, scores):
        spans = {span: value for value, span in every_span(row, may, longest)}
        best = max(spans.values(), default=-np.inf)
        assert np.isclose(score, best) or score == best
        null = row[0].sum()
        if not spans or (threshold is not None and not best > null + threshold):
            assert place.tolist() == [0, 0]
        else:
            assert np.isclose(spans[tuple(place)], best)


def test_an_answer_must_exceed_no_answer_by_the_threshold():
    logits = np.zeros((1, 4, 2), np.float32)
    logits[0, 0], logits[0, 2] = 1.0, 2.0  # no answer: 2; the token at 2: 4
    allowed = np.array([[0, 1, 1, 1]])
    for threshold, expected in ((None, 2), (1.9, 2), (2.0, 0), (3.0, 0), (-5.0, 2)):
        places, scores = best_spans(logits, allowed, threshold=threshold)
        assert places.tolist() == [[expected] * 2] and scores.tolist() == [4.0]


def test_an_end_never_comes_before_its_start():
    logits = np.zeros((1, 5, 2), np.float32)
    logits[0, 3, 0] = logits[0, 1, 1] = 9.0
    places, _ = best_spans(logits, np.ones((1, 5), bool))
    assert places.tolist() in ([[3, 3]], [[3, 4]], [[0, 1]], [[1, 1]])
    logits[0, 4, 1] = 1.0
    assert best_spans(logits, np.ones((1, 5), bool))[0].tolist() == [[3, 4]]
    assert best_spans(logits, np.ones((1, 5), bool), longest=1)[0][0].tolist() in ([3, 3], [1, 1])
