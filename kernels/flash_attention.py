"""FlashAttention on raw arrays: checks, padding, tile sizes, and the launch of flash_attention.cu.

CuPy arrays run on their GPU, NumPy arrays in the emulator, from the same source. Query i of n stands at
position i + m - n among the m keys; `causal` hides the keys after it, `window` also those `window` or more
before it, `key_lengths` (B,) the padding from there on.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .module import SHARED_LIMIT, Module

Array = Any  # numpy.ndarray or cupy.ndarray

SOURCE = Path(__file__).parent / "flash_attention.cu"
HEAD_DIMS = (32, 64, 96, 128)  # others are padded to the next
_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}  # of NumPy, of the source

# Br and Bc of each kernel, by the bytes of a number and the head dimension. Chosen from the table that
# tests/kernels/test_compile.py prints: no register spilled on sm_86, then as many warps on an SM as there is
# room for, then the larger tile. See flash_attention.md.
TILES = {
    "forward": {
        4: {32: (64, 32), 64: (64, 32), 96: (64, 16), 128: (128, 16)},
        2: {32: (128, 64), 64: (128, 64), 96: (128, 32), 128: (64, 32)},
    },
    "backward_keys": {
        4: {32: (32, 64), 64: (16, 64), 96: (16, 64), 128: (16, 64)},
        2: {32: (32, 64), 64: (64, 64), 96: (32, 64), 128: (16, 64)},
    },
    "backward_queries": {
        4: {32: (64, 32), 64: (64, 16), 96: (64, 16), 128: (64, 16)},
        2: {32: (64, 64), 64: (64, 64), 96: (64, 32), 128: (64, 16)},
    },
}
_ROWS_OF_DOTS = 8  # a block of row_dots: eight warps, a row for each

_STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("row", "i8")], align=True)
_PROBLEM = np.dtype(  # struct Problem of the source
    [(name, "i4") for name in ("heads", "group", "queries", "keys", "left", "right")]
    + [("scale", "f4")]
    + [(name, _STRIDES) for name in ("Q", "K", "V", "O", "dO", "dQ", "dK", "dV")],
    align=True,
)


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Array | None = None,
    backend: str | Module | None = None,
) -> tuple[Array, Array]:
    """out = softmax(q k^T * scale) v over the visible keys, and L = logsumexp(q k^T * scale).

    q (B, H, n, d), k and v (B, H_kv, m, d), of float32, float16 or bfloat16 -> out (B, H, n, d) of the same
    and L (B, H, n) of float32. H_kv divides H, d is at most 128, scale defaults to 1/sqrt(d). A query that
    sees nothing gives 0 and -inf. In memory out is (B, n, H, d), so that joining its heads copies nothing.

    backend: "cuda" or "emulator", which must fit the arrays and is found from them; or a Module, such as one
    of a changed copy of the source. Algorithm 1 of Dao 2023, "FlashAttention-2"; the memory is O(n + m).

    Raises:
        TypeError: arrays of other or of different types, or on different devices.
        ValueError: shapes that do not fit, named; a scale that is not positive; a window below 1.
        RuntimeError: a card too old for 16-bit numbers (below sm_80) or with too little shared memory, no
            headers of CUDA, no C++ compiler for the emulator.
    """
    call = _Call(q, k, v, causal, window, scale, key_lengths, backend)
    xp, (B, H, n, _) = call.xp, call.sizes
    out = _empty(xp, (B, H, n, call.width), q.dtype)
    logsumexp = xp.empty((B, H, n), np.float32)
    if call.empty:
        out[...], logsumexp[...] = 0, -math.inf
        return out[..., : q.shape[3]], logsumexp
    q, k, v = map(call.rows, (q, k, v))
    Br, _ = call.tiles("forward")
    call.launch("forward", B * H * -(-n // Br), [q, k, v, out, logsumexp, call.lengths], Q=q, K=k, V=v, O=out)
    return out[..., : call.d], logsumexp


def flash_attention_backward(
    grad_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    logsumexp: Array,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    key_lengths: Array | None = None,
    backend: str | Module | None = None,
    into: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """dq, dk and dv, from grad_out (B, H, n, d) and what the forward pass took and gave.

    With P = exp(q k^T * scale - L) and D = rowsum(grad_out * out):  dv = P^T grad_out,
    dS = P * (grad_out v^T - D),  dq = dS k * scale,  dk = dS^T q * scale. In float32 the rows of P are
    divided by their sums, which the rounding of L keeps from being 1. Every run gives the same numbers:
    no sum depends on the order in which blocks finish.

    into: arrays, or views of one, to write the three gradients to. Raises: as flash_attention.
    """
    call = _Call(q, k, v, causal, window, scale, key_lengths, backend)
    xp, (B, H, n, m) = call.xp, call.sizes
    for name, array, shape in (("grad_out", grad_out, q.shape), ("out", out, q.shape)):
        _check_like(name, array, shape, q)
    if tuple(logsumexp.shape) != (B, H, n) or logsumexp.dtype != np.float32:
        raise ValueError(
            f"flash_attention_backward: logsumexp {logsumexp.dtype} {logsumexp.shape} must be float32 "
            f"{(B, H, n)}"
        )
    into = tuple(_empty(xp, x.shape, x.dtype) for x in (q, k, v)) if into is None else into
    for name, array, like in zip(("dq", "dk", "dv"), into, (q, k, v)):
        _check_like(name, array, like.shape, q)
    if call.empty:
        for gradient in into:
            gradient[...] = 0
        return into
    q, k, v, grad_out, out = map(call.rows, (q, k, v, grad_out, out))
    dq, dk, dv = (call.room_for(gradient) for gradient in into)
    logsumexp, D = xp.ascontiguousarray(logsumexp), xp.empty((B, H, n), np.float32)

    dots = [grad_out, out, D, np.int32(B * H * n)]
    call.launch("row_dots", -(-B * H * n // _ROWS_OF_DOTS), dots, O=out, dO=grad_out)
    inputs, strides = [grad_out, q, k, v, logsumexp, D], {"dO": grad_out, "Q": q, "K": k, "V": v}
    R = xp.empty((B, H, n), np.float32) if q.dtype == np.float32 else None
    Br, _ = call.tiles("backward_queries")
    call.launch("backward_queries", B * H * -(-n // Br), [*inputs, dq, R, call.lengths], **strides, dQ=dq)
    _, Bc = call.tiles("backward_keys")
    key_blocks = B * k.shape[1] * -(-m // Bc)
    call.launch("backward_keys", key_blocks, [*inputs, R, dk, dv, call.lengths], **strides, dK=dk, dV=dv)
    for gradient, found in zip(into, (dq, dk, dv)):
        if found is not gradient:
            gradient[...] = found[..., : call.d]
    return into


class _Call:
    """One problem: its sizes, checked, and what the kernels share."""

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool,
        window: int | None,
        scale: float | None,
        key_lengths: Array | None,
        backend: str | Module | None,
    ) -> None:
        self.xp = _array_module(q, k, v, *([] if key_lengths is None else [key_lengths]))
        _check_arrays(q, k, v)
        (B, H, n, d), (_, H_kv, m, _) = q.shape, k.shape
        self.sizes, self.d, self.dtype = (B, H, n, m), d, q.dtype
        self.width = next(width for width in HEAD_DIMS if width >= d)
        self.empty = 0 in (*self.sizes, d)
        if window is not None and (window < 1 or not causal):
            raise ValueError(
                f"flash_attention: window={window}: a window is 1 or more, and needs causal=True"
            )
        scale = 1 / math.sqrt(max(d, 1)) if scale is None else scale
        if not 0 < scale < math.inf:
            raise ValueError(f"flash_attention: scale={scale} is not a positive number; negate q instead")
        if max(n + m, B * H * n) >= 2**30:
            raise ValueError(
                f"flash_attention: {B} * {H} * {n} queries and {m} keys: a launch takes up to 2^30"
            )
        self.module = _module(backend, self.xp, q.dtype)
        self.lengths = None if key_lengths is None else _lengths(self.xp, key_lengths, B, m)
        self.problem = np.zeros((), _PROBLEM)
        self.problem["heads"], self.problem["group"] = H, H // H_kv if H_kv else 1
        self.problem["queries"], self.problem["keys"] = n, m
        self.problem["left"] = n + m if window is None else min(window - 1, n + m)
        self.problem["right"] = 0 if causal else n + m
        self.problem["scale"] = scale

    def tiles(self, kernel: str) -> tuple[int, int]:
        return TILES[kernel][self.dtype.itemsize][self.width]

    def rows(self, x: Array) -> Array:
        """x if the kernels can read it where it lies; else a copy, padded with zeros to a width they have.

        They read 16 bytes at a time, so rows must be contiguous and start at multiples of 16 bytes.
        """
        if self.d == self.width:
            return x if _readable(x) else self.xp.ascontiguousarray(x)
        padded = self.xp.zeros((*x.shape[:3], self.width), x.dtype)
        padded[..., : self.d] = x
        return padded

    def room_for(self, gradient: Array) -> Array:
        """The gradient itself if the kernels can write it where it lies; else room for it."""
        if self.d == self.width and _readable(gradient):
            return gradient
        return self.xp.empty((*gradient.shape[:3], self.width), gradient.dtype)

    def launch(self, kernel: str, blocks: int, args: list[Any], **laid_out: Array) -> None:
        """Run a kernel on blocks; laid_out names the arrays whose strides it has to know."""
        problem = self.problem.copy()
        for name, array in laid_out.items():
            problem[name] = tuple(stride // array.dtype.itemsize for stride in array.strides[:3])
        name = kernel_name(kernel, self.dtype, self.width)
        threads, shared_bytes = block_shape(kernel, self.dtype, self.width)
        if self.xp is not np and shared_bytes > _shared_limit(self.xp.cuda.Device().id):
            raise RuntimeError(
                f"{name} needs {shared_bytes} bytes of shared memory for a block, more than this card has: "
                "F.use_flash(False) takes array operations instead"
            )
        self.module.kernel(name)((blocks,), (threads,), [*args, problem[()]], shared_bytes=shared_bytes)


def kernel_name(kernel: str, dtype: Any, d: int) -> str:
    """The C++ name of "forward", "row_dots", "backward_keys" or "backward_queries" for head dimension d."""
    dtype = np.dtype(dtype)
    tiles = TILES[kernel][dtype.itemsize][d] if kernel in TILES else ()
    return f"{kernel}<{', '.join(map(str, (_TYPES[dtype.name], d, *tiles)))}>"


def block_shape(kernel: str, dtype: Any, d: int) -> tuple[int, int]:
    """The threads of a block, and the bytes of shared memory it needs.

    A warp of 32 threads has 16 rows. The tiles that stay are held once, those that stream by twice.
    """
    itemsize = np.dtype(dtype).itemsize
    if kernel == "row_dots":
        return 32 * _ROWS_OF_DOTS, 0
    Br, Bc = TILES[kernel][itemsize][d]
    rows, threads = {
        "forward": (Br + 2 * 2 * Bc, 2 * Br),
        "backward_keys": (2 * Bc + 2 * 2 * Br, 2 * Bc),
        "backward_queries": (2 * Br + 2 * 2 * Bc, 2 * Br),
    }[kernel]
    # L, D and, in float32, R of the queries that stream by
    statistics = 2 * (3 if itemsize == 4 else 2) * Br * 4 if kernel == "backward_keys" else 0
    return threads, rows * d * itemsize + statistics


def shared_needed(dtype: Any, d: int) -> int:
    """The bytes of shared memory that a block of the kernel that needs most takes, for heads of d numbers."""
    width = next(width for width in HEAD_DIMS if width >= d)
    return max(block_shape(kernel, dtype, width)[1] for kernel in TILES)


def shared_limit(x: Array) -> int:
    """The bytes of shared memory that a block may have where x lies: on its card, or in the emulator."""
    return SHARED_LIMIT if isinstance(x, np.ndarray) else _shared_limit(x.device.id)


@functools.cache
def _compiled(backend: str) -> Module:
    return Module(SOURCE, backend=backend)


def _module(backend: str | Module | None, xp: ModuleType, dtype: Any) -> Module:
    fitting = "emulator" if xp is np else "cuda"
    if not isinstance(backend, (str, type(None))):
        return backend
    if backend not in (None, "cuda", "emulator"):
        raise ValueError(f"flash_attention: backend {backend!r}: it is 'cuda', 'emulator' or None")
    if backend not in (None, fitting):
        move = "cupy.asarray" if backend == "cuda" else "cupy.asnumpy"
        raise TypeError(
            f"flash_attention: backend {backend!r} does not fit {xp.__name__} arrays: {move} moves them"
        )
    if fitting == "cuda" and dtype.itemsize == 2:
        capability = int(xp.cuda.Device().compute_capability)
        if capability < 80:
            raise RuntimeError(
                f"flash_attention: {dtype} needs a card of compute capability 8.0 or later, and this one has "
                f"{capability / 10}: use float32"
            )
    return _compiled(fitting)


@functools.cache
def _shared_limit(device: int) -> int:
    """The bytes of shared memory that a block on the card may ask for."""
    import cupy

    return cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]


def _array_module(*arrays: Array) -> ModuleType:
    """numpy or cupy, whichever all the arrays belong to."""
    modules = {type(array).__module__.partition(".")[0] for array in arrays}
    if modules == {"numpy"}:
        return np
    if modules == {"cupy"}:
        import cupy

        return cupy
    raise TypeError(
        f"flash_attention: all arrays must be NumPy's or all CuPy's; these are of {sorted(modules)}"
    )


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    for x in (q, k, v):
        if x.dtype.name not in _TYPES:
            raise TypeError(
                f"flash_attention: takes float32, float16 or bfloat16, not {x.dtype}: use .astype"
            )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"flash_attention: q {q.dtype}, k {k.dtype} and v {v.dtype} must be of one type")
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]
    if not fits or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"flash_attention: q {q.shape}, k {k.shape}, v {v.shape} do not fit: they are "
            "(batch, heads, queries, d), and twice (batch, kv_heads, keys, d)"
        )
    if q.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"flash_attention: {k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if q.shape[3] > HEAD_DIMS[-1]:
        raise ValueError(f"flash_attention: head dimension {q.shape[3]} is above {HEAD_DIMS[-1]}")


def _check_like(name: str, array: Array, shape: tuple[int, ...], q: Array) -> None:
    _array_module(array, q)
    if tuple(array.shape) != tuple(shape) or array.dtype != q.dtype:
        raise ValueError(
            f"flash_attention_backward: {name} {array.dtype} {array.shape} must be {q.dtype} {tuple(shape)}"
        )


def _lengths(xp: ModuleType, key_lengths: Array, B: int, m: int) -> Array:
    if tuple(key_lengths.shape) != (B,) or key_lengths.dtype.kind not in "iu":
        raise ValueError(
            f"flash_attention: key_lengths {key_lengths.dtype} {key_lengths.shape} must be {B} integers, one "
            "for each sequence"
        )
    return xp.ascontiguousarray(xp.clip(key_lengths, 0, m).astype(np.int32))


def _readable(x: Array) -> bool:
    """Whether rows of x can be read and written in pieces of 16 bytes."""
    address = x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr
    starts = [stride for size, stride in zip(x.shape[:3], x.strides) if size > 1]
    return (
        x.strides[3] == x.dtype.itemsize and address % 16 == 0 and all(s >= 0 and s % 16 == 0 for s in starts)
    )


def _empty(xp: ModuleType, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array (B, H, n, d) that lies in memory as (B, n, H, d)."""
    B, H, n, d = shape
    return xp.empty((B, n, H, d), dtype).transpose(0, 2, 1, 3)
