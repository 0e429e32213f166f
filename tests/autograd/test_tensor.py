"""Tensor, the graph and the walk: depth, sharing, accumulation, freeing, threads, errors."""

from __future__ import annotations

import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from autograd import (
    Tensor,
    concatenate,
    enable_grad,
    grad,
    gradcheck,
    is_recording,
    logsumexp,
    mul,
    nn,
    no_grad,
    tanh,
    where,
)  # fmt: skip
from autograd import functional as F
from autograd import primitives as P
from autograd.optim import SGD
from autograd.tensor import Node, RowsGradient, fused_result, primitive


def leaf(*values, dtype="float64") -> Tensor:
    return Tensor(np.array(values, dtype), requires_grad=True)


def random_leaf(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


def nodes_of(tensor: Tensor) -> list[Node]:
    found, stack = [], [tensor.node]
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in found:
            found.append(node)
            stack += node.edges
    return found


# Depth and sharing.


@pytest.mark.parametrize("walk", [True, False])
def test_a_chain_of_100_000(walk):
    """Neither the walk nor the deletion of a graph, walked or not, may recurse."""
    x = leaf(1.0)
    y = x
    for _ in range(100_000):
        y = -y
    if walk:
        y.backward()
        assert x.grad.data[0] == 1
    del y


def test_a_long_chain_differentiates_twice():
    x = leaf(0.5)
    y = x
    for _ in range(3_000):
        y = y * 1.001 + 0.001 * x * x
    (first,) = grad(y.sum(), x, create_graph=True)
    (second,) = grad(first.sum(), x)
    # y = 1.001^n x + x^2 (1.001^n - 1)
    growth = 1.001**3_000
    np.testing.assert_allclose(first.data, growth + 2 * 0.5 * (growth - 1), rtol=1e-10)
    np.testing.assert_allclose(second.data, 2 * (growth - 1), rtol=1e-10)


def test_a_node_used_many_times():
    x = leaf(3.0)
    y = x * x
    (y * y + y * 2 + y + x).sum().backward()  # x^4 + 3 x^2 + x
    assert x.grad.data[0] == 4 * 27 + 6 * 3 + 1


def test_a_ladder_of_diamonds():
    """2^60 paths, walked once a node."""
    x = leaf(1.0)
    y = x
    for _ in range(60):
        y = y * 0.5 + y * 0.5
    y.sum().backward()
    assert x.grad.data[0] == 1.0


def test_a_diamond_with_arms_of_different_length():
    """The node where the arms meet must wait for the longer one."""
    x = leaf(0.7)
    y = x * x
    long = y
    for _ in range(5):
        long = tanh(long)
    gradcheck(lambda x: x * x + tanh(tanh(x * x)), x)
    (y + long).sum().backward()
    derivative, value = 2 * 0.7, 0.49
    for _ in range(5):
        value = np.tanh(value)
        derivative *= 1 - value**2
    assert x.grad.data[0] == pytest.approx(1.4 + derivative, rel=1e-14)


def test_the_same_tensor_as_both_operands():
    for operation, expected in [(P.add, 2), (P.sub, 0), (P.mul, 6), (P.div, 0), (P.maximum, 1)]:
        x = leaf(3.0)
        operation(x, x).sum().backward()
        assert x.grad.data[0] == expected
    x = random_leaf(2, 2)
    gradcheck(lambda x: x @ x, x, order=2)
    gradcheck(lambda x: P.einsum("ij,jk,kl->il", x, x, x), x, order=2)
    gradcheck(lambda x: concatenate([x, x * 2, x]), x)


# Accumulation, and who owns a gradient.


def test_leaves_accumulate_over_backwards():
    x = leaf(2.0, 3.0)
    (x * x).sum().backward()
    first = x.grad
    (x * 5.0).sum().backward()
    assert x.grad.data.tolist() == [9.0, 11.0]
    assert first.data.tolist() == [4.0, 6.0]  # what was handed out does not change afterwards


def test_gradients_of_different_leaves_share_no_memory():
    x, y, z = leaf(1.0, 2.0), leaf(3.0, 4.0), leaf(5.0, 6.0)
    (x + y + P.identity(z)).backward(np.ones(2))
    x.grad.data += 100
    assert y.grad.data.tolist() == z.grad.data.tolist() == [1.0, 1.0]


def test_gradients_through_views_share_no_memory():
    """Each of these hands its upstream gradient, or a view of it, to a leaf."""
    x, y = random_leaf(2, 3), random_leaf(2, 3)
    functions = [
        lambda t: t.reshape(3, 2), lambda t: t.T, lambda t: t[::-1], lambda t: P.expand_dims(t, 0),
        lambda t: P.swapaxes(t, 0, 1), lambda t: t, lambda t: P.squeeze(t),
        lambda t: P.broadcast_to(t, t.shape),
    ]  # fmt: skip
    for function in functions:
        x.grad = y.grad = None
        out = function(x) + function(y)
        upstream = np.ones(out.shape)
        out.backward(upstream)
        assert not np.shares_memory(x.grad.data, y.grad.data)
        assert not any(np.shares_memory(t.grad.data, a) for t in (x, y) for a in (upstream, x.data, y.data))
        x.grad.data[...] = 7
        assert np.all(upstream == 1) and np.all(y.grad.data == 1)


def test_the_given_gradient_is_never_changed():
    upstream = np.array([1.0, 2.0])
    x = leaf(1.0, 1.0)
    for y in (x + x, x, P.identity(x) * 1.0 + x, x - x + x):
        y.backward(upstream)
        x.grad.data += 1
        grad(x + x, x, Tensor(upstream))[0].data[...] = 9
        assert upstream.tolist() == [1.0, 2.0]


def test_a_gradient_summed_in_place_does_not_leak_into_others():
    """y's gradient is a sum that the walk owns; z gets the array that was the first summand."""
    x, z = random_leaf(3), random_leaf(3, seed=1)
    y = x * 1.0
    out = (y + z) + y * 2.0 + y * 3.0
    out.backward(np.ones(3))
    assert x.grad.data.tolist() == [6.0] * 3 and z.grad.data.tolist() == [1.0] * 3


def test_backward_of_a_leaf_itself():
    x = leaf(1.0, 2.0)
    x.backward(np.array([3.0, 4.0]))
    assert x.grad.data.tolist() == [3.0, 4.0]


def test_gradients_have_the_dtype_of_their_leaf():
    x = leaf(1.0, 2.0, dtype="float32")
    y = leaf(1.0, 2.0)
    (x * y).backward(np.ones(2, "int64"))
    assert x.grad.dtype == np.float32 and y.grad.dtype == np.float64
    x.grad = None
    x.backward(np.ones(2))
    assert x.grad.dtype == np.float32
    (found,) = grad(x * 2, x, np.ones(2), create_graph=True)
    assert found.dtype == np.float32


# grad


def test_grad_leaves_grad_alone():
    x, y = leaf(2.0), leaf(3.0)
    found = grad((x * y).sum(), (x, y))
    assert [g.data[0] for g in found] == [3.0, 2.0]
    assert x.grad is None and y.grad is None
    assert not any(g.requires_grad for g in found)


def test_grad_takes_one_tensor_and_gives_a_tuple():
    x = leaf(2.0)
    assert isinstance(grad(x * x, x), tuple) and grad(x * x, x)[0].data[0] == 4.0


def test_grad_with_respect_to_interior_tensors():
    x = leaf(2.0)
    y = x * x
    z = y * y
    to_y, to_x, to_z = grad(z * 3.0, (y, x, z))
    assert (to_y.data[0], to_x.data[0], to_z.data[0]) == (3 * 2 * 4.0, 3 * 4 * 8.0, 3.0)


def test_grad_of_the_output_itself():
    x = leaf(2.0)
    y = x * x
    assert grad(y, (y,))[0].data[0] == 1.0 and grad(x, (x,))[0].data[0] == 1.0


def test_grad_of_an_unused_input_is_zero():
    x, unused, interior = leaf(2.0), random_leaf(2, 3), leaf(1.0) * 2.0
    for create_graph in (False, True):
        _, zero, other = grad(x * x, (x, unused, interior), create_graph=create_graph)
        assert zero.shape == (2, 3) and not zero.data.any() and not other.data.any()


def test_the_same_input_asked_for_twice():
    x = leaf(3.0)
    first, second = grad(x * x, (x, x))
    assert first.data[0] == second.data[0] == 6.0


def test_grad_frees_only_the_part_it_walked():
    x, y = leaf(2.0), leaf(3.0)
    a, b = x * x, y * y
    total = a + b
    grad(total, x)
    with pytest.raises(RuntimeError, match="freed"):
        total.backward()
    b.backward()
    assert y.grad.data[0] == 6.0


def test_derivatives_of_derivatives():
    x = leaf(1.5)
    y = x * x * x * x
    (first,) = grad(y, x, create_graph=True)
    (second,) = grad(first, x, create_graph=True)
    (third,) = grad(second, x, create_graph=True)
    (fourth,) = grad(third, x)
    values = [g.data[0] for g in (first, second, third, fourth)]
    assert values == pytest.approx([4 * 1.5**3, 12 * 1.5**2, 24 * 1.5, 24])


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 4])
def test_derivatives_of_whole_powers_at_zero(exponent):
    """x ** n has derivatives everywhere, also where x^(n - k) with k > n would be infinite."""
    x = leaf(0.0)
    y = x**exponent
    for k in range(1, 5):
        (y,) = grad(y, x, create_graph=True)
        expected = float(np.prod(range(1, exponent + 1))) if k == exponent else 0.0
        assert y.data[0] == expected
        if not y.requires_grad:
            return


def test_create_graph_keeps_the_graph():
    x = leaf(2.0)
    y = x * x
    grad(y, x, create_graph=True)
    y.backward()
    assert x.grad.data[0] == 4.0


def test_gradient_of_a_gradient_with_respect_to_the_upstream():
    x, v = random_leaf(3), random_leaf(3, seed=1)
    (g,) = grad(tanh(x), x, v, create_graph=True)
    (to_v,) = grad(g.sum(), v)
    np.testing.assert_allclose(to_v.data, 1 - np.tanh(x.data) ** 2, rtol=1e-14)


def test_backward_through_a_gradient_penalty():
    x = random_leaf(4)

    def penalty(x):
        (g,) = grad(tanh(x * x).sum(), x, create_graph=True)
        return (g * g).sum()

    penalty(x).backward()
    h = 1e-5
    shifted = []
    for t in (h, -h):
        moved = Tensor(x.data + t * np.eye(4)[1], requires_grad=True)
        shifted.append(penalty(moved).item())
    assert x.grad.data[1] == pytest.approx((shifted[0] - shifted[1]) / (2 * h), rel=1e-6)


# Freed graphs and other errors.


def test_a_second_backward_is_an_error():
    x = leaf(2.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(
        RuntimeError, match="'sum' was freed by an earlier backward: run the forward pass again"
    ):
        y.backward()
    assert x.grad.data[0] == 4.0


def test_a_graph_sharing_a_freed_part_is_an_error():
    x = leaf(2.0)
    shared = x * x
    first, second = shared * 2.0, tanh(shared)
    first.backward()
    with pytest.raises(RuntimeError, match="'mul' was freed"):
        second.backward()
    assert x.grad.data[0] == 8.0  # a walk that fails adds nothing


def test_backward_needs_a_single_value_or_a_gradient():
    x = leaf(1.0, 2.0)
    with pytest.raises(ValueError, match=r"backward: the result has shape \(2,\), not a single value"):
        (x * x).backward()
    with pytest.raises(ValueError, match=r"grad: the result has shape \(2,\)"):
        grad(x * x, x)
    with pytest.raises(ValueError, match=r"the gradient has shape \(3,\), the result \(2,\)"):
        (x * x).backward(np.ones(3))
    (x * x)[:1].backward()
    assert x.grad.data.tolist() == [2.0, 0.0]


def test_backward_without_a_graph_is_an_error():
    with pytest.raises(RuntimeError, match="no tensor with requires_grad=True"):
        (Tensor([1.0]) * 2).backward()
    with pytest.raises(RuntimeError, match="grad: input 1 does not require gradients"):
        x = leaf(1.0)
        grad(x * x, (x, Tensor([1.0])))


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_integers_have_no_gradients(dtype):
    with pytest.raises(
        TypeError, match=f"only floating-point tensors have gradients, and this one is {dtype}"
    ):
        Tensor(np.ones(3, dtype), requires_grad=True)
    constant = leaf(1.0).astype(dtype)
    assert constant.dtype == dtype and not constant.requires_grad
    assert not Tensor(np.ones(3, dtype)).requires_grad


@pytest.mark.parametrize(
    "operation",
    ["add", "sub", "mul", "div", "power", "maximum", "minimum", "less", "greater", "equal", "not_equal",
     "less_equal", "greater_equal", "matmul", "where"],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_both_named(operation):
    a, b = Tensor(np.ones((2, 3))), Tensor(np.ones((4, 5)))
    with pytest.raises(ValueError) as caught:
        getattr(P, operation)(*([np.array(True)] if operation == "where" else []), a, b)
    assert operation in str(caught.value) and "(2, 3)" in str(caught.value) and "(4, 5)" in str(caught.value)


def test_other_shapes_that_do_not_fit():
    a = Tensor(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"where.*\(5,\).*\(2, 3\)"):
        where(np.ones(5, bool), a, a)
    with pytest.raises(ValueError, match=r"matmul.*\(2, 2, 3\).*\(5, 3, 2\)"):
        P.matmul(np.ones((2, 2, 3)), np.ones((5, 3, 2)))
    with pytest.raises(ValueError, match=r"matmul.*\(\).*\(2, 3\)"):
        P.matmul(np.ones(()), a)
    with pytest.raises(ValueError, match=r"broadcast_to.*\(2, 3\).*\(4, 3\)"):
        a.broadcast_to((4, 3))
    with pytest.raises(ValueError, match="axis 2 is out of range"):
        a.sum(axis=2)
    with pytest.raises(ValueError, match="does not divide into 2 equal sections"):
        a.split(2, axis=1)


def test_einsum_errors():
    a = Tensor(np.ones((2, 3)))
    for formula, operands, message in [
        ("ij,jk", [a], "names 2 operands, not 1"),
        ("ijk->i", [a], r"'ijk' does not fit shape \(2, 3\)"),
        ("ii->i", [a], "occurs twice in 'ii'"),
    ]:
        with pytest.raises(ValueError, match=message):
            P.einsum(formula, *operands)


def test_embedding_ids_are_checked():
    table = random_leaf(3, 2)
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=f"id {bad} is out of range: the table has rows 0 to 2"):
            P.embedding(np.array([0, bad]), table)
    with pytest.raises(TypeError, match="ids must be integers"):
        P.embedding(np.array([0.0]), table)


def test_changes_in_place_are_refused():
    x = leaf(1.0, 2.0)
    with pytest.raises(TypeError, match="does not change in place"):
        x[0] = 5.0
    y = x
    y += 1.0  # makes a new tensor
    assert y is not x and x.data.tolist() == [1.0, 2.0]


# no_grad and threads.


def test_no_grad_records_nothing():
    x = leaf(1.0)
    with no_grad():
        y = x * 2
        with enable_grad():
            z = x * 2
        assert not is_recording()
    assert not y.requires_grad and y.node is None and z.requires_grad and is_recording()


def test_no_grad_decorates_and_ends_after_an_error():
    @no_grad()
    def fails(x):
        assert not is_recording()
        raise KeyError

    for _ in range(2):  # a decorated function runs more than once
        with pytest.raises(KeyError):
            fails(leaf(1.0))
        assert is_recording()


def test_gradient_functions_record_nothing_without_create_graph():
    x = leaf(1.0)
    recorded = []

    def gradient(g):
        recorded.append(is_recording())
        return g * x

    grad(primitive("square", x.data**2 / 2, (x, gradient)), x)
    grad(primitive("square", x.data**2 / 2, (x, gradient)), x, create_graph=True)
    assert recorded == [False, True] and is_recording()


def test_no_grad_belongs_to_its_thread():
    inside, done = threading.Event(), threading.Event()

    def quiet():
        with no_grad():
            inside.set()
            done.wait(10)
            return (leaf(1.0) * 2).requires_grad

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(quiet)
        assert inside.wait(10)
        recorded = (leaf(1.0) * 2).requires_grad
        done.set()
        assert recorded and future.result() is False


def test_graphs_in_many_threads():
    """Each thread builds and walks graphs of its own over shared weights, and gets what one alone gets."""
    weight = random_leaf(8, 8)

    def run(seed):
        x = Tensor(np.random.default_rng(seed).standard_normal((4, 8)))
        for _ in range(6):
            x = tanh(x @ weight) + x
        (g,) = grad(logsumexp(x), weight)
        return g.data

    alone = [run(seed) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(64)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))
    assert weight.grad is None


# Memory.


def test_arrays_are_freed_while_the_walk_proceeds():
    """When the walk reaches the first node, nothing of what came after it is alive any more."""
    alive = []
    x = random_leaf(1000)
    arrays = []

    def gradient(g):
        alive.extend(ref() is not None for ref in arrays)
        return g

    y = primitive("first", x.data.copy(), (x, gradient))
    for _ in range(20):
        y = tanh(y) * 1.5
        arrays.append(weakref.ref(y.data))
    total = y.sum()
    del y
    assert all(ref() is not None for ref in arrays[:-1])  # the gradient of tanh needs them
    total.backward()
    assert alive and not any(alive)


def test_interior_gradients_are_freed_while_the_walk_proceeds():
    x = random_leaf(10)
    seen = []

    def watched(t):
        def gradient(g):
            count = sum(ref() is not None for ref in seen)
            seen.append(weakref.ref(g.data))
            most.append(count)
            return g * 2.0

        return primitive("double", t.data * 2, (t, gradient))

    most: list[int] = []
    y = x
    for _ in range(20):
        y = watched(y)
    y.sum().backward()
    assert len(most) == 20 and max(most) <= 1
    assert x.grad.data[0] == 2.0**20


def test_a_walked_graph_holds_no_arrays():
    x = random_leaf(5, 5)
    hidden = tanh(x @ x)
    reference = weakref.ref(hidden.data)
    total = (hidden * hidden).sum()
    nodes = nodes_of(total)
    del hidden
    total.backward()
    assert reference() is None
    assert len(nodes) == 4 and all(n.gradients is None and n.composition is None for n in nodes)
    assert [n.name for n in nodes_of(total)] == [
        "sum",
        "mul",
        "tanh",
        "matmul",
    ]  # the skeleton stays, to be drawn


def test_a_graph_never_walked_goes_without_the_garbage_collector():
    """No cycles: a result that goes out of use takes its graph with it at once."""
    import gc

    x = random_leaf(3)
    operations = [tanh, logsumexp, lambda t: t.max(), lambda t: P.cumsum(t, 0), lambda t: t**2, P.sigmoid,
                  lambda t: P.einsum("i,i->", t, t), lambda t: t[[0, 0]], lambda t: P.var(t)]  # fmt: skip
    gc.disable()
    try:
        for operation in operations:
            middle = x * 2.0
            reference = weakref.ref(middle)
            result = operation(middle)
            del middle
            del result
            assert reference() is None
    finally:
        gc.enable()


LINEAR = {
    "add": lambda t: t + 1.0, "sub": lambda t: 1.0 - t, "neg": lambda t: -t, "sum": lambda t: t.sum(),
    "mean": lambda t: t.mean(0), "cumsum": lambda t: t.cumsum(0), "tril": lambda t: t.tril(),
    "concatenate": lambda t: concatenate([t, t]), "pad": lambda t: P.pad(t, [(1, 1), (0, 0)]),
    "gather": lambda t: t[[0, 0]],
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_operation_keeps_no_operand(name):
    """Its gradient needs no values, so the graph must not hold them until the backward walk."""
    x = random_leaf(3, 3)
    middle = x * 2.0
    reference = weakref.ref(middle.data)
    result = LINEAR[name](middle)
    del middle
    assert reference() is None and result.requires_grad


@pytest.mark.parametrize("operation", [P.mul, P.div, P.matmul])
def test_nothing_is_kept_for_the_gradient_of_a_constant(operation):
    """The gradient of the left operand reads the right one only; of a constant no gradient is asked for."""
    for constant in (True, False):
        left, right = random_leaf(3, 3) * 2.0, Tensor(np.ones((3, 3)), requires_grad=not constant)
        reference = weakref.ref(left.data)
        result = operation(left, right)
        del left
        assert (reference() is None) == constant and result.requires_grad


# An embedding table that also serves as the output head.


def rows_of(table: Tensor, ids: np.ndarray) -> Tensor:
    """table[ids] with the sparse gradient of the fused embedding."""

    def gradients(g, needed):
        return [RowsGradient(ids.reshape(-1), g.reshape(-1, g.shape[-1]), table.shape)]

    def composition():
        source = P.identity(table)
        return P.embedding(ids, source), [source]

    return fused_result("rows", table.data[ids], [table], gradients, composition)


IDS = np.array([[0, 2, 2], [2, 0, 4]])
TIED = {
    "rows alone": lambda t: rows_of(t, IDS) * 2.0,
    "rows, then head": lambda t: tanh(rows_of(t, IDS)) @ t.T,
    "head before rows": lambda t: (t.T * 2.0)[0].sum() + (rows_of(t, IDS) * 3.0),
    "rows twice": lambda t: rows_of(t, IDS) * rows_of(t, IDS[::-1]),
    "rows, head, rows": lambda t: (rows_of(t, IDS) @ t.T)[..., :2] * rows_of(t, IDS[::-1]),
    "dense, dense, rows": lambda t: (t * t).sum() + rows_of(t, IDS) + t.sum(),
    "interior table": lambda t: rows_of(t * 2.0, IDS),
    "interior table, tied": lambda t: (lambda u: rows_of(u, IDS) @ u.T)(tanh(t)),
    "table handed on unchanged": lambda t: (lambda u: rows_of(u, IDS).sum() + (u + t).sum())(P.identity(t)),
}


@pytest.mark.parametrize("order", TIED, ids=str)
def test_tied_table(order):
    table = random_leaf(5, 2)
    gradcheck(TIED[order], table)
    gradcheck(TIED[order], table, order=2, projections=3)
    results = [TIED[order](t) for t in (table, table)]
    upstream = np.random.default_rng(3).standard_normal(results[0].shape)
    kept = upstream.copy()
    (first,) = grad(results[0], table, upstream)
    results[1].backward(upstream)
    assert np.array_equal(upstream, kept) and np.array_equal(table.grad.data, first.data)


def test_rows_gradient_does_not_write_into_what_others_hold():
    """The dense gradient that the rows are added to is the upstream itself."""
    table, other = random_leaf(5, 2), random_leaf(5, 2)
    upstream = np.ones((5, 2))
    ids = np.arange(5)
    (rows_of(table, ids) + (table + other)).backward(upstream)
    assert np.all(upstream == 1) and np.all(other.grad.data == 1) and np.all(table.grad.data == 2)


# Numbers, arrays, devices.


OPERATORS = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "**": lambda a, b: a**b, "@": lambda a, b: a @ b, "<": lambda a, b: a < b, ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b, ">": lambda a, b: a > b,
}  # fmt: skip

COMPARISONS = {"<", ">", "<=", ">="}


@pytest.mark.parametrize("symbol", OPERATORS)
def test_operators_with_arrays_on_either_side(symbol):
    """An array on the left must not take the tensor apart element by element."""
    operator = OPERATORS[symbol]
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 1.0], [3.0, 0.5]])
    for left, right in ((Tensor(a), b), (a, Tensor(b)), (Tensor(a), Tensor(b))):
        result = operator(left, right)
        assert isinstance(result, Tensor) and np.array_equal(result.data, operator(a, b))


@pytest.mark.parametrize("number", [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2), np.float16(2)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("symbol", [s for s in OPERATORS if s != "@"])
def test_numbers_never_promote(symbol, dtype, number):
    operator = OPERATORS[symbol]
    x = leaf(1.0, 3.0, dtype=dtype)
    for result in (operator(x, number), operator(number, x)):
        assert isinstance(result, Tensor) and result.dtype == (bool if symbol in COMPARISONS else dtype)
        if result.requires_grad:
            (g,) = grad(result, x, np.ones(2), create_graph=True)
            assert g.dtype == dtype


def test_numbers_never_promote_in_functions():
    x = leaf(1.0, 3.0, dtype="float32")
    mask = np.array([True, False])
    for y in (
        where(mask, x, np.float64(0)), where(mask, 0.0, x), P.maximum(x, np.float64(2)), P.minimum(0.5, x),
        P.pad(x, [(1, 1)], np.float64(2)), x.mean(), x.var(), x.sum(), x[0] * np.float64(3),
        mul(np.float64(3), x[0]),
        P.sigmoid(x[0]), P.erf(x[0]), logsumexp(x), P.split(x, 2)[0], (x @ x) ** 2, 1 / x.sum(),
    ):  # fmt: skip
        assert y.dtype == np.float32
        (g,) = grad(y.sum(), x)
        assert g.dtype == np.float32


def test_astype_carries_gradients_across_precisions():
    x = leaf(0.5, 1.5, dtype="float32")
    y = (x.astype("float64") * np.array([1 / 3, 1e-9])).sum()
    assert y.dtype == np.float64
    y.backward()
    assert x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad.data, np.array([1 / 3, 1e-9], "float32"))


def test_erf_is_accurate_everywhere():
    import math

    x = np.concatenate([np.linspace(-7, 7, 5001), [0.0, -0.0, np.inf, -np.inf, 1e-300, -1e-9]])
    exact = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(P.erf(x).data, exact, rtol=4e-16, atol=0)
    single = x.astype("float32")
    exact = np.array([math.erf(v) for v in single])
    np.testing.assert_allclose(P.erf(single).data, exact, rtol=3e-7, atol=0)
    ends = P.erf(np.array([np.inf, -np.inf, 5, 4.2], np.float32)).data
    assert ends.tolist() == [1, -1, 1, 1] and np.isnan(P.erf(np.array([np.nan], np.float32)).data[0])
    assert np.signbit(P.erf(np.array([-0.0], np.float32)).data[0])
    assert np.isnan(P.erf(np.array([np.nan])).data[0])
    assert np.signbit(P.erf(np.array([-0.0])).data[0])


def test_ties_share_the_gradient():
    x, y = leaf(1.0, 2.0), leaf(1.0, 3.0)
    P.maximum(x, y).sum().backward()
    assert x.grad.data.tolist() == [0.5, 0.0] and y.grad.data.tolist() == [0.5, 1.0]
    x = leaf(2.0, 2.0, 1.0)
    (x.max() * 6).backward()
    assert x.grad.data.tolist() == [3.0, 3.0, 0.0]


def test_values_at_the_edge():
    """Large arguments overflow nowhere, and a row of -inf has the gradient zero instead of nan."""
    x = leaf(1e4, -1e4, 0.0)
    assert P.sigmoid(x).data.tolist() == [1.0, 0.0, 0.5]
    assert logsumexp(x).item() == 1e4
    row = leaf(-np.inf, -np.inf)
    y = logsumexp(row)
    assert y.item() == -np.inf
    (g,) = grad(y, row)
    assert g.data.tolist() == [0.0, 0.0]


def test_numpy_and_cupy_do_not_mix(strict_cupy):
    host, device = leaf(1.0, 2.0), Tensor(strict_cupy.asarray(np.ones(2)), requires_grad=True)
    assert host.device == "cpu" and device.device == "cuda"
    for operation in (P.add, P.mul, P.maximum, P.power, P.less, P.matmul):
        for pair in ((host, device), (device, host), (host.data, device)):
            with pytest.raises(TypeError, match="move both to one device"):
                operation(*pair)
    with pytest.raises(TypeError, match="move both to one device"):
        concatenate([host, device])
    with pytest.raises(TypeError, match="move both to one device"):
        where(np.array([True, False]), device, device)
    with pytest.raises(TypeError, match="use .numpy"):
        np.asarray(device)
    assert (device * 2 + np.float64(1)).numpy().tolist() == [3.0, 3.0]


# Tensor as a Python object.


def test_construction():
    array = np.ones(3)
    assert Tensor(array).data is array  # no copy
    assert (
        Tensor([1.0, 2.0]).shape == (2,) and Tensor(3.0).shape == () and Tensor(Tensor(array)).data is array
    )
    x = leaf(1.0)
    assert x.detach().data is x.data and not x.detach().requires_grad and not Tensor(x).requires_grad


def test_attributes_and_conversions():
    x = random_leaf(2, 3)
    assert (x.shape, x.ndim, x.size, x.dtype, len(x), x.device) == ((2, 3), 2, 6, np.float64, 2, "cpu")
    assert x.numpy() is x.data and np.array_equal(np.asarray(x), x.data) and x.T.shape == (3, 2)
    assert np.asarray(x, "float32").dtype == np.float32
    assert (
        float(Tensor([2.5])[0]) == 2.5 and bool(Tensor(1.0)) and not Tensor(0.0) and Tensor(2.5).item() == 2.5
    )
    with pytest.raises(ValueError):
        bool(x)


def test_iterating_gives_differentiable_rows():
    x = random_leaf(3, 2)
    rows = list(x)
    assert len(rows) == 3 and all(r.shape == (2,) for r in rows)
    (rows[0] * 2 + rows[2]).sum().backward()
    assert x.grad.data.tolist() == [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
    with pytest.raises(TypeError):
        list(Tensor(1.0))


def test_repr():
    x = leaf(1.0)
    assert repr(x) == "Tensor([1.], dtype=float64, requires_grad=True)"
    assert repr(x * 2) == "Tensor([2.], dtype=float64, made by mul)"
    assert repr(Tensor(np.float32(2))) == "Tensor(2.0, dtype=float32)"


def test_methods_take_torch_keywords():
    x = random_leaf(2, 3)
    for name in ("sum", "mean", "max", "min", "var", "logsumexp"):
        ours = getattr(x, name)(axis=1, keepdims=True)
        theirs = getattr(x, name)(dim=1, keepdim=True)
        assert ours.shape == theirs.shape == (2, 1) and np.array_equal(ours.data, theirs.data)
    assert x.cumsum(dim=1).shape == (2, 3) and x.sum(-1).shape == (2,)
    assert Tensor(2.0).sum(axis=-1).shape == Tensor(2.0).max(axis=0).shape == ()
    assert x.transpose(0, 1).shape == (3, 2) and x.reshape((3, 2)).shape == x.reshape(-1, 2).shape == (3, 2)


def test_a_graph_notices_that_a_parameter_was_changed_since():
    w = nn.Parameter(np.array([1.0, 2.0]))
    optimizer = SGD([w], lr=0.1)
    old = (w * w).sum()
    (w * 3).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="'mul' read was changed in place"):
        old.backward()
    module = nn.Linear(2, 2)
    old = module(Tensor(np.ones((1, 2), np.float32))).sum()
    module.load_state_dict({name: array + 1 for name, array in module.state_dict().items()})
    with pytest.raises(RuntimeError, match="'linear' read was changed in place"):
        old.backward()


def test_threads_that_share_a_leaf_lose_no_gradient():
    x = Tensor(np.zeros(3), requires_grad=True)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: (x * 1.0).sum().backward(), range(200)))
    finally:
        sys.setswitchinterval(before)
    assert x.grad.numpy().tolist() == [200.0] * 3


def test_grad_of_a_result_without_a_graph_is_an_error():
    x = Tensor(np.ones(2), requires_grad=True)
    with no_grad():
        y = (x * x).sum()
    with pytest.raises(RuntimeError, match="no tensor with requires_grad"):
        grad(y, x)


def test_equality_is_elementwise_and_tensors_are_keys():
    x = Tensor(np.array([1.0, 2.0]))
    assert (x == 1).numpy().tolist() == [True, False] and (x != 1).numpy().tolist() == [False, True]
    assert {x: "x"}[x] == "x"


def test_whole_numbers_have_a_sigmoid():
    np.testing.assert_allclose(Tensor([0, 2]).sigmoid().numpy(), [0.5, 1 / (1 + np.exp(-2))])
    assert (Tensor([1, 2]) ** 2.5).numpy().tolist() == [1.0, 2**2.5]
    with pytest.raises(TypeError, match="silu: needs floating-point"):
        F.silu(Tensor([1, 2]))
