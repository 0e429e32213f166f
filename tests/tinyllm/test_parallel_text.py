"""Parallel text: reading pairs, holding some out, and batches that lose none."""

from __future__ import annotations

import gzip
import itertools
import sys
from collections import Counter

import numpy as np
import pytest

from tinyllm.datasets import padded
from tinyllm.errors import InputError
from tinyllm.parallel_text import (
    PairSampler,
    Tokens,
    collate,
    encoded,
    evaluation_batches,
    learn_vocabulary,
    read_pairs,
    scores,
    split_pairs,
)

from .folders import one_line

PAIRS = [
    (f"the {a} {b} sees {c} dogs", f"{a} {b} voit {c} chiens" * (1 + c % 3))
    for a in ("red", "blue")
    for b in ("cat", "owl", "fox")
    for c in range(20)
]


@pytest.fixture(scope="module")
def vocabulary():
    return learn_vocabulary(PAIRS, 300)


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_read_pairs(tmp_path):
    expected = [("Go.", "Geh."), ("I see.", "Ach so.")]
    for text in (
        "Go.\tGeh.\nI see.\tAch so.\n",
        "Go.\tGeh.\r\nI see.\tAch so.",
        "\ufeffGo. \t Geh.\tCC-BY 2.0\nI see.\tAch so.\tCC-BY\tmore\n",
    ):
        assert read_pairs(write(tmp_path, "pairs.tsv", text)) == expected
    packed = write(tmp_path, "pairs.tsv.gz", gzip.compress(b"Go.\tGeh.\nI see.\tAch so.\n"))
    assert read_pairs(packed) == expected
    source = write(tmp_path, "a.en", "Go.\nI see.\n")
    target = write(tmp_path, "a.de", "Geh.\nAch so.")
    assert read_pairs(source, target) == expected
    # Only a line's end ends a line, whatever else Python's splitlines takes for one.
    odd = write(tmp_path, "odd.tsv", "a\u2028b\x0cc\tx\x85y\n")
    assert read_pairs(odd) == [("a\u2028b\x0cc", "x\x85y")]


@pytest.mark.parametrize(
    "text, said",
    [
        ("a\tb\nc\n", "line 2 has no tab"),
        ("a\tb\n\nc\td\n", "line 2 is empty"),
        ("a\tb\n \td\n", "line 2 has an empty source"),
        ("a\t\nc\td\n", "line 1 has an empty target"),
        ("a\t\tb\n", "line 1 has an empty target"),
        ("", "holds no text"),
        (b"a\t\xff\n", "is not UTF-8"),
    ],
)
def test_bad_pairs(tmp_path, text, said):
    path = write(tmp_path, "pairs.tsv", text)
    message = one_line(pytest.raises(InputError, read_pairs, path))
    assert said in message and "pairs.tsv" in message and "lines to mend" not in message


def test_bad_lines_are_counted(tmp_path):
    """So that nobody mends them one by one, whatever is wrong with each."""
    path = write(tmp_path, "pairs.tsv", "a\tb\nc\n\n \td\ne\tf\ng\t\n")
    message = one_line(pytest.raises(InputError, read_pairs, path))
    assert "pairs.tsv, line 2 has no tab" in message and "the first of 4 lines to mend" in message
    one, two = write(tmp_path, "one", "a\nb\n\nd\n"), write(tmp_path, "two", "x\n\nz\n\n")
    message = one_line(pytest.raises(InputError, read_pairs, one, two))
    assert "two, line 2 has an empty target" in message and "the first of 3 lines to mend" in message


def test_bad_files_side_by_side(tmp_path):
    one, two = write(tmp_path, "one", "a\nb\n"), write(tmp_path, "two", "x\ny\nz\n")
    message = one_line(pytest.raises(InputError, read_pairs, one, two))
    assert "one has 2 lines" in message and "two 3" in message
    empty = write(tmp_path, "empty", "x\n\n")
    assert "empty, line 2 has an empty target" in one_line(pytest.raises(InputError, read_pairs, one, empty))
    assert "one, line 1 has an empty source" in one_line(
        pytest.raises(InputError, read_pairs, write(tmp_path, "one", "\t\nb\n"), empty)
    )
    assert "does not exist" in one_line(pytest.raises(InputError, read_pairs, one, tmp_path / "absent"))


def test_no_source_stands_on_both_sides():
    doubled = [*PAIRS, *((source, target + "!") for source, target in PAIRS), *PAIRS[:5]]
    train, held_out = split_pairs(doubled, 30, seed=1)
    assert len(held_out) == 30 == len({source for source, _ in held_out})
    assert not {source for source, _ in held_out} & {source for source, _ in train}
    assert len(train) == 2 * 90 and set(train) < set(doubled) and set(held_out) <= set(PAIRS)
    assert split_pairs(doubled, 30, seed=1) == (train, held_out)
    assert split_pairs(doubled, 30, seed=2)[1] != held_out
    for pairs, n in ((PAIRS, 61), (PAIRS[:1], 1), ([], 1)):
        assert "too few" in one_line(pytest.raises(InputError, split_pairs, pairs, n))


def test_the_vocabulary(vocabulary):
    """One for both sides: what is frequent on either became a token; two more end and pad."""
    assert vocabulary.size <= 300 and vocabulary.pad == vocabulary.size - 1 == vocabulary.end + 1
    ids = vocabulary.source("the owl")
    assert ids[-1] == vocabulary.end and vocabulary.end not in ids[:-1] and len(ids) < 8
    assert len(vocabulary.tokenizer.encode(" chiens")) == 1 == len(vocabulary.tokenizer.encode(" dogs"))
    assert vocabulary.text([*ids, vocabulary.pad, -1, -1]) == "the owl"
    assert "".join(vocabulary.pieces(ids)) == "the owlend"
    assert "257" in one_line(pytest.raises(InputError, learn_vocabulary, PAIRS, 257))


def test_sentences_that_are_too_long(vocabulary):
    (pair,) = encoded([("aaa", "bbbbb")], vocabulary, 6)
    assert len(pair.source) == 4 and len(pair.target) == 5 and pair.length == 6
    for longer in (("aaa", "bbbbb"), ("zqzqz", "b")):
        pairs = [("a", "b"), longer, ("b", "a"), ("zqzqzqz", "b")]
        message = one_line(pytest.raises(InputError, encoded, pairs, vocabulary, 5))
        assert "reads 5 tokens" in message and "2 of 4 pairs have more, up to 8" in message
        assert f"pair 2 (line 2 of a file), {longer[0]!r}" in message


def test_collate(vocabulary):
    end, pad = vocabulary.end, vocabulary.pad
    (ids, lengths, decoder_ids), targets = collate(
        [Tokens([5, 6, end], [7]), Tokens([8, end], [9, 10, 11])], vocabulary
    )
    assert ids.tolist() == [[5, 6, end], [8, end, pad]] and lengths.tolist() == [3, 2]
    assert decoder_ids.tolist() == [[pad, 7, pad, pad], [pad, 9, 10, 11]]
    assert targets.tolist() == [[7, end, -100, -100], [9, 10, 11, end]]


def test_padded():
    ids, lengths = padded([[1, 2], [3]], fill=9)
    assert ids.tolist() == [[1, 2], [3, 9]] and lengths.tolist() == [2, 1]
    assert ids.dtype == lengths.dtype == np.int64


def content(batch):
    """The pairs of a batch, without their padding."""
    (ids, lengths, decoder_ids), targets = batch
    rows = []
    for row, n, read, wanted in zip(ids, lengths, decoder_ids, targets):
        kept = wanted[wanted != -100]
        assert np.array_equal(read[1 : len(kept)], kept[:-1])
        rows.append((tuple(row[:n]), tuple(kept)))
    return rows


def test_an_epoch_has_each_pair_once(vocabulary):
    pairs = encoded(PAIRS, vocabulary, 200)
    tokens = 3 * max(pair.length for pair in pairs)
    sampler = PairSampler(pairs, vocabulary, tokens, seed=3)
    expected = Counter((tuple(p.source), (*p.target, vocabulary.end)) for p in pairs)
    orders, together = [], []
    for epoch in range(3):
        batches = [sampler.batch(epoch * len(sampler) + i) for i in range(len(sampler))]
        found = [row for batch in batches for row in content(batch)]
        assert Counter(found) == expected
        orders.append(found)
        together.append({frozenset(content(batch)) for batch in batches})
        for (ids, _, decoder_ids), _ in batches:
            assert max(ids.size, decoder_ids.size) <= tokens
    assert orders[0] != orders[1] != orders[2]
    assert together[0] != together[1] != together[2]  # other pairs meet
    widths = [max(ids.shape[1], read.shape[1]) for (ids, _, read), _ in batches]
    assert widths != sorted(widths)  # short ones do not always come first
    lengths = np.sort(sampler.lengths)  # full: one pair more would be too much
    for start, end in itertools.pairwise(sampler.cuts):
        assert (end - start) * lengths[end - 1] <= tokens < (end + 1 - start) * lengths[end]
    wanted = np.concatenate([targets.ravel() for _, targets in batches])
    assert (wanted == -100).mean() < 0.15


def test_a_batch_depends_on_the_seed_and_the_step(vocabulary):
    pairs = encoded(PAIRS, vocabulary, 200)
    one, two, three = (PairSampler(pairs, vocabulary, 150, seed) for seed in (1, 1, 2))
    far = 2 * len(one) + 1
    first = [content(one.batch(step)) for step in (0, 1, far)]
    assert content(two.batch(far)) == first[2] and content(two.batch(0)) == first[0] != first[1]
    assert content(three.batch(0)) != first[0]


def test_a_pair_longer_than_a_batch_is_one(vocabulary):
    pairs = [Tokens([1] * n, [2]) for n in (3, 50, 3, 60)]
    sampler = PairSampler(pairs, vocabulary, 8, seed=0)
    assert sorted(sampler.batch(i)[0][0].shape for i in range(len(sampler))) == [(1, 50), (1, 60), (2, 3)]
    assert len(PairSampler(pairs[:1], vocabulary, 1)) == 1


def test_evaluation_batches(vocabulary):
    pairs = encoded(PAIRS, vocabulary, 200)
    batches = evaluation_batches(pairs, vocabulary, rows=50)
    assert [len(targets) for _, targets in batches] == [50, 50, 20]
    found = Counter(row for batch in batches for row in content(batch))
    assert found == Counter((tuple(p.source), (*p.target, vocabulary.end)) for p in pairs)


def test_scores():
    """As sacrebleu has them; a perfect translation has 100 of each."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra: pip install -e '.[translation]'")
    expected = ["the cat sat on the mat", "a dog ran over the green field"]
    assert scores(expected, expected) == pytest.approx({"BLEU": 100, "chrF": 100})
    found = scores(["the cat sat on a mat", "the dog ran over a field"], expected)
    bleu = sacrebleu.corpus_bleu(["the cat sat on a mat", "the dog ran over a field"], [expected])
    assert found["BLEU"] == bleu.score and 10 < found["BLEU"] < 55 < found["chrF"] < 80


def test_scores_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert scores(["a"], ["a"]) == {}
