"""rwkv.py at a tiny setting: what it prints and draws, and its bad inputs."""

from __future__ import annotations

import re

import pytest

from .helpers import check_bad_paths, check_help, refused


@pytest.fixture
def rwkv(script, module, monkeypatch):
    """rwkv(*arguments): the script in this process, with a model of a few thousand parameters."""
    for name, value in {
        "VOCABULARY": 300, "WIDTH": 12, "LAYERS": 2, "GPT2_LAYERS": 2, "GPT2_HEADS": 2, "BATCH": 4,
        "CONTEXT": 16, "LENGTHS": [20, 40, 80], "TIMED": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return script


def test_a_run(rwkv, book, tmp_path):
    code, out, err = rwkv("--data", book, "--steps", 40, "--out", tmp_path / "new" / "run")
    assert code == 0, err
    assert re.search(r"corpus: [\d,]+ tokens to train on, [\d,]+ to validate", out)
    assert re.search(r"model: +[\d,]+ parameters, 2 layers of width 12", out)
    rows = re.findall(r"^ +(\d+) +([\d.]+)? +([\d.]+)$", out, re.MULTILINE)
    assert [int(step) for step, *_ in rows] == list(range(0, 41, 5))
    assert float(rows[-1][2]) < float(rows[0][2]) - 0.1
    assert re.search(r"[\d.]+   reading 16 at a time\n +[\d.]+   reading 256 at a time", out)
    assert "it writes:\n   | The class statement" in out
    costs = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.MULTILINE)
    assert [int(length) for length, *_ in costs] == [20, 40, 80]
    state = 4 * 2 * 5 * 12 / 1024  # KiB: in float32, for 2 layers, five numbers for each of 12 channels
    for length, own, other, *times in costs:
        assert float(own) == pytest.approx(state, abs=0.06)
        assert float(other) == pytest.approx(4 * 2 * 2 * 12 * int(length) / 1024, abs=0.6)
        assert all(float(milliseconds) > 0 for milliseconds in times)
    picture = re.search(r"drawn in (\S+)", out)[1]
    assert picture == str(tmp_path / "new" / "run" / "rwkv.png")
    assert (tmp_path / "new" / "run" / "rwkv.png").read_bytes().startswith(b"\x89PNG") and "/40" in err


def test_the_seed_decides(rwkv, module, book, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw", lambda *args: None)
    written = []
    for seed in (1, 1, 2):
        out = rwkv("--data", book, "--steps", 2, "--seed", seed, "--out", tmp_path).out
        written.append(out[: out.index("memory")])
    assert written[0] == written[1] != written[2]


def test_help_and_bad_input(rwkv, module, book, tmp_path):
    check_help(rwkv, module)
    check_bad_paths(rwkv, book, tmp_path)
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    refused(rwkv("--data", tmp_path / "short.txt", "--out", tmp_path), "short.txt holds too little", "--data")
    (tmp_path / "few.txt").write_text("few words " * 3, encoding="utf-8")
    refused(rwkv("--data", tmp_path / "few.txt", "--out", tmp_path), "too short for a context of 16")
