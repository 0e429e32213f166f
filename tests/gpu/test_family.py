"""Every causal model on a real GPU, through CuPy: training steps, a checkpoint, generation, as on the CPU."""

from __future__ import annotations

import pytest

import autograd.functional as F
from autograd import backend

from ..tinyllm.test_family import assert_alike, step_and_generate
from ..tinyllm.tiny import TINY

try:
    backend.device_module("cuda")
except backend.DeviceError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_step_checkpoint_and_generation(name, fused, tmp_path):
    F.use_fused(fused)
    try:
        found, expected = (
            step_and_generate(device, tmp_path / device, TINY[name]) for device in ("cuda", "cpu")
        )
    finally:
        F.use_fused(True)
    # The GPU sums in another order, and AdamW's first steps have the size of the learning rate whatever the
    # gradient: where that is all rounding, the two go different ways.
    assert_alike(found, expected, 1e-3)
