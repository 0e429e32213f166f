"""bigram.py: what it prints and draws, also for the smallest text and one of many characters; its errors."""

from __future__ import annotations

import math
import re

from .helpers import check_bad_paths, check_help, refused, run


def losses(out):
    """name -> (training, validation), as printed."""
    names = r"(all equally likely|counted, smoothing [\d.]+|learned, \d+ steps)"
    found = re.findall(rf"^{names} +([\d.]+) +([\d.]+|inf)$", out, re.MULTILINE)
    return {name: (float(train), float(validation)) for name, train, validation in found}


def test_the_default_corpus_in_a_process_of_its_own(tmp_path):
    code, out, err = run("bigram", "--steps", 250, cwd=tmp_path)
    assert code == 0, err
    assert re.search(
        r"corpus: \d{3},\d{3} characters to train on, \d{2},\d{3} to validate, \d{2,3} different", out
    )
    found = losses(out)
    assert list(found) == [
        "all equally likely", "counted, smoothing 0", "counted, smoothing 0.01", "counted, smoothing 0.1",
        "counted, smoothing 1", "counted, smoothing 10", "learned, 250 steps",
    ]  # fmt: skip
    best = found["counted, smoothing 0"][0]
    assert 2.3 < best < 2.8 and all(train >= best for train, _ in found.values())
    assert found["learned, 250 steps"][0] < best + 0.2 < found["all equally likely"][0] - 1.5
    apart = re.search(r"the two tables differ in the place of (\d+\.\d)% of the probability", out)
    assert 0 < float(apart[1]) < 15
    assert re.search(r"^counted, smoothing 0\.\d+, it writes:\n   \| ", out, re.M)
    assert re.search(r"^learned, it writes:\n   \| ", out, re.M)
    picture = re.search(r"drawn in (\S+)", out)[1]
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG") and "/250" in err


def test_characters_that_training_does_not_know(script, module, tmp_path):
    """More than can be known, and some that only the validation part has: together they are one."""
    path = tmp_path / "many.txt"
    path.write_text("".join(chr(0x4E00 + i % 300) for i in range(2970)) + "ab" * 165, encoding="utf-8")
    tokenizer, train, validation = module.characters(path)
    assert tokenizer.vocabulary_size == 256 and module.OTHER in tokenizer.characters
    assert module.OTHER in tokenizer.decode(train) and set(tokenizer.decode(validation)) >= {module.OTHER}
    code, out, err = script("--data", path, "--steps", 2, "--out", tmp_path / "out")
    assert code == 0, err
    assert all(math.isfinite(validation) for _, validation in losses(out).values())


def test_the_smallest_text(script, tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 10, encoding="utf-8")
    code, out, err = script("--data", tmp_path / "a.txt", "--steps", 3, "--out", tmp_path)
    assert code == 0, err
    assert losses(out)["counted, smoothing 0"] == (0.0, 0.0)
    assert (tmp_path / "bigram.png").exists()


def test_the_seed_decides(script, book, tmp_path):
    outputs = [script("--data", book, "--steps", 3, "--seed", s, "--out", tmp_path).out for s in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_help_and_bad_input(script, module, book, tmp_path):
    check_help(script, module)
    check_bad_paths(script, book, tmp_path)
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    refused(script("--data", tmp_path / "short.txt"), "short.txt holds too little text", "--data")
