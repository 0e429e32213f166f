"""Modules: names, tied parameters, state, modes, precision and devices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import autograd.functional as F
from autograd import Tensor, backend, nn

RNG = np.random.default_rng(0)


class Block(nn.Module):
    def __init__(self, width):
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(self.norm(x)))


class Model(nn.Module):
    """An embedding tied to the head, a list of blocks, a scale of its own, and attributes that are none."""

    def __init__(self, width=4):
        self.name, self.settings, self.nothing = "model", {"a": 1}, None
        self.embedding = nn.Embedding(7, width)
        self.blocks = [Block(width) for _ in range(11)]
        self.pair = (nn.RMSNorm(width), "not a module")
        self.scale = nn.Parameter(np.float32([2.0]))
        self.buffer = Tensor(np.zeros(3, np.float32))
        self.head = nn.Linear(width, 7)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            parameter.data = RNG.standard_normal(parameter.shape).astype(np.float32)

    def forward(self, ids):
        x = self.embedding(ids) * self.scale
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.pair[0](x))


EXPECTED = {
    "scale", "embedding.weight", "pair.0.weight", "head.bias",
    *(f"blocks.{i}.{name}" for i in range(11) for name in ("norm.weight", "norm.bias", "linear.weight")),
}  # fmt: skip


def test_names_are_paths_and_each_parameter_counts_once():
    model = Model()
    named = dict(model.named_parameters())
    assert named.keys() == EXPECTED == model.state_dict().keys()
    assert named["blocks.10.linear.weight"] is model.blocks[10].linear.weight
    assert named["embedding.weight"] is model.head.weight
    parameters = model.parameters()
    assert len(parameters) == len({id(p) for p in parameters}) == len(EXPECTED)
    assert [id(p) for p in parameters] == [id(p) for p in named.values()]
    assert model.parameter_count() == 1 + 28 + 4 + 7 + 11 * (4 + 4 + 16)
    assert sum(isinstance(m, nn.LayerNorm) for m in model.modules()) == 11
    assert len(list(model.modules())) == 1 + 1 + 11 * 4 + 1 + 1


def test_a_tied_parameter_gets_both_gradients():
    model, ids = Model().eval(), np.array([[1, 1, 3]])
    model(ids).sum().backward()
    tied = model.embedding.weight.grad.numpy().copy()
    model.head.weight = nn.Parameter(model.embedding.weight.data)
    assert "head.weight" in dict(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = None
    model(ids).sum().backward()
    apart = model.embedding.weight.grad.numpy() + model.head.weight.grad.numpy()
    np.testing.assert_allclose(tied, apart, rtol=1e-5, atol=1e-6)
    assert np.abs(apart[[0, 2]]).min() > 0  # rows that were not looked up, through the head alone


def test_frozen():
    model = Model()
    model.scale.requires_grad = False
    model.eval()(np.array([0])).sum().backward()
    assert model.scale.grad is None and model.head.bias.grad is not None


# State


def test_the_state_is_the_parameters_and_loading_copies():
    model, other = Model(), Model()
    state = other.state_dict()
    assert all(state[name] is p.data for name, p in other.named_parameters())
    arrays = {name: p.data for name, p in model.named_parameters()}
    assert not np.array_equal(model.scale.numpy(), other.scale.numpy())
    model.load_state_dict({name: array.astype(np.float64) for name, array in state.items()})
    for name, parameter in model.named_parameters():
        assert parameter.data is arrays[name]  # an optimizer may hold it
        assert parameter.dtype == np.float32 and np.array_equal(parameter.numpy(), state[name])
        assert not np.shares_memory(parameter.data, state[name])
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    "change, said",
    [
        ({"scale": None}, "scale is missing"),
        ({"head.weight": np.zeros((7, 4))}, "head.weight is unknown"),
        ({"blocks.3.linear.weight": np.zeros((4, 5))}, r"3.linear.weight has shape \(4, 5\), not \(4, 4\)"),
        ({"scale": np.zeros(())}, r"scale has shape \(\), not \(1,\)"),  # though it would broadcast
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, said):
    model = Model()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()} | change
    with pytest.raises(ValueError, match=said):
        model.load_state_dict({name: array for name, array in state.items() if array is not None})
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())


# Modes, precision, devices


def test_training_and_evaluation():
    model, ids = Model(), np.arange(7)
    assert model.training and all(m.training for m in model.modules())
    assert model.eval() is model and not any(m.training for m in model.modules())
    first = model(ids).numpy()
    assert np.array_equal(first, model(ids).numpy())
    assert model.train() is model and all(m.training for m in model.modules())
    F.manual_seed(0)
    dropped = model(ids).numpy()
    assert not np.array_equal(dropped, first) and not np.array_equal(dropped, model(ids).numpy())
    F.manual_seed(0)
    assert np.array_equal(dropped, model(ids).numpy())
    assert Model().training  # the class is not changed by one module's mode


@pytest.mark.parametrize("dtype", [np.float64, np.float16, "float64"])
def test_precision(dtype):
    model = Model().eval()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    model(np.arange(7)).sum().backward()
    assert model.to(dtype=dtype) is model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype and parameter.grad is None
        assert np.array_equal(parameter.numpy(), before[name].astype(dtype))
    assert model.head.weight is model.embedding.weight and model(np.arange(7)).dtype == dtype


def test_devices(strict_cupy):
    model, ids = Model().eval(), np.arange(7)
    before, expected = {name: a.copy() for name, a in model.state_dict().items()}, model(ids).numpy()
    model.to("cuda")
    assert all(type(p.data) is strict_cupy.ndarray for p in model.parameters())
    out = model(ids)
    assert out.device == "cuda"
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)
    model.load_state_dict(before)  # from the host
    model.load_state_dict(model.state_dict())
    model.to("cpu")
    for name, parameter in model.named_parameters():
        assert type(parameter.data) is np.ndarray and np.array_equal(parameter.numpy(), before[name])
    with pytest.raises(ValueError, match="tpu"):
        model.to("tpu")


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr("autograd.backend.cupy", None)
    model = Model()
    with pytest.raises(backend.DeviceError, match="CuPy, which is not installed"):
        model.to("cuda")
    assert model.scale.device == "cpu"


# The layers


def test_layers_compute_their_formulas():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    linear, norm, rms = nn.Linear(4, 5), nn.LayerNorm(4, eps=0.1), nn.RMSNorm(4, eps=0.2)
    assert linear.weight.shape == (5, 4)
    assert not any(p.numpy().any() for p in (linear.weight, linear.bias, norm.bias))
    assert all((p.numpy() == 1).all() for p in (norm.weight, rms.weight))
    for layer in (linear, norm, rms):
        for parameter in layer.parameters():
            parameter.data = rng.standard_normal(parameter.shape).astype(np.float32)
    W, b = linear.weight.numpy(), linear.bias.numpy()
    found = {"linear": linear(Tensor(x)), "norm": norm(Tensor(x)), "rms": rms(Tensor(x))}
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    expected = {
        "linear": x @ W.T + b,
        "norm": y * norm.weight.numpy() + norm.bias.numpy(),
        "rms": x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.2) * rms.weight.numpy(),
    }
    for name, out in found.items():
        np.testing.assert_allclose(out.numpy(), expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    table = nn.Embedding(7, 4)
    table.weight.data = rng.standard_normal((7, 4)).astype(np.float32)
    for ids in (np.array([[6, 0], [0, 3]]), [[6, 0], [0, 3]], Tensor(np.array([[6, 0], [0, 3]]))):
        assert np.array_equal(table(ids).numpy(), table.weight.numpy()[[[6, 0], [0, 3]]])
    plain = nn.Linear(4, 5, bias=False)
    plain.weight.data = W
    np.testing.assert_allclose(plain(Tensor(x)).numpy(), x @ W.T, rtol=1e-5, atol=1e-5)
    assert len(plain.parameters()) == 1


def test_dropout_keeps_the_expected_value():
    F.manual_seed(0)
    layer, x = nn.Dropout(0.25), Tensor(np.ones((400, 500), np.float32), requires_grad=True)
    out = layer(x)
    values, counts = np.unique(out.numpy(), return_counts=True)
    np.testing.assert_allclose(values, [0, 4 / 3], rtol=1e-6)
    assert counts[0] / out.size == pytest.approx(0.25, abs=0.005)
    out.sum().backward()
    assert np.array_equal(x.grad.numpy(), out.numpy())  # the same mask
    assert layer.eval()(x) is x and nn.Dropout(0.0)(x) is x
    with pytest.raises(ValueError, match="p=1"):
        nn.Dropout(1.0)(x)


def test_a_skeleton_takes_no_memory():
    with nn.skeleton():
        big = nn.Linear(10**9, 10**9)
        norm = nn.LayerNorm(10**9)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(nn.zeros, 3).result().data.flags.writeable  # another thread's are real
    assert big.weight.shape == (10**9, 10**9) and big.parameter_count() == 10**18 + 10**9
    assert (
        (norm.weight.data[:3] == 1).all()
        and (norm.bias.data[-3:] == 0).all()
        and norm.weight.dtype == np.float32
    )
    assert sum(parameter.data.strides[-1] for parameter in [*big.parameters(), *norm.parameters()]) == 0
    with pytest.raises(ValueError, match="read-only"):
        norm.weight.data[0] = 2
    assert nn.ones(3).data.flags.writeable and nn.zeros(3).data.flags.writeable


def test_a_skeleton_of_too_many_or_impossible_parameters():
    with pytest.raises(ValueError, match="too many parameters"), nn.skeleton(most=5):
        [nn.Linear(2, 2) for _ in range(3)]
    with nn.skeleton(most=6):
        [nn.Linear(2, 2) for _ in range(3)]
    with pytest.raises(ValueError), nn.skeleton():
        nn.zeros(10**18, 10**18)
    assert nn.zeros(2).data.flags.writeable
