"""The stand-in for CuPy refuses what CuPy refuses, and computes what NumPy computes."""

from __future__ import annotations

import copy
import operator
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

try:
    import cupy as real_cupy
except Exception:
    real_cupy = None

needs_cupy = pytest.mark.skipif(real_cupy is None, reason="cupy, whose names this compares, is missing")


@pytest.fixture
def cp(strict_cupy):
    return strict_cupy


@pytest.fixture
def stand_in(strict_cupy):
    """The module tests/strict_cupy.py itself."""
    return sys.modules[type(strict_cupy).__module__]


ARITHMETIC = "add sub mul truediv floordiv mod pow".split()
BITWISE = "and_ or_ xor lshift rshift".split()
COMPARISON = "eq ne lt le gt ge".split()


# Never a NumPy array among device arrays


@pytest.mark.parametrize("name", [*ARITHMETIC, *BITWISE, *COMPARISON, "matmul"])
def test_operators_refuse_numpy_arrays_on_either_side(cp, name):
    host = np.ones((2, 2), np.int32)
    device, function = cp.asarray(host), getattr(operator, name)
    function(device, device)
    for pair in [(device, host), (host, device), (device, np.array(1, np.int32))]:
        with pytest.raises(TypeError):
            function(*pair)


@pytest.mark.parametrize("name", [*ARITHMETIC, *BITWISE, "matmul"])
def test_in_place_operators_refuse_numpy_arrays(cp, name):
    in_place = getattr(operator, "i" + name.strip("_"))
    for left, right in [(cp.ones((2, 2)), np.ones((2, 2))), (np.ones((2, 2)), cp.ones((2, 2)))]:
        with pytest.raises(TypeError):
            in_place(left, right)
        assert float(left.sum()) == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda cp, x, h: cp.exp(h),
        lambda cp, x, h: cp.add(x, h),
        lambda cp, x, h: cp.add(x, x, out=h),
        lambda cp, x, h: cp.maximum(h, 0.0),
        lambda cp, x, h: cp.matmul(x, h),
        lambda cp, x, h: cp.einsum("ij,jk->ik", x, h),
        lambda cp, x, h: cp.concatenate([x, h]),
        lambda cp, x, h: cp.concatenate((h, x), axis=1),
        lambda cp, x, h: cp.where(x > 0, x, h),
        lambda cp, x, h: cp.sum(h),
        lambda cp, x, h: cp.add.at(x, 0, h[0]),
        lambda cp, x, h: cp.add.reduce(h),
        lambda cp, x, h: cp.zeros_like(h),
        lambda cp, x, h: cp.ascontiguousarray(h),
        lambda cp, x, h: cp.linalg.norm(h),
        lambda cp, x, h: cp.random.default_rng(0).random(out=h),
        lambda cp, x, h: cp.array([x[0], h[0]]),
        lambda cp, x, h: x.dot(h),
        lambda cp, x, h: x.sum(out=h),
        lambda cp, x, h: x[np.array([0, 1])],
        lambda cp, x, h: x[h > 0],
        lambda cp, x, h: x[0, np.array([0, 1])],
        lambda cp, x, h: x.__setitem__(0, h[0]),
        lambda cp, x, h: x.__setitem__(np.array([0, 1]), 1.0),
        lambda cp, x, h: x.__setitem__(cp.array([0, 1]), h),
        lambda cp, x, h: h.__setitem__(0, x[0]),
        lambda cp, x, h: h[x > 0],
    ],
)
def test_functions_methods_and_indices_refuse_numpy_arrays(cp, call):
    with pytest.raises((TypeError, IndexError)):
        call(cp, cp.ones((2, 2)), np.ones((2, 2)))


@pytest.mark.parametrize(
    "leak",
    [
        np.asarray,
        np.array,
        lambda x: np.array([x, x]),
        np.exp,
        np.sum,
        lambda x: np.add(x, x),
        lambda x: np.add(np.ones(2), 1, out=x),
        lambda x: np.concatenate([x, x]),
        lambda x: np.where(x > 0, x, x),
        lambda x: np.testing.assert_array_equal(x, x),
        lambda x: np.add.at(x, 0, 1),
        np.frombuffer,
        memoryview,
        lambda x: np.from_dlpack(x),
    ],
)
def test_a_device_array_never_turns_into_a_numpy_array(cp, leak):
    with pytest.raises((TypeError, AttributeError)):
        leak(cp.ones(2))


@pytest.mark.parametrize("name", ["flat", "ctypes", "__array_interface__", "__array_struct__", "itemset"])
def test_no_attribute_leads_to_the_host_memory(cp, name):
    with pytest.raises(AttributeError):
        getattr(cp.ones(2), name)


def test_get_and_asnumpy_copy_to_the_host_and_asarray_to_the_device(cp):
    source = np.arange(6.0).reshape(2, 3)
    for move in (cp.asarray, cp.array, cp.asanyarray):
        device = move(source)
        source[0, 0] = 9
        assert type(device) is cp.ndarray and float(device[0, 0]) == 0
        source[0, 0] = 0
    for host in (device.get(), cp.asnumpy(device), device.get(out=np.empty((2, 3)))):
        assert type(host) is np.ndarray
        np.testing.assert_array_equal(host, source)
        host[0, 0] = 9
        assert float(device[0, 0]) == 0
    assert cp.asarray(device) is device and cp.array(device) is not device
    assert cp.get_array_module(source) is np and cp.get_array_module(source, device) is cp
    with pytest.raises(TypeError):
        device.get(out=np.empty((2, 3), np.float32))


@pytest.mark.parametrize("values", [np.array(["a"]), np.array([None]), np.ones(2, np.longdouble)])
def test_types_that_cupy_lacks_stay_on_the_host(cp, values):
    if values.dtype == np.float64:
        pytest.skip("this platform's long double is a double")
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.asarray(values)


def test_bfloat16_stays_on_the_host(cp):
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.asarray(np.ones(2, pytest.importorskip("ml_dtypes").bfloat16))


# Device arrays, not scalars


def test_reductions_and_elements_are_0d_device_arrays(cp):
    x = cp.arange(6.0).reshape(2, 3)
    for value in [x.sum(), cp.max(x), x.mean(), x.argmax(), (x > 0).all(), x[1, 2], cp.sqrt(4), x[0] @ x[0],
                  cp.allclose(x, x), cp.array_equal(x, x), cp.add.reduce(x[0]), cp.float32(2) * x.sum(),
                  cp.random.default_rng(0).random()]:  # fmt: skip
        assert type(value) is cp.ndarray and value.shape == ()
    assert isinstance(x.sum().item(), float) and x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (float(x[1, 2]), int(x[1, 2]), bool(x[1, 2]), f"{x[1, 2]:.1f}", len(x)) == (5.0, 5, True, "5.0", 2)
    assert [row.shape for row in x] == [(3,), (3,)]
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x)


@pytest.mark.parametrize(
    "use",
    [
        lambda cp, n: range(n),
        lambda cp, n: [0, 1, 2][n],
        lambda cp, n: np.arange(9)[n:],
        lambda cp, n: cp.ones(9)[:n],
        pytest.param(lambda cp, n: cp.ones(4).reshape(n, -1), marks=needs_cupy),
        lambda cp, n: cp.ones((3, 3)).sum(axis=n),
        pytest.param(lambda cp, n: cp.zeros((n, 2)), marks=needs_cupy),
        pytest.param(lambda cp, n: cp.reshape(cp.ones(4), (n, -1)), marks=needs_cupy),
        pytest.param(lambda cp, n: cp.repeat(cp.ones(2), n), marks=needs_cupy),
    ],
)
def test_a_device_scalar_is_no_python_integer(cp, use):
    with pytest.raises((TypeError, IndexError)):
        use(cp, cp.array(1))


@needs_cupy
@pytest.mark.parametrize(
    "call",
    [
        lambda cp, x: cp.exp([1.0, 2.0]),
        lambda cp, x: cp.add(x, [1.0, 2.0]),
        lambda cp, x: x + [1.0, 2.0],
        lambda cp, x: x + None,
        lambda cp, x: x.__setitem__(slice(None), [1.0, 2.0]),
        lambda cp, x: cp.sum([1.0, 2.0]),
        lambda cp, x: cp.where(True, x, x),
        lambda cp, x: cp.concatenate([x, [1.0]]),
        lambda cp, x: cp.stack([1.0, 2.0]),
    ],
)
def test_lists_and_scalars_do_not_stand_for_arrays(cp, call):
    with pytest.raises(TypeError):
        call(cp, cp.ones(2))


# Names and keywords of the real CuPy


@needs_cupy
def test_every_name_offered_exists_in_the_real_cupy(cp):
    names = {name for name in dir(np) if name[0] != "_"}
    offered = {name for name in names if hasattr(cp, name)}
    absent = {name for name in names if not hasattr(real_cupy, name)}
    assert not offered & absent
    assert {"errstate", "einsum_path", "vecdot"} <= absent
    assert {"exp", "matmul", "einsum", "where", "tril", "argsort", "float32", "newaxis", "pi"} <= offered
    for name in absent:
        with pytest.raises(AttributeError):
            getattr(cp, name)
    for owner, real in [(cp.ones((2, 2)), real_cupy.ndarray), (cp.random, real_cupy.random),
                        (cp.random.default_rng(0), real_cupy.random.Generator), (cp.linalg, real_cupy.linalg),
                        (cp.cuda, real_cupy.cuda), (cp.add, real_cupy.ufunc)]:  # fmt: skip
        public = {name for name in dir(owner) + dir(np.ndarray) + dir(np.random.Generator) if name[0] != "_"}
        assert [name for name in public if hasattr(owner, name) and not hasattr(real, name)] == []


@needs_cupy
@pytest.mark.parametrize(
    "call",
    [
        lambda cp, x: cp.max(x, initial=0.0),
        lambda cp, x: cp.mean(x, where=x > 0),
        lambda cp, x: cp.take(x, cp.array([0]), mode="clip"),
        lambda cp, x: cp.take_along_axis(x, indices=cp.array([[0]]), axes=0),
        lambda cp, x: cp.clip(x, min=0.0),
        lambda cp, x: cp.full((2,), 1.0, device="cpu"),
        lambda cp, x: x.item(0),
        lambda cp, x: x.max(dtype=np.float32),
        lambda cp, x: x.sort(axis=0, order=None),
        lambda cp, x: x.reshape(newshape=(4,)),
        lambda cp, x: cp.random.default_rng(0).standard_normal(2, loc=1.0),
        lambda cp, x: cp.random.default_rng(0).normal(),
        lambda cp, x: cp.random.default_rng(0).permutation(3),
        lambda cp, x: cp.random.default_rng(0).bit_generator,
    ],
)
def test_keywords_and_methods_that_cupy_lacks_are_refused(cp, call):
    with pytest.raises((TypeError, AttributeError)):
        call(cp, cp.ones((2, 2)))


def test_keywords_that_cupy_has_are_taken(cp):
    x = cp.asarray(np.array([[3.0, 1.0], [2.0, 5.0]], np.float32))
    assert x.sum(axis=1, keepdims=True, dtype=np.float64).dtype == np.float64
    assert x.reshape(4, order="F").tolist() == [3, 2, 1, 5]
    assert x.reshape((4,)).tolist() == x.reshape(-1).tolist() == [3, 1, 2, 5]
    assert x.transpose(1, 0).tolist() == x.transpose((1, 0)).tolist() == x.T.tolist()
    assert x.swapaxes(0, 1)[0, 1] == 2 and x.astype(np.float16, copy=False).dtype == np.float16
    assert cp.einsum("ij,kj->ik", x, x, optimize=True).shape == (2, 2)
    assert cp.argsort(x, axis=1, kind="stable").tolist() == [[1, 0], [0, 1]]
    assert cp.random.default_rng(0).random((2, 3), dtype=np.float32).dtype == np.float32
    assert cp.issubdtype(x.dtype, cp.floating) and cp.finfo(x.dtype).max > 1e38


def test_what_ufuncs_and_einsum_of_cupy_do_not_take(cp):
    x = cp.ones((2, 2))
    for call in [
        lambda: cp.exp(x, where=x > 0),
        lambda: cp.exp(x, order="F"),
        lambda: x.sum(where=x > 0),
        lambda: cp.einsum("ij->i", x, order="C"),
        lambda: cp.einsum("ij->i", x, out=x[0]),
    ]:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="kind"):
        x.sort(kind="quicksort")
    for call in [
        lambda: cp.multiply.at(x, cp.array([0]), 2.0),
        lambda: cp.maximum.reduce(x),
        lambda: cp.maximum.accumulate(x),
        lambda: cp.maximum.reduceat(x, cp.array([0])),
    ]:
        with pytest.raises(NotImplementedError):
            call()


def test_scatter_takes_only_what_the_atomics_take(cp):
    index = cp.array([0, 2, 0])
    for dtype in (np.float16, np.float32, np.float64, np.int32):
        x = cp.zeros(3, dtype)
        cp.add.at(x, index, cp.ones(3, dtype))
        assert x.tolist() == [2, 0, 1]
    for function, dtype in [(cp.add, np.int64), (cp.maximum, np.float16)]:
        with pytest.raises(TypeError, match="only supports"):
            function.at(cp.zeros(3, dtype), index, cp.ones(3, dtype))
    x = cp.zeros((2, 3), np.int64)
    cp.add.at(x, (slice(None), 1), 5)  # no atomics needed without an index array
    assert x.tolist() == [[0, 5, 0], [0, 5, 0]]
    assert cp.add.reduceat(cp.arange(4.0), cp.array([0, 2])).tolist() == [1, 5]


def test_only_the_rules_written_out_hold_without_the_real_cupy(cp, stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "REAL", None)
    bare = stand_in.Module("cupy", np, None)
    x = cp.arange(4.0)
    assert bare.sum(x, axis=0).item() == 6 and x.mean().item() == 1.5 and bare.exp(x).dtype == np.float64
    assert cp.random.default_rng(0).standard_normal(3, dtype=np.float32).dtype == np.float32
    for call in [lambda: bare.sum(x, where=x > 0), lambda: x.max(initial=0.0), lambda: bare.exp(np.ones(2)),
                 lambda: x + np.ones(4)]:  # fmt: skip
        with pytest.raises(TypeError):
            call()
    for name in ("ctypes", "flat", "__array_interface__"):
        with pytest.raises(AttributeError):
            getattr(x, name)
    for name in ("r_", "mgrid", "vectorize"):
        with pytest.raises(AttributeError):
            getattr(bare, name)


# Silent or undefined in CuPy


@pytest.mark.parametrize(
    "call",
    [
        lambda cp, x: x[cp.array([0, 4])],
        lambda cp, x: x[cp.array([-5])],
        lambda cp, x: x[[0, 4]],
        lambda cp, x: x.__setitem__(cp.array([4]), 1.0),
        lambda cp, x: cp.take(x, cp.array([4])),
        lambda cp, x: x.take(cp.array([4]), axis=0),
        lambda cp, x: cp.take_along_axis(x, cp.array([4]), axis=0),
        lambda cp, x: cp.add.at(x, cp.array([4]), 1.0),
    ],
)
def test_an_index_that_cupy_would_wrap_around_is_found(cp, call):
    with pytest.raises(AssertionError, match="wraps"):
        call(cp, cp.arange(4.0))


def test_an_index_that_cupy_refuses_is_refused_alike(cp):
    x = cp.ones((2, 2))
    for index in (2, (0, -3), (0, 0, 0), cp.ones(2), cp.ones(3, bool)):
        with pytest.raises(IndexError):
            x[index]
    with pytest.raises(np.exceptions.AxisError):
        x.sum(axis=2)


def test_assignment_through_repeated_indices_is_found(cp):
    x, repeated = cp.zeros((3, 2)), cp.array([0, 2, 0])
    with pytest.raises(AssertionError, match="repeated"):
        x[repeated] = cp.arange(6.0).reshape(3, 2)
    with pytest.raises(AssertionError, match="repeated"):
        x[repeated, cp.array([1, 0, 1])] += cp.arange(3.0) + 1
    assert x.tolist() == [[0, 0], [0, 0], [0, 0]]
    x[repeated] = 7.0
    x[repeated, cp.array([1, 0, 0])] = cp.array([1.0, 2.0, 3.0])
    assert x.tolist() == [[3, 1], [0, 0], [2, 7]]


def test_cupy_never_warns_of_floating_point(cp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = cp.zeros(2, np.float32)
        assert np.isnan((x / x).get()).all() and np.isneginf(cp.log(x).get()).all()
        assert np.isposinf(cp.sum(cp.full(2, 3e38, np.float32)).get())


# It computes what NumPy computes


def test_views_share_memory_and_copies_do_not(cp):
    x = cp.zeros((2, 3))
    views = [x[1:], x[..., 0], x.reshape(3, 2), x.T, x.swapaxes(0, 1), x[None], x.ravel(), x.view(), x[1, 1],
             cp.reshape(x, -1), cp.expand_dims(x, 0), cp.squeeze(x[None]), cp.transpose(x)]  # fmt: skip
    for count, view in enumerate(views, start=1):
        assert view.base is x and cp.shares_memory(view, x)
        x += 1
        assert view.ravel()[0] == count
        view *= 1
    x[1, 1][...] = 50.0
    assert x[1, 1] == 50 and x.base is None and views[0].data.ptr == x.data.ptr + x.strides[0]
    for other in [x.copy(), x.astype(np.float64), x[cp.array([0, 1])], x[x > -1], x + 0, copy.copy(x),
                  copy.deepcopy(x), x[cp.array(0)], x[[0, 1]], x.flatten()]:  # fmt: skip
        assert not cp.shares_memory(other, x)
    out = cp.empty_like(x)
    assert cp.add(x, 1, out=out) is out and cp.ascontiguousarray(x) is x
    assert x.astype(x.dtype, copy=False) is x
    alias = x
    alias += 1
    alias @= cp.eye(3)  # CuPy has no in-place form: a new array
    assert alias is not x and x[0, 0] == len(views) + 1


def test_attributes(cp):
    x = cp.ndarray((2, 3), np.float32)
    assert (x.shape, x.ndim, x.size, x.nbytes, x.itemsize, x.strides) == ((2, 3), 2, 6, 24, 4, (12, 4))
    assert x.dtype == np.float32 and x.flags.c_contiguous and not x.T.flags.c_contiguous and x.flags.owndata
    x.shape = (6,)
    assert x.shape == (6,)
    x.fill(2)
    assert x.tolist() == [2] * 6
    for change in (lambda: setattr(x, "dtype", np.int32), lambda: setattr(x, "note", 1), lambda: hash(x)):
        with pytest.raises((AttributeError, TypeError)):
            change()


@pytest.mark.parametrize("name", [*ARITHMETIC, *COMPARISON])
@pytest.mark.parametrize("other", [3, 2.5, True, np.float32(2), np.float64(2), np.int64(3)])
def test_scalars_promote_as_in_numpy_2(cp, name, other):
    function = getattr(operator, name)
    on_host = np.power if name == "pow" else function  # NumPy 2.2's ** has a shortcut that does not promote
    for dtype in (np.int32, np.float16, np.float32, np.float64):
        host = np.array([1, 2, 5], dtype)
        for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
            expected, found = on_host(*order(host, other)), function(*order(cp.asarray(host), other))
            assert type(found) is cp.ndarray and found.dtype == expected.dtype
            np.testing.assert_array_equal(found.get(), expected)


def test_another_type_gets_its_turn_only_if_it_outranks_the_array(cp):
    x = cp.ones(2)
    answers = {"__radd__": lambda self, other: "mine", "__gt__": lambda self, other: "mine"}
    for rank in ({"__array_priority__": 1000}, {"__array_ufunc__": None}):
        higher = type("Tensor", (), {**answers, **rank})()
        assert x + higher == "mine" and (x < higher) == "mine"
    with pytest.raises(TypeError):
        x + type("Tensor", (), answers)()


def test_results_equal_numpys(cp):
    host = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    x, mask = cp.asarray(host), host > 0
    pairs = [
        (x[:, None, ::2], host[:, None, ::2]),
        (x[x > 0], host[mask]),
        (x[cp.array([2, 0]), cp.array([1, 1])], host[[2, 0], [1, 1]]),
        (cp.where(x > 0, x, 0.0), np.where(mask, host, 0.0)),
        (cp.matmul(x, x.T), host @ host.T),
        (cp.tril(x, k=1), np.tril(host, 1)),
        (cp.pad(x, ((1, 0), (0, 2))), np.pad(host, ((1, 0), (0, 2)))),
        (cp.stack([x, x], axis=1), np.stack([host, host], axis=1)),
        (cp.split(x, 2, axis=1)[1], host[:, 2:]),
        (-(abs(x) ** 2), -(abs(host) ** 2)),
        (cp.cumsum(x, axis=-1), np.cumsum(host, -1)),
    ]
    for found, expected in pairs:
        assert type(found) is cp.ndarray and found.dtype == expected.dtype
        np.testing.assert_array_equal(found.get(), expected)
    x[x < 0] = 0
    np.testing.assert_array_equal(x.get(), np.maximum(host, 0))


# The backend on it


def test_the_backend_computes_through_the_stand_in(cp):
    from autograd import backend

    x = backend.to_device(np.ones(3, np.float32), "cuda")
    assert type(x) is cp.ndarray and backend.array_module(x) is cp and backend.array_module(np.ones(1)) is np
    with pytest.raises(TypeError):
        backend.array_module(x, np.ones(3))
    assert type(backend.to_host(x)) is np.ndarray
    backend.add_at(x, cp.array([0, 0]), cp.ones(2, np.float32))
    assert x.tolist() == [3, 1, 1]
    assert type(backend.generator(0, "cuda").random(2, dtype=np.float32)) is cp.ndarray


def test_the_special_functions_of_cupyx_are_replaced_too(cp):
    from cupyx.scipy.special import erf

    x = cp.array([-1.0, 0.0, 0.5])
    np.testing.assert_allclose(erf(x).get(), [-0.8427007929497149, 0.0, 0.5204998778130465], rtol=1e-15)
    assert erf(x.astype(np.float32)).dtype == np.float32 and erf(x.astype(np.float16)).dtype == np.float64
    with pytest.raises(TypeError):
        erf(np.ones(2))


def test_one_device_with_memory(cp):
    assert cp.cuda.runtime.getDeviceCount() == 1 and cp.cuda.is_available() and cp.is_available()
    free, total = cp.cuda.Device().mem_info
    assert 0 < free < total
    assert isinstance(cp.cuda.runtime, SimpleNamespace)
