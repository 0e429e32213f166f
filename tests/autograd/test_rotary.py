"""Rotary positions: what shapes fit. Values and gradients are tested from the op table."""

from __future__ import annotations

import numpy as np
import pytest

import autograd.functional as F
from autograd import Tensor
from autograd.rotary import rotary, rotary_attention, rotary_attention_composed, rotary_composed

tensor = lambda *shape: Tensor(np.ones(shape, np.float32))


@pytest.mark.parametrize("operation", [rotary, rotary_composed])
def test_tables_that_do_not_fit(operation):
    x, table = tensor(2, 3, 8), np.ones((3, 2), np.float32)
    for bad in ((2, 2), (3, 3), (3, 0), (3,), (1, 3, 2), (1, 2)):
        with pytest.raises(ValueError, match=r"rotary: x \(2, 3, 8\)"):
            operation(x, np.ones(bad, np.float32), np.ones(bad, np.float32))
    with pytest.raises(ValueError, match="rotary: "):
        operation(x, table, table[:2])
    with pytest.raises(ValueError, match=r"rotary: x \(8,\)"):
        operation(tensor(8), table, table)


@pytest.mark.parametrize("operation", [F.rotary_attention, rotary_attention, rotary_attention_composed])
def test_heads_that_do_not_fit(operation):
    table = np.ones((3, 2), np.float32)
    good = tensor(2, 3, 8), tensor(2, 3, 4), tensor(2, 3, 4)
    assert operation(*good, table, table).shape == (2, 3, 8)
    for place, shape, said in (
        (0, (1, 3, 8), r"q \(1, 3, 8\)"),
        (0, (2, 3, 10), "do not fit"),
        (1, (2, 3, 8), r"k \(2, 3, 8\)"),
        (1, (2, 2, 4), r"k \(2, 2, 4\)"),
        (2, (2, 3, 8), r"v \(2, 3, 8\)"),
        (0, (6, 8), r"q \(6, 8\)"),
    ):
        arguments = [*good[:place], tensor(*shape), *good[place + 1 :]]
        with pytest.raises(ValueError, match=said):
            operation(*arguments, table, table)
    wide = tensor(2, 3, 12), tensor(2, 3, 8), tensor(2, 3, 8)
    with pytest.raises(ValueError, match="2 key heads do not divide 3 query heads"):
        operation(*wide, table, table)
    with pytest.raises(ValueError, match="0 key heads do not divide 2 query heads"):
        operation(good[0], tensor(2, 3, 0), tensor(2, 3, 0), table, table)
    with pytest.raises(ValueError, match="window=0"):
        operation(*good, table, table, window=0)


def test_float32_stays_float32():
    x, table = tensor(2, 3, 8), np.ones((3, 2), np.float32)
    assert rotary(x, table, table).dtype == rotary_composed(x, table, table).dtype == np.float32


def test_swiglu_of_two_shapes():
    with pytest.raises(ValueError, match=r"swiglu: gate \(2, 3\) and up \(3,\)"):
        F.swiglu(tensor(2, 3), tensor(3))
