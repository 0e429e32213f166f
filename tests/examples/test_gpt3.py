"""gpt3.py: its tasks, what it prints and draws for a small model, and its errors."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tinyllm.tokenizers import CharacterTokenizer

from .helpers import refused


@pytest.fixture
def gpt3(script, module, monkeypatch, tmp_path):
    """gpt3(*arguments): the script in this process, its model small."""
    monkeypatch.setattr(module, "CONFIG", replace(module.CONFIG, n_embd=16, n_head=2))
    monkeypatch.chdir(tmp_path)  # whose folder runs takes what has no --out
    return script


def test_a_text_is_one_code(module):
    """The same letter always stands for the same, in a text; in another text for something else."""
    inputs, targets = module.texts(np.random.default_rng(0), 50)
    assert inputs.shape == targets.shape == (50, module.CONTEXT)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    codes = []
    for row in inputs:
        pairs = module.TOKENIZER.decode(row).rstrip(",").split(",")
        assert len(pairs) == module.PAIRS and all(len(pair) == 2 for pair in pairs)
        code = dict(pairs)
        assert {"".join(item) for item in code.items()} == set(pairs) and len(code) <= module.KEYS
        codes.append(code)
    assert len({code.get("a") for code in codes} - {None}) > 3


@pytest.mark.parametrize("shots", [0, 1, 4, 8])
def test_a_question(module, shots):
    """K different pairs, then a letter; the right choice is what its pair says, where it was shown."""
    questions, shown = module.quiz(shots, 300, seed=0)
    assert abs(shown.mean() - shots / module.KEYS) < 0.1  # 3 standard deviations of 300 coins
    for question, told in zip(questions, shown):
        *pairs, asked = module.TOKENIZER.decode(question.context).split(",")
        assert len(dict(pairs)) == len(pairs) == shots and len(asked) == 1
        assert told == (asked in dict(pairs))
        assert [module.TOKENIZER.decode(c) for c in question.completions] == list(module.LETTERS)
        if told:
            assert module.LETTERS[question.answer] == dict(pairs)[asked]


def test_what_it_prints(gpt3, tmp_path):
    code, out, err = gpt3("--steps", 6, "--questions", 40, "--out", tmp_path)
    assert code == 0, err
    rows = re.findall(r"^ +(\d) +(\d\.\d\d) +(\d\.\d\d) +(\d\.\d\d)?$", out, re.MULTILINE)
    assert [int(shots) for shots, *_ in rows] == [0, 1, 2, 4, 8]
    assert rows[0][2:] == ("0.00", "") and rows[4][2] == "1.00" and rows[4][1] == rows[4][3]
    assert (tmp_path / "gpt3.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"it goes on: (\w\w,){8}\w -> .*$", out, re.MULTILINE)


@pytest.mark.slow
def test_learning_in_context_emerges(gpt3, module, monkeypatch, tmp_path):
    """With codes of four of eight letters. Of two pairs shown, one who cannot look up takes the wrong half of
    the time, and one who answers with any letter is right once in eight."""
    for name, value in {"LETTERS": "abcdefgh", "KEYS": 4, "PAIRS": 8, "CONTEXT": 24, "SHOTS": [0, 2]}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "TOKENIZER", CharacterTokenizer(module.LETTERS + ","))
    monkeypatch.setattr(module, "CONFIG", replace(module.CONFIG, n_positions=24, n_embd=48, n_head=4))
    found = {}
    for steps in (1, 900):
        code, out, err = gpt3("--steps", steps, "--seed", 1, "--out", tmp_path)
        assert code == 0, err
        found[steps] = float(re.search(r"^ +2 .* (\d\.\d\d)$", out, re.MULTILINE)[1])
    assert found[1] < 0.4 and found[900] > 0.9


def test_what_it_refuses(gpt3, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for arguments in (["--steps", 0], ["--data", "book.txt"]):  # it makes its data itself
        code, _, err = gpt3(*arguments)
        assert code == 2 and arguments[0] in err.splitlines()[-1]
    refused(gpt3("--steps", 1, "--questions", 1, "--out", tmp_path / "file"), "file")
