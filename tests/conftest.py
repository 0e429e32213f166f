"""Fixtures and settings of every test."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from . import strict_cupy as stand_in

# A failed assert of theirs says what it compared, as one in a test file does.
shared = ("tinyllm.folders", "tinyllm.reference", "tinyllm.tiny", "examples.helpers")
pytest.register_assert_rewrite(*(f"{__package__}.{module}" for module in shared))

settings.register_profile(
    "tinyllm",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=25,
    # Fixtures here hold for a whole test (a module patched, a folder); no example changes them.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tinyllm")

# Slow by what they are: runs of examples, comparisons with other libraries, emulated attention, all of it on
# the stand-in for CuPy, trainings.
SLOW = re.compile(
    r"examples/|_reference\.py::|kernels/test_(flash_attention|traffic|compile)\.py::"
    r"|test_fuzz\.py::|are_derivatives|test_device\.py::|stand_in|overfits|train_alike|autograd/test_wkv\.py::"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def strict_cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in of strict_cupy.py as the backend's CuPy, so that device "cuda" works without a GPU."""
    monkeypatch.setattr("autograd.backend.cupy", stand_in.cupy)
    monkeypatch.setitem(sys.modules, "cupyx.scipy.special", stand_in.cupyx_special)
    yield stand_in.cupy
