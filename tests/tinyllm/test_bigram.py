"""Bigram: counting is right, gradient descent finds what counting finds, and only the last token matters."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinyllm
from autograd import backend
from tinyllm.datasets import Sampler, default_corpus
from tinyllm.errors import InputError
from tinyllm.models import Bigram, BigramConfig
from tinyllm.models.bigram import count_pairs
from tinyllm.tokenizers import CharacterTokenizer
from tinyllm.training import Recipe, fit

rows = st.lists(st.integers(0, 5), min_size=2, max_size=60)


def nats(model, tokens):
    """The mean loss over the pairs of a row."""
    tokens = np.asarray(tokens)
    return model.loss(tokens[None, :-1], tokens[None, 1:]).item()


@pytest.fixture(scope="module")
def text():
    """Some prose as characters: (tokens, vocabulary size)."""
    characters = default_corpus()[:8000]
    tokenizer = CharacterTokenizer(characters)
    return np.array(tokenizer.encode(characters), np.uint8), tokenizer.vocabulary_size


# Counting


@given(rows, st.sampled_from([0, 0.25, 1, 7]), st.sampled_from([np.uint8, np.int32, np.int64]))
def test_probabilities_are_the_smoothed_frequencies_of_the_pairs(tokens, smoothing, dtype):
    V = 7  # token 6 is never there
    model = Bigram.from_counts(np.array(tokens, dtype), V, smoothing)
    found = model.probabilities().numpy()
    pairs, before = Counter(pairwise(tokens)), Counter(tokens[:-1])
    for a in range(V):
        for b in range(V):
            n = before[a] + smoothing * V
            expected = (pairs[a, b] + smoothing) / n if n else 1 / V
            assert found[a, b] == pytest.approx(expected, rel=1e-5, abs=1e-30)
    assert found.dtype == model.table.weight.dtype == np.float32
    assert not model.training and model.config == BigramConfig(V)
    assert count_pairs(tokens, V).tolist() == [[pairs[a, b] for b in range(V)] for a in range(V)]


def test_counts_of_bytes_do_not_overflow():
    tokens = np.array([255, 255, 0, 255, 255], np.uint8)
    count = count_pairs(tokens, 256)
    assert count.shape == (256, 256) and count.sum() == 4
    assert (count[255, 255], count[255, 0], count[0, 255]) == (2, 1, 1)


def test_the_loss_of_counting_is_the_conditional_entropy(text):
    """Shannon 1948, section 3: H(pair) - H(first of the pair), here of the text's own frequencies."""
    tokens, V = text
    entropy = lambda counter: sum(-n / N * math.log(n / N) for n in counter.values())
    N = len(tokens) - 1
    expected = entropy(Counter(pairwise(tokens.tolist()))) - entropy(Counter(tokens[:-1].tolist()))
    assert nats(Bigram.from_counts(tokens, V, 0), tokens) == pytest.approx(expected, rel=1e-5)
    losses = [nats(Bigram.from_counts(tokens, V, s), tokens) for s in (0, 0.1, 1, 10, 1e6)]
    assert losses == sorted(losses) and losses[-1] == pytest.approx(math.log(V), abs=1e-2)


def test_a_pair_never_seen_is_impossible_without_smoothing_and_possible_with():
    seen, held_out = [0, 1, 2, 0, 1], [0, 2]
    assert nats(Bigram.from_counts(seen, 3, 0), seen) == 0.0
    assert nats(Bigram.from_counts(seen, 3, 0), held_out) == math.inf
    assert nats(Bigram.from_counts(seen, 3, 0.5), held_out) == pytest.approx(-math.log(0.5 / 3.5), rel=1e-6)


# Learning


@given(rows, st.integers(0, 99))
def test_no_table_is_better_than_the_counts(tokens, seed):
    best = nats(Bigram.from_counts(tokens, 7, 0), tokens)
    model = Bigram(BigramConfig(7), seed)
    for scale in (0.0, 0.3, 3.0):
        table = np.random.default_rng(seed).normal(0, 1, (7, 7)) * scale
        model.table.weight.data = table.astype(np.float32)
        assert nats(model, tokens) >= best - 1e-6


@given(rows, st.integers(0, 99))
def test_the_gradient_is_how_far_the_table_is_from_the_counts(tokens, seed):
    model = Bigram(BigramConfig(7), seed).to(dtype=np.float64)
    model.table.weight.data = np.random.default_rng(seed).normal(0, 1, (7, 7))
    tokens = np.array(tokens)
    model.loss(tokens[None, :-1], tokens[None, 1:]).backward()
    count = count_pairs(tokens, 7)
    n = count.sum(axis=1, keepdims=True)
    expected = (n * model.probabilities().numpy() - count) / n.sum()
    np.testing.assert_allclose(model.table.weight.grad.numpy(), expected, rtol=0, atol=1e-12)


def test_the_gradient_at_the_counts_is_zero(text):
    tokens, V = text
    model = Bigram.from_counts(tokens, V, 0)
    model.loss(tokens[None, :-1], tokens[None, 1:]).backward()
    # float32 rounds each probability by 1e-7 or less, and the sum over a row of pairs by some times that.
    assert np.abs(model.table.weight.grad.numpy()).max() < 1e-6
    model = Bigram.from_counts(tokens, V, 1)
    model.loss(tokens[None, :-1], tokens[None, 1:]).backward()
    assert np.abs(model.table.weight.grad.numpy()).max() > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_descent_reaches_the_loss_and_the_table_of_counting(text, seed):
    tokens, V = text
    counted = Bigram.from_counts(tokens, V, 0)
    learned = Bigram(BigramConfig(V), seed)
    learned.table.weight.data = np.random.default_rng(seed).normal(0, 2, (V, V)).astype(np.float32)
    best = nats(counted, tokens)
    assert nats(learned, tokens) > best + 2
    recipe = Recipe(steps=400, batch=16, context=128, lr=0.1, warmup=1, weight_decay=0.0, seed=seed)
    sampler = Sampler(tokens, recipe.batch, recipe.context, seed)
    progress = fit(learned, lambda step: sampler.next(), recipe, "bigram")
    assert best - 1e-6 < nats(learned, tokens) < best + 5e-3
    p, q = (model.probabilities().numpy() for model in (counted, learned))
    frequency = np.bincount(tokens, minlength=V) / len(tokens)
    assert frequency @ np.abs(p - q).sum(axis=1) / 2 < 0.02
    assert len(progress.losses) == 400


# Reading and writing


def test_only_the_last_token_matters_however_many_there_are(text):
    tokens, V = text
    model = Bigram.from_counts(tokens, V, 0.1)
    logits = model(tokens[None, :5000]).numpy()
    assert logits.shape == (1, 5000, V)
    np.testing.assert_array_equal(logits[0], model.table.weight.numpy()[tokens[:5000]])
    long = model.generate(tokens[None], 30, seed=3)
    np.testing.assert_array_equal(long[0, -30:], model.generate(tokens[None, -1:], 30, seed=3)[0, -30:])
    assert model.parameter_count() == V * V


def test_what_it_writes_has_the_pairs_frequencies(text):
    tokens, V = text
    model = Bigram.from_counts(tokens, V, 0)
    start = int(np.bincount(tokens).argmax())  # the blank
    new = model.generate(np.full((4000, 1), start), 1, seed=0)[:, 1]
    p = model.probabilities().numpy()[start]
    spread = np.sqrt(p * (1 - p) / 4000)
    assert (np.abs(np.bincount(new, minlength=V) / 4000 - p) <= 4.5 * spread).all()
    seen = set(pairwise(tokens.tolist()))
    for row in model.generate(np.full((4, 1), start), 200, seed=1).tolist():
        assert set(pairwise(row)) <= seen  # what was never seen is impossible, so it is never written


def test_beams_over_impossible_tokens():
    model = Bigram.from_counts([0, 1, 2, 3, 0, 1, 2, 3, 0], 5, 0)  # a cycle: one way to go on
    for width in (1, 4):
        best, *others = model.beam_search([2], 6, width=width)
        assert best.tokens == [3, 0, 1, 2, 3, 0] and best.score == pytest.approx(0, abs=1e-6)
        assert all(beam.score == -math.inf for beam in others)


@pytest.mark.parametrize("smoothing", [0, 1])
def test_a_counted_model_is_saved_and_read(tmp_path, text, smoothing):
    tokens, V = text
    model = Bigram.from_counts(tokens, V, smoothing)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config == {
        "model_type": "bigram", "architectures": ["Bigram"], "vocab_size": V, "dtype": "float32",
    }  # fmt: skip
    loaded = tinyllm.from_pretrained(tmp_path)
    assert type(loaded) is Bigram
    np.testing.assert_array_equal(loaded.table.weight.numpy(), model.table.weight.numpy())
    assert np.isneginf(loaded.table.weight.numpy()).any() == (smoothing == 0)


def test_on_the_stand_in_for_a_gpu(strict_cupy, text):
    tokens, V = text
    on_host = Bigram.from_counts(tokens, V, 0.5)
    on_gpu = Bigram.from_counts(backend.to_device(tokens, "cuda"), V, 0.5)
    assert type(on_gpu.table.weight.data) is strict_cupy.ndarray
    np.testing.assert_allclose(on_gpu.table.weight.numpy(), on_host.table.weight.numpy(), rtol=1e-6)


# Bad input


def test_what_cannot_be_counted():
    for tokens in ([], [1], [[0, 1], [1, 0]], [0.0, 1.0]):
        with pytest.raises(InputError, match="a row of 2 or more token ids"):
            Bigram.from_counts(tokens, 3)
    for bad in (3, -1):
        with pytest.raises(InputError, match=f"token id {bad} is out of range: the model knows ids 0 to 2"):
            Bigram.from_counts([0, bad, 1], 3)
    for smoothing in (-0.1, math.inf, math.nan):
        with pytest.raises(InputError, match=f"smoothing is {smoothing}, but must be a number of 0 or more"):
            Bigram.from_counts([0, 1], 3, smoothing)


def test_configs_that_cannot_be(tmp_path):
    for size in (0, -1, 2.0, "3", True, None):
        with pytest.raises(
            InputError, match=f"vocab_size is {size!r}, but must be a whole number of 1 or more"
        ):
            BigramConfig(size)
    Bigram(BigramConfig(4)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    for change, words in [
        ({"vocab_size": 5}, "misshapen.*table.weight"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"order": 3}, "order = 3"),
        ({"model_type": "trigram"}, "'trigram'"),
    ]:
        path.write_text(json.dumps({**saved, **change}), encoding="utf-8")
        with pytest.raises(InputError, match=words) as error:
            tinyllm.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
