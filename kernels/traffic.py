"""How many bytes attention moves between global memory and the chip: closed forms, and the naive way to run.

The paper (Dao et al. 2022, "FlashAttention", section 3.2) counts Theta(N d + N^2) numbers for the naive way
and Theta(N^2 d^2 / M) for its own, where M numbers fit on the chip: a tile of queries has Br ~ M / d rows,
and K and V are read once for each of the N / Br tiles. Here it is exact to the byte; the emulator counts it.
"""

from __future__ import annotations

import math

import numpy as np

from .flash_attention import TILES, Array
from .module import Module

NAIVE = "naive_attention.cu"


def flash_forward_bytes(heads: int, n: int, d: int, itemsize: int, causal: bool = False) -> tuple[int, int]:
    """(read, written) by the forward kernel, for n queries and n keys in each of so many heads.

    A tile of queries is read once, and with it each tile of keys and values that it sees.
    """
    Br, Bc = TILES["forward"][itemsize][d]
    row = d * itemsize
    return heads * row * (n + 2 * _keys_read(n, Br, Bc, causal)), heads * n * (row + 4)


def flash_backward_bytes(heads: int, n: int, d: int, itemsize: int, causal: bool = False) -> tuple[int, int]:
    """(read, written) by the three kernels of the backward pass together."""
    row = d * itemsize
    dots = (2 * n * row, 4 * n)  # dO, O -> D
    Br, Bc = TILES["backward_keys"][itemsize][d]
    queries = sum(n - (j // Br * Br if causal else 0) for j in range(0, n, Bc))
    sums = 4 * (itemsize == 4)  # R of a row
    # K, V once; Q, dO, L, D, R -> dK, dV
    keys = (2 * n * row + queries * (2 * row + 8 + sums), 2 * n * row)
    Br, Bc = TILES["backward_queries"][itemsize][d]
    # Four threads hold a row, and each reads its L and its D.
    by_queries = (2 * n * row + 4 * 8 * n + 2 * row * _keys_read(n, Br, Bc, causal), n * (row + sums))
    read, written = map(sum, zip(dots, keys, by_queries))
    return heads * read, heads * written


def _keys_read(n: int, Br: int, Bc: int, causal: bool) -> int:
    """The rows of K that all tiles of queries read together."""
    seen = (min(i + Br, n) if causal else n for i in range(0, n, Br))
    return sum(min(-(-keys // Bc) * Bc, n) for keys in seen)


def naive_forward_bytes(heads: int, n: int, d: int) -> tuple[int, int]:
    """(read, written) by the three kernels of naive_attention.cu, n a multiple of 32 and d too."""
    scores = (2 * n * n * d // 32, n * n)  # every number of Q and K for each of n / 32 tiles
    softmax = (
        32 * n + 3 * n * n,
        n * n,
    )  # S three times: for its maximum, its sum and P; and S[0] by 32 threads
    output = (n * n * (d // 32) + n * n * d // 32, n * d)
    read, written = map(sum, zip(scores, softmax, output))
    return 4 * heads * read, 4 * heads * written


def naive_attention(q: Array, k: Array, v: Array, module: Module) -> Array:
    """softmax(q k^T / sqrt(d)) v in three kernels.   q, k, v (heads, n, d) of float32, contiguous.

    module: naive_attention.cu, on the device of the arrays.
    """
    (heads, n, d), m = q.shape, k.shape[1]
    xp = np if module.backend == "emulator" else __import__("cupy")
    S, P, O = (xp.empty(shape, np.float32) for shape in ((heads, n, m), (heads, n, m), (heads, n, d)))
    tiles = lambda x: -(-x // 32)
    sizes = [np.int32(x) for x in (n, m, d)]
    scale = np.float32(1 / math.sqrt(d))
    module.kernel("scores")((tiles(m), tiles(n), heads), (32, 8), [q, k, S, *sizes, scale])
    module.kernel("softmax")(-(-heads * n // 8), (32, 8), [S, P, np.int32(heads * n), sizes[1]])
    module.kernel("output")((tiles(d), tiles(n), heads), (32, 8), [P, v, O, *sizes])
    return O
