"""The op table against PyTorch: values and gradients in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autograd import primitives
from autograd.fused import FUSED as OPERATIONS

from .checks import gradients, run, upstream_of
from .op_table import FUSED, PRIMITIVES, Row

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[reference]'")
functional = torch.nn.functional


def reduction(function):
    """torch's reduction over one axis, several or all, as NumPy takes them."""
    return lambda a, axis, keepdims: function(
        a, tuple(range(a.ndim)) if axis is None else axis, keepdim=keepdims
    )


def layer_norm(x, weight=None, bias=None, eps=0.0):
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x, weight=None, eps=0.0):
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


def cross_entropy(logits, targets, **kwargs):
    losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **kwargs)
    # The mean over no positions is nan in torch, and zero here.
    return losses if (targets != kwargs["ignore_index"]).any() else logits.sum() * 0


def attention(q, k, v, causal=False, window=None, key_lengths=None, scale=None, keep=1.0):
    """Torch's masked softmax; a query that sees nothing gives nan there, and zero here."""
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    behind = torch.arange(n)[:, None] + m - n - torch.arange(m)
    seen = torch.ones(q.shape[0], 1, n, m, dtype=torch.bool)
    seen = seen & (behind >= 0) if causal else seen
    seen = seen & (behind < window) if window is not None else seen
    if key_lengths is not None:
        seen = seen & (torch.arange(m) < key_lengths[:, None, None, None])
    scores = (q @ k.mT) * (scale or 1 / math.sqrt(q.shape[-1]))
    p = torch.where(seen, scores, -1e300).softmax(-1) * seen
    return (p * keep) @ v


def multi_head_attention(q, k, v, heads, causal=False, key_lengths=None, keep=1.0):
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v, causal, None, key_lengths, keep=keep).transpose(1, 2).flatten(2)


def self_attention(qkv, heads, causal=False, window=None, keep=1.0):
    B, T, width = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return attention(q, k, v, causal, window, keep=keep).transpose(1, 2).reshape(B, T, width // 3)


def rotary(x, cos, sin):
    """Points as complex numbers, turned by one product."""
    half = cos.shape[1]
    heads = x.reshape(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half)  # (..., T, H, 2, d/2)
    z = torch.complex(heads[..., 0, :], heads[..., 1, :]) * torch.complex(cos, sin)[:, None]
    return torch.stack([z.real, z.imag], -2).reshape(x.shape)


def rotary_attention(q, k, v, cos, sin, window=None, keep=1.0):
    heads = lambda x: x.reshape(*x.shape[:2], -1, 2 * cos.shape[1]).transpose(1, 2)
    out = attention(heads(rotary(q, cos, sin)), heads(rotary(k, cos, sin)), heads(v), True, window, keep=keep)
    return out.transpose(1, 2).reshape(q.shape)


def wkv(w, u, k, v, state=None):
    """The weights of all positions for all, (B, T, T, C), and of what was before them, (B, T, C)."""
    t = torch.arange(k.shape[1])
    age = (t[:, None] - t - 1)[..., None]
    weights = (k[:, None] + torch.where(age < 0, u, -age * w)).exp() * (age >= -1)
    top, total = (weights * v[:, None]).sum(2), weights.sum(2)
    if state is not None:
        aa, bb, pp = (x[:, None] for x in state)
        past = (pp - t[:, None] * w).exp()
        top, total = top + past * aa, total + past * bb
    return top / total


def scatter(values, index, shape):
    out = torch.zeros(shape, dtype=values.dtype)
    return out.index_put(_arrays(index, shape), values, accumulate=True)


def _arrays(index, shape):
    """Any NumPy index as one array of positions an axis."""
    positions = np.arange(math.prod(shape)).reshape(shape)[index]
    return tuple(torch.as_tensor(i) for i in np.unravel_index(positions, shape))


def getitem(a, index):
    if a.ndim == 0:
        return a[torch.as_tensor(index) if isinstance(index, np.ndarray) else index]
    return a[_arrays(index, tuple(a.shape))]


# Operations that PyTorch spells otherwise; the others are torch.<name>, called as ours are.
THEIRS = {
    "astype": lambda a, dtype: a.to(dtype),
    "concatenate": lambda t, axis: torch.cat(t, axis),
    "embedding": lambda ids, table: functional.embedding(ids, table),
    "expand_dims": torch.unsqueeze,
    "getitem": getitem,
    "identity": torch.clone,
    "logsumexp": reduction(torch.logsumexp),
    "max": reduction(torch.amax),
    "mean": reduction(torch.mean),
    "min": reduction(torch.amin),
    "pad": lambda a, pairs, value: functional.pad(
        a, [n for pair in reversed(pairs) for n in pair], value=value
    ),
    "power": torch.pow,
    "put": scatter,
    "split": lambda a, how, axis: torch.tensor_split(a, how, axis),
    "squeeze": lambda a, axis: a.squeeze() if axis is None else a.squeeze(axis),
    "stack": lambda t, axis: torch.stack(t, axis),
    "sum": reduction(torch.sum),
    "transpose": lambda a, axes=None: a.permute(tuple(reversed(range(a.ndim))) if axes is None else axes),
    "unbroadcast": torch.Tensor.sum_to_size,
    "var": lambda a, axis, keepdims: reduction(lambda *how, **kw: torch.var(*how, correction=0, **kw))(
        a, axis, keepdims
    ),
    "attention": attention,
    "cross_entropy": cross_entropy,
    "embedding_lookup": lambda ids, table: functional.embedding(ids, table),
    "gelu": lambda x, approximate: functional.gelu(x, approximate=approximate),
    "layer_norm": layer_norm,
    "linear": functional.linear,
    "linear_cross_entropy": lambda x, w, *args, **kwargs: cross_entropy(x @ w.T, *args, **kwargs),
    "multi_head_attention": multi_head_attention,
    "rms_norm": rms_norm,
    "rotary": rotary,
    "rotary_attention": rotary_attention,
    "self_attention": self_attention,
    "silu": functional.silu,
    "swiglu": lambda gate, up: functional.silu(gate) * up,
    "wkv": wkv,
}
OURS = {name: getattr(primitives, name) for name in PRIMITIVES if PRIMITIVES[name].differentiable}
OURS |= {name: OPERATIONS[name].fused for name in FUSED}
NUMPY_INDEX = {"getitem", "put"}


def theirs_of(value):
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, dict):
        return {key: theirs_of(item) for key, item in value.items()}
    return type(value)(map(theirs_of, value)) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("name", sorted(OURS))
@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.filterwarnings("ignore:var..:UserWarning")  # of one value, which is zero all the same
def test_value_and_gradient(name, data):
    row: Row = {**PRIMITIVES, **FUSED}[name]
    case = data.draw(row.cases)
    tensors = case.tensors()
    found = run(row, OURS[name], tensors, case, np)
    leaves = [torch.tensor(x.values, requires_grad=True) for x in case.inputs]
    args, kwargs = case.constants()
    args, kwargs = (args, kwargs) if name in NUMPY_INDEX else (theirs_of(args), theirs_of(kwargs))
    expected = row.call(THEIRS.get(name) or getattr(torch, name), leaves, *args, **kwargs)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    for y, z in zip(found, expected, strict=True):
        assert y.shape == tuple(z.shape)
        np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=1e-12, atol=1e-12)
    upstream = upstream_of(found)
    total = sum((z * torch.as_tensor(g)).sum() for z, g in zip(expected, upstream))
    expected_gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    for g, h in zip(gradients(found, tensors, upstream, np), expected_gradients):
        np.testing.assert_allclose(g, h.numpy(), rtol=1e-12, atol=1e-12)
