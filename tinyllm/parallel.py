"""One batch on all the cores: shards on threads, their gradients summed.

The same idea that later runs across machines: each shard of the batch goes forward and backward by itself,
and only the gradients meet. NumPy leaves Python's lock while it computes, so threads are enough; inside a
shard the BLAS runs single-threaded, for two layers of threads would fight over the same cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import autograd.functional as F
from autograd import Tensor, backend, grad, no_grad
from autograd.backend import Array


class DataParallel:
    """A model's loss and gradients on batches, in `shards` pieces on as many threads.

    The model has loss(inputs, targets, reduction) -> Tensor. On a GPU there is one shard. As a context
    manager it keeps the BLAS single-threaded while it is open.
    """

    def __init__(self, model: Any, shards: int | None = None) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        on_gpu = backend.device_of(self.parameters[0].data) != "cpu"
        self.shards = 1 if on_gpu else shards or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self.shards)
        backend.keep_memory()

    def __enter__(self) -> DataParallel:
        self._limits = threadpool_limits(1 if self.shards > 1 else None, user_api="blas")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._limits.restore_original_limits()

    def gradients(self, inputs: Array, targets: Array, seed: tuple[int, ...], parts: int = 1) -> float:
        """Add the gradients of loss / parts to every parameter's `.grad`; returns the mean loss in nats.

        inputs, targets (B, ...); targets of -100 do not count. The random numbers of dropout depend on the
        seed and the shard alone. parts: how many batches are accumulated before a step.
        """
        share = 1 / (max(int((targets != -100).sum()), 1) * parts)

        def run(shard: int, ids: Array, wanted: Array) -> tuple[float, tuple[Tensor, ...]]:
            F.manual_seed((*seed, shard))
            loss = self.model.loss(ids, wanted, reduction="sum") * share
            return loss.item(), grad(loss, self.parameters)

        results = self._map(run, inputs, targets)
        for i, parameter in enumerate(self.parameters):
            for _, found in results[1:]:
                results[0][1][i].data += found[i].data
            total = results[0][1][i]
            parameter.grad = total if parameter.grad is None else Tensor(parameter.grad.data + total.data)
        return sum(value for value, _ in results) * parts

    def loss(self, inputs: Array, targets: Array) -> tuple[float, int]:
        """The summed loss of a batch in nats, without gradients, and how many targets count."""

        def run(shard: int, ids: Array, wanted: Array) -> float:
            with no_grad():
                return self.model.loss(ids, wanted, reduction="sum").item()

        return sum(self._map(run, inputs, targets)), int((targets != -100).sum())

    def _map(self, run: Callable[..., Any], inputs: Array, targets: Array) -> list[Any]:
        """run(number, inputs, targets) for each shard of the batch that is not empty."""
        shards = zip(np.array_split(inputs, self.shards), np.array_split(targets, self.shards))
        filled = [(i, a, b) for i, (a, b) in enumerate(shards) if len(a)]
        if len(filled) == 1:
            return [run(*filled[0])]
        return list(self._pool.map(lambda shard: run(*shard), filled))
