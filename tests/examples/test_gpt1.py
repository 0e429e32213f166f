"""gpt1.py: what it prints and draws, that no label leaks, that its comparison is fair; its errors."""

from __future__ import annotations

import re
import string
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from autograd import no_grad
from tinyllm.datasets import Document, documents
from tinyllm.models import GPT1, GPT1Config
from tinyllm.tokenizers import CharacterTokenizer

from .helpers import check_bad_paths, check_help, refused, run

LABELS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def toy(kind):
    """200 short docstrings: each says its label, in capitals too, and is told by its first letters anyway.
    The first label is the most frequent; a private one, more frequent than some, is no package."""
    assert kind == "docstrings"
    rng = np.random.default_rng(0)
    found = []
    for i in range(200):
        k = int(rng.integers(8)) if i % 3 else 0
        label = LABELS[k]
        text = f"{'aeimquxz'[k] * 12} {i}: in {label.upper()} or {LABELS[i % 8].title()}s."
        found.append(Document(label, f"{label}.f{i}", text))
    return [*found, *(Document("_private", f"_private.f{i}", f"{i}") for i in range(90))]


@pytest.fixture
def gpt1(script, module, monkeypatch):
    """gpt1(*arguments): the script in this process, with a tiny model and the toy's docstrings."""
    monkeypatch.setattr(module, "CONFIG", GPT1Config(n_positions=64, n_embd=8, n_layer=1, n_head=2))
    monkeypatch.setattr(module, "VOCABULARY", 300)
    monkeypatch.setattr(module, "documents", toy)
    return script


def accuracies(out):
    """start -> its two accuracies, as printed."""
    starts = r"^  (pre-trained|from scratch|naive Bayes|always \w+) +"
    rows = re.findall(starts + r"(\d+\.\d)% +(\d+\.\d)%$", out, re.MULTILINE)
    return {name: (float(a), float(b)) for name, a, b in rows}


def test_pythons_own_docstrings_in_a_process_of_its_own(tmp_path):
    code, out, err = run("gpt1", "--steps", 3, "--tune", 1, cwd=tmp_path)
    assert code == 0, err
    assert re.search(r"GPT-1 with \d{3},\d{3} parameters", out)
    before, after = re.search(r"3 steps, validation loss (\d\.\d\d) -> (\d\.\d\d) nats", out).groups()
    assert float(after) < float(before) == pytest.approx(np.log(1024), abs=0.1)
    train, held_out, names = re.search(r"([\d,]+) to learn from, (\d+) held out, of (.*)", out).groups()
    assert 0.2 < int(held_out) / (int(held_out) + int(train.replace(",", ""))) < 0.4
    assert len(names.split(", ")) == 8 and "asyncio" in names
    found = accuracies(out)
    assert len(found) == 4 and "held-out accuracy after 1 steps" in out
    (majority,) = [pair for name, pair in found.items() if name.startswith("always")]
    assert majority[0] == majority[1] < 50 < found["naive Bayes"][0] == found["naive Bayes"][1]
    assert (tmp_path / "runs" / "gpt1" / "gpt1.png").read_bytes().startswith(b"\x89PNG")
    assert "drawn in" in out and "/1 " in err


def test_it_learns_and_counts_right(gpt1, module, book, tmp_path, monkeypatch):
    """The toy's task is easy. The accuracies are those of the guesses that it draws."""
    monkeypatch.setattr(module, "CONFIG", GPT1Config(n_positions=64, n_embd=32, n_layer=1, n_head=2))
    monkeypatch.setattr(module, "FINE_TUNING", replace(module.FINE_TUNING, lr=1e-2))
    drawn = SimpleNamespace()

    def draw(path, runs, best, labels, names, share):
        drawn.runs, drawn.labels, drawn.best = runs, labels, best
        drawn.majority = names[np.bincount(labels).argmax()], share

    monkeypatch.setattr(module, "draw", draw)
    code, out, err = gpt1("--data", book, "--steps", 2, "--tune", 60, "--out", tmp_path)
    assert code == 0, err
    found = accuracies(out)
    for (start, objective), result in drawn.runs.items():
        accuracy = (result.guesses == drawn.labels).mean()
        assert result.accuracies[-1] == accuracy and result.steps == [0, 10, 20, 30, 40, 50, 60]
        printed = found[start][list(module.OBJECTIVES).index(objective)]
        assert printed == pytest.approx(100 * accuracy, abs=0.06)
    name, share = drawn.majority
    assert found[f"always {name}"][0] == pytest.approx(100 * share, abs=0.06)
    assert share == pytest.approx(np.bincount(drawn.labels).max() / len(drawn.labels))
    assert max(result.accuracies[-1] for result in drawn.runs.values()) > share + 0.2
    assert ", ".join(drawn.best) + ", it guesses:" in out


def test_nothing_gives_the_label_away(module):
    """No name of a package is left in any text; and as far as the model reads them, no two are the same."""
    for found in (toy("docstrings"), documents("docstrings")):
        tokenizer = CharacterTokenizer({*string.printable, *"".join(document.text for document in found)})
        names, train, held_out, *_ = module.docstring_task(found, tokenizer)
        assert len(names) == 8 and not any(name.startswith("_") for name in names)
        assert set(train.labels) == set(range(8)) >= set(held_out.labels)
        sides = [[tokenizer.decode(tokens) for tokens in side.tokens] for side in (train, held_out)]
        read = [text for side in sides for text in side]
        assert len(set(read)) == len(read)
        assert max(map(len, read)) <= 62 and not any(name in text.lower() for text in read for name in names)


def test_every_text_keeps_its_label(module):
    """The toy's texts begin with a letter of their label's own."""
    tokenizer = CharacterTokenizer(string.printable)
    names, *sides, _, _ = module.docstring_task(toy("docstrings"), tokenizer)
    for side in sides:
        letters = "".join("aeimquxz"[LABELS.index(names[label])] for label in side.labels)
        assert letters == "".join(tokenizer.decode(tokens[:1]) for tokens in side.tokens)


def test_the_comparison_is_fair(module, monkeypatch):
    """All runs see the same batches, and the starts differ in nothing but the pre-training."""
    tokenizer = CharacterTokenizer(string.printable)
    names, train, held_out, *_ = module.docstring_task(toy("docstrings"), tokenizer)
    assert all(len(tokens) <= 62 for tokens in train.tokens)
    lengths = [len(tokens) for tokens in held_out.tokens]
    assert lengths == sorted(lengths)
    start = GPT1(GPT1Config(tokenizer.vocabulary_size, 64, 8, 1, 2), 0)
    before = {name: array.copy() for name, array in start.state_dict().items()}
    seen = []

    def fit(model, batch, recipe, label, validation, every):
        seen.append([np.concatenate([part.ravel() for part in batch(i)]) for i in range(recipe.steps)])
        progress = original(model, batch, recipe, label, validation, every)
        with no_grad():
            ids, labels = module.batch(model, held_out, np.arange(len(held_out.labels)))
            guesses.append(model(ids).numpy().argmax(axis=-1))
        return progress

    original, guesses = module.fit, []
    monkeypatch.setattr(module, "fit", fit)
    args = SimpleNamespace(tune=20, seed=3)
    runs = [module.finetune(start, auxiliary, train, held_out, args, "") for auxiliary in (0.0, 0.5)]
    assert all(np.array_equal(a, b) for a, b in zip(*seen)) and len(seen[0]) == 20
    assert all(np.array_equal(run.guesses, guess) for run, guess in zip(runs, guesses))
    assert all(np.array_equal(array, before[name]) for name, array in start.state_dict().items())
    assert runs[0].accuracies[0] == runs[1].accuracies[0]  # before the first step they are one model


def test_the_seed_decides(gpt1, book, tmp_path):
    outputs = [
        gpt1("--data", book, "--steps", 2, "--tune", 2, "--seed", seed, "--out", tmp_path).out
        for seed in (1, 1, 2)
    ]
    assert outputs[0] == outputs[1] != outputs[2]


def test_help_and_bad_input(gpt1, module, book, tmp_path):
    check_help(gpt1, module, "--tune")
    check_bad_paths(gpt1, book, tmp_path)
    (tmp_path / "short.txt").write_text("Too short for a context.", encoding="utf-8")
    refused(gpt1("--data", tmp_path / "short.txt", "--out", tmp_path), "too short for a context of 64")
