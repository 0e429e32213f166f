"""embed.py: the table that it prints, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tinyllm.embeddings import SentenceEncoder
from tinyllm.masked import with_special_tokens
from tinyllm.models import BERT, GPT2, BERTConfig, GPT2Config
from tinyllm.tokenizers import train_bpe

from .helpers import refused, run

SENTENCES = [
    "The cat sat.",
    "A kitten, perhaps, sat  on a rug; and it stayed there until the evening came.",
    "42",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with a BPE of ours, its weights large enough to tell sentences apart."""
    path = tmp_path_factory.mktemp("bert")
    tokenizer = with_special_tokens(train_bpe("the cat sat on the mat and the kitten sat on the rug", 270))
    config = BERTConfig(tokenizer.vocabulary_size, 16, 1, 2, 32, max_position_embeddings=40,
                        initializer_range=0.5, architecture="BertForMaskedLM")  # fmt: skip
    BERT(config).save_pretrained(path)
    tokenizer.save(path)
    return path


def test_the_table_of_cosines(folder, tmp_path):
    code, out, err = run("embed", folder, *SENTENCES[:1], SENTENCES[2], "The cat sat.", cwd=tmp_path)
    assert code == 0, err
    rows = re.findall(r"^ +(\d)((?: +-?\d\.\d{3}){3}) +(\d)  (.*)$", out, re.MULTILINE)
    assert [row[3] for row in rows] == ["The cat sat.", "42", "The cat sat."]
    found = np.array([[float(x) for x in row[1].split()] for row in rows])
    vectors, _ = SentenceEncoder.from_pretrained(folder).encode(["The cat sat.", "42"])
    a, b = vectors
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found[0, 1] == pytest.approx(expected, abs=6e-4) and abs(expected) < 0.99
    assert (found.diagonal() == 1).all() and found[0, 2] == 1 and np.array_equal(found, found.T)
    assert [row[2] for row in rows][::2] == ["3", "1"]
    assert not err


def test_long_sentences_are_cut_and_it_says_so(folder, script):
    code, out, err = script(folder, *SENTENCES)
    assert code == 0 and "1 of 3 sentences are longer than the 40 tokens" in err
    assert "A kitten, perhaps, sat on a rug; and it stayed there unti..." in out


def test_bad_input(folder, script, module, tmp_path):
    refused(script(folder, "One."), "give two or more")
    refused(script(folder, "One.", ""), "text 2 is empty")
    refused(script(tmp_path, "One.", "Two."), "config.json")
    GPT2(GPT2Config(300, 16, 16, 1, 2)).save_pretrained(tmp_path)
    refused(script(tmp_path, "One.", "Two."), "need a BERT")
    code, out, _ = script("--help")
    assert code == 0 and module.__doc__.strip() in out and "  --device " in out
