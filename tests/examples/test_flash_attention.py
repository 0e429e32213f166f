"""flash_attention.py: what it prints and draws, at short lengths; its errors."""

from __future__ import annotations

import re

import pytest

from kernels.emulator.build import EmulatorUnavailable, compiler

from .helpers import refused, run

try:
    compiler()
except EmulatorUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def flash(script, module, monkeypatch, tmp_path):
    """flash(*arguments): the script in this process, with short lengths."""
    monkeypatch.setattr(module, "SHORTEST", 64)
    monkeypatch.setattr(module, "ROWS", (16, 64))
    monkeypatch.chdir(tmp_path)
    return script


def test_what_it_prints(flash, module, tmp_path):
    code, out, err = flash("--longest", 128, "--out", tmp_path)
    assert code == 0, err
    rows = re.findall(
        r"^ +(\d+) +([\d.]+) \[(-?\d+)\] +([\d.]+) \[(-?\d+)\] +([\d.]+)x +[\d.]+ \[(-?\d+)\]", out, re.M
    )
    assert [int(row[0]) for row in rows] == [64, 128]
    for _, naive, more, ours, less, ratio, rest in rows:
        assert more == less == rest == "0"  # counted is the closed form
        assert float(naive) / float(ours) == pytest.approx(float(ratio), rel=0.1)
    differences = [float(x) for x in re.findall(r"KB +(\d\.\de-\d\d)$", out, re.M)]
    assert len(differences) == 2 and max(differences) < 1e-6
    small, large = (float(x) for x in re.findall(r"^ +(?:16|64) +\d+ +([\d.]+)$", out, re.M))
    assert small > large
    assert re.search(r"^   flash_attention.cu:\d+: race: ", out, re.M)
    assert (tmp_path / "flash_attention.png").read_bytes().startswith(b"\x89PNG")
    assert module.TILES["forward"][4][64] == (64, 32)  # as it was


def test_at_how_many_rows_both_ways_move_the_same(module):
    rows = module.even_rows(512)
    bytes_moved = 4 * 64 * (2 * 512 + 2 * 512 * 512 / rows) + 4 * 512
    assert bytes_moved == pytest.approx(sum(module.naive_forward_bytes(1, 512, 64)))


def test_help(script, module):
    code, out, err = script("--help")
    assert code == 0 and not err and module.__doc__.strip() in out
    assert all(f"  {option} " in out for option in ("--longest", "--seed", "--out"))


def test_bad_input(flash, tmp_path, monkeypatch):
    code, _, err = flash("--longest", 3)
    assert code == 2 and "3 is not a number of 64 or more" in err
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    refused(flash("--out", tmp_path / "file"), tmp_path / "file")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    refused(flash("--out", tmp_path), "no C++ compiler found")


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    code, out, err = run("flash_attention", "--longest", 256, "--out", tmp_path, cwd=tmp_path)
    assert code == 0, err
    assert out.count("[0]") == 3 and (tmp_path / "flash_attention.png").exists()
