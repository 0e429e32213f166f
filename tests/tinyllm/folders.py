"""Saved models that tests spoil, and what must come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file


def edit(folder: Path, **options: Any) -> None:
    """Change options of config.json; `...` takes one out."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | options
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def stored(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def one_line(error: pytest.ExceptionInfo) -> str:
    """What the error says, in one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


def assert_identical(found: Any, expected: Any) -> None:
    """The same model: its kind, its configuration, and every bit of its parameters."""
    assert type(found) is type(expected) and found.config == expected.config
    found, expected = dict(found.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].dtype == parameter.dtype and found[name].shape == parameter.shape
        assert np.array_equal(found[name].numpy(), parameter.numpy()), name
        assert found[name].data.flags.c_contiguous and found[name].data.flags.writeable, name
