"""The op table on the strict stand-in for CuPy, which mixes no devices and has only what CuPy has."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autograd import Tensor, gradcheck, primitives
from autograd.fused import FUSED as OPERATIONS

from .checks import check_device
from .op_table import FUSED, PRIMITIVES


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
@given(data=st.data())
@settings(max_examples=10)
def test_primitive(name, strict_cupy, data):
    check_device(PRIMITIVES[name], getattr(primitives, name), data.draw(PRIMITIVES[name].cases), strict_cupy)


@pytest.mark.parametrize("name", sorted(FUSED))
@given(data=st.data())
@settings(max_examples=10)
def test_fused(name, strict_cupy, data):
    check_device(FUSED[name], OPERATIONS[name].fused, data.draw(FUSED[name].cases), strict_cupy)


def test_gradcheck(strict_cupy):
    x = Tensor(strict_cupy.asarray([[0.5, -1.0], [2.0, 0.1]]), requires_grad=True)
    for projections in (None, 2):
        assert gradcheck(lambda a: primitives.tanh(a @ a), x, order=2, projections=projections)
