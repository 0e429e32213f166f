"""Fixtures that the tests of several models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import autograd.functional as F


@pytest.fixture(params=["fused", "composed"])
def both(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test that runs with fused operations and with their compositions."""
    F.use_fused(request.param == "fused")
    yield request.param
    F.use_fused(True)
