"""Which array library an array belongs to: NumPy on the CPU, CuPy on the GPU.

Every operation computes through its arrays' own module (`xp = array_module(a, b)`), so one source runs on
both. This is the one file that imports cupy, and the one place for what CuPy spells otherwise.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np

_cupy_missing = "which is not installed"
try:
    import cupy
except Exception as error:  # not installed, or installed for a CUDA that is not here
    cupy = None
    if not isinstance(error, ModuleNotFoundError):
        _cupy_missing = f"which fails: {error}"

Array = Any  # numpy.ndarray or cupy.ndarray


class DeviceError(RuntimeError):
    """The device asked for is not to be had; the message says what to install."""


def array_module(*arrays: Array) -> ModuleType:
    """numpy or cupy, whichever all the arrays belong to.

    Raises:
        TypeError: the arrays live on different devices; nothing is ever copied across silently.
    """
    if cupy is None:
        return np
    on_gpu = [isinstance(array, cupy.ndarray) for array in arrays]
    if not any(on_gpu):
        return np
    if not all(on_gpu):
        raise TypeError(
            "a NumPy array met a CuPy array: move both to one device first, "
            "with backend.to_device(array, 'cuda') or backend.to_host(array)"
        )
    return cupy


def is_array(value: object) -> bool:
    """True for a NumPy or CuPy array."""
    return type(value) is np.ndarray or isinstance(
        value, np.ndarray if cupy is None else (np.ndarray, cupy.ndarray)
    )


def device_module(device: str) -> ModuleType:
    """The array library of "cpu" or "cuda".

    Raises:
        DeviceError: "cuda" without CuPy or without a GPU, saying which and how to mend it.
        ValueError: another name.
    """
    if device == "cpu":
        return np
    if device != "cuda":
        raise ValueError(f"unknown device {device!r}: use 'cpu' or 'cuda'")
    install = 'pip install -e ".[cuda12]" (CUDA 12) or pip install -e ".[cuda13]" (CUDA 13)'
    if cupy is None:
        raise DeviceError(f"device 'cuda' needs CuPy, {_cupy_missing}: {install}")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeviceError(
            f"device 'cuda' needs an NVIDIA GPU, and CuPy finds none ({reason}): "
            f"use --device cpu, or install the NVIDIA driver and the CuPy that fits it: {install}"
        ) from None
    if count == 0:
        raise DeviceError("device 'cuda' needs an NVIDIA GPU, and this machine has none: use --device cpu")
    return cupy


def to_device(array: Array, device: str) -> Array:
    """The array on "cpu" or "cuda"; itself if it is there already."""
    if device == "cpu":
        return to_host(array)
    return device_module(device).asarray(array)


def to_host(array: Array) -> np.ndarray:
    """The array as a NumPy array, copied from the GPU if it is there."""
    return array.get() if array_module(array) is not np else array


def device_of(array: Array) -> str:
    """The name of the device where the array lives, "cpu" or "cuda"."""
    return "cpu" if array_module(array) is np else "cuda"


def generator(seed: int | tuple[int, ...], device: str = "cpu") -> Any:
    """A random generator on the device. The same seed gives the same numbers on one device."""
    xp = device_module(device)
    if xp is np:
        return np.random.default_rng(seed)
    # CuPy seeds with one integer: SeedSequence mixes a tuple into one just as NumPy's generators do.
    return xp.random.default_rng(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))


def add_at(target: Array, index: Any, values: Array) -> None:
    """target[index] += values, in place, where an index that occurs twice adds twice."""
    array_module(target, values).add.at(target, index, values)


def add_rows(target: Array, rows: Array, values: Array) -> None:
    """target[rows[i]] += values[i], in place, for integer rows.

    target (V, C), rows (N,), values (N, C). Rows may repeat. On the CPU equal rows are brought together by
    a sort and summed by one reduceat, seven times faster than add.at.
    """
    if array_module(target, values) is not np:
        add_at(target, rows, values)
    elif len(rows):
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        starts = np.flatnonzero(np.concatenate([[True], sorted_rows[1:] != sorted_rows[:-1]]))
        target[sorted_rows[starts]] += np.add.reduceat(values[order], starts, axis=0)


_ERF_STEP = 1 / 16
_ERF_END = 6.0  # erf(6) is 1 to the last bit of a float64


def _erf_table(terms: int) -> np.ndarray:
    """Taylor coefficients of erf at the nodes 0, 1/16, ... 6: row n holds erf^(n)(x) / n!.

    With |x - x0| <= 1/32 eleven terms leave an error below 1e-17, six one below 1e-10.

    erf'(x) = 2/sqrt(pi) exp(-x^2), and each further derivative follows from the Hermite recurrence
    f_(n+1) = -2 x f_n - 2 (n - 1) f_(n-1)   (Abramowitz & Stegun 7.1.19).
    """
    nodes = np.arange(0.0, _ERF_END + _ERF_STEP, _ERF_STEP)
    derivatives = [np.array([math.erf(x) for x in nodes]), 2 / math.sqrt(math.pi) * np.exp(-nodes * nodes)]
    derivatives.append(-2 * nodes * derivatives[1])
    for n in range(2, terms):
        derivatives.append(-2 * nodes * derivatives[n] - 2 * (n - 1) * derivatives[n - 1])
    return np.array([d / math.factorial(n) for n, d in enumerate(derivatives[:terms])])


_ERF_TABLES = {8: _erf_table(11), 2: _erf_table(6)}
_ERF_END_32 = 4.2  # where NumPy's tanh of it is 1 as well
# Elements that pass some twenty times through the cache together. Fewer, and threads would take turns at
# Python's lock too often.
_ERF_BLOCK = 1 << 17


def _erf_polynomial(degree: int) -> np.ndarray:
    """Coefficients in s = 2 (x / 4.2)^2 - 1, highest first, of atanh(erf x) / x.

    By least squares at Chebyshev nodes, weighted with what an error does to erf x in the end: one of
    u = atanh(erf x) shrinks by 1 - erf^2.
    """
    s = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    x = np.sqrt((s + 1) / 2) * _ERF_END_32
    erf, erfc = (np.array([f(v) for v in x]) for f in (math.erf, math.erfc))
    u = np.log((1 + erf) / erfc) / 2
    series = np.polynomial.chebyshev.chebfit(s, u / x, degree, w=x * (1 + erf) * erfc / erf)
    return np.polynomial.chebyshev.cheb2poly(series)[::-1].astype(np.float32)


_ERF_POLYNOMIAL = _erf_polynomial(9)


def erf(x: Array) -> Array:
    """The error function, to some units in the last place; NumPy has none of its own.

    float32: tanh(x p(x^2)), p a polynomial, for NumPy's tanh is fast. Else, around the nearest node x0 of a
    fine grid, a short Taylor series in x - x0 (|x - x0| <= 1/32).
    """
    xp = array_module(x)
    if xp is not np:
        from cupyx.scipy.special import erf as cupy_erf

        return cupy_erf(x)
    if x.dtype == np.float32:
        return _erf_float32(x)
    table = _ERF_TABLES[x.dtype.itemsize].astype(x.dtype)
    magnitude = np.minimum(np.abs(x), x.dtype.type(_ERF_END))
    node = np.rint(np.nan_to_num(magnitude) * (1 / _ERF_STEP)).astype(np.intp)
    delta = magnitude - node.astype(x.dtype) * x.dtype.type(_ERF_STEP)
    series = table[-1][node]
    for coefficient in table[-2::-1]:
        series = series * delta + coefficient[node]
    return np.copysign(series, x)


def _erf_float32(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(-1)
    out = np.empty_like(flat)
    first, second, *rest = _ERF_POLYNOMIAL
    for start in range(0, flat.size, _ERF_BLOCK):
        block = slice(start, start + _ERF_BLOCK)
        near = np.clip(flat[block], -_ERF_END_32, _ERF_END_32)
        s = near * near
        s *= 2 / _ERF_END_32**2
        s -= 1
        p = s * first
        p += second
        for coefficient in rest:
            p *= s
            p += coefficient
        p *= near
        np.tanh(p, out=out[block])
    return out.reshape(x.shape)


def keep_memory() -> None:
    """Ask glibc to keep freed memory for the next step instead of giving it back to the kernel.

    A training step frees and takes the same large arrays again and again; by default each is mapped anew
    and its pages are zeroed anew. Does nothing elsewhere than on Linux with glibc.
    """
    if not sys.platform.startswith("linux") or os.environ.get("MALLOC_ARENA_MAX"):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    # One pool for all threads. With one for each, large models take 3 % longer; small ones gain a sixth, but
    # only where the cores share no cache.
    mallopt(M_ARENA_MAX, 1)
