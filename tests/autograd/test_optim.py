"""Optimizers against torch's, and against their formulas where torch is not installed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autograd import Tensor, nn, optim
from autograd.optim import SGD, AdamW, clip_grad_norm, decay_groups, warmup_cosine

# One parameter larger than a chunk of the optimizer, one of one element; a matrix, vectors, a 3-D table.
SHAPES = {"weight": (210, 190), "bias": (7,), "scale": (1,), "table": (2, 3, 4)}


class Model(nn.Module):
    def __init__(self, dtype=np.float64, seed=0):
        rng = np.random.default_rng(seed)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(rng.standard_normal(shape).astype(dtype)))


def set_gradients(model, step):
    """Gradients that change from step to step, and are zero in places."""
    rng = np.random.default_rng(step)
    for parameter in model.parameters():
        g = rng.standard_normal(parameter.shape) * 10.0 ** rng.integers(-3, 1)
        g = np.where(rng.random(parameter.shape) < 0.1, 0, g).astype(parameter.dtype)
        parameter.grad = Tensor(g)


def torch_parameters(torch, model):
    return {name: torch.nn.Parameter(torch.tensor(p.numpy())) for name, p in model.named_parameters()}


def torch_groups(parameters, decay):
    """Matrices and tables decay, vectors do not; written out by name, not by our rule."""
    return [
        {"params": [parameters["weight"], parameters["table"]], "weight_decay": decay},
        {"params": [parameters["bias"], parameters["scale"]], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["adamw", "adamw defaults", "sgd", "sgd momentum", "sgd momentum decay"])
def test_ten_steps_as_in_torch(kind, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
    model = Model(dtype)
    theirs = torch_parameters(torch, model)
    if kind == "adamw":
        ours = AdamW(decay_groups(model, 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
        reference = torch.optim.AdamW(torch_groups(theirs, 0.1), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    elif kind == "adamw defaults":
        ours, reference = AdamW(model.parameters()), torch.optim.AdamW(theirs.values())
    else:
        settings = {"momentum": 0.9} if "momentum" in kind else {}
        settings |= {"weight_decay": 0.05} if "decay" in kind else {}
        ours = SGD(model.parameters(), lr=0.02, **settings)
        reference = torch.optim.SGD(theirs.values(), lr=0.02, **settings)
    for step in range(10):
        set_gradients(model, step)
        for name, parameter in model.named_parameters():
            theirs[name].grad = torch.tensor(parameter.grad.numpy())
        lr = warmup_cosine(step, 0.01, 3, 10, 0.001)
        ours.lr = lr
        for group in reference.param_groups:
            group["lr"] = lr
        if dtype == np.float32:  # torch's is max_norm / (norm + 1e-6), which float64 would show
            found = clip_grad_norm(model.parameters(), 5.0)
            expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 5.0)
            assert found == pytest.approx(expected.item(), rel=1e-6)
        ours.step()
        reference.step()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype
            np.testing.assert_allclose(
                parameter.numpy(), theirs[name].detach().numpy(), rtol=tolerance, atol=tolerance, err_msg=name
            )


def test_schedule_as_in_torch():
    torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 4, 1.0, total_iters=3)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=0.03)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[4])
    for step in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert warmup_cosine(step, 0.3, 4, 20, 0.03) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()


# The formulas, with nothing but NumPy


def test_adamw_formula():
    p, g1, g2 = np.array([1.0, -2.0]), np.array([0.5, 0.0]), np.array([-0.1, 3.0])
    parameter = nn.Parameter(p.copy())
    optimizer = AdamW([parameter], lr=0.1, betas=(0.8, 0.9), eps=0.01, weight_decay=0.5)
    m = v = 0.0
    for t, g in ((1, g1), (2, g2)):
        parameter.grad = Tensor(g)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        p = p - 0.1 * 0.5 * p - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 0.01)
        np.testing.assert_allclose(parameter.numpy(), p, rtol=1e-14)


def test_sgd_formula():
    p, v = np.array([1.0, -2.0]), 0.0
    parameter = nn.Parameter(p.copy())
    optimizer = SGD([parameter], lr=0.1, momentum=0.7, weight_decay=0.2)
    for g in (np.array([0.5, 0.0]), np.array([-0.1, 3.0])):
        parameter.grad = Tensor(g)
        optimizer.step()
        v = 0.7 * v + g + 0.2 * p
        p = p - 0.1 * v
        np.testing.assert_allclose(parameter.numpy(), p, rtol=1e-14)


def test_schedule():
    rates = [warmup_cosine(step, 1.0, 5, 25, 0.1) for step in range(30)]
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[15] == pytest.approx(0.55) and rates[10] > 0.8
    assert all(a > b for a, b in zip(rates[5:25], rates[6:26]))
    np.testing.assert_allclose(rates[25:], 0.1)
    assert warmup_cosine(0, 1.0, 0, 10) == 1.0 and warmup_cosine(10, 1.0, 0, 10) == pytest.approx(0)
    assert warmup_cosine(4, 1.0, 5, 5) == 1.0  # nothing is left after the warm-up


@pytest.mark.parametrize("max_norm, scaled", [(4.0, True), (5.0, False), (6.0, False)])
def test_clipping(max_norm, scaled):
    a, b, without = (nn.Parameter(np.zeros(2, np.float32)) for _ in range(3))
    a.grad, b.grad = Tensor(np.float32([3.0, 0.0])), Tensor(np.float32([0.0, -4.0]))

    assert clip_grad_norm([a, without, b], max_norm) == pytest.approx(5.0)
    factor = max_norm / 5 if scaled else 1
    np.testing.assert_allclose(a.grad.numpy(), np.array([3, 0]) * factor, rtol=1e-6)
    np.testing.assert_allclose(b.grad.numpy(), np.array([0, -4]) * factor, rtol=1e-6)
    assert a.grad.dtype == np.float32 and without.grad is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clipping_says_when_a_gradient_is_not_finite(bad):
    parameter = nn.Parameter(np.zeros(2, np.float32))
    parameter.grad = Tensor(np.float32([bad, 1.0]))
    with np.errstate(all="raise"):
        assert not math.isfinite(clip_grad_norm([parameter], 1.0))
    assert np.array_equal(parameter.grad.numpy(), np.float32([bad, 1.0]), equal_nan=True)


def test_decay_groups_take_each_trainable_parameter_once():
    model = Model()
    model.tied = model.weight
    model.table.requires_grad = False
    decayed, rest = decay_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0
    assert [id(p) for p in decayed["params"]] == [id(model.weight)]
    assert {id(p) for p in rest["params"]} == {id(model.bias), id(model.scale)}


# What they share


@pytest.fixture(params=["adamw", "sgd"])
def make(request):
    if request.param == "adamw":
        return lambda model: AdamW(decay_groups(model, 0.1), lr=0.01)
    return lambda model: SGD(decay_groups(model, 0.1), lr=0.01, momentum=0.9)


def run(model, optimizer, steps):
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def test_a_restored_optimizer_goes_on_alike(make):
    model, again = Model(np.float32), Model(np.float32, seed=1)
    optimizer, other = make(model), make(again)
    run(model, optimizer, range(3))
    run(again, other, range(5, 6))
    state = {name: array.copy() for name, array in optimizer.state_dict().items()}
    other.load_state_dict(state)
    again.load_state_dict(model.state_dict())
    run(model, optimizer, range(3, 6))
    run(again, other, range(3, 6))
    for ours, theirs in zip(model.parameters(), again.parameters()):
        assert np.array_equal(ours.numpy(), theirs.numpy())
    assert other.steps == 6 and state["steps"] == 3
    slot = "0." + optimizer.slots[0]
    assert not np.array_equal(state[slot], optimizer.state_dict()[slot])


def test_the_state_of_other_parameters_is_refused(make):
    optimizer, model = make(Model()), Model()
    model.bias = nn.Parameter(np.zeros(8))
    for other in (make(model).state_dict(), {}, {**optimizer.state_dict(), "2.m": np.zeros(3)}):
        before = optimizer.state_dict()
        with pytest.raises(ValueError, match="other parameters"):
            optimizer.load_state_dict(other)
        assert all(np.array_equal(array, before[name]) for name, array in optimizer.state_dict().items())


def test_a_step_needs_every_gradient_and_changes_nothing_without(make):
    model = Model()
    before = [p.numpy().copy() for p in model.parameters()]
    optimizer = make(model)
    set_gradients(model, 0)
    model.bias.grad = None
    with pytest.raises(RuntimeError, match=r"shape \(7,\) has no gradient"):
        optimizer.step()
    assert optimizer.steps == 0
    assert all(np.array_equal(p.numpy(), old) for p, old in zip(model.parameters(), before))
    set_gradients(model, 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_moved_model_needs_a_new_optimizer(make):
    model = Model()
    optimizer = make(model)
    model.to(dtype=np.float32)
    set_gradients(model, 0)
    with pytest.raises(RuntimeError, match="new optimizer"):
        optimizer.step()


def test_the_gradients_and_a_shared_array_stay_as_they_were(make):
    model = Model()
    shared = model.weight.data
    before = shared.copy()
    optimizer = make(model)
    run(model, optimizer, range(1))
    assert np.array_equal(shared, before)  # the optimizer took a copy
    set_gradients(model, 1)
    gradients = [p.grad.numpy().copy() for p in model.parameters()]
    optimizer.step()
    assert all(np.array_equal(p.grad.numpy(), g) for p, g in zip(model.parameters(), gradients))


def test_a_frozen_parameter_stays(make):
    model = Model()
    model.weight.requires_grad = False
    before = model.weight.numpy().copy()
    run(model, make(model), range(2))
    assert np.array_equal(model.weight.numpy(), before)


def test_on_the_stand_in_for_a_gpu(make, strict_cupy):
    def three_steps(device):
        model = Model(np.float32).to(device)
        optimizer = make(model)
        norms = []
        for step in range(3):
            set_gradients(model, step)
            for parameter in model.parameters():
                parameter.grad = Tensor(optim.to_device(parameter.grad.data, device))
            norms.append(clip_grad_norm(model.parameters(), 1.0))
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        if device == "cuda":
            for group in optimizer.groups:
                arrays = [group.flat, group.grad, *group.state.values(), *group.views]
                assert all(type(array) is strict_cupy.ndarray for array in arrays)
        assert all(type(array) is np.ndarray for array in optimizer.state_dict().values())
        return norms, model.to("cpu").state_dict()

    (norms, found), (expected_norms, expected) = three_steps("cuda"), three_steps("cpu")
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7)
