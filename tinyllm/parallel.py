"""One batch on all the cores: shards on threads, their gradients summed.

The same idea that later runs across machines: each shard of the batch goes forward and backward by itself,
and only the gradients meet. NumPy leaves Python's lock while it computes, so threads are enough; inside a
shard the BLAS runs single-threaded, for two layers of threads would fight over the same cores.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import autograd.functional as F
from autograd import Tensor, backend, grad, no_grad
from autograd.backend import Array


class DataParallel:
    """A model's loss and gradients on batches, in `shards` pieces on as many threads, this one among them.

    The model has loss(inputs, targets, reduction) -> Tensor. On a GPU there is one shard. As a context
    manager it keeps the BLAS single-threaded while it is open.
    """

    def __init__(self, model: Any, shards: int | None = None) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        on_gpu = backend.device_of(self.parameters[0].data) != "cpu"
        self.shards = 1 if on_gpu else shards or os.cpu_count() or 1
        self._pool: ThreadPoolExecutor | None = None
        backend.keep_memory()

    def __enter__(self) -> DataParallel:
        self._limits = threadpool_limits(1 if self.shards > 1 else None, user_api="blas")
        # A thread that wants Python's lock asks for it after this long; the default, 5 ms, is longer than
        # most operations of a small model take.
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._limits.restore_original_limits()
        sys.setswitchinterval(self._interval)

    def gradients(self, inputs: Array, targets: Array, seed: tuple[int, ...], parts: int = 1) -> float:
        """Add the gradients of loss / parts to every parameter's `.grad`; returns the mean loss in nats.

        inputs, targets (B, ...); targets of -100 do not count. The random numbers of dropout depend on the
        seed and the shard alone; those of this thread start anew, as by manual_seed. parts: how many batches
        are accumulated before a step.
        """
        share = 1 / (max(int((targets != -100).sum()), 1) * parts)

        def run(shard: int, ids: Array, wanted: Array) -> tuple[float, tuple[Tensor, ...]]:
            F.manual_seed((*seed, shard))
            loss = self.model.loss(ids, wanted, reduction="sum") * share
            return loss.item(), grad(loss, self.parameters)

        losses, found = zip(*self._over_shards(run, inputs, targets))

        def add(i: int) -> None:
            total, parameter = found[0][i], self.parameters[i]
            for other in found[1:]:
                total.data += other[i].data
            parameter.grad = total if parameter.grad is None else Tensor(parameter.grad.data + total.data)

        self.map(add, range(len(self.parameters)))
        return sum(losses) * parts

    def loss(self, inputs: Array, targets: Array) -> tuple[float, int]:
        """The summed loss of a batch in nats, without gradients, and how many targets count."""

        def run(shard: int, ids: Array, wanted: Array) -> float:
            with no_grad():
                return self.model.loss(ids, wanted, reduction="sum").item()

        return sum(self._over_shards(run, inputs, targets)), int((targets != -100).sum())

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """[function(item) for item in items], each thread taking every shards-th item, this one the first."""
        items, n = list(items), self.shards
        results = [None] * len(items)

        def run(k: int) -> None:
            results[k::n] = [function(item) for item in items[k::n]]

        if n > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(n - 1)
        others = [self._pool.submit(run, k) for k in range(1, n)]
        run(0)
        for other in others:
            other.result()
        return results

    def _over_shards(self, run: Callable[..., Any], inputs: Array, targets: Array) -> list[Any]:
        """run(number, inputs, targets) for each shard of the batch that is not empty."""
        shards = enumerate(zip(np.array_split(inputs, self.shards), np.array_split(targets, self.shards)))
        return self.map(lambda shard: run(shard[0], *shard[1]), [s for s in shards if len(s[1][0])])
