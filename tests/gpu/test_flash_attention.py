"""FlashAttention on a real GPU: what tests/kernels/test_flash_attention.py asks of the emulator, and more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

import autograd.functional as F
import kernels
from autograd import Tensor, backend, grad
from autograd.attention import attention_composed
from kernels.flash_attention import HEAD_DIMS

from ..kernels.attention import DTYPES, Case, case, check
from ..kernels.draws import MASKS, cases

try:
    cupy = backend.device_module("cuda")
except backend.DeviceError as error:
    pytest.skip(str(error), allow_module_level=True)

NEW = int(cupy.cuda.Device().compute_capability) >= 80
TYPES = sorted(DTYPES) if NEW else ["float32"]


def on_card(x: np.ndarray):
    """The array on the GPU; bfloat16 passes as its bits, for CuPy may not know the type when it copies."""
    return cupy.asarray(x.view(np.uint16)).view(x.dtype) if x.dtype.name == "bfloat16" else cupy.asarray(x)


def to_host(x) -> np.ndarray:
    return x.view(np.uint16).get().view(x.dtype) if x.dtype.name == "bfloat16" else x.get()


def run(c: Case) -> tuple[np.ndarray, ...]:
    q, k, v, g = map(on_card, (c.q, c.k, c.v, c.g))
    keywords = dict(c.keywords)
    if "key_lengths" in keywords:
        keywords["key_lengths"] = cupy.asarray(keywords["key_lengths"])
    out, logsumexp = kernels.flash_attention(q, k, v, **keywords)
    grads = kernels.flash_attention_backward(g, q, k, v, out, logsumexp, **keywords)
    return tuple(to_host(cupy.ascontiguousarray(x)) for x in (out, logsumexp, *grads))


@pytest.fixture(autouse=True)
def bfloat16_if_cupy_has_it(request):
    values = getattr(request.node, "callspec", None)
    if values and values.params.get("dtype") == "bfloat16":
        try:
            on_card(np.zeros(1, DTYPES["bfloat16"]))
        except (TypeError, ValueError) as error:
            pytest.skip(f"this CuPy has no bfloat16: {error}")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TYPES)
def test_lengths_around_the_tiles(dtype, mask):
    for length in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 500):
        c = case(dtype, 2, 4, 2, length, length, 64, **MASKS[mask])
        check(c, run(c))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_head_dimensions(dtype, d):
    c = case(dtype, 2, 4, 2, 300, 333, d, causal=True)
    check(c, run(c))


@given(cases(tuple(set(TYPES) - {"bfloat16"})))
@settings(max_examples=100)
def test_against_float64(drawn):
    arguments, keywords = drawn
    c = case(*arguments, **keywords)
    check(c, run(c))


@pytest.mark.parametrize("values", ["large", "tailed"])
@pytest.mark.parametrize("dtype", TYPES)
def test_values_at_the_edge(dtype, values):
    for seed in range(5):
        c = case(dtype, 1, 2, 1, 300, 330, 64, values, seed)
        check(c, run(c))


@pytest.mark.parametrize("dtype", TYPES)
def test_one_query_against_a_long_cache(dtype):
    c = case(dtype, 2, 4, 2, 1, 5000, 128, causal=True, key_lengths=np.array([5000, 4321]))
    check(c, run(c))


def test_many_blocks_and_every_run_the_same_bits():
    c = case("float16" if NEW else "float32", 16, 8, 8, 512, 512, 64, causal=True)
    for first, second in zip(run(c), run(c)):
        assert first.tobytes() == second.tobytes()


def test_attention_of_tensors_takes_the_kernel():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, heads, 150, 40)) for heads in (4, 2, 2)]
    exact = [Tensor(x, requires_grad=True) for x in arrays]
    expected = attention_composed(*exact, causal=True)
    g = rng.standard_normal(expected.shape)
    wanted = [expected, *grad(expected, exact, Tensor(g))]
    for precision, tolerance in ((None, 1e-5), ("float16", 5e-3))[: 1 + NEW]:
        F.use_flash(precision=precision)
        try:
            tensors = [Tensor(cupy.asarray(x, dtype=np.float32), requires_grad=True) for x in arrays]
            assert F.attention_path(*tensors) == f"flash kernel, {precision or 'float32'}"
            out = F.attention(*tensors, causal=True)
            found = [out, *grad(out, tensors, Tensor(cupy.asarray(g, dtype=np.float32)))]
        finally:
            F.use_flash()
        for x, y in zip(found, wanted):
            np.testing.assert_allclose(x.data.get(), y.data, rtol=0, atol=tolerance * np.abs(y.data).max())
