"""Texts with labels: the docstrings' task, tables of two columns, and what is wrong with them."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from tinyllm.datasets import Document, documents
from tinyllm.errors import InputError
from tinyllm.labelled import Texts, masked, naive_bayes, read_tsv, split_task

from .folders import one_line

encode = lambda text: list(text.encode())


def write(folder, text, name="data.tsv"):
    (folder / name).write_bytes(text.encode("utf-8"))
    return folder / name


def test_a_table_is_read(tmp_path):
    text = "\ufeffGood film\tpos\r\n\n  A tab\there\tneg \nnaïve\tpos\n   \n"
    expected = [("pos", "Good film"), ("neg", "A tab\there"), ("pos", "naïve")]
    path = write(tmp_path, text)
    assert [(d.label, d.text) for d in read_tsv(path)] == expected
    with gzip.open(tmp_path / "data.tsv.gz", "wb") as file:
        file.write(text.encode())
    assert read_tsv(tmp_path / "data.tsv.gz") == read_tsv(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("good\tpos\nno tab\nbad\tneg", "line 2 has no tab"),
        ("good\tpos\n\tneg", "line 2 has an empty text"),
        ("good\tpos\nbad\t", "line 2 has an empty label"),
        ("good\tpos\nbetter\tpos", "less than two labels"),
        ("\n \n", "less than two labels"),
        ("", "holds no text"),
    ],
)
def test_tables_that_are_none(tmp_path, text, said):
    path = write(tmp_path, text)
    message = one_line(pytest.raises(InputError, read_tsv, path))
    assert said in message and "data.tsv" in message and "lines to mend" not in message


def test_bad_lines_are_counted(tmp_path):
    path = write(tmp_path, "good\tpos\n\n\tneg\nno tab\nbad\t\nbad\tneg\n")
    message = one_line(pytest.raises(InputError, read_tsv, path))
    assert "line 3 has an empty text (the first of 3 lines to mend)" in message


def many(count=200, labels="ab"):
    return [Document(labels[i % len(labels)], f"name {i}", f"text number {i}") for i in range(count)]


def test_a_task():
    task = split_task(many(), encode, 100)
    assert task.names == ["a", "b"]
    sides = (task.train, task.held_out)
    assert 0.2 < len(task.held_out.labels) / 200 < 0.4 and task.cut == 0
    read = {bytes(tokens).decode(): task.names[k] for side in sides for tokens, k in zip(*side)}
    assert read == {document.text: document.label for document in many()}
    for side in sides:
        lengths = [len(tokens) for tokens in side.tokens]
        assert lengths == sorted(lengths) and side.labels.dtype.kind == "i"


def test_classes_are_in_the_order_of_their_frequency():
    assert split_task([*many(60, "abb"), *many(300, "c")[60:]], encode, 99).names == ["c", "b", "a"]


def test_no_text_that_is_read_alike_is_on_both_sides():
    """Cut, many texts are the same."""
    task = split_task(many(), encode, 13)  # "text number 1" of 111 texts
    read = [tuple(tokens) for side in (task.train, task.held_out) for tokens in side.tokens]
    assert len(read) == len(set(read)) == 10 and max(map(len, read)) == 13
    assert task.cut == 0  # the first of each is whole
    assert split_task(many()[10:], encode, 13).cut == 9
    twins = [*many(), *(document._replace(label="z", name=document.name + "2") for document in many())]
    task = split_task(twins, encode, 99)  # "z" is the most frequent label, and none of its texts is kept
    assert task.alike == 200 and "z" not in task.names


def test_tasks_that_are_none():
    said = lambda found: one_line(pytest.raises(InputError, split_task, found, encode, 99))
    assert "too few" in said(many(1))
    assert "too few" in said([])
    held = [bytes(t).decode() for t in split_task(many(), encode, 99).held_out.tokens]
    for count, names in ((1, "alone: 'rare 0'; "), (3, "alone: 'rare 0', 'rare 1', 'rare 2'; "),
                         (6, "'rare 3' and 2 more; ")):  # fmt: skip
        rare = {text: f"rare {i}" for i, text in enumerate(held[:count])}
        assert names in said([d._replace(label=rare.get(d.text, d.label)) for d in many()])


def test_names_are_masked_and_only_frequent_public_labels_stay():
    found = [Document("json", "json.load", "A JSON text, by json; subjson.")] * 3
    found += [Document("csv", "csv.reader", "Not json but CSV")] * 2
    found += [Document("_io", "_io.x", "private")] * 9 + [Document("abc", "abc.x", "rare")]
    kept = masked(found, 2)
    assert {d.label for d in kept} == {"json", "csv"}
    assert {d.text for d in kept} == {"A package text, by package; subpackage.", "Not package but package"}


def test_the_docstrings_of_python():
    found = masked(documents("docstrings"), 8)
    labels = {document.label for document in found}
    assert len(labels) == 8 and "asyncio" in labels and len(found) > 1000
    assert not any(label in document.text.lower() for document in found for label in labels)


def test_naive_bayes():
    """argmax p(class) p(token | class) ..., multiplied out."""
    rng = np.random.default_rng(0)
    sides = []
    for count in (30, 200):
        tokens = [rng.integers(0, 5, rng.integers(1, 6)).tolist() for _ in range(count)]
        sides.append(Texts(tokens, rng.integers(0, 3, count)))
    train, held_out = sides
    guesses = naive_bayes(train, held_out, vocabulary=5)
    for tokens, guess in zip(held_out.tokens, guesses, strict=True):
        p = []
        for k in range(3):
            texts = [text for text, label in zip(train.tokens, train.labels) if label == k]
            words = [token for text in texts for token in text]
            p.append((len(texts) + 1) / (30 + 3))
            for token in tokens:
                p[-1] *= (words.count(token) + 1) / (len(words) + 5)
        assert p[guess] == pytest.approx(max(p), rel=1e-12)
