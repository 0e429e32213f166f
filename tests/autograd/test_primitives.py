"""Every primitive: values, first and second derivatives, precision, views, types. The op table drives it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autograd import primitives

from .checks import check_float32, check_gradients, check_values, check_views
from .op_table import PRIMITIVES

every = pytest.mark.parametrize("name", sorted(PRIMITIVES))
differentiable = pytest.mark.parametrize(
    "name", sorted(n for n in PRIMITIVES if PRIMITIVES[n].differentiable)
)
NUMPY_NAMES = {name: getattr(np, name, None) for name in PRIMITIVES}


def test_every_primitive_has_a_row():
    assert sorted(PRIMITIVES) == sorted(primitives.__all__)


@differentiable
@given(data=st.data())
@settings(max_examples=12)
def test_gradient(name, data):
    row = PRIMITIVES[name]
    check_gradients(row, getattr(primitives, name), data.draw(row.cases))


@differentiable
@given(data=st.data())
@settings(max_examples=8)
def test_second_order(name, data):
    row = PRIMITIVES[name]
    check_gradients(row, getattr(primitives, name), data.draw(row.cases), order=2)


@every
@given(data=st.data())
@settings(max_examples=12)
def test_value(name, data):
    row = PRIMITIVES[name]
    check_values(row, getattr(primitives, name), row.numpy or NUMPY_NAMES[name], data.draw(row.cases))


@differentiable
@given(data=st.data())
@settings(max_examples=12)
def test_float32(name, data):
    row = PRIMITIVES[name]
    check_float32(row, getattr(primitives, name), data.draw(row.cases))


@differentiable
@given(data=st.data())
@settings(max_examples=12)
def test_views(name, data):
    row = PRIMITIVES[name]
    check_views(row, getattr(primitives, name), data.draw(row.cases))
