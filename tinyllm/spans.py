"""Answers as spans of a text (Rajpurkar et al. 2016, SQuAD): where the likeliest one starts and ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autograd import Tensor
from autograd.backend import to_host


def best_spans(
    logits: Any, allowed: np.ndarray, longest: int = 30, threshold: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest answers: the places (B, 2) of their first and last tokens, and their scores (B,).

    logits (B, T, 2), the scores of a start and of an end, those of [CLS] first; allowed (B, T), true where an
    answer may start and end. The best of

        score[i, j] = start[i] + end[j],   i <= j < i + longest        (Devlin et al. 2019, section 4.2)

    threshold tau: an answer must exceed start[0] + end[0] + tau, else the places are 0, 0: there is no answer
    (section 4.3). None: there always is one. Where nothing is allowed the score is -inf, the places 0, 0.
    """
    scores = to_host(logits.data if isinstance(logits, Tensor) else logits).astype(np.float64)
    null = scores[:, 0].sum(axis=-1)  # (B,)
    start, end = np.moveaxis(np.where(np.asarray(allowed, bool)[..., None], scores, -math.inf), -1, 0)
    B, T = start.shape
    best, places = np.full(B, -math.inf), np.zeros((B, 2), np.int64)
    for more in range(min(longest, T)):  # tokens after the first
        sums = start[:, : T - more] + end[:, more:]  # (B, T - more)
        first = sums.argmax(axis=1)
        found = sums[np.arange(B), first]
        better = found > best
        best[better] = found[better]
        places[better] = np.stack([first, first + more], axis=1)[better]
    if threshold is not None:
        places[~(best > null + threshold)] = 0
    return places, best
