"""bert.py: what it prints, saves and draws, that its comparison is fair, and its errors."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import tinyllm
from tinyllm.datasets import Document, documents
from tinyllm.embeddings import SentenceEncoder
from tinyllm.models import BERT

from .helpers import check_help, refused, run

LABELS = ["alpha", "beta", "gamma"]


def toy(kind):
    """A few documents of either kind: 60 docstrings, told by one of their words, each with one phrase."""
    if kind == "prose":
        return documents("prose")[:12]
    found = []
    for i in range(60):
        k = i % 3
        text = f"Set {'aei'[k] * 9} from file {i}."
        found.append(Document(LABELS[k], f"{LABELS[k]}.function{i}", text))
    return found


@pytest.fixture
def bert(script, module, monkeypatch):
    """bert(*arguments): the script in this process, with a tiny model and few documents."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setattr(module, "CONFIG", replace(module.CONFIG, **small))
    monkeypatch.setattr(module, "VOCABULARY", 300)
    monkeypatch.setattr(module, "documents", toy)
    return script


def shares(out):
    """Row of the table -> the numbers in it."""
    names = "pre-trained|from scratch|naive Bayes|always the most frequent class|no answer, always"
    rows = re.findall(rf"^  ({names}) +(.*)$", out, re.MULTILINE)
    return {name: [float(x) for x in re.findall(r"(\d+\.\d)%", numbers)] for name, numbers in rows}


def test_pythons_own_prose_in_a_process_of_its_own(tmp_path):
    code, out, err = run("bert", "--steps", 3, "--tune", 1, cwd=tmp_path)
    assert code == 0, err
    assert re.search(r"BERT with \d{3},\d{3} parameters", out)
    before, after = re.search(r"masked tokens, nats +(\d\.\d\d) -> +(\d\.\d\d)", out).groups()
    assert float(after) < float(before) == pytest.approx(np.log(1028), abs=0.6)
    assert re.search(r"next sentence found +\d+\.\d% -> +\d+\.\d%", out)
    filled = re.findall(r"____.*\n +('.*' \d+%), .*; it was '.*', \d+\.\d%", out)
    assert len(filled) == 6
    train, held_out, names = re.search(r"([\d,]+) to learn from, (\d+) held out, of (.*)", out).groups()
    assert 0.2 < int(held_out) / (int(held_out) + int(train.replace(",", ""))) < 0.4
    assert len(names.split(", ")) == 8 and "asyncio" in names
    assert "longer than 62 tokens: only their beginning is read" in out
    found = shares(out)
    assert [len(row) for row in found.values()] == [2, 2, 1, 1, 1] and len(found) == 5
    assert found["naive Bayes"] > found["always the most frequent class"]
    folder = tmp_path / "runs" / "bert"
    assert (folder / "bert.png").read_bytes().startswith(b"\x89PNG") and "drawn in" in out
    model = tinyllm.from_pretrained(folder)
    assert type(model) is BERT and f"{model.parameter_count():,}" in out
    vectors, _ = SentenceEncoder.from_pretrained(folder).encode(["A class.", "A statement."])
    assert vectors.shape == (2, model.config.hidden_size) and "/1 " in err


def test_it_learns_both_tasks(bert, module, tmp_path, monkeypatch):
    """The toy's classes are easy, and where all questions are answered so is the span."""
    monkeypatch.setattr(module, "FINE_TUNING", replace(module.FINE_TUNING, lr=1e-2))
    monkeypatch.setattr(module, "NO_ANSWER", 0.0)
    drawn = []
    monkeypatch.setattr(module, "draw", lambda path, runs, *_: drawn.append(runs))
    code, out, err = bert("--steps", 2, "--tune", 60, "--out", tmp_path)
    assert code == 0, err
    found = shares(out)
    for (kind, start), result in drawn[0].items():
        assert result.steps == [0, 12, 24, 36, 48, 60]
        printed = found[start][["class", "span"].index(kind)]
        assert printed == pytest.approx(100 * result.accuracies[-1], abs=0.06)
        assert result.accuracies[-1] > 0.7, (kind, start)
    assert found["no answer, always"] == [0.0]


def test_the_share_of_questions_without_an_answer_is_counted(bert, module, tmp_path, monkeypatch):
    """Among those held out, not what they are drawn with."""
    seen = []

    def questions(pool, text, size, seed):
        batch = original(pool, text, size, seed)
        if seed[1] == 1:  # held out
            seen.append(batch[1])
        return batch

    original = module.questions
    monkeypatch.setattr(module, "questions", questions)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    code, out, err = bert("--steps", 1, "--tune", 1, "--out", tmp_path)
    assert code == 0, err
    places = np.concatenate(seen)
    share = 100 * np.mean([tuple(place) == (0, 0) for place in places])
    assert len(places) == 12 * 64 and share != 100 * module.NO_ANSWER
    assert shares(out)["no answer, always"] == [pytest.approx(share, abs=0.051)]


def test_the_comparison_is_fair(bert, module, tmp_path, monkeypatch):
    """Both starts see the same batches and end with heads that began alike; and pre-training is all that
    sets them apart."""
    seen, first = [], []

    def fit(model, batch, recipe, label, validation, every):
        if label != "pre-training":
            first.append(model.state_dict()["position_embedding.weight"].copy())
            batches = [batch(step) for step in range(recipe.steps)]
            flat = [np.concatenate([a.ravel() for a in (*inputs, targets)]) for inputs, targets in batches]
            seen.append((label.split(",")[0], flat))
        return original(model, batch, recipe, label, validation, every)

    original = module.fit
    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    bert("--steps", 2, "--tune", 3, "--out", tmp_path)
    assert [kind for kind, _ in seen] == ["classes", "spans"] * 2
    for one, other in ((0, 2), (1, 3)):
        assert all(np.array_equal(a, b) for a, b in zip(seen[one][1], seen[other][1], strict=True))
    assert np.array_equal(first[0], first[1]) and np.array_equal(first[2], first[3])
    assert not np.array_equal(first[0], first[2])


def test_pairs_and_masks_are_made_anew_in_each_step_and_by_the_seed(bert, module):
    text = module.prose()
    pairs = module.SentencePairs(text.train, module.CONTEXT)
    one, same, other = (module.masked_pairs(pairs, text, 4, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    (ids, mask, segments), (tokens, follows) = one
    assert all(np.array_equal(a, b) for a, b in zip((*one[0], *one[1]), (*same[0], *same[1])))
    assert ids.shape != other[0][0].shape or not np.array_equal(ids, other[0][0])
    assert ids.shape == mask.shape == segments.shape == tokens.shape and follows.shape == (4,)
    assert (tokens[mask == 0] == -100).all() and (tokens != -100).any() and ids.shape[1] <= 64


def test_data_of_ones_own(bert, tmp_path):
    lines = [f"{'good fine'.split()[i % 2]} film {i}\tpos" for i in range(30)]
    lines += [f"bad film {i}\tneg" for i in range(30)]
    (tmp_path / "films.tsv").write_text("\n".join(lines), encoding="utf-8")
    code, out, err = bert("--data", tmp_path / "films.tsv", "--steps", 2, "--tune", 2, "--out", tmp_path)
    assert code == 0, err
    assert "held out, of pos, neg" in out and "only their beginning" not in out


def test_the_seed_decides(bert, tmp_path):
    outputs = [bert("--steps", 1, "--tune", 1, "--seed", seed, "--out", tmp_path).out for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_help_and_bad_input(bert, module, tmp_path):
    check_help(bert, module, "--tune")
    refused(bert("--data", tmp_path / "absent.tsv", "--out", tmp_path), "absent.tsv does not exist")
    for name, text, said in (
        ("no_tab.tsv", "one two\n", "line 1 has no tab"),
        ("one.tsv", "a text\tpos\nanother\tpos\n", "less than two labels"),
        ("empty.tsv", "\tpos\n", "line 1 has an empty text"),
        ("few.tsv", "a text\tpos\n" * 3 + "b text\tneg\n", "too few"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        refused(bert("--data", tmp_path / name, "--out", tmp_path), said)
    rare = "".join(f"text {i}\t{'usual' if i % 9 else f'rare{i}'}\n" for i in range(60))
    (tmp_path / "rare.tsv").write_text(rare, encoding="utf-8")
    refused(bert("--data", tmp_path / "rare.tsv", "--out", tmp_path), "that stand in held-out texts alone")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    refused(bert("--steps", 1, "--out", tmp_path / "file"), tmp_path / "file")
