"""The masks and the random problems that the emulator and a card are both tried with."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from .attention import DTYPES

MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 40},
    "lengths": {"key_lengths": np.array([37, 1])},
    "all": {"causal": True, "window": 20, "key_lengths": np.array([50, 0])},
}


@st.composite
def cases(draw, dtypes: tuple[str, ...] = tuple(DTYPES)) -> tuple[tuple, dict]:
    """Arguments and keywords of `case`: any heads, lengths, mask, head dimension, type and kind of values."""
    B, H_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n, m = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    keywords = {"causal": draw(st.booleans())}
    if keywords["causal"] and draw(st.booleans()):
        keywords["window"] = draw(st.integers(1, 320))
    if draw(st.booleans()):
        keywords["key_lengths"] = np.array(draw(st.lists(st.integers(-1, m + 5), min_size=B, max_size=B)))
    values = draw(st.sampled_from(["normal", "large", "tailed"]))
    if values != "large" and draw(st.booleans()):
        keywords["scale"] = draw(st.floats(0.01, 1))
    d, dtype, seed = draw(st.integers(1, 128)), draw(st.sampled_from(dtypes)), draw(st.integers(0, 99))
    return (dtype, B, H_kv * group, H_kv, n, m, d, values, seed), keywords
