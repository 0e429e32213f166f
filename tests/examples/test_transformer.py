"""transformer.py: number words, what it prints and draws, other text, its errors."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from .helpers import check_help, refused, run

WORDS = "red blue small large old new".split()
LINES = [f"the {a} {b} dog\tder {a}e {b}e Hund {a}" for a in WORDS for b in WORDS if a != b]


@pytest.fixture
def transformer(script, module, monkeypatch):
    """The script in this process, with a tiny model, few numbers and a short beam."""
    tiny = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    for name, held_out in (("NUMBERS", 12), ("TEXT", 6)):
        setting = getattr(module, name)
        config = replace(setting.config, **tiny)
        monkeypatch.setattr(module, name, setting._replace(config=config, held_out=held_out))
    monkeypatch.setattr(module, "COUNT", 200)
    monkeypatch.setattr(module, "room", lambda model, source: 6)
    return script


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def test_the_number_words(module):
    for n, english, german in (
        (0, "zero", "null"),
        (1, "one", "eins"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (18, "eighteen", "achtzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (66, "sixty-six", "sechsundsechzig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred one", "einhunderteins"),
        (121, "one hundred twenty-one", "einhunderteinundzwanzig"),
        (1000, "one thousand", "eintausend"),
        (1001, "one thousand one", "eintausendeins"),
        (42_681, "forty-two thousand six hundred eighty-one",
         "zweiundvierzigtausendsechshunderteinundachtzig"),
        (201_011, "two hundred one thousand eleven", "zweihunderteintausendelf"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine",
         "neunhundertneunundneunzigtausendneunhundertneunundneunzig"),
    ):  # fmt: skip
        assert (module.english(n), module.german(n)) == (english, german)
    found = module.numbers(2000, seed=1)
    assert len(set(found)) == 2000 == len({german for _, german in found})
    assert found == module.numbers(2000, seed=1) != module.numbers(2000, seed=2)


def test_a_run_in_a_process_of_its_own(tmp_path, pairs):
    code, out, err = run("transformer", "--data", pairs, "--steps", 2, "--vocabulary", 300, cwd=tmp_path)
    assert code == 0, err
    assert "27 to learn from, 3 held out" in out and re.search(r"Transformer with [\d,]{7,} parameters", out)
    assert (tmp_path / "runs" / "transformer" / "transformer.png").read_bytes().startswith(b"\x89PNG")


def test_numbers(transformer, module, tmp_path):
    code, out, err = transformer("--steps", 3, "--out", tmp_path)
    assert code == 0, err
    assert "200 to learn from, 12 held out" in out and "12 held out       exact match\n" in out
    rows = re.findall(r"^  (greedy|a beam of four) +([\d.]+)%$", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["greedy", "a beam of four"]
    before, after = (
        float(x) for x in re.findall(r"^ +[\d,]+ +(?:[\d.]+)? +([\d.]+)$", out, re.MULTILINE)[::3]
    )
    assert after < before
    assert "written piece by piece <- looking most at:" in out and "drawn in" in out
    assert (tmp_path / "transformer.png").read_bytes().startswith(b"\x89PNG")
    assert "BLEU" not in out


@pytest.mark.parametrize("files", [1, 2])
def test_other_text(transformer, module, pairs, tmp_path, files, monkeypatch):
    """From one file or two the same; without sacrebleu one line says how to get it."""
    arguments = ["--data", pairs]
    if files == 2:
        for i, name in enumerate(("a.en", "a.de")):
            text = "\n".join(line.split("\t")[i] for line in LINES)
            (tmp_path / name).write_text(text, encoding="utf-8")
        arguments = ["--data", tmp_path / "a.en", "--target", tmp_path / "a.de"]
    monkeypatch.setattr(module, "scores", lambda found, expected: {"BLEU": 12.3, "chrF": 45.6})
    code, out, err = transformer(*arguments, "--steps", 2, "--out", tmp_path)
    assert code == 0, err
    assert re.search(r"^  greedy +[\d.]+% +12\.3 +45\.6$", out, re.MULTILINE) and "BLEU     chrF" in out
    monkeypatch.setattr(module, "scores", lambda found, expected: {})
    code, out, err = transformer(*arguments, "--steps", 2, "--out", tmp_path)
    assert code == 0 and 'for BLEU and chrF: pip install -e ".[translation]"' in out


def test_it_learns_and_counts_right(script, module, tmp_path, monkeypatch):
    """Numbers below 30, of which a part is held out: easy for a small model, and scored as it should be."""
    monkeypatch.setattr(module, "numbers", lambda count, seed: [
        (module.english(n), module.german(n)) for n in range(20, 100)
    ])  # fmt: skip
    small = module.NUMBERS.config
    config = replace(small, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layers=1,
                     decoder_layers=1, max_position_embeddings=40)  # fmt: skip
    monkeypatch.setattr(module, "NUMBERS", module.NUMBERS._replace(config=config, vocabulary=320))
    seen = {}

    def table(ways, unseen, text):
        seen.update(ways=ways, unseen=unseen)
        return original(ways, unseen, text)

    original = module.table
    monkeypatch.setattr(module, "table", table)
    code, out, err = script("--steps", 250, "--out", tmp_path)
    assert code == 0, err
    for name, found in seen["ways"].items():
        exact = np.mean([a == b for a, (_, b) in zip(found, seen["unseen"])])
        assert exact > 0.6
        assert re.search(rf"^  {name} +{exact * 100:.1f}%$", out, re.MULTILINE)


def test_the_order_of_greedy_translations(module):
    """They are made in the order of length and given back in that of the pairs."""

    class Model:
        context = 100

        def generate(self, sources, most, temperature):
            assert temperature == 0 and [len(s) for s in sources] == sorted(len(s) for s in sources)
            return np.array([[source[0], -1] for source in sources])

    class Vocabulary:
        def text(self, tokens):
            return str(tokens[0])

    unseen = [module.Tokens([i] * n, []) for i, n in enumerate((5, 2, 9, 2, 7))]
    assert module.greedy(Model(), Vocabulary(), unseen, rows=2) == list("01234")


def test_the_seed_decides(transformer, tmp_path):
    outputs = [transformer("--steps", 2, "--seed", seed, "--out", tmp_path).out for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_help_and_bad_input(transformer, module, pairs, tmp_path):
    check_help(transformer, module, "--target", "--vocabulary", "--context")
    out = ["--steps", 1, "--out", tmp_path / "out"]
    refused(transformer("--data", tmp_path / "absent.tsv", *out), "absent.tsv does not exist")
    refused(transformer("--target", pairs, *out), "--data")
    (tmp_path / "bad.tsv").write_text("a\tb\nc\n", encoding="utf-8")
    refused(transformer("--data", tmp_path / "bad.tsv", *out), "line 2 has no tab")
    (tmp_path / "bad.tsv").write_text("a\tb\n\td\n", encoding="utf-8")
    refused(transformer("--data", tmp_path / "bad.tsv", *out), "line 2 has an empty source")
    refused(transformer("--data", pairs, "--target", tmp_path / "bad.tsv", *out), "30 lines", "2")
    (tmp_path / "bad.tsv").write_text("a\tb\n", encoding="utf-8")
    refused(transformer("--data", tmp_path / "bad.tsv", *out), "too few to hold 1 out")
    refused(transformer("--data", pairs, "--context", 5, *out), "reads 5", "30 of 30", "line 1 of a file")
    longer = [LINES[0], *(f"{line} again and again and again" for line in LINES[1:3]), *LINES[3:]]
    (tmp_path / "long.tsv").write_text("\n".join(longer), encoding="utf-8")
    said = ("2 of 30 pairs", "line 2 of a file", repr(longer[1].split("\t")[0]))
    bytes_alone = ["--vocabulary", 258, "--context", 36]
    refused(transformer("--data", tmp_path / "long.tsv", *bytes_alone, *out), *said)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    refused(transformer("--data", pairs, "--out", tmp_path / "file"), tmp_path / "file")
    assert transformer("--steps", 0).code == transformer("--vocabulary", 257).code == 2


def test_without_sacrebleu(transformer, pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    code, out, err = transformer("--data", pairs, "--steps", 1, "--out", tmp_path)
    assert code == 0, err
    assert out.count("pip install") == 1
