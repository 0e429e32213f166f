"""GPT-2 on a real GPU, through CuPy: the training step, a checkpoint and generation, as on the CPU."""

from __future__ import annotations

import pytest

import autograd.functional as F
from autograd import backend

from ..tinyllm.test_gpt2 import assert_alike, step_and_generate

try:
    backend.device_module("cuda")
except backend.DeviceError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("fused", [True, False])
def test_step_checkpoint_and_generation(fused, tmp_path):
    F.use_fused(fused)
    try:
        found = step_and_generate("cuda", tmp_path / "cuda")
        expected = step_and_generate("cpu", tmp_path / "cpu")
    finally:
        F.use_fused(True)
    # The GPU sums in another order, and AdamW's first steps have the size of the learning rate whatever the
    # gradient: where that is all rounding, the two go different ways.
    assert_alike(found, expected, 1e-3)
