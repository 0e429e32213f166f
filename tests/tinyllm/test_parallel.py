"""Shards of a batch on threads: the gradients of one batch, however it is cut."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from autograd import is_recording
from tinyllm.parallel import DataParallel
from tinyllm.training import mean_loss

from .test_gpt2 import TINY, scrambled, tokens

DROPOUT = replace(TINY, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)


def a_batch(kind):
    """(inputs, targets) of 5 rows, which 2 and 3 shards cut unevenly."""
    inputs, targets = tokens(5, 12), tokens(5, 12, seed=1)
    if kind == "some ignored":
        targets[0] = targets[1, 3:] = targets[4, ::2] = -100
    elif kind == "a shard ignored":
        targets[3:] = -100
    elif kind == "two rows":  # fewer than three shards
        inputs, targets = inputs[:2], targets[:2]
    elif kind == "all ignored":
        targets[:] = -100
    return inputs, targets


def gradients(model, shards, *batch, seed=(0,), parts=1):
    """(loss, every gradient) from no gradients before."""
    for parameter in model.parameters():
        parameter.grad = None
    with DataParallel(model, shards) as parallel:
        loss = parallel.gradients(*batch, seed=seed, parts=parts)
    return loss, {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}


def assert_close(found, expected, tolerance=1e-12):
    (loss, found), (expected_loss, expected) = found, expected
    assert loss == pytest.approx(expected_loss, rel=tolerance, abs=tolerance)
    for name, g in expected.items():
        atol = tolerance * max(1, np.abs(g).max())
        np.testing.assert_allclose(found[name], g, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("kind", ["full", "some ignored", "a shard ignored", "two rows", "all ignored"])
def test_gradients_are_those_of_the_whole_batch(kind, shards):
    model, (inputs, targets) = scrambled(dtype=np.float64).train(), a_batch(kind)
    loss = model.loss(inputs, targets)
    loss.backward()
    expected = loss.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    assert (max(np.abs(g).max() for g in expected[1].values()) > 1e-2) == (kind != "all ignored")
    assert_close(gradients(model, shards, inputs, targets), expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_accumulated_parts_are_one_large_batch(shards):
    model, (inputs, targets) = scrambled(dtype=np.float64).train(), a_batch("full")
    inputs, targets = np.tile(inputs, (3, 1))[:12], tokens(12, 12, seed=4)
    expected = gradients(model, 1, inputs, targets)
    for parameter in model.parameters():
        parameter.grad = None
    with DataParallel(model, shards) as parallel:
        losses = [
            parallel.gradients(inputs[i : i + 4], targets[i : i + 4], seed=(0, i), parts=3) for i in (0, 4, 8)
        ]
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert_close((np.mean(losses), found), expected)
    assert losses[0] == pytest.approx(model.loss(inputs[:4], targets[:4]).item(), rel=1e-12)


def test_loss_alone():
    model, (inputs, targets) = scrambled(dtype=np.float64), a_batch("some ignored")
    expected = model.loss(inputs, targets, reduction="sum").item()
    with DataParallel(model, 3) as parallel:
        (total,), (count,) = parallel.loss(inputs, targets)
    assert total == pytest.approx(expected, rel=1e-12) and count == (targets != -100).sum() == 60 - 12 - 9 - 6
    assert all(parameter.grad is None for parameter in model.parameters())


class Two:
    """A model with two inputs and two losses: of the tokens, and of other tokens in reverse order.

    Each loss has targets of its own; what counts is the sum of both means.
    """

    def __init__(self, inner):
        self.inner, self.parameters = inner, inner.parameters
        self.train, self.eval = inner.train, inner.eval

    def loss(self, inputs, targets, reduction):
        ids, others = inputs
        return tuple(
            self.inner.loss(part, wanted, reduction) for part, wanted in zip((ids, others[:, ::-1]), targets)
        )


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_several_inputs_and_losses(shards):
    inner = scrambled(dtype=np.float64).train()
    (ids, targets), (others, less) = a_batch("full"), a_batch("some ignored")
    loss = inner.loss(ids, targets) + inner.loss(others[:, ::-1], less)
    loss.backward()
    expected = loss.item(), {name: p.grad.numpy().copy() for name, p in inner.named_parameters()}
    for parameter in inner.parameters():
        parameter.grad = None
    with DataParallel(Two(inner), shards) as parallel:
        found = parallel.gradients((ids, others), (targets, less), seed=(0,))
        sums, counts = parallel.loss((ids, others), (targets, less))
        mean = mean_loss(
            inner,
            parallel,
            [
                ((ids[:2], others[:2]), (targets[:2], less[:2])),
                ((ids[2:], others[2:]), (targets[2:], less[2:])),
            ],
        )
    assert_close((found, {name: p.grad.numpy() for name, p in inner.named_parameters()}), expected)
    assert counts.tolist() == [(targets != -100).sum(), (less != -100).sum()] and counts[0] > counts[1]
    assert (sums / counts).sum() == pytest.approx(expected[0], rel=1e-12)
    assert mean == pytest.approx(expected[0], rel=1e-12)  # not the mean of the means


def test_frozen_parameters_are_left_alone():
    model, batch = scrambled(dtype=np.float64).train(), a_batch("full")
    _, expected = gradients(model, 2, *batch)
    frozen = model.token_embedding.weight
    frozen.requires_grad, frozen.grad = False, None
    with DataParallel(model, 2) as parallel:
        for parameter in parallel.parameters:
            parameter.grad = None
        parallel.gradients(*batch, seed=(0,))
    assert frozen.grad is None and len(parallel.parameters) == len(model.parameters()) - 1
    assert np.allclose(model.norm.weight.grad.numpy(), expected["norm.weight"], rtol=1e-12, atol=1e-12)


def test_each_shard_runs_on_a_thread_of_its_own():
    class Spy:
        """A model that meets the other shards: no shard returns before all have begun."""

        def __init__(self):
            self.inner, self.barrier, self.seen = scrambled(), threading.Barrier(3, timeout=10), []

        def parameters(self):
            return self.inner.parameters()

        def loss(self, inputs, targets, reduction):
            self.barrier.wait()
            self.seen.append((threading.get_ident(), len(inputs), is_recording()))
            return self.inner.loss(inputs, targets, reduction)

    spy, (inputs, targets) = Spy(), a_batch("full")
    with DataParallel(spy, 3) as parallel:
        parallel.gradients(inputs, targets, seed=(0,))
        parallel.loss(inputs, targets)
    threads, sizes, recording = zip(*spy.seen)
    assert sorted(sizes) == [1, 1, 2, 2, 2, 2]
    assert len(set(threads[:3])) == len(set(threads[3:])) == 3
    assert recording == (True,) * 3 + (False,) * 3 and is_recording()


def test_an_error_in_a_shard_comes_out():
    model = scrambled()
    with DataParallel(model, 2) as parallel, pytest.raises(IndexError, match="31"):
        parallel.gradients(np.array([[1, 2], [3, 31]]), np.zeros((2, 2), int), seed=(0,))


# Dropout


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_dropout_depends_on_the_seed_and_nothing_before(shards):
    model, batch = scrambled(DROPOUT).train(), a_batch("full")
    loss, first = gradients(model, shards, *batch, seed=(3, 1))
    with DataParallel(model, shards) as parallel:  # the threads of this one have drawn other numbers before
        for seed in [(0,), (3, 0), (3, 1)]:
            for parameter in model.parameters():
                parameter.grad = None
            again = parallel.gradients(*batch, seed=seed)
            same = again == loss
            same &= all(np.array_equal(p.grad.numpy(), first[name]) for name, p in model.named_parameters())
            assert same == (seed == (3, 1))


def test_each_shard_has_masks_of_its_own():
    model = scrambled(DROPOUT).train()
    row, wanted = tokens(1, 12), tokens(1, 12, seed=1)

    def loss(shards, copies):
        batch = np.repeat(row, copies, axis=0), np.repeat(wanted, copies, axis=0)
        return gradients(model, shards, *batch, seed=(0,))[0]

    first, both = loss(1, 1), loss(2, 2)
    second = 2 * both - first  # shard 0 of two draws what shard 0 of one does
    assert abs(second - first) > 1e-3 and abs(loss(3, 3) - both) > 1e-4


# The threads of the BLAS


def blas_threads():
    return [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]


@pytest.mark.skipif(not blas_threads(), reason="this NumPy's BLAS is none that threadpoolctl knows")
@pytest.mark.parametrize("failing", [False, True])
def test_blas_threads_come_back(failing):
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        if set(before) != {2}:
            pytest.skip("this BLAS has one thread only")
        try:
            with DataParallel(scrambled(), 2):
                assert set(blas_threads()) == {1}
                if failing:
                    raise KeyError
        except KeyError:
            assert failing
        assert blas_threads() == before
        with DataParallel(scrambled(), 1):  # a single shard keeps the BLAS's own threads
            assert blas_threads() == before
        assert blas_threads() == before
