"""Reverse-mode automatic differentiation over NumPy and CuPy arrays."""

from . import backend
from .gradcheck import GradientError, gradcheck
from .primitives import *  # noqa: F403  (installs the operators on Tensor)
from .tensor import Tensor, enable_grad, grad, is_recording, no_grad

__all__ = [
    "GradientError", "Tensor", "backend", "enable_grad", "grad", "gradcheck", "is_recording", "no_grad",
]  # fmt: skip
