"""Zero-, one- and few-shot evaluation (Brown et al. 2020, section 2.4), for every causal model.

No weight changes. A task is put into text, K examples with their completions and then one without, and the
model is asked how likely it finds each possible completion, or writes one by itself. And, at the end, what a
text tells of a model without any task: its loss, and the memory and the time that reading it takes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

import autograd.functional as F
from autograd import no_grad
from autograd.backend import array_module, to_host
from tinyllm.datasets import evaluation_batches
from tinyllm.errors import InputError

Tokens = Sequence[int]


class Example(NamedTuple):
    """A task's example in text: "cheese =>" and " fromage"."""

    context: str
    completion: str


class Question(NamedTuple):
    """Multiple choice: a context, the completions to choose from, and the number of the right one."""

    context: Tokens
    completions: Sequence[Tokens]
    answer: int


def few_shot(
    examples: Sequence[Example],
    k: int,
    query: str,
    rng: np.random.Generator,
    description: str = "",
    separator: str = "\n\n",
) -> str:
    """A K-shot prompt: the description, K of the task's examples drawn at random, and the query's context.

    k 0 is zero-shot, for which the description is all there is to know the task by; k 1 is one-shot.

    Raises:
        InputError: fewer examples than k.
    """
    if not 0 <= k <= len(examples):
        raise InputError(f"{k} shots of {len(examples)} examples: choose from 0 to {len(examples)}")
    shots = ["".join(examples[i]) for i in rng.choice(len(examples), k, replace=False)]
    return separator.join([*([description] if description else []), *shots, query])


def log_likelihoods(model: Any, pairs: Sequence[tuple[Tokens, Tokens]], batch: int = 32) -> np.ndarray:
    """log P(completion | context) in nats for N pairs (context, completion) of token ids -> (N,).

        sum over i of  log softmax(logits after context, c_0 ... c_(i-1))[c_i],   c the completion

    `batch` rows are read together, each filled up at its end: no position of a causal model sees what follows
    it. Pairs that read the same tokens, such as one context with many completions of one token, are one row.

    Raises:
        InputError: an empty context or completion, more tokens than the model's context, or unknown ids.
    """
    readings: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> the pairs answered by it
    checked = [(_tokens(model, context), _tokens(model, completion)) for context, completion in pairs]
    for i, (context, completion) in enumerate(checked):
        reading = (*context, *completion[:-1])
        if len(reading) > model.context:
            raise InputError(
                f"context and completion take {len(reading)} positions, and the model's context is "
                f"{model.context}: give fewer examples"
            )
        readings.setdefault(reading, []).append(i)
    total = np.zeros(len(pairs))
    order = sorted(readings, key=len)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            ids = np.zeros((len(rows), len(rows[-1])), np.int64)
            places: dict[tuple[int, int], int] = {}  # (row, position) whose next token matters -> its number
            terms = []  # (pair, number of the place, token)
            for row, reading in enumerate(rows):
                ids[row, : len(reading)] = reading
                for i in readings[reading]:
                    context, completion = checked[i]
                    for position, token in enumerate(completion, len(context) - 1):
                        terms.append((i, places.setdefault((row, position), len(places)), token))
            i, place, token = np.array(terms).T
            np.add.at(total, i, _log_p(model, ids, np.array(list(places)))[place, token])
    finally:
        model.train(was_training)
    if not np.isfinite(total).all():
        raise InputError("the model's scores are not finite numbers: its weights are damaged, or overflow")
    return total


def _tokens(model: Any, tokens: Tokens) -> list[int]:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise InputError(f"a context or completion is a row of 1 or more token ids, not {str(tokens)[:60]}")
    if ids.min() < 0 or ids.max() >= model.vocabulary_size:
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(
            f"token id {bad} is out of range: the model knows ids 0 to {model.vocabulary_size - 1}"
        )
    return ids.tolist()


def _log_p(model: Any, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """ids (B, T), places (n, 2) of (row, position) -> log-probabilities (n, V) of what follows each place."""
    with no_grad():
        hidden = model.hidden_states(ids)  # (B, T, C)
        rows, positions = array_module(hidden.data).asarray(places).T
        return to_host(F.log_softmax(model.head(hidden[rows, positions])).data)


def choose(
    model: Any, questions: Sequence[Question], answer_context: Tokens | None = None, batch: int = 32
) -> np.ndarray:
    """The number of the completion that the model finds likeliest, for each of N questions -> (N,).

    By default the likelihood counts by token, log P(completion | context) / length, so that long completions
    stand a chance. With an answer_context, such as the tokens of "Answer: ", it is weighed against what the
    completion would be worth without the question: P(completion | context) / P(completion | answer_context).

    Raises:
        InputError: as for `log_likelihoods`, or a question with nothing to choose from.
    """
    if not all(len(question.completions) for question in questions):
        raise InputError("a question has no completions to choose from: give it one or more")
    pairs = [(question.context, c) for question in questions for c in question.completions]
    scores = log_likelihoods(model, pairs, batch)
    if answer_context is None:
        scores /= [len(completion) for _, completion in pairs]
    else:
        scores -= log_likelihoods(model, [(answer_context, completion) for _, completion in pairs], batch)
    ends = np.cumsum([len(question.completions) for question in questions])
    return np.array([part.argmax() for part in np.split(scores, ends)[:-1]], np.int64)


def accuracy(
    model: Any, questions: Sequence[Question], answer_context: Tokens | None = None, batch: int = 32
) -> float:
    """The share of the questions that `choose` answers rightly."""
    if not questions:
        raise InputError("no questions: give one or more")
    answers = [question.answer for question in questions]
    return float((choose(model, questions, answer_context, batch) == answers).mean())


def complete(model: Any, context: Tokens, max_new_tokens: int, stop: Collection[int] = ()) -> list[int]:
    """Free-form: what beam search writes, with width 4 and alpha 0.6, without its token of `stop`."""
    best = model.beam_search(context, max_new_tokens, width=4, alpha=0.6, stop=stop)[0].tokens
    return best[:-1] if best[-1] in stop else best


def loss(model: Any, tokens: np.ndarray, context: int) -> float:
    """Nats a token of a text (N,) in evaluation mode, read `context` tokens at a time.

    Raises:
        InputError: less than two tokens.
    """
    model.eval()
    with no_grad():
        batches = list(evaluation_batches(tokens, 1, context))
        nats = sum(model.loss(*batch, reduction="sum").item() for batch in batches)
    return nats / sum(int((targets != -100).sum()) for _, targets in batches)


def cost(model: Any, ids: np.ndarray, timed: int) -> tuple[int, float]:
    """(bytes, seconds): what a cache holds after ids (1, T), and what one token costs there.

    That is the median of the last `timed` tokens, fewer than T, which are read one by one in evaluation mode.
    The BLAS has one thread: for the products of one token a second is no help.
    """
    start, seconds = ids.shape[1] - timed, []
    model.eval()
    with no_grad(), threadpool_limits(1, user_api="blas"):
        cache = model.new_cache(ids.shape[1])
        model.hidden_states(ids[:, :start], cache)
        for i in range(start, ids.shape[1]):
            began = time.perf_counter()
            model(ids[:, i : i + 1], cache).numpy()
            seconds.append(time.perf_counter() - began)
    return cache.nbytes, float(np.median(seconds))
