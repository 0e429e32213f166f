"""A stand-in for CuPy on NumPy memory, as strict as CuPy, to test code for the GPU on a machine without one.

`cupy` and `cupyx_special` below stand for cupy and cupyx.scipy.special. An array of theirs wraps a NumPy
array and never mixes with one. What CuPy refuses is refused here; what CuPy leaves undefined or does
silently (an index out of bounds wraps around, an assignment through repeated indices keeps any of the
values) is an AssertionError, so that nothing comes to rely on it. Stricter than CuPy on purpose: no NumPy
arrays as indices, no NumPy functions on device arrays, no bfloat16 (CuPy 13 lacks it).

Where the real cupy is installed (`import cupy` works without a GPU), a name it lacks is an AttributeError
and a keyword it lacks a TypeError; without it, only the rules written out here are kept.

Source: CuPy user guide, "Differences between CuPy and NumPy"; core.pyx, _kernel.pyx, _routines_indexing.pyx.
"""

from __future__ import annotations

import inspect
import math
import re
import weakref
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np

try:
    import cupy as REAL
except Exception:  # not installed, or installed for a CUDA that is not here
    REAL = None

SCALARS = (bool, int, float, complex, np.number, np.bool_)
DTYPES = "?bhilqBHILQefdFD"
# Arguments that CuPy reads on the host: an array there would need __index__, which a device array lacks.
ON_HOST = set(
    "shape newshape size axis axes axis1 axis2 source destination k n N M num reps repeats pad_width ndmin "
    "ddof indices_or_sections decimals offset".split()
)
TAKE_SCALARS = {"ndim", "shape", "isclose", "allclose", "iscomplexobj"}  # elsewhere `a` must be an array
VERDICTS = {"allclose", "array_equal", "array_equiv"}  # a Python bool in NumPy, an array in CuPy
# What atomicAdd, atomicMax and atomicMin exist for; int64 is not among them.
ATOMIC = dict.fromkeys(("maximum", "minimum"), {"float32", "float64", "int32", "uint32", "uint64"})
ATOMIC["add"] = ATOMIC["maximum"] | {"float16"}
REDUCE, REDUCEAT = {"add", "multiply"}, {"add"}

_wrappers: weakref.WeakValueDictionary[int, ndarray] = weakref.WeakValueDictionary()


def _wrap(result):
    """Host arrays as device arrays, NumPy scalars as 0-d ones; always the same wrapper for the same array."""
    if isinstance(result, (tuple, list)):
        return (list if type(result) is list else tuple)(map(_wrap, result))
    if not isinstance(result, (np.ndarray, np.generic)):
        return result
    host = np.asarray(result)
    if host.dtype.char not in DTYPES:
        raise ValueError(f"Unsupported dtype {host.dtype}")
    wrapper = _wrappers.get(id(host))
    if wrapper is None or wrapper._host is not host:
        wrapper = object.__new__(ndarray)
        object.__setattr__(wrapper, "_host", host)
        _wrappers[id(host)] = wrapper
    return wrapper


def _unwrap(value):
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: move it with cupy.asarray first")
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_unwrap, value))
    return value._host if isinstance(value, ndarray) else value


def _operand(value):
    if not isinstance(value, (ndarray, *SCALARS)):
        raise TypeError(f"Unsupported type {type(value)}")
    return _unwrap(value)


def _holds_array(value) -> bool:
    return isinstance(value, ndarray) or (isinstance(value, (tuple, list)) and any(map(_holds_array, value)))


@contextmanager
def _as_on_gpu():
    """No warnings of overflow or division by zero; an index that CuPy wraps around is an AssertionError."""
    try:
        with np.errstate(all="ignore"):
            yield
    except IndexError as error:
        if re.search("out of bounds for (axis|size)", str(error)):
            raise AssertionError(f"{error}: CuPy wraps such an index around and says nothing") from error
        raise


def _signature(function) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # compiled: Cython leaves the signature in the docstring's first line
        match = re.match(r"[\w.]+\((self.*)\)", (function.__doc__ or "").partition("\n")[0])
        return match and inspect.signature(eval(f"lambda {re.sub(r'[a-zA-Z_]+ (?=[a-z])', '', match[1])}: 0"))


def _check(name, signature, args, kwargs, needs_array=()) -> None:
    if {"where", "initial"} & kwargs.keys() or (name == "einsum" and kwargs.keys() - {"dtype", "optimize"}):
        raise TypeError(f"{name}: Wrong arguments {list(kwargs)}")
    if kwargs.get("kind") not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    try:
        arguments = signature.bind(*args, **kwargs).arguments if signature else kwargs
    except TypeError as error:
        raise TypeError(f"cupy's {name}{signature}: {error}") from None
    for argument, value in arguments.items():
        if argument in ON_HOST and _holds_array(value):
            raise TypeError(f"{name}: 'ndarray' object cannot be interpreted as an integer ({argument})")
        if argument in needs_array and not isinstance(value, ndarray):
            raise TypeError(f"{name}: {argument} must be a cupy.ndarray, not {type(value)}")
        if argument == "tup" and not all(isinstance(item, ndarray) for item in value):
            raise TypeError(f"{name}: Only cupy arrays can be concatenated")


def _function(name, target, real, needs_array=(), leading=()):
    """target on the host arrays, behind the checks of `real`; leading is the self of a method."""
    signature = _signature(real) if real is not None else None

    def call(*args, **kwargs):
        _check(name, signature, (*leading, *args), kwargs, needs_array)
        with _as_on_gpu():
            result = target(*_unwrap(args), **_unwrap(kwargs))
        python_scalar = name in VERDICTS or (isinstance(result, float) and name not in ("item", "tolist"))
        return _wrap(np.asarray(result) if python_scalar else result)

    return call


def _require(real, name, owner) -> None:
    if name.startswith("__") or (real is not None and not hasattr(real, name)):
        raise AttributeError(f"the real {owner} has no attribute {name!r}")


class ufunc:
    """cupy.ufunc: operands are device arrays or scalars; at, reduce and the like exist for a few only."""

    def __init__(self, host: np.ufunc):
        self._host, self.__name__ = host, host.__name__

    def __call__(self, *args, **kwargs):
        if kwargs.keys() - {"out", "dtype", "casting"}:
            raise TypeError(f"{self.__name__}: Wrong arguments {kwargs}")
        with _as_on_gpu():
            return _wrap(self._host(*map(_operand, args), **_unwrap(kwargs)))

    def _method(self, name, supported, array, *args):
        if self.__name__ not in supported:
            raise NotImplementedError(f"`{self.__name__}.{name}` is not supported yet")
        if not isinstance(array, ndarray):
            raise TypeError(f"Unsupported type {type(array)}")
        with _as_on_gpu():
            return _wrap(getattr(self._host, name)(array._host, *args))

    def at(self, a, indices, b=None) -> None:
        types = ATOMIC.get(self.__name__)
        if types and _holds_array(indices) and a.dtype.name not in types:
            raise TypeError(f"{self.__name__}.at only supports {', '.join(sorted(types))}, not {a.dtype}")
        self._method("at", ATOMIC, a, _unwrap(indices), _operand(b))

    def reduce(self, array, axis=0, dtype=None, out=None, keepdims=False):
        return self._method("reduce", REDUCE, array, axis, dtype, _unwrap(out), keepdims)

    def accumulate(self, array, axis=0, dtype=None, out=None):
        return self._method("accumulate", REDUCE, array, axis, dtype, _unwrap(out))

    def reduceat(self, array, indices, axis=0, dtype=None, out=None):
        return self._method("reduceat", REDUCEAT, array, _unwrap(indices), axis, dtype, _unwrap(out))


class ndarray:
    """cupy.ndarray over a NumPy array. Views share its memory; only get() and asnumpy lead to the host."""

    __slots__ = ("_host", "__weakref__")
    __array_priority__ = 100
    __hash__ = None

    def __new__(cls, shape, dtype=float, order="C"):
        return cupy.empty(shape, dtype, order)

    def __getattr__(self, name):
        real = REAL and REAL.ndarray
        _require(real, name, "cupy.ndarray")
        value = getattr(self._host, name)
        if callable(value):
            return _function(name, value, getattr(real, name, None), leading=(self,))
        if not isinstance(value, (np.ndarray, np.dtype, int, tuple, type(None))):
            raise AttributeError(f"the stand-in has no model of ndarray.{name}")
        return _wrap(value)

    def __setattr__(self, name, value):
        if name != "shape":
            raise AttributeError(f"attribute {name!r} of 'cupy.ndarray' objects is not writable")
        self._host.shape = _unwrap(value)

    def get(self, stream=None, order="C", out=None, blocking=True) -> np.ndarray:
        if out is None:
            return np.array(self._host, order=order)
        if not isinstance(out, np.ndarray) or (out.dtype, out.shape) != (self.dtype, self.shape):
            raise TypeError(f"out must be a numpy.ndarray of {self.dtype} and shape {self.shape}")
        out[...] = self._host
        return out

    @property
    def data(self):
        return SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def flags(self):
        names = ("c_contiguous", "f_contiguous", "owndata")
        return SimpleNamespace(**{name: getattr(self._host.flags, name) for name in names})

    def __getitem__(self, index):
        parts = _unwrap(index if isinstance(index, tuple) else (index,))
        if any(isinstance(part, (np.ndarray, list)) for part in parts):
            with _as_on_gpu():
                return _wrap(self._host[parts])
        if not any(part is Ellipsis for part in parts):
            parts += (Ellipsis,)  # so that a single element is a 0-d view of this memory, as in CuPy
        return _wrap(self._host[parts])

    def __setitem__(self, index, value):
        index, value = _unwrap(index if isinstance(index, tuple) else (index,)), _operand(value)
        with _as_on_gpu():
            if np.size(value) > 1 and any(isinstance(part, (np.ndarray, list)) for part in index):
                targets = np.arange(self.size).reshape(self.shape)[index]
                if np.unique(targets).size < targets.size:
                    raise AssertionError("repeated indices: which value CuPy keeps is undefined; use add.at")
            self._host[index] = value

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __copy__(self, memo=None):
        return self.copy()

    __deepcopy__ = __copy__

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_ufunc__(self, function, method, *inputs, **kwargs):
        # A NumPy scalar's operators (np.float32(2) * x) come this way too, and those are legitimate; its
        # comparisons come as a 0-d array.
        comparison = function.types[0].endswith("->?") and isinstance(inputs[0], np.ndarray)
        left = inputs[0].item() if comparison and inputs[0].ndim == 0 else inputs[0]
        if method == "__call__" and len(inputs) == 2 and isinstance(left, SCALARS) and not kwargs:
            return getattr(cupy, function.__name__)(left, inputs[1])
        self.__array_function__(function)

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} met a CuPy array: compute through the array's own module")


def _defers(x, y) -> bool:
    """Whether CuPy leaves x + y to y.__radd__ (core.pyx, _should_use_rop)."""
    if hasattr(y, "__array_ufunc__"):
        return y.__array_ufunc__ is None
    return getattr(y, "__array_priority__", 0) > x.__array_priority__


def _add_operators() -> None:
    def add(name, method):
        setattr(ndarray, f"__{name}__", method)

    def forward(function):
        return lambda self, other: NotImplemented if _defers(self, other) else function(self, other)

    arithmetic = {
        "add": cupy.add, "sub": cupy.subtract, "mul": cupy.multiply, "truediv": cupy.true_divide,
        "floordiv": cupy.floor_divide, "mod": cupy.remainder, "pow": cupy.power, "and": cupy.bitwise_and,
        "or": cupy.bitwise_or, "xor": cupy.bitwise_xor, "lshift": cupy.left_shift, "rshift": cupy.right_shift,
    }  # fmt: skip
    for name, function in arithmetic.items():
        add(name, forward(function))
        add(f"r{name}", lambda self, other, function=function: function(other, self))
        add(f"i{name}", lambda self, other, function=function: function(self, other, out=self))
    add("matmul", forward(cupy.matmul))  # CuPy has no @=
    comparison = {
        "eq": cupy.equal, "ne": cupy.not_equal, "lt": cupy.less, "le": cupy.less_equal,
        "gt": cupy.greater, "ge": cupy.greater_equal,
    }  # fmt: skip
    for name, function in comparison.items():
        add(name, forward(function))
    for name, function in {"neg": cupy.negative, "abs": cupy.absolute, "invert": cupy.invert}.items():
        add(name, lambda self, function=function: function(self))
    for name in ("len", "bool", "int", "float", "complex", "repr", "format"):  # on the host in CuPy too
        add(name, lambda self, *args, name=name: getattr(self._host, f"__{name}__")(*args))


class Module(ModuleType):
    """A namespace of CuPy: a name of it is NumPy's, once it was found in the real cupy."""

    def __init__(self, name: str, host, real, **own):
        super().__init__(name)
        self.__dict__.update(own, _host=host, _real=real)

    def __getattr__(self, name):
        _require(self._real, name, self.__name__)
        target, real = getattr(self._host, name, None), getattr(self._real, name, None)
        if isinstance(target, ModuleType):
            value = Module(f"{self.__name__}.{name}", target, real)
        elif isinstance(target, np.ufunc) and target.signature is None:
            value = ufunc(target)
        elif name == "newaxis" or isinstance(target, float) or target in (np.dtype, np.finfo, np.iinfo):
            value = target
        elif isinstance(target, type) and issubclass(target, np.generic):
            value = target
        elif callable(target) and not isinstance(target, type):
            strict = self.__name__ == "cupy" and name not in TAKE_SCALARS
            value = _function(name, target, real, ("a", "condition") if strict else ())
        else:
            raise AttributeError(f"the stand-in has no model of {self.__name__}.{name}")
        setattr(self, name, value)
        return value


class Device:
    """cupy.cuda.Device: the only one there is, with 8 of 10 GB free."""

    id, mem_info = 0, (8 * 2**30, 10 * 2**30)

    def synchronize(self) -> None:
        pass


class Generator:
    """cupy.random.Generator: NumPy's numbers, on the device, through the methods that CuPy's has."""

    def __init__(self, seed: int | None = None):
        self._host = np.random.default_rng(None if seed is None else _operand(seed))

    def __getattr__(self, name):
        real = REAL and REAL.random.Generator
        _require(real, name, "cupy.random.Generator")
        return _function(name, getattr(self._host, name), getattr(real, name, None), leading=(self,))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False) -> ndarray:
    """The one way to the device: what comes from the host is copied always, what is there only if need be."""
    if isinstance(obj, ndarray):
        return _wrap(np.array(obj._host, dtype, copy=copy, order=order, ndmin=ndmin))
    host = _unwrap(obj) if isinstance(obj, (tuple, list)) else obj
    return _wrap(np.array(host, dtype, order="A" if order == "K" else order, ndmin=ndmin))


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False) -> ndarray:
    return array(a, dtype, copy, order or "K")


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True) -> np.ndarray:
    return a.get(stream, order, out) if isinstance(a, ndarray) else np.asarray(a, order=order)


def get_array_module(*args) -> ModuleType:
    return cupy if any(isinstance(arg, ndarray) for arg in args) else np


def erf(x: ndarray) -> ndarray:
    """cupyx.scipy.special.erf: float32 stays, all else (float16 too) gives float64."""
    dtype = np.float32 if x.dtype == np.float32 else np.float64
    return _wrap(np.vectorize(math.erf, otypes=[dtype])(_operand(x)))


_runtime = SimpleNamespace(getDeviceCount=lambda: 1, memGetInfo=lambda: Device.mem_info)
_cuda = {"Device": Device, "runtime": _runtime, "is_available": lambda: True}
_random = {"Generator": Generator, "default_rng": Generator}
cupy = Module(
    "cupy", np, REAL, ufunc=ufunc, ndarray=ndarray, array=array, asarray=asarray, asanyarray=asarray,
    asnumpy=asnumpy, get_array_module=get_array_module, is_available=lambda: True,
    random=Module("cupy.random", np.random, REAL and REAL.random, **_random),
    cuda=Module("cupy.cuda", None, REAL and REAL.cuda, **_cuda),
)  # fmt: skip
cupyx_special = Module("cupyx.scipy.special", None, None, erf=erf)
_add_operators()
