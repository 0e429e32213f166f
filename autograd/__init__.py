"""Reverse-mode automatic differentiation over NumPy and CuPy arrays."""

from . import backend, functional, nn, optim
from .draw import draw
from .gradcheck import gradcheck
from .primitives import *  # noqa: F403  (installs the operators on Tensor)
from .tensor import GradientError, Tensor, enable_grad, grad, is_recording, no_grad

__all__ = [
    "GradientError", "Tensor", "backend", "draw", "enable_grad", "functional", "grad", "gradcheck",
    "is_recording", "nn", "no_grad", "optim",
]  # fmt: skip
