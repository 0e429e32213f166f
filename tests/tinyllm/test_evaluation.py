"""Few-shot evaluation: the likelihoods that it computes, the answers it chooses, the prompts it builds."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

import autograd.functional as F
from autograd import Tensor, no_grad
from tinyllm.errors import InputError
from tinyllm.evaluation import Example, Question, accuracy, choose, complete, few_shot, log_likelihoods

from .tiny import TINY


@pytest.fixture(scope="module")
def model():
    return TINY["gpt3"](0)


class Table:
    """A model whose next token depends on the last one alone: probabilities p (V, V). It counts its rows."""

    training = True

    def __init__(self, p, context=10):
        with np.errstate(divide="ignore"):
            self.table = np.log(np.array(p)).astype(np.float32)
        self.vocabulary_size, self.context, self.rows = len(p), context, []

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.train(False)

    def hidden_states(self, ids, cache=None):
        assert not self.training
        self.rows.append(ids.shape)
        return Tensor(np.eye(self.vocabulary_size, dtype=np.float32)[ids])

    def head(self, hidden):
        return hidden @ Tensor(self.table)


def uniform_table(V=4, **settings):
    return Table(np.full((V, V), 1 / V), **settings)


def random_pairs(count, V=31, longest=12, seed=0):
    rng = np.random.default_rng(seed)
    row = lambda: rng.integers(0, V, rng.integers(1, longest)).tolist()
    return [(row(), row()) for _ in range(count)]


def one_by_one(model, pairs):
    """Each token's log-probability from the logits of all tokens before it, in float64, without padding."""
    found = []
    for context, completion in pairs:
        total, read = 0.0, list(context)
        for token in completion:
            with no_grad():
                z = model([read]).numpy()[0, -1].astype(np.float64)
            total += z[token] - z.max() - math.log(np.exp(z - z.max()).sum())
            read.append(token)
        found.append(total)
    return np.array(found)


# Likelihoods


@pytest.mark.parametrize("name", sorted(TINY))
def test_likelihoods_are_products_of_conditional_probabilities(name):
    """For every causal model: pairs of all lengths together, in batches in which most rows are filled up."""
    model, pairs = TINY[name](0), random_pairs(12)
    expected = one_by_one(model, pairs)
    for batch in (1, 5, 32):
        found = log_likelihoods(model, pairs, batch)
        assert found.dtype == np.float64 and found.shape == (12,)
        # Logits of a few tens, rounded to 6e-8 of themselves, over up to 11 tokens
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert np.ptp(expected) > 5


def test_likelihoods_in_double_precision():
    """Where rounding hides nothing, not even a token's probability that is missing or counted twice."""
    model, pairs = TINY["gpt3"](0).to(dtype=np.float64), random_pairs(10, seed=1)
    np.testing.assert_allclose(log_likelihoods(model, pairs, 4), one_by_one(model, pairs), rtol=1e-12)


def test_all_completions_of_a_length_share_one(model):
    small = Table(np.random.default_rng(0).dirichlet(np.ones(5), 5))
    for length in (1, 2, 3):
        pairs = [([2, 4], c) for c in itertools.product(range(5), repeat=length)]
        assert np.exp(log_likelihoods(small, pairs)).sum() == pytest.approx(1, abs=1e-6)
    assert np.exp(log_likelihoods(model, [([3, 1], [i]) for i in range(31)])).sum() == pytest.approx(
        1, abs=1e-6
    )


def test_what_is_read_alike_is_read_once():
    table = uniform_table(5)
    log_likelihoods(table, [([1, 2, 3], [i]) for i in range(5)] + [([1, 2], [3, 0]), ([1], [2, 3, 4])])
    assert table.rows == [(1, 3)]
    table.rows.clear()
    log_likelihoods(table, [([1, 2, 3], [i, 0]) for i in range(5)] + [([4], [4])], batch=4)
    assert table.rows == [(4, 4), (2, 4)]  # the shortest first, so that rows of a batch are much alike


def test_the_order_of_pairs_is_kept(model):
    pairs = random_pairs(9)
    found = log_likelihoods(model, pairs, 2)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(log_likelihoods(model, [pairs[i] for i in order], 4), found[order], rtol=1e-5)
    np.testing.assert_allclose(log_likelihoods(model, [pairs[2]] * 3), found[[2, 2, 2]], rtol=1e-5)
    assert log_likelihoods(model, []).shape == (0,)


def test_arrays_tuples_and_lists(model):
    context, completion = [3, 1, 4], [1, 5]
    expected = log_likelihoods(model, [(context, completion)])
    for kind in (tuple, np.array, lambda x: np.array(x, np.uint16)):
        assert np.array_equal(log_likelihoods(model, [(kind(context), kind(completion))]), expected)


def test_dropout_is_off_and_the_mode_comes_back(model):
    table = uniform_table()
    for mode in (True, False):
        table.train(mode)
        log_likelihoods(table, [([1], [2])])
        assert table.training is mode
        with pytest.raises(InputError):
            log_likelihoods(table, [([1], [9])])
        assert table.training is mode
    table.train()
    table.head = lambda hidden: 1 / 0
    with pytest.raises(ZeroDivisionError):
        log_likelihoods(table, [([1], [2])])
    assert table.training


def test_the_longest_that_fits(model):
    """The last token of a completion is not read, so a pair may have one token more than the context."""
    context, completion = [1] * 70, [2] * 11
    assert np.isfinite(log_likelihoods(model, [(context, completion)])).all()
    with pytest.raises(InputError, match="take 81 positions, and the model's context is 80: give fewer"):
        log_likelihoods(model, [(context, [*completion, 2])])


@pytest.mark.parametrize(
    "pair, said",
    [
        (([], [1]), "1 or more token ids"), (([1], []), "1 or more token ids"), (([[1]], [1]), "not [[1]]"),
        (([1.0], [1]), "not [1.0]"), ((["a"], [1]), "not ['a']"), (([1], [31]), "token id 31 is out"),
        (([-1], [1]), "token id -1"), (("ab", [1]), "not ab"),
    ],
    ids=str,
)  # fmt: skip
def test_pairs_that_are_none(model, pair, said):
    with pytest.raises(InputError) as error:
        log_likelihoods(model, [([1], [2]), pair])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_damaged_weights():
    table = uniform_table()
    table.table[1, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        log_likelihoods(table, [([1], [2])])


def test_composed_operations_and_a_gpu_give_the_same(model, strict_cupy):
    pairs = random_pairs(6)
    expected = log_likelihoods(model, pairs)
    on_gpu = TINY["gpt3"](0).to("cuda")
    for fused in (True, False):
        F.use_fused(fused)
        try:
            for m in (model, on_gpu):
                found = log_likelihoods(m, pairs)
                assert type(found) is np.ndarray
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        finally:
            F.use_fused(True)


# Answers

#           to 0  1    2    3
CHAIN = [
    [0.01, 0.60, 0.30, 0.09],  # from 0
    [0.01, 0.01, 0.49, 0.49],  # from 1
    [0.05, 0.05, 0.45, 0.45],  # from 2
    [0.01, 0.68, 0.01, 0.30],
]  # from 3: what is likely after an answer's prompt, 1, is so anyway
# fmt: skip


def test_the_likeliest_a_token_is_chosen():
    """[2] has probability .30 and [1, 3] .60 * .49 = .294: less, but .54 a token."""
    table = Table(CHAIN)
    question = Question([0], [[2], [1, 3]], 1)
    (short, long) = log_likelihoods(table, [([0], c) for c in question.completions])
    assert short > long
    assert choose(table, [question]).tolist() == [1]


def test_weighed_by_what_it_is_worth_without_the_question():
    """P(1 | 0) = .60 is the largest, but after the prompt of an answer, 3, it is .68: .88 times as likely
    now. P(2 | 0) = .30 is 30 times what it was."""
    table = Table(CHAIN)
    question = Question([2, 0], [[1], [2], [3]], 1)
    assert choose(table, [question]).tolist() == [0]
    assert choose(table, [question], answer_context=[3]).tolist() == [1]
    # The ratio is of whole completions: .60 * .49 / (.68 * .49) = .88, .09 / .30 = .30
    assert choose(table, [Question([0], [[3], [1, 3]], 0)], answer_context=[3]).tolist() == [1]
    # and not by token: .30 * .45^3 / (.01 * .45^3) = 30, the root of which is 2.3; .05 / .01 = 5
    table.table[0, 0], table.table[3, 0] = np.log(0.05), np.log(0.01)
    assert choose(table, [Question([0], [[0], [2, 2, 2, 2]], 1)], answer_context=[3]).tolist() == [1]


def test_questions_of_different_sizes(model):
    rng = np.random.default_rng(3)
    row = lambda n: rng.integers(0, 31, n).tolist()
    questions = [
        Question(row(1 + i), [row(1 + (i + j) % 3) for j in range(1 + i % 4)], i % 2) for i in range(9)
    ]
    expected = [
        np.argmax([one_by_one(model, [(q.context, c)])[0] / len(c) for c in q.completions]) for q in questions
    ]
    found = choose(model, questions, batch=3)
    assert found.tolist() == expected and len(set(expected)) > 2
    right = np.mean([a == q.answer for a, q in zip(expected, questions)])
    assert accuracy(model, questions) == right and 0 < right < 1
    weighed = [
        np.argmax([np.subtract(*one_by_one(model, [(q.context, c), ([7, 7], c)])) for c in q.completions])
        for q in questions
    ]
    assert choose(model, questions, [7, 7]).tolist() == weighed != expected
    assert accuracy(model, questions, [7, 7]) == np.mean([a == q.answer for a, q in zip(weighed, questions)])


def test_no_questions(model):
    assert choose(model, []).shape == (0,)
    with pytest.raises(InputError, match="no questions"):
        accuracy(model, [])
    with pytest.raises(InputError, match="no completions to choose from"):
        choose(model, [Question([1], [[2]], 0), Question([1], [], 0)])


# Prompts

PAIRS = [Example("sea =>", " mer"), Example("cat =>", " chat"), Example("dog =>", " chien")]


def test_prompts():
    rng = np.random.default_rng(0)
    task = "Translate English to French:"
    assert few_shot(PAIRS, 0, "bread =>", rng) == "bread =>"
    assert few_shot(PAIRS, 0, "bread =>", rng, task, "\n") == f"{task}\nbread =>"
    assert few_shot(PAIRS[:1], 1, "bread =>", rng, task) == f"{task}\n\nsea => mer\n\nbread =>"
    lines = few_shot(PAIRS, 3, "bread =>", rng, separator="\n").split("\n")
    assert sorted(lines[:3]) == ["cat => chat", "dog => chien", "sea => mer"] and lines[3] == "bread =>"


def test_examples_are_drawn_anew_and_none_twice():
    rng = np.random.default_rng(0)
    drawn = [few_shot(PAIRS, 2, "?", rng, separator="|").split("|")[:2] for _ in range(600)]
    assert all(first != second for first, second in drawn)
    counts = {tuple(shots): drawn.count(shots) for shots in drawn}
    assert len(counts) == 6 and all(70 < n < 130 for n in counts.values())  # 100, within 3.3 deviations
    again = [few_shot(PAIRS, 2, "?", np.random.default_rng(5)) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("k", [-1, 4])
def test_more_shots_than_examples(k):
    with pytest.raises(InputError, match=f"{k} shots of 3 examples: choose from 0 to 3"):
        few_shot(PAIRS, k, "bread =>", np.random.default_rng(0))


# Free-form


def test_beam_search_as_in_the_paper(model):
    asked = {}

    def beam_search(prompt, max_new_tokens, **settings):
        asked.update(settings, prompt=prompt, max_new_tokens=max_new_tokens)
        return model.beam_search(prompt, max_new_tokens, **settings)

    best = model.beam_search([3, 1], 6, width=4, alpha=0.6, stop=[])[0].tokens
    spy = SimpleNamespace(beam_search=beam_search)
    assert complete(spy, [3, 1], 6) == best and len(best) == 6
    assert asked == {"prompt": [3, 1], "max_new_tokens": 6, "width": 4, "alpha": 0.6, "stop": ()}


def test_the_stop_token_is_no_part_of_the_answer():
    beams = lambda tokens: SimpleNamespace(
        beam_search=lambda *args, **settings: [SimpleNamespace(tokens=tokens), SimpleNamespace(tokens=[9])]
    )
    for tokens, expected in (([4, 5, 0], [4, 5]), ([4, 0, 5], [4, 0, 5]), ([0], []), ([4, 1], [4])):
        assert complete(beams(tokens), [1], 3, stop=[0, 1]) == expected
