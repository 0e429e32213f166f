"""Writing text token by token, for every causal model in one place.

A causal model's next token depends on all tokens before it. Their keys and values do not change any more, so
a cache keeps them, and each step computes one position only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from autograd import Tensor, backend, is_recording, no_grad
from autograd.backend import Array
from tinyllm.errors import InputError


class KeyValueCache:
    """The keys and values of the positions seen so far, for each layer.

    Room for `capacity` positions is taken at once, so that a step appends without copying what is there.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._arrays: dict[int, tuple[Array, Array]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H_kv, T, d) of a layer; returns all so far (B, H_kv, length + T, d)."""
        if is_recording() and k.requires_grad:
            raise RuntimeError("a cache keeps no graph: use it inside no_grad()")
        B, H, T, d = k.shape
        if layer not in self._arrays:
            xp = backend.array_module(k.data)
            self._arrays[layer] = tuple(xp.empty((B, H, self.capacity, d), k.dtype) for _ in range(2))
        keys, values = self._arrays[layer]
        end = self.length + T
        keys[:, :, self.length : end] = k.data
        values[:, :, self.length : end] = v.data
        return Tensor(keys[:, :, :end]), Tensor(values[:, :, :end])

    def advance(self, T: int) -> None:
        """All layers have seen T more positions."""
        self.length += T


def stream(
    model: Any,
    input_ids: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[np.ndarray]:
    """Yield the new tokens, one array (B,) at a time, for prompts input_ids (B, T).

    temperature divides the logits (0: the likeliest token always); top_k keeps the k likeliest tokens; top_p
    the likeliest ones whose probabilities first reach p (Holtzman et al. 2020, section 3.1). The model sees
    at most its context: past that the last `context` tokens, computed anew each step, for every one of them
    moves to another position.

    Raises:
        InputError: an empty prompt, one longer than the context, unknown ids, or a setting out of range.
    """
    ids = _checked_prompt(model, input_ids)
    if max_new_tokens < 0 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise InputError("max_new_tokens and temperature must be 0 or more, top_k 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, but must be above 0 and at most 1")
    rng = np.random.default_rng(seed)
    was_training, length = model.training, ids.shape[1]
    cache = KeyValueCache(min(length + max_new_tokens, model.context)) if use_cache else None
    seen = 0  # positions that the cache holds
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with no_grad():
                if ids.shape[1] > model.context:
                    hidden = model.hidden_states(ids[:, -model.context :])
                else:
                    hidden = model.hidden_states(ids[:, seen:], cache)
                logits = model.head(hidden[:, -1]).numpy()  # (B, V)
            seen = ids.shape[1] if cache is not None else 0
            token = sample(logits, rng, temperature, top_k, top_p)
            yield token
            ids = np.concatenate([ids, token[:, None]], axis=1)
    finally:
        model.train(was_training)


def generate(model: Any, input_ids: Any, max_new_tokens: int, **settings: Any) -> np.ndarray:
    """The prompts (B, T) with their continuations, (B, T + max_new_tokens). Settings as for `stream`."""
    ids = np.asarray(input_ids)
    new = list(stream(model, ids, max_new_tokens, **settings))
    return np.concatenate([ids, *(token[:, None] for token in new)], axis=1)


def sample(
    logits: np.ndarray,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """A token for each row, from softmax(logits / temperature) cut to top_k and top_p. (B, V) -> (B,)."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise InputError("the model's scores are not finite numbers: its weights are damaged, or overflow")
    if temperature == 0:
        return logits.argmax(axis=-1)
    z = logits.astype(np.float64)
    z = (z - z.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None and top_k < z.shape[-1]:
        kth = np.partition(z, -top_k, axis=-1)[:, -top_k, None]
        z[z < kth] = -np.inf
    p = np.exp(z)
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None and top_p < 1:
        order = np.argsort(-p, axis=-1, kind="stable")
        ranked = np.take_along_axis(p, order, axis=-1)
        ranked[ranked.cumsum(axis=-1) - ranked >= top_p] = 0  # what came before was enough already
        np.put_along_axis(p, order, ranked, axis=-1)
    cumulative = p.cumsum(axis=-1)
    draw = rng.random((len(p), 1)) * cumulative[:, -1:]
    return np.minimum((cumulative <= draw).sum(axis=-1), p.shape[-1] - 1)


def _checked_prompt(model: Any, input_ids: Any) -> np.ndarray:
    ids = np.asarray(input_ids.data if isinstance(input_ids, Tensor) else input_ids)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise InputError(f"a prompt has the shape (batch, length) with length 1 or more, not {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise InputError(f"a prompt holds token ids, which are integers, not {ids.dtype}")
    if ids.shape[1] > model.context:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens, and the model's context is {model.context}: shorten it"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= model.vocabulary_size):
        bad = int(ids.min() if ids.min() < 0 else ids.max())
        raise InputError(
            f"token id {bad} is out of range: the model knows ids 0 to {model.vocabulary_size - 1}"
        )
    return ids.astype(np.int64)
