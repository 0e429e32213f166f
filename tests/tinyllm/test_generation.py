"""Generation: which tokens may come, how often they come, and when; on every model in test_family.py."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autograd import Tensor, no_grad
from tinyllm.errors import InputError
from tinyllm.generation import KeyValueCache, generate, sample, search, stream

from .folders import one_line
from .test_gpt2 import TINY, scrambled, tokens

LOGITS = np.array([0.3, -1.2, 2.0, 1.9, -0.4, 0.3, -np.inf, 1.1])


@pytest.fixture(scope="module")
def model():
    return scrambled()


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


# Drawing one token


def frequencies(n=100_000, logits=LOGITS, **settings):
    drawn = sample(np.tile(logits, (n, 1)), np.random.default_rng(0), **settings)
    assert drawn.shape == (n,)
    return np.bincount(drawn, minlength=len(logits))


def assert_distributed(counts, p):
    """Pearson's statistic of at most 7 degrees of freedom: above 40 once in a million."""
    assert (counts[p == 0] == 0).all()
    expected = counts.sum() * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 40


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_probabilities(temperature):
    counts = frequencies(temperature=temperature)
    assert_distributed(counts, softmax(LOGITS / temperature))
    with pytest.raises(AssertionError):  # 100,000 draws do tell temperatures apart
        assert_distributed(counts, softmax(LOGITS / (temperature * 1.1)))


def only(*kept, logits=LOGITS):
    """The distribution over these tokens alone."""
    return softmax(np.where(np.isin(np.arange(len(logits)), kept), logits, -np.inf))


@pytest.mark.parametrize(
    "k, kept", [(1, [2]), (2, [2, 3]), (3, [2, 3, 7]), (6, [0, 2, 3, 4, 5, 7]), (8, range(8)), (9, range(8))]
)
def test_top_k(k, kept):
    assert_distributed(frequencies(top_k=k), only(*kept))


def test_top_k_keeps_what_ties_with_the_last():
    assert_distributed(frequencies(top_k=4), only(0, 2, 3, 5, 7))  # tokens 0 and 5 are equally likely


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.8, 0.95, 1.0])
def test_top_p(top_p):
    p = softmax(LOGITS)
    kept, mass = [], 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token]
    assert 0 < len(kept) and (top_p == 1 or len(kept) < 7)
    assert_distributed(frequencies(top_p=top_p), only(*kept))


def test_top_p_at_the_very_edge():
    """A set that reaches p exactly is enough."""
    logits = np.log([0.125, 0.5, 0.125, 0.25])
    for top_p, kept in ((0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3])):
        assert np.flatnonzero(frequencies(1000, np.round(logits, 15), top_p=top_p - 1e-12)).tolist() == kept


def test_temperature_then_top_k_then_top_p():
    """Each sees what the one before it left: top_p the probabilities of the three tokens at temperature 2."""
    counts = frequencies(temperature=2.0, top_k=3, top_p=0.7)
    three, all_of_them, cold = only(2, 3, 7, logits=LOGITS / 2), softmax(LOGITS / 2), only(2, 3, 7)
    assert three[[2, 3]].sum() > 0.7 > all_of_them[[2, 3, 7]].sum() and cold[2] < 0.7
    assert_distributed(counts, only(2, 3, logits=LOGITS / 2))


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    k=st.none() | st.integers(1, 14),
    p=st.none() | st.floats(1e-3, 1),
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 100.0]),
    seed=st.integers(0, 2**32),
)
@example(logits=[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0**-149], k=6, p=None, temperature=1.0, seed=326)
@example(logits=[2.0**-149, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0], k=6, p=0.75, temperature=100.0, seed=326)
def test_a_drawn_token_was_among_the_kept(logits, k, p, temperature, seed):
    logits = np.array(logits, np.float32)
    (token,) = sample(logits[None], np.random.default_rng(seed), temperature, k, p)
    z = logits.astype(np.float64) - logits.max()  # where logits that differ by less than rounding are equal
    assert (z > z[token]).sum() < (k or len(z))
    if temperature == 0:
        assert token == logits.argmax()
    elif p is not None:  # better tokens alone must not have reached p
        kth = np.sort(z)[::-1][: k or len(z)][-1]
        probability = softmax(np.where(z >= kth, z, -np.inf) / temperature)
        assert probability[probability > probability[token]].sum() < p + 1e-9


def test_rows_are_drawn_apart():
    rows = np.array([[0.0, 1e4], [1e4, 0.0]])
    rng = np.random.default_rng(0)
    assert sample(rows, rng).tolist() == sample(rows, rng, top_k=1).tolist() == [1, 0]
    assert sample(rows, rng, top_p=0.5).tolist() == sample(rows, rng, temperature=0).tolist() == [1, 0]
    drawn = np.array([sample(np.zeros((2, 2)), rng) for _ in range(400)])
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2


def test_extreme_settings_give_tokens():
    rng = np.random.default_rng(0)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert sample(np.array([[3.0, 5.0, 4.0]]), rng, temperature=1e-30).tolist() == [1]
        assert sample(np.array([[3.0, -np.inf, -np.inf]]), rng, top_p=1e-9).tolist() == [0]
        assert sample(np.array([[1e30, -1e30]], np.float32), rng).tolist() == [0]


class Fixed:
    """A generator that draws one number only."""

    def __init__(self, number):
        self.number = number

    def random(self, shape):
        return np.full(shape, self.number)


@pytest.mark.parametrize("number, token", [(0.0, 1), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval(number, token):
    logits = np.array([[-np.inf, 0.0, 0.1, 0.2, -np.inf]])
    assert sample(logits, Fixed(number)).tolist() == [token]


# With a model


def test_tokens_have_the_probabilities_of_the_model(model):
    """At the second new token, so with the cache: its frequencies against the exact ones of two steps."""
    prompt, n = tokens(1, 5), 4000
    found = model.generate(np.repeat(prompt, n, axis=0), 2, seed=0, temperature=1.5)
    first = softmax(model(prompt).numpy()[0, -1].astype(np.float64) / 1.5)
    after = np.concatenate([np.repeat(prompt, 31, axis=0), np.arange(31)[:, None]], axis=1)
    p = sum(w * softmax(row / 1.5) for w, row in zip(first, model(after).numpy()[:, -1].astype(np.float64)))
    expected = n * p
    statistic = ((np.bincount(found[:, -1], minlength=31) - expected) ** 2 / expected).sum()
    assert statistic < 90  # 30 degrees of freedom: above once in ten million


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_given_and_what_comes_back(model, use_cache):
    ids = tokens(3, 5)
    settings = {"temperature": 0, "use_cache": use_cache}
    expected = model.generate(ids, 4, **settings)
    assert type(expected) is np.ndarray and expected.dtype.kind == "i"
    for prompt in (ids.tolist(), ids.astype(np.uint16), Tensor(ids)):
        found = generate(model, prompt, 4, **settings)
        assert np.array_equal(found, expected)
    assert np.array_equal(model.generate(ids, 0), ids)
    assert not np.array_equal(model.generate(ids, 20), model.generate(ids, 20))  # without a seed


@pytest.mark.parametrize(
    "ids, settings, said",
    [
        ([], {}, "no prompt"),
        (np.zeros((0, 4), int), {}, "no prompt"),
        ([[1], []], {}, "1 or more; a row of these has the shape (0,)"),
        ([1, 2], {}, "(batch, length), or are a list of rows"),
        (np.array([1, 2]), {}, "(batch, length), or are a list of rows"),
        (np.zeros((1, 2, 3), int), {}, "(2, 3)"),
        ("text", {}, "shape ()"),
        ([[1], [0.5]], {}, "integers"),
        ([[True]], {}, "integers"),
        (np.zeros((1, 81), int), {}, "81 tokens, and the model's context is 80"),
        ([[0, 1, 2], [0, 31]], {}, "token id 31 is out of range"),
        ([[0, -1]], {}, "token id -1 is out of range"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_k": 2.5}, "top_k is 2.5"),
        ([[1]], {"top_p": 0}, "top_p is 0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"top_p": float("nan")}, "top_p is nan"),
    ],
    ids=str,
)
def test_bad_arguments(model, ids, settings, said):
    settings = {"max_new_tokens": 3, **settings}
    assert said in one_line(pytest.raises(InputError, model.generate, ids, **settings))
    assert said in one_line(pytest.raises(InputError, lambda: list(stream(model, ids, **settings))))


def test_scores_that_are_no_numbers():
    model = scrambled()
    model.norm.bias.data = np.full_like(model.norm.bias.data, np.nan)
    for write in (lambda: model.generate([[1]], 2), lambda: model.beam_search([1], 2)):
        assert "not finite" in one_line(pytest.raises(InputError, write))


# Rows that begin and end apart


def expected_rows(model, prompts, new, stop=()):
    """What each prompt alone gets, token by token from the whole model."""
    rows = []
    for prompt in prompts:
        row = list(prompt)
        while len(row) < len(prompt) + new and not (len(row) > len(prompt) and row[-1] in stop):
            row.append(int(model(np.array([row[-model.context :]])).numpy()[0, -1].argmax()))
        rows.append(row)
    return rows


@pytest.mark.parametrize("lengths", [(3, 8, 1), (5, 5), (1, 20), (78, 79, 80)])
@pytest.mark.parametrize("stops", [None, 0, 2])
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_different_lengths(model, lengths, stops, use_cache):
    prompts = [tokens(n, seed=n).tolist() for n in lengths]
    free = expected_rows(model, prompts, 9)
    stop = set() if stops is None else {row[n + stops] for row, n in zip(free, lengths)}
    expected = expected_rows(model, prompts, 9, stop)
    settings = {"temperature": 0, "stop": stop, "use_cache": use_cache}
    found = model.generate(prompts, 9, **settings)
    assert type(found) is np.ndarray and found.shape == (len(prompts), max(map(len, expected)))
    for row, wanted in zip(found.tolist(), expected):
        assert row == wanted + [-1] * (len(row) - len(wanted))
    # The stream: each token once, a row's tokens without a gap between them, and never a step of nothing.
    steps = np.array(list(stream(model, prompts, 9, **settings)))
    assert (steps != -1).any(axis=1).all()
    for column, wanted, n in zip(steps.T, expected, lengths):
        places = np.flatnonzero(column != -1)
        assert column[places].tolist() == wanted[n:]
        assert np.ptp(places) == len(places) - 1


def test_prompts_of_arrays_and_tensors_of_different_lengths(model):
    prompts = [[1, 2, 3], [4]]
    expected = model.generate(prompts, 3, temperature=0)
    assert expected.tolist()[1][4:] == [-1, -1]
    given = [np.array([1, 2, 3], np.uint8), (4,)]
    assert np.array_equal(model.generate(given, 3, temperature=0), expected)
    assert model.generate(prompts, 0).tolist() == [[1, 2, 3], [4, -1, -1]]
    assert list(stream(model, prompts, 0)) == []


def test_a_drawn_row_ends_too(model):
    """With every token a stop, each row writes one. -1, where a row has nothing new, is no token."""
    found = model.generate([[1, 2], [3]], 5, seed=0, stop=range(-1, 31))
    assert found.shape == (2, 3) and found[1, 2] == -1 and (found[:, :2] != -1).all()


def test_nothing_is_computed_that_nobody_asked_for(monkeypatch):
    model = scrambled()
    steps = count_steps(model, monkeypatch)
    model.generate([[1, 2, 3], [4]], 0)
    assert steps == []
    first = model.generate([[1, 2, 3]], 1, temperature=0)[0, -1]
    del steps[:]
    model.generate([[1, 2, 3]], 9, temperature=0, stop=[first])
    assert [positions for positions, _ in steps] == [3]
    del steps[:]
    model.generate([[1, 2, 3], [1, 2, 3, 4, 5, 6]], 4, temperature=0)
    assert [positions for positions, _ in steps] == [3] + [1] * 6  # the last is written at position 9


# Beam search


class Table:
    """A reader as `search` wants it, with the scores of each text from a table made at random."""

    def __init__(self, seed, V, start, impossible):
        self.ids, self.seed, self.V, self.impossible = np.array([start]), seed, V, impossible
        self.steps = 0

    def score(self, row):
        rng = np.random.default_rng([self.seed, *row])
        scores = rng.normal(0, 0.3, self.V)  # flat, so that many ways to end are among the likeliest
        scores[: self.V - 1][rng.random(self.V - 1) < self.impossible] = -np.inf
        return scores

    def logits(self):
        self.steps += 1
        return np.array([self.score(row) for row in self.ids.tolist()], np.float32)

    def append(self, tokens):
        self.ids = np.concatenate([self.ids, tokens[:, None]], axis=1)

    def select(self, rows):
        self.ids = self.ids[rows]


def beams_by_definition(table, n, width, alpha, stop):
    """As the docstring says, on lists, and without leaving early."""
    living, done = [(0.0, [])], []
    start = table.ids[0].tolist()
    for length in range(1, n + 1):
        candidates = []
        for score, text in living:
            logits = np.float32(table.score(start + text)).astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum())
            candidates += [(score + log_p[v], [*text, v]) for v in range(table.V) if log_p[v] > -np.inf]
        candidates.sort(key=lambda pair: -pair[0])
        ends = [pair for pair in candidates if pair[1][-1] in stop or length == n]
        done += [
            (s / ((5 + length) / 6) ** alpha, text) for s, text in candidates[:width] if (s, text) in ends
        ]
        living = [pair for pair in candidates if pair not in ends][:width]
    return sorted(done, key=lambda pair: -pair[0])[:width]


def test_beam_search_is_as_defined():
    rng = np.random.default_rng(0)
    for case in range(800):
        V, n, width = rng.integers(1, 7), rng.integers(1, 5), rng.choice([1, 2, 3, 9])
        alpha, stop = rng.choice([0.0, 0.6, 6.0]), set(rng.integers(0, 6, rng.integers(0, 4)).tolist())
        start = rng.integers(0, 6, rng.integers(0, 3))
        table = Table(case, V, start, impossible=rng.choice([0.0, 0.3]))
        expected = beams_by_definition(table, n, width, alpha, stop)
        found = search(table, len(start), n, width, alpha, stop)
        assert [beam.tokens for beam in found] == [text for _, text in expected], case
        scores = [score for score, _ in expected]
        np.testing.assert_allclose([beam.score for beam in found], scores, rtol=0, atol=1e-9)
        assert all(type(token) is int for beam in found for token in beam.tokens)
        assert table.steps <= n


def test_a_search_ends_when_no_beam_can_overtake():
    class Ends(Table):  # token 0 ends a text, nearly certainly
        def score(self, row):
            return np.array([20.0, 1.0, 0.0])

    table = Ends(0, 3, [1], 0)
    found = search(table, 1, 50, 2, 0.6, {0})
    assert table.steps < 5 and found[0].tokens == [0] and len(found) == 2
    assert found[0].score == pytest.approx(-np.log1p(np.exp(-19) + np.exp(-20)), abs=1e-12)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"width": 0}, "width of 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"alpha": -1}, "alpha of 0"),
        ({"alpha": float("nan")}, "alpha of 0"),
        ({"prompt": []}, "1 or more"),
        ({"prompt": [[1, 2]]}, "1 or more"),
        ({"prompt": [31]}, "token id 31"),
        ({"prompt": [0.5]}, "integers"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_beam_search(model, change, said):
    settings = {"prompt": [1], "max_new_tokens": 2, **change}
    assert said in one_line(pytest.raises(InputError, model.beam_search, **settings))


def test_beam_search_restores_the_mode(monkeypatch):
    model = scrambled(replace(TINY, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    assert model.beam_search([1, 2], 3) == scrambled().beam_search([1, 2], 3)
    assert all(module.training for module in model.modules())
    monkeypatch.setattr(model, "head", None, raising=False)
    with pytest.raises(TypeError):
        model.beam_search([1, 2], 3)
    assert all(module.training for module in model.modules())


# Streaming


def count_steps(model, monkeypatch):
    """A list that grows by (positions computed, in training mode) with each step of the model."""
    steps, hidden_states = [], model.hidden_states

    def counted(ids, cache=None):
        steps.append((ids.shape[1], model.blocks[1].mlp.training or model.training))
        return hidden_states(ids, cache)

    monkeypatch.setattr(model, "hidden_states", counted, raising=False)
    return steps


def test_stream_gives_each_token_when_it_is_known(monkeypatch):
    model, ids = scrambled(), tokens(2, 77)
    expected = model.generate(ids, 6, seed=3)
    steps = count_steps(model, monkeypatch)
    for i, token in enumerate(stream(model, ids, 6, seed=3)):
        assert token.shape == (2,) and np.array_equal(token, expected[:, 77 + i])
        assert len(steps) == i + 1
    # One position a step with the cache, until the window moves and all positions change.
    assert [positions for positions, _ in steps] == [77, 1, 1, 1, 80, 80]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("leave", ["at the end", "close", "drop", "error"])
def test_the_mode_comes_back(monkeypatch, training, leave):
    model = scrambled().train(training)
    steps = count_steps(model, monkeypatch)
    tokens_of = stream(model, [[1, 2]], 4)
    next(tokens_of)
    assert not model.training and steps == [(2, False)]
    if leave == "at the end":
        list(tokens_of)
    elif leave == "close":
        tokens_of.close()
    elif leave == "drop":
        del tokens_of
        gc.collect()
    else:
        monkeypatch.setattr(model, "head", None, raising=False)
        with pytest.raises(TypeError):
            list(tokens_of)
    assert all(module.training is training for module in model.modules())


def test_dropout_is_off_and_nothing_is_recorded(monkeypatch):
    model = scrambled(replace(TINY, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    expected = scrambled().generate([[1, 2]], 8, temperature=0)
    heads, head = [], model.head
    monkeypatch.setattr(model, "head", lambda hidden: heads.append(head(hidden)) or heads[-1], raising=False)
    assert np.array_equal(model.train().generate([[1, 2]], 8, temperature=0), expected)
    assert len(heads) == 8 and not any(logits.requires_grad for logits in heads)


@pytest.mark.parametrize("T", [1, 2])
def test_a_full_cache_takes_no_more(model, T):
    """One position more than fits would else be lost without a word: NumPy spreads one over none."""
    cache = KeyValueCache(3)
    with no_grad():
        model(tokens(1, 3), cache)
        with pytest.raises(RuntimeError, match=f"{3 + T} positions do not fit a cache of 3"):
            model(tokens(1, T), cache)
