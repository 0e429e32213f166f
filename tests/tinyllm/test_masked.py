"""Rows, masks and pairs: what BERT is given to learn from."""

from __future__ import annotations

import numpy as np
import pytest

from tinyllm.datasets import documents as default_documents
from tinyllm.datasets import sentences
from tinyllm.errors import InputError
from tinyllm.masked import SentencePairs, SpecialTokens, mask_tokens, with_special_tokens
from tinyllm.tokenizers import CharacterTokenizer, load_tokenizer, train_bpe

from .folders import one_line

SPECIAL = SpecialTokens(pad=100, cls=101, sep=102, mask=103)


def test_a_tokenizer_with_the_special_tokens(tmp_path):
    """They are new, stand behind all others, and text that looks like them is text."""
    plain = train_bpe("the cat and the hat and the bat", 262)
    tokenizer = with_special_tokens(plain)
    special = SpecialTokens.of(tokenizer)
    assert special == tuple(range(plain.vocabulary_size, plain.vocabulary_size + 4))
    text = "the cat [MASK] [SEP]"
    assert tokenizer.encode(text) == plain.encode(text) and not set(special) & set(tokenizer.encode(text))
    assert tokenizer.decode([special.mask, *tokenizer.encode(" hat")]) == "[MASK] hat"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert SpecialTokens.of(again) == special and again.encode(text) == tokenizer.encode(text)


def test_a_tokenizer_without_them():
    with pytest.raises(InputError, match=r"no \[PAD\], \[CLS\], \[SEP\], \[MASK\]"):
        SpecialTokens.of(train_bpe("text", 257))
    lacking = CharacterTokenizer("abc")
    lacking.special_tokens = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2}
    assert "has no [MASK]" in one_line(pytest.raises(InputError, SpecialTokens.of, lacking))


def test_rows():
    assert SPECIAL.row([1, 2]) == ([101, 1, 2, 102], [0, 0, 0, 0])
    assert SPECIAL.row([1, 2], [3]) == ([101, 1, 2, 102, 3, 102], [0, 0, 0, 0, 1, 1])
    assert SPECIAL.row([1, 2], []) == ([101, 1, 2, 102, 102], [0, 0, 0, 0, 1])
    assert SPECIAL.row([1, 2, 3], longest=4) == ([101, 1, 2, 102], [0, 0, 0, 0])
    assert SPECIAL.row([1, 2, 3], longest=5) == ([101, 1, 2, 3, 102], [0] * 5)


@pytest.mark.parametrize("n, m", [(10, 3), (3, 10), (10, 10), (1, 1), (5, 0)])
def test_long_pairs_are_cut_where_they_are_longer(n, m):
    first, second = list(range(n)), list(range(50, 50 + m))
    for longest in range(5, 26):
        ids, segments = SPECIAL.row(first, second, longest)
        a, b = ids[1 : ids.index(102)], ids[ids.index(102) + 1 : -1]
        assert a == first[: len(a)] and b == second[: len(b)] and len(segments) == len(ids)
        assert len(ids) == min(longest, n + m + 3)
        if len(ids) < n + m + 3:  # no text is cut below the length of the other
            assert len(a) == n or len(a) + 1 >= len(b)
            assert len(b) == m or len(b) + 1 >= len(a)
    assert "no room" in one_line(pytest.raises(InputError, SPECIAL.row, first, second, 4))
    assert "no room" in one_line(pytest.raises(InputError, SPECIAL.row, first, None, 2))
    assert (first, second) == (list(range(n)), list(range(50, 50 + m)))  # as they were


def test_batches_are_padded_at_the_end():
    ids, mask, segments = SPECIAL.batch([SPECIAL.row([1], [2, 3]), SPECIAL.row([4])])
    assert ids.tolist() == [[101, 1, 102, 2, 3, 102], [101, 4, 102, 100, 100, 100]]
    assert mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
    assert ids.dtype == mask.dtype == segments.dtype == np.int64


def test_the_shares_of_masking():
    """15 % chosen, of these 80 / 10 / 10, within four standard errors; targets are what stood there."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100, (2000, 100))
    ids[:, 0], ids[:, 50], ids[:, 90:] = 101, 102, 100
    inputs, targets = mask_tokens(ids, SPECIAL, SPECIAL.mask, 104, rng)
    chosen, special = targets != -100, ids >= 100
    assert not chosen[special].any() and np.array_equal(inputs[special], ids[special])
    assert np.array_equal(targets[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    near = lambda share, p, n: abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5
    n, count = (~special).sum(), chosen.sum()
    assert near(chosen.sum() / n, 0.15, n)
    masked, same = inputs[chosen] == SPECIAL.mask, inputs[chosen] == ids[chosen]
    assert near(masked.mean(), 0.8, count)
    assert near(same.mean(), 0.1 + 0.1 / 100, count)  # a random token may be the right one
    random = inputs[chosen & (inputs != SPECIAL.mask) & (inputs != ids)]
    assert random.max() < 100 and (np.bincount(random, minlength=100) > 0).all()
    # Positions and tokens are chosen alike.
    assert all(near(share, 0.15, 2000) for share in chosen[:, 1:50].mean(axis=0))
    # Another draw is another mask; the ids are as they were.
    again, _ = mask_tokens(ids, SPECIAL, SPECIAL.mask, 104, rng)
    assert (again != inputs).any()


@pytest.mark.parametrize("rate, share", [(0.0, 0.0), (1.0, 1.0)])
def test_other_rates(rate, share):
    ids = np.arange(100).reshape(2, 50)
    _, targets = mask_tokens(ids, SPECIAL, SPECIAL.mask, 104, np.random.default_rng(0), rate)
    assert (targets != -100).mean() == share


def documents(count, sentences=6, longest=7):
    """Sentences whose tokens tell where they stand: 1000 d + 20 i + place."""
    rng = np.random.default_rng(0)
    return [
        [[1000 * d + 20 * i + k for k in range(rng.integers(1, longest))] for i in range(sentences)]
        for d in range(count)
    ]


@pytest.mark.parametrize("longest", [7, 16, 40, 200])
def test_pairs_follow_or_come_from_another_document(longest):
    found = documents(5)
    pairs, rng = SentencePairs(found, longest), np.random.default_rng(0)
    starts, labels = set(), []
    for _ in range(600):
        first, second, label = pairs.draw(rng)
        labels.append(label)
        assert first and second and len(first) + len(second) + 3 <= longest
        (d, i), (other, j) = ((text[0] // 1000, text[0] % 1000 // 20) for text in (first, second))
        starts.add((d, i))
        for text, document, start in ((first, d, i), (second, other, j)):
            whole = [token for sentence in found[document][start:] for token in sentence]
            assert text == whole[: len(text)]
        last = first[-1] % 1000 // 20  # the sentence that the first text ends with
        assert (other == d) == (label == 0)
        if label == 0:
            assert j == last + 1
    assert starts == {(d, i) for d in range(5) for i in range(5)}  # never the last, which nothing follows
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / 600**0.5


def test_a_second_text_alone_does_not_tell_whether_it_followed():
    """It begins at each sentence of a document but the first, in both cases equally often."""
    pairs, rng = SentencePairs(documents(9), 30), np.random.default_rng(1)
    counts = np.zeros((2, 6))
    for _ in range(4000):
        _, second, label = pairs.draw(rng)
        counts[label, second[0] % 1000 // 20] += 1
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert not counts[:, 0].any()
    assert np.abs(shares[0] - shares[1]).max() < 0.05  # three standard errors of 2,000 draws


def test_a_sentence_longer_than_the_room_is_cut_and_nothing_follows_the_cut():
    pairs = SentencePairs([[list(range(100)), [200, 201]], [[300], [301]]], 13)
    drawn = [pairs.draw(np.random.default_rng(seed)) for seed in range(50)]
    cut = [(a, b) for a, b, label in drawn if a[0] == 0 and label == 0]
    assert cut and all(a == [0, 1, 2, 3, 4] and b == [200, 201] for a, b in cut)


def test_documents_that_make_no_pairs():
    for found in ([], [[[1], [2]]], [[[1], [2]], [[3]]]):
        assert "two documents" in one_line(pytest.raises(InputError, SentencePairs, found, 20))


def test_sentences():
    text = (
        "One sentence.  Another,\nwrapped one! Is e.g. this\tone? (Yes.)\n\n"
        "A heading\n \nIt is 3.5 long. 4 more.  \n\n\n\n \"Quoted.\" 'So too.'\n"
    )
    assert sentences(text) == [
        "One sentence.", "Another, wrapped one!", "Is e.g. this one?", "(Yes.)", "A heading",
        "It is 3.5 long.", "4 more.", '"Quoted." \'So too.\'',
    ]  # fmt: skip
    assert sentences("") == sentences(" \n\n ") == []
    whole = " ".join(default_documents("prose")[5].text.split())
    assert " ".join(sentences(default_documents("prose")[5].text)) == whole
