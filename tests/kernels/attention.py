"""What the kernel is compared with: attention in float64, and plain attention in the kernel's precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}


@dataclass
class Case:
    """Inputs of attention: q (B, H, n, d), k and v (B, H_kv, m, d), and the gradient g of the output."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    keywords: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Case(q {self.q.dtype} {self.q.shape}, k {self.k.shape}, {self.keywords})"


def case(
    dtype: str,
    B: int,
    H: int,
    H_kv: int,
    n: int,
    m: int,
    d: int,
    values: str = "normal",
    seed: int = 0,
    **keywords: Any,
) -> Case:
    """Random inputs. values: "normal"; "large": scores reach 1e4; "tailed": a few numbers are huge."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (
            rng.standard_t(1.5, shape).clip(-200, 200) if values == "tailed" else rng.standard_normal(shape)
        )

    q, k, v, g = draw(B, H, n, d), draw(B, H_kv, m, d), draw(B, H_kv, m, d), draw(B, H, n, d)
    if values == "large" and n * m * H:
        scores = np.abs(q @ np.repeat(k, H // H_kv, 1).swapaxes(-1, -2)).max() / np.sqrt(d)
        q, k = q * np.sqrt(1e4 / scores), k * np.sqrt(1e4 / scores)
    return Case(*(x.astype(DTYPES[dtype]) for x in (q, k, v, g)), keywords)


def visible(c: Case) -> np.ndarray:
    """Which key each query sees, (B, 1, n, m), key by key, from the words of the rule."""
    (B, _, n, _), m = c.q.shape, c.k.shape[2]
    lengths = c.keywords.get("key_lengths")
    sees = np.zeros((B, 1, n, m), bool)
    for b in range(B):
        for i in range(n):
            position = i + m - n
            last = position if c.keywords.get("causal") else m - 1
            first = position - (c.keywords.get("window") or 2 * (n + m)) + 1
            if lengths is not None:
                last = min(last, lengths[b] - 1)
            sees[b, 0, i, max(first, 0) : max(last + 1, 0)] = True
    return sees


def attention(c: Case, dtype: Any) -> tuple[np.ndarray, ...]:
    """out, logsumexp, dq, dk, dv the plain way, every intermediate result rounded to `dtype`.

    Products of 16-bit matrices are summed, and softmax is computed, in float32, as frameworks do.
    """
    wide = np.float64 if dtype == np.float64 else np.float32

    def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(wide) @ b.astype(wide)).astype(dtype)

    (B, H, _, d), (_, H_kv, m, _) = c.q.shape, c.k.shape
    q, k, v, g = (x.astype(dtype) for x in (c.q, c.k, c.v, c.g))
    k, v = (np.repeat(x, H // H_kv, 1) for x in (k, v))
    scale = dtype(c.keywords.get("scale") or 1 / np.sqrt(d))
    with np.errstate(all="ignore"):
        scores = np.where(visible(c), times(q * scale, k.swapaxes(-1, -2)), dtype(-np.inf)).astype(wide)
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        top = np.where(np.isfinite(top), top, wide(0))
        e = np.exp(scores - top)
        total = e.sum(-1, keepdims=True)
        logsumexp = (top + np.log(total))[..., 0]
        p = (e / np.where(total == 0, wide(1), total)).astype(dtype)
    out, dp = times(p, v), times(g, v.swapaxes(-1, -2))
    D = (p.astype(wide) * dp.astype(wide)).sum(-1, keepdims=True)
    ds = (p.astype(wide) * (dp.astype(wide) - D)).astype(dtype)
    share = lambda x: x.astype(wide).reshape(B, H_kv, H // H_kv, m, d).sum(2).astype(dtype)
    dk, dv = times(ds.swapaxes(-1, -2), q), times(p.swapaxes(-1, -2), g)
    return out, logsumexp, times(ds, k) * scale, share(dk) * scale, share(dv)


def largest_terms(c: Case) -> tuple[float, ...]:
    """The largest sum of the magnitudes of what is added up, for each of the five results."""
    (B, H, _, d), (_, H_kv, m, _) = c.q.shape, c.k.shape
    out, logsumexp, *_ = attention(c, np.float64)
    q, k, v, g = (np.abs(x.astype(np.float64)) for x in (c.q, c.k, c.v, c.g))
    k, v = (np.repeat(x, H // H_kv, 1) for x in (k, v))
    scale = c.keywords.get("scale") or 1 / np.sqrt(d)
    scores = c.q.astype(np.float64) @ np.repeat(c.k.astype(np.float64), H // H_kv, 1).swapaxes(-1, -2) * scale
    with np.errstate(all="ignore"):
        p = np.where(visible(c), np.exp(scores - logsumexp[..., None]), 0)
    ds = p * (g @ v.swapaxes(-1, -2) + (g * np.abs(out)).sum(-1, keepdims=True)) * scale
    share = lambda x: x.reshape(B, H_kv, H // H_kv, m, d).sum(2)
    sums = (p @ v, np.where(np.isfinite(logsumexp), np.abs(logsumexp), 0), ds @ k)
    sums += (share(ds.swapaxes(-1, -2) @ q), share(p.swapaxes(-1, -2) @ g))
    return tuple(float(x.max(initial=0)) for x in sums)


def plain_errors(c: Case, exact: tuple[np.ndarray, ...]) -> list[float]:
    """The largest error of each result of plain attention, over a few orders of its sums.

    One order may be lucky, so the numbers of a head change places: that changes nothing but the roundings.
    """
    errors = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(c.q.shape[3])
        shuffled = Case(*(x[..., order] for x in (c.q, c.k, c.v, c.g)), c.keywords)
        found = attention(shuffled, c.q.dtype.type)
        pairs = [(x, y if i == 1 else y[..., order]) for i, (x, y) in enumerate(zip(found, exact))]
        with np.errstate(invalid="ignore"):  # -inf - -inf
            errors.append([np.nanmax(np.abs(x.astype(np.float64) - y), initial=0) for x, y in pairs])
    return np.max(errors, axis=0).tolist()


def check(c: Case, found: tuple[np.ndarray, ...]) -> None:
    """The errors of out, logsumexp, dq, dk, dv are at most twice those of plain attention, equally precise.

    That is the budget of the FlashAttention test suite, and not all that is allowed here. out and logsumexp
    may have roundings of the largest sum on top: eight, for 300 keys are five tiles, each of which scales the
    sum and adds to it (found: up to 7.7). A gradient may have four, and also what the rounding of L does to
    P = exp(S - L), which is all it knows of the sum of a row. The kernel needs much of that: a float32 dv is
    off by up to 15 times as much as that of plain attention on normal inputs, by hundreds of times on tailed
    and by thousands on large ones. The price: a median dq or dk of normal inputs would pass if it were 30 to
    90 times less exact.
    """
    dtype = c.q.dtype.type
    exact = attention(c, np.float64)
    units = {np.float32: 2.0**-24, np.float16: 2.0**-11, bfloat16: 2.0**-8}
    of_L = 2.0**-23 * np.abs(exact[1][np.isfinite(exact[1])]).max(initial=0)
    for name, ours, reference, budget, terms in zip(
        ("out", "logsumexp", "dq", "dk", "dv"), found, exact, plain_errors(c, exact), largest_terms(c)
    ):
        assert ours.shape == reference.shape
        assert ours.dtype == (np.float32 if name == "logsumexp" else dtype)
        hidden = np.isneginf(reference)  # logsumexp of a query that sees nothing
        assert np.array_equal(np.isneginf(ours.astype(np.float64)), hidden), f"{name} of {c}"
        ours, reference = (np.where(hidden, 0, x.astype(np.float64)) for x in (ours, reference))
        error = np.abs(ours - reference).max(initial=0)
        unit = units[np.float32 if name == "logsumexp" else dtype]
        if name in ("out", "logsumexp"):
            limit = 2 * budget + 8 * unit * terms
        else:
            limit = 2 * budget + (4 * unit + of_L) * terms
        assert error <= limit, f"{name} of {c}: error {error:.2e}, plain {budget:.2e}, limit {limit:.2e}"
