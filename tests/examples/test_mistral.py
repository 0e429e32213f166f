"""mistral.py: what it prints and draws, for a small model and little text; its errors."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from .helpers import check_bad_paths, check_help, refused, run


@pytest.fixture
def mistral(script, module, monkeypatch, tmp_path):
    """mistral(*arguments): the script in this process, its model small."""
    small = replace(
        module.CONFIG, vocab_size=300, hidden_size=16, intermediate_size=24, max_position_embeddings=300,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    monkeypatch.setattr(module, "CONFIG", small)
    monkeypatch.setattr(module, "BATCH", 3)
    monkeypatch.setattr(module, "CONTEXT", 24)
    monkeypatch.setattr(module, "POSITIONS", [16, 300])
    monkeypatch.setattr(module, "TIMED", 4)
    monkeypatch.chdir(tmp_path)  # whose folder runs takes what has no --out
    return script


def table(out):
    """position -> (KiB of the rolling cache, KiB of the full one, ms, ms), as printed."""
    found = re.findall(r"^ *([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+) +([\d.]+)$", out, re.MULTILINE)
    return {int(n.replace(",", "")): [float(x.replace(",", "")) for x in row] for n, *row in found}


def test_what_it_prints(mistral, book, tmp_path):
    code, out, err = mistral("--data", book, "--steps", 8, "--out", tmp_path)
    assert code == 0, err
    assert re.search(r"model:  [\d,]+ parameters, 2 layers with a window of 8 tokens", out)
    losses = re.findall(r"^ +(\d+) +(?:[\d.]+ +)?([\d.]+)$", out, re.MULTILINE)
    assert [int(step) for step, _ in losses] == [0, 2, 4, 6, 8] and float(losses[-1][1]) < float(losses[0][1])
    short, long, free = map(float, re.findall(r"^   (\d\.\d+)   reading", out, re.MULTILINE))
    assert short == float(losses[-1][1]) and abs(long - short) < 0.5 and free != long
    equal = re.search(r"10 windows\n +(\d+) of (\d+) greedy tokens .* difference of logits is (\S+)\n", out)
    assert equal[1] == equal[2] == "76" and float(equal[3]) < 1e-5
    assert re.search(r"drawn at temperature 0.8\n   \| ", out)
    (rolled, full, *_), (still, grown, *_) = (table(out)[n] for n in (16, 300))
    one = 2 * 2 * 1 * 8 * 4 / 1024  # KiB a position
    assert rolled == still == round(8 * one) and (full, grown) == (round(16 * one), round(300 * one))
    picture = re.search(r"drawn in (\S+)", out)[1]
    assert (tmp_path / "mistral.png").read_bytes().startswith(b"\x89PNG") and picture.endswith("mistral.png")


def test_who_sees_whom(module):
    config = replace(module.CONFIG, num_hidden_layers=2, sliding_window=3)
    nan = np.nan
    expected = [
        [1, nan, nan, nan, nan, nan],
        [1, 1, nan, nan, nan, nan],
        [1, 1, 1, nan, nan, nan],
        [2, 1, 1, 1, nan, nan],
        [2, 2, 1, 1, 1, nan],
        [nan, 2, 2, 1, 1, 1],
    ]
    np.testing.assert_array_equal(module.layers_between(config, 6), expected)


def test_the_gradient_reaches_as_far_as_the_windows(module, mistral):
    model = module.Mistral(module.CONFIG)
    for layers, reach in ((1, 7), (2, 14)):
        shallow = module.variation(model, num_hidden_layers=layers)
        size = module.influence(shallow, 30, np.random.default_rng(0), draws=2)
        assert np.flatnonzero(size).tolist() == list(range(reach + 1))


def test_a_text_shorter_than_the_context(mistral, tmp_path):
    """18 characters to train on and 2 to validate, each a token."""
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrst", encoding="utf-8")
    code, out, err = mistral("--data", tmp_path / "a.txt", "--steps", 2, "--out", tmp_path)
    assert code == 0, err
    assert (tmp_path / "mistral.png").exists() and "greedy tokens are equal" in out


def test_help_and_bad_input(module, mistral, book, tmp_path):
    check_help(mistral, module)
    check_bad_paths(mistral, book, tmp_path)
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    refused(mistral("--data", tmp_path / "short.txt"), "short.txt holds too little text", "--data")
    (tmp_path / "few.txt").write_text("ab" * 10, encoding="utf-8")  # one pair, one token to validate on
    refused(mistral("--data", tmp_path / "few.txt", "--out", tmp_path), "longer text")


def test_in_a_process_of_its_own(book, tmp_path):
    """Up to the check of --device, which comes before any work."""
    result = run("mistral", "--data", book, "--device", "cuda", "--steps", 1, cwd=tmp_path)
    if result.code:
        refused(result, "device 'cuda' needs")
        assert not list(tmp_path.iterdir())
