"""The op table on a real GPU, through CuPy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autograd import backend, primitives
from autograd.fused import FUSED as OPERATIONS

from ..autograd.checks import check_device
from ..autograd.op_table import FUSED, PRIMITIVES

try:
    cupy = backend.device_module("cuda")
except backend.DeviceError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
@given(data=st.data())
@settings(max_examples=10)
def test_primitive(name, data):
    check_device(PRIMITIVES[name], getattr(primitives, name), data.draw(PRIMITIVES[name].cases), cupy)


@pytest.mark.parametrize("name", sorted(FUSED))
@given(data=st.data())
@settings(max_examples=10)
def test_fused(name, data):
    check_device(FUSED[name], OPERATIONS[name].fused, data.draw(FUSED[name].cases), cupy)
