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

Arrays = Array | tuple[Array, ...]


class DataParallel:
    """A model's loss and gradients on batches, in `shards` pieces on as many threads, this one among them.

    The model has loss(inputs, targets, reduction) -> Tensor, where inputs are an array (B, ...) or a tuple of
    such arrays. Where targets are a tuple too, so is the loss, and what counts is the sum of the means. On a
    GPU there is one shard. As a context manager it keeps the BLAS single-threaded while it is open.
    """

    def __init__(self, model: Any, shards: int | None = None) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        on_gpu = backend.device_of(model.parameters()[0].data) != "cpu"
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

    def gradients(self, inputs: Arrays, targets: Arrays, seed: tuple[int, ...], parts: int = 1) -> float:
        """Add the gradients of loss / parts to every parameter's `.grad`; returns the mean loss in nats.

        inputs, targets (B, ...); targets of -100 do not count. The random numbers of dropout depend on the
        seed and the shard alone; those of this thread start anew, as by manual_seed. parts: how many batches
        are accumulated before a step.
        """
        shares = [1 / (max(count, 1) * parts) for count in _counts(targets)]

        def run(shard: int, some: Arrays, wanted: Arrays) -> tuple[float, tuple[Tensor, ...]]:
            F.manual_seed((*seed, shard))
            sums = _tuple(self.model.loss(some, wanted, reduction="sum"))
            loss = sum(part * share for part, share in zip(sums, shares, strict=True))
            return loss.item(), grad(loss, self.parameters)

        losses, found = zip(*self._over_shards(run, inputs, targets))

        def add(i: int) -> None:
            total, parameter = found[0][i], self.parameters[i]
            for other in found[1:]:
                total.data += other[i].data
            parameter.grad = total if parameter.grad is None else Tensor(parameter.grad.data + total.data)

        self.map(add, range(len(self.parameters)))
        return sum(losses) * parts

    def loss(self, inputs: Arrays, targets: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """The summed losses of a batch in nats, without gradients, and how many targets count: both (n,), n
        the number of target arrays."""

        def run(shard: int, some: Arrays, wanted: Arrays) -> list[float]:
            with no_grad():
                return [part.item() for part in _tuple(self.model.loss(some, wanted, reduction="sum"))]

        return np.sum(self._over_shards(run, inputs, targets), axis=0), np.array(_counts(targets))

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

    def _over_shards(self, run: Callable[..., Any], inputs: Arrays, targets: Arrays) -> list[Any]:
        """run(number, inputs, targets) for each shard of the batch that is not empty."""
        rows = np.array_split(np.arange(len(_tuple(targets)[0])), self.shards)
        cut = lambda arrays, some: (
            tuple(a[some] for a in arrays) if isinstance(arrays, tuple) else arrays[some]
        )
        places = [(k, slice(some[0], some[-1] + 1)) for k, some in enumerate(rows) if len(some)]
        return self.map(lambda place: run(place[0], cut(inputs, place[1]), cut(targets, place[1])), places)


def _tuple(of: Any) -> tuple:
    return of if isinstance(of, tuple) else (of,)


def _counts(targets: Arrays) -> list[int]:
    """How many targets count, in each array."""
    return [int((part != -100).sum()) for part in _tuple(targets)]
