"""What the kernel is compared with: attention in float64, and plain attention in the kernel's precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # the largest relative rounding
ROUNDINGS = 4  # of the largest sum, that `check` allows beyond twice the error of plain attention
NAMES = ("out", "logsumexp", "dq", "dk", "dv")  # what both passes give


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


def attention(c: Case, dtype: Any, seed: int = 0) -> tuple[np.ndarray, ...]:
    """out, logsumexp, dq, dk, dv the plain way, every intermediate result rounded to `dtype`.

    Products of 16-bit matrices are summed, and softmax is computed, in float32, as frameworks do.
    seed: if not 0, queries, keys and the numbers of a head change places while it computes, and with them
    the order of the sums; and in float32 q and k share the scale. Only roundings change by that.
    """
    (B, H, n, d), (_, H_kv, m, _) = c.q.shape, c.k.shape
    rng = np.random.default_rng(seed)
    queries, keys, numbers = (rng.permutation(x) if seed else np.arange(x) for x in (n, m, d))
    back = lambda x, rows: x[:, :, np.argsort(rows)][..., np.argsort(numbers)]
    wide = np.float64 if dtype == np.float64 else np.float32

    def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # float16 ends at 65504
            return (a.astype(wide) @ b.astype(wide)).astype(dtype)

    q, g = (x[:, :, queries][..., numbers].astype(dtype) for x in (c.q, c.g))
    k, v = (x[:, :, keys][..., numbers].astype(dtype).repeat(H // H_kv, 1) for x in (c.k, c.v))
    sees = visible(c)[:, :, queries][..., keys]
    share_of_q = rng.random() if seed and dtype == wide else 1
    scale = dtype(c.keywords.get("scale") or 1 / np.sqrt(d))
    with np.errstate(all="ignore"):
        scores = times(q * dtype(scale**share_of_q), (k * dtype(scale ** (1 - share_of_q))).swapaxes(-1, -2))
        scores = np.where(sees, scores, dtype(-np.inf)).astype(wide)
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
    dq, dk, dv = back(times(ds, k) * scale, queries), back(share(dk) * scale, keys), back(share(dv), keys)
    return back(out, queries), logsumexp[:, :, np.argsort(queries)], dq, dk, dv


def largest_terms(c: Case) -> tuple[float, ...]:
    """The largest sum of the magnitudes of what is added up, for each of the five results."""
    (B, H, _, d), (_, H_kv, m, _) = c.q.shape, c.k.shape
    out, logsumexp, *_ = attention(c, np.float64)
    scale = c.keywords.get("scale") or 1 / np.sqrt(d)
    q, k, v, g = (x.astype(np.float64) for x in (c.q, c.k, c.v, c.g))
    k, v = (np.repeat(x, H // H_kv, 1) for x in (k, v))
    sees = visible(c)
    with np.errstate(all="ignore"):
        p = np.where(sees, np.exp(q @ k.swapaxes(-1, -2) * scale - logsumexp[..., None]), 0)
    q, k, v, g = map(np.abs, (q, k, v, g))
    scores = np.where(sees, q @ k.swapaxes(-1, -2) * scale, 0)
    ds = p * (g @ v.swapaxes(-1, -2) + (g * np.abs(out)).sum(-1, keepdims=True)) * scale
    share = lambda x: x.reshape(B, H_kv, H // H_kv, m, d).sum(2)
    sums = (p @ v, scores, ds @ k, share(ds.swapaxes(-1, -2) @ q), share(p.swapaxes(-1, -2) @ g))
    return tuple(float(x.max(initial=0)) for x in sums)


def plain_errors(c: Case, exact: tuple[np.ndarray, ...], orders: range = range(8)) -> np.ndarray:
    """The largest error of each result of plain attention, over some ways to compute it, where it has one."""

    def error(found: np.ndarray, exact: np.ndarray) -> float:
        is_number = np.isfinite(found)
        return np.abs(found[is_number].astype(np.float64) - exact[is_number]).max(initial=0)

    return np.max([list(map(error, attention(c, c.q.dtype.type, seed), exact)) for seed in orders], axis=0)


def unit(name: str, c: Case) -> float:
    """The largest relative rounding of a result."""
    return UNITS["float32" if name == "logsumexp" else c.q.dtype.name]


def check(c: Case, found: tuple[np.ndarray, ...]) -> None:
    """The errors of out, logsumexp, dq, dk, dv are at most twice those of plain attention, equally precise.

    That is the budget of the FlashAttention test suite. On top of it there are four roundings of the largest
    sum, for plain attention can be exact where the kernel is not: with one key, or one that outweighs all
    others, its P is 1 and its dS is 0, while here D and dO V^T are two sums of the same numbers. And where a
    few huge scores decide, roundings can be lucky: the kernel has one try, plain attention eight, and where
    these are not enough, 128. Nothing is asked where plain attention leaves float16, which ends at 65504.
    """
    dtype = c.q.dtype.type
    exact, errors = attention(c, np.float64), []
    for name, ours, reference, own in zip(NAMES, found, exact, attention(c, dtype)):
        assert ours.shape == reference.shape
        assert ours.dtype == (np.float32 if name == "logsumexp" else dtype)
        hidden = np.isneginf(reference)  # logsumexp of a query that sees nothing
        assert np.array_equal(np.isneginf(ours.astype(np.float64)), hidden), f"{name} of {c}"
        ours, reference = (x[np.isfinite(own)].astype(np.float64) for x in (ours, reference))
        errors.append(np.abs(ours - reference).max(initial=0))
    slack = [ROUNDINGS * unit(name, c) * terms for name, terms in zip(NAMES, largest_terms(c))]
    plain = plain_errors(c, exact)
    if not np.all(errors <= 2 * plain + slack):
        plain = np.maximum(plain, plain_errors(c, exact, range(8, 128)))
    for name, error, most, extra in zip(NAMES, errors, plain, slack):
        limit = 2 * most + extra
        assert error <= limit, f"{name} of {c}: error {error:.2e}, plain {most:.2e}, limit {limit:.2e}"
