"""Writing text token by token, for every causal model in one place.

A causal model's next token depends on all tokens before it. What it computed for them does not change any
more, so a cache keeps it, and each step computes one position only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from autograd import Tensor, backend, is_recording, no_grad
from autograd.backend import Array
from tinyllm.errors import InputError

NOTHING = -1  # stands where a row has no new token


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
        if T and end > self.capacity:
            raise RuntimeError(f"{end} positions do not fit a cache of {self.capacity}: make a larger one")
        keys[:, :, self.length : end] = k.data
        values[:, :, self.length : end] = v.data
        return Tensor(keys[:, :, :end]), Tensor(values[:, :, :end])

    def advance(self, T: int) -> None:
        """All layers have seen T more positions."""
        self.length += T

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch, in this order; a row may be taken several times."""
        self._arrays = {layer: tuple(a[rows] for a in pair) for layer, pair in self._arrays.items()}

    @property
    def nbytes(self) -> int:
        """The memory that it holds."""
        return sum(a.nbytes for pair in self._arrays.values() for a in pair)


class _Reader:
    """A model reading rows of tokens that grow together: the next position's logits, cached or not.

    The model sees at most its context: past that its last `context` tokens, computed anew each step, for
    every one of them moves to another position.
    """

    def __init__(self, model: Any, ids: np.ndarray, longest: int, use_cache: bool) -> None:
        self.model, self.ids = model, ids  # (B, T)
        self.cache = model.new_cache(min(longest, model.context)) if use_cache else None
        self._seen = 0  # positions that the cache holds

    def logits(self) -> np.ndarray:
        """The scores (B, V) of what may follow."""
        model, T = self.model, self.ids.shape[1]
        with no_grad():
            if T > model.context:
                hidden = model.hidden_states(self.ids[:, -model.context :])
            else:
                hidden = model.hidden_states(self.ids[:, self._seen :], self.cache)
            logits = model.head(hidden[:, -1]).numpy()
        self._seen = T if self.cache is not None else 0
        if not np.isfinite(logits.max(axis=-1)).all():
            raise InputError(
                "the model's scores are not finite numbers: its weights are damaged, or overflow"
            )
        return logits

    def append(self, tokens: np.ndarray) -> None:
        self.ids = np.concatenate([self.ids, tokens[:, None]], axis=1)

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows, as a cache does."""
        self.ids = self.ids[rows]
        if self._seen:
            self.cache.select(rows.tolist())


def stream(
    model: Any,
    input_ids: Any,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    stop: Collection[int] = (),
) -> Iterator[np.ndarray]:
    """Yield the new tokens, one array (B,) at a time, for prompts input_ids (B, T) or a list of B lists.

    temperature divides the logits (0: the likeliest token always); top_k keeps the k likeliest tokens; top_p
    the likeliest ones whose probabilities first reach p (Holtzman et al. 2020, section 3.1). A row ends after
    max_new_tokens or with a token of `stop`, which is its last.

    Prompts may differ in length: all rows are read position by position from the end of the shortest prompt,
    and a row writes once its own prompt is over. No row needs padding, so none can see any. -1 stands where a
    row has nothing new: still in its prompt, or ended.

    Raises:
        InputError: an empty prompt, one longer than the context, unknown ids, or a setting out of range.
    """
    prompts = checked_prompts(model, input_ids)
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    stop = [token for token in stop if token >= 0]  # -1 is NOTHING here
    rng = np.random.default_rng(seed)
    lengths = np.array([len(prompt) for prompt in prompts])
    shortest, end = lengths.min(), lengths.max() + max_new_tokens
    rest = np.full((len(prompts), lengths.max()), NOTHING)
    for row, prompt in zip(rest, prompts):
        row[: len(prompt)] = prompt
    reader = _Reader(model, rest[:, :shortest], end, use_cache)
    ended = np.full(len(prompts), max_new_tokens == 0)
    was_training = model.training
    model.eval()
    try:
        for position in range(shortest, end):
            ended |= lengths + max_new_tokens <= position
            if ended.all():
                return
            token = sample(reader.logits(), rng, temperature, top_k, top_p)
            reading = lengths > position
            new = np.where(reading | ended, NOTHING, token)
            ended |= np.isin(new, stop)
            if (new != NOTHING).any():
                yield new
            reader.append(np.where(reading, rest[:, min(position, rest.shape[1] - 1)], token))
    finally:
        model.train(was_training)


def generate(model: Any, input_ids: Any, max_new_tokens: int, **settings: Any) -> np.ndarray:
    """The prompts (B, T) with their continuations, (B, T + max_new_tokens). Settings as for `stream`.

    Where prompts differ in length, or `stop` ends rows early, shorter rows are filled up with -1.
    """
    rows = [list(prompt) for prompt in checked_prompts(model, input_ids)]
    for tokens in stream(model, rows, max_new_tokens, **settings):
        for row, token in zip(rows, tokens.tolist()):
            if token != NOTHING:
                row.append(token)
    out = np.full((len(rows), max(map(len, rows))), NOTHING)
    for row, tokens in zip(out, rows):
        row[: len(tokens)] = tokens
    return out


class Beam(NamedTuple):
    """A finished continuation: its new tokens, and its log-probability over the length penalty."""

    tokens: list[int]
    score: float


def beam_search(
    model: Any,
    prompt: Any,
    max_new_tokens: int,
    width: int = 4,
    alpha: float = 0.6,
    stop: Collection[int] = (),
    use_cache: bool = True,
) -> list[Beam]:
    """The likeliest continuations of one prompt (T,) that `width` beams find: at most `width`, best first.

    Each step takes the `width` likeliest of all continuations by one token. Those among them that end, with
    a token of `stop` or at max_new_tokens, are put aside and compared by

        log P(tokens | prompt) / ((5 + length) / 6)^alpha            (Wu et al. 2016, equation 14)

    so that long texts stand a chance; alpha 0 compares plain log-probabilities. The next likeliest that do
    not end take their places. The search is over when no beam can overtake the best `width` ended ones.
    Width 1 without `stop` is greedy; a width that no step fills searches all there is.

    Raises:
        InputError: as for `stream`, or width, alpha or max_new_tokens out of range.
    """
    (ids,) = checked_prompts(model, [prompt])
    if max_new_tokens < 1 or width < 1 or not 0 <= alpha < math.inf:
        raise InputError("beam search takes max_new_tokens and width of 1 or more, alpha of 0 or more")
    reader = _Reader(model, np.array([ids]), len(ids) + max_new_tokens, use_cache)
    was_training = model.training
    model.eval()
    try:
        return search(reader, len(ids), max_new_tokens, width, alpha, stop)
    finally:
        model.train(was_training)


def search(
    reader: Any, start: int, max_new_tokens: int, width: int, alpha: float, stop: Collection[int]
) -> list[Beam]:
    """The search itself, for any reader: an encoder-decoder's too, whose rows share what the encoder gave.

    reader.ids (beams, start + length) are the tokens of each beam, at first one row of `start` tokens;
    reader.logits() (beams, V) scores what may follow, reader.select(rows) goes on with these beams, and
    reader.append(tokens) adds one token to each.
    """
    penalty = lambda length: ((5 + length) / 6) ** alpha
    scores = np.zeros(1)  # log-probability of each living beam
    done: list[Beam] = []
    for length in range(1, max_new_tokens + 1):
        logits = reader.logits().astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        total = (scores[:, None] + log_p).reshape(-1)  # (beams V,)
        # With these, `width` beams live on even if each one ends with each token of `stop`.
        best = np.argsort(-total, kind="stable")[: (1 + len(stop)) * width]
        best = best[total[best] > -math.inf]  # no text that is impossible
        rows, tokens = np.divmod(best, log_p.shape[1])
        ends = np.isin(tokens, list(stop)) | (length == max_new_tokens)
        for i in np.flatnonzero(ends[:width]):
            written = [*reader.ids[rows[i], start:].tolist(), int(tokens[i])]
            done.append(Beam(written, float(total[best[i]] / penalty(length))))
        done = sorted(done, key=lambda beam: -beam.score)[:width]
        alive = np.flatnonzero(~ends)[:width]
        scores = total[best[alive]]
        # A living beam only loses log-probability; the longest penalty is the kindest to it.
        if not len(alive) or len(done) == width and scores[0] / penalty(max_new_tokens) <= done[-1].score:
            break
        reader.select(rows[alive])
        reader.append(tokens[alive])
    return done


def sample(
    logits: np.ndarray,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """A token for each row, from softmax(logits / temperature) cut to top_k and top_p. (B, V) -> (B,)."""
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


def _check_settings(
    max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> None:
    if not isinstance(max_new_tokens, (int, np.integer)):
        raise InputError(f"max_new_tokens is {max_new_tokens!r}, but must be a whole number")
    if max_new_tokens < 0 or not 0 <= temperature < math.inf:
        raise InputError("max_new_tokens and temperature must be 0 or more")
    if top_k is not None and (not isinstance(top_k, (int, np.integer)) or top_k < 1):
        raise InputError(f"top_k is {top_k}, but must be a whole number of 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, but must be above 0 and at most 1")


def checked_prompts(model: Any, input_ids: Any) -> list[np.ndarray]:
    """The rows of input_ids, (B, T) or B sequences, each as integers that the model knows.

    Raises:
        InputError: no row, an empty one, one longer than the context, or with ids that are unknown or no
            integers.
    """
    ids = input_ids.data if isinstance(input_ids, Tensor) else input_ids
    rows = [np.asarray(row) for row in (backend.to_host(ids) if backend.is_array(ids) else ids)]
    if not rows:
        raise InputError("there is no prompt: give a batch of one or more")
    for row in rows:
        if row.ndim != 1 or row.size == 0:
            raise InputError(
                f"prompts have the shape (batch, length), or are a list of rows, with a length of 1 or more; "
                f"a row of these has the shape {row.shape}"
            )
        if row.dtype.kind not in "iu":
            raise InputError(f"a prompt holds token ids, which are integers, not {row.dtype}")
        if len(row) > model.context:
            raise InputError(
                f"the prompt has {len(row)} tokens, and the model's context is {model.context}: shorten it"
            )
        if row.min() < 0 or row.max() >= model.vocabulary_size:
            bad = int(row.min() if row.min() < 0 else row.max())
            raise InputError(
                f"token id {bad} is out of range: the model knows ids 0 to {model.vocabulary_size - 1}"
            )
    return [row.astype(np.int64) for row in rows]
