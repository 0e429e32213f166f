"""A corpus as tokens: what is learned from which side, and the folder, file or .gz given instead."""

import gzip

import numpy as np
import pytest

from tinyllm import corpus
from tinyllm.corpus import load, split_texts
from tinyllm.datasets import Document, documents, split_documents
from tinyllm.errors import InputError
from tinyllm.tokenizers import train_bpe


def texts_of(tokenizer, row):
    """The documents of a row of tokens, cut at end_of_text."""
    ends = [*np.flatnonzero(row == tokenizer.end_of_text), len(row)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [tokenizer.decode(row[start:end].tolist()) for start, end in zip(starts, ends)]


def test_rows_hold_the_documents_of_their_side():
    tokenizer, train, validation = load(None, 500)
    sides = split_documents(documents("prose"))
    for row, side in zip((train, validation), sides):
        assert row.ndim == 1 and row.dtype == np.uint16 and row.max() < tokenizer.vocabulary_size == 500
        assert texts_of(tokenizer, row) == [document.text for document in side]


def test_the_kind_of_documents_can_be_chosen(monkeypatch):
    made = lambda kind: [Document(kind, f"{kind} {i}", f"{kind}, text {i}") for i in range(40)]
    monkeypatch.setattr(corpus, "documents", made)
    for kind in ("docstrings", "sources"):
        train, validation = split_texts(None, kind)
        assert sorted(train + validation) == sorted(document.text for document in made(kind))
        loaded = load(None, 300, kind)
        assert texts_of(loaded.tokenizer, loaded.train) == train
        assert texts_of(loaded.tokenizer, loaded.validation) == validation


def test_the_encoding_is_learned_from_the_training_side_alone(monkeypatch):
    text = "\n\n".join(document.text for document in split_documents(documents("prose"))[0])
    seen = []
    progress = lambda merges: seen.append(merges) or iter(merges)
    assert load(None, 300, progress=progress).tokenizer.ranks == train_bpe(text, 300).ranks
    assert seen == [range(256, 299)]
    monkeypatch.setattr(corpus, "BPE_CHARACTERS", 1000)
    assert load(None, 300).tokenizer.ranks == train_bpe(text[:1000], 300).ranks


def test_a_file_is_cut_at_its_last_tenth_and_a_gz_file_too(tmp_path):
    text = "".join(f"line {i} of a text\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="\n")
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.txt", "a.gz"):
        (train,), (validation,) = split_texts(tmp_path / name)
        assert train + validation == text and abs(len(validation) - len(text) / 10) < 20
        tokenizer, row, held_out = load(tmp_path / name, 270)
        assert tokenizer.decode(row.tolist()) == train and tokenizer.decode(held_out.tolist()) == validation
        assert row.dtype == np.uint16


def test_a_folder_is_split_by_file_and_by_place_where_files_are_few(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"This is text {i}.", encoding="utf-8")
    train, validation = split_texts(tmp_path)
    assert sorted(train + validation) == sorted(f"This is text {i}." for i in range(40))
    assert 1 <= len(validation) <= 10
    loaded = load(tmp_path, 280)
    assert texts_of(loaded.tokenizer, loaded.train) == train
    assert texts_of(loaded.tokenizer, loaded.validation) == validation
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.txt").write_text("a line\n" * 50, encoding="utf-8", newline="\n")
    (train,), (validation,) = split_texts(few)
    assert train + validation == "a line\n" * 50 and len(validation) == 35


def test_what_a_corpus_cannot_be_made_of(tmp_path):
    for size in (3, 19):  # no character for validation, and one
        (tmp_path / "short.txt").write_text("a" * size, encoding="utf-8")
        with pytest.raises(InputError, match="short.txt holds too little text.*--data"):
            load(tmp_path / "short.txt", 300)
    with pytest.raises(InputError, match="absent.txt does not exist"):
        load(tmp_path / "absent.txt", 300)
    with pytest.raises(InputError, match="vocabulary of 256 is too small"):
        load(None, 256)
    with pytest.raises(InputError, match="kind 'poems'"):
        load(None, 300, "poems")
