"""token_file.py: tokens written from parts are those of the whole text; damaged files are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm import datasets, tokenizers
from tinyllm.datasets import default_corpus, stream_text
from tinyllm.errors import InputError
from tinyllm.token_file import open_tokens, write_tokens
from tinyllm.tokenizers import BytePairTokenizer, CharacterTokenizer, train_bpe


@pytest.fixture(scope="module")
def corpus():
    return default_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_bpe(corpus[:20_000], 400)


@given(st.text("ab '\n\t!\x1cé", max_size=200).map(lambda s: "x" + s), st.integers(1, 50))
def test_tokens_written_from_parts_are_those_of_the_whole(tmp_path, tokenizer, text, part):
    path = tmp_path / "new" / "tokens.npy"
    whole = tokenizer.encode(text)
    for given_text in (text, (text[i : i + part] for i in range(0, len(text), part))):
        assert write_tokens(tokenizer, given_text, path) == len(whole)
        assert open_tokens(path).tolist() == np.load(path).tolist() == whole
    assert [p.name for p in path.parent.iterdir()] == ["tokens.npy"]


def test_tokens_of_a_long_text(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(tokenizers, "PIECE", 10**9)
    whole = tokenizer.encode(corpus)
    monkeypatch.setattr(tokenizers, "PIECE", 10_000)
    monkeypatch.setattr(datasets, "CHUNK", 3_333)
    file, path = tmp_path / "corpus.txt", tmp_path / "tokens.npy"
    file.write_bytes(corpus.encode())
    assert write_tokens(tokenizer, stream_text(file), path) == len(whole)
    tokens = open_tokens(path)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.shape == (len(whole),)
    assert tokens.tolist() == whole


@pytest.mark.parametrize("size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_the_largest_id_fits(tmp_path, size, dtype):
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"\x00" + i.to_bytes(3, "big"): i for i in range(256, size)}
    ranks[b"ab"] = ranks.pop(b"\x00" + (size - 1).to_bytes(3, "big"))
    assert write_tokens(BytePairTokenizer(ranks), "ab", tmp_path / "t.npy") == 1
    tokens = open_tokens(tmp_path / "t.npy")
    assert tokens.dtype == dtype and tokens.tolist() == [size - 1]


def test_a_failure_leaves_the_old_file(tmp_path):
    tokenizer = CharacterTokenizer("ab")
    write_tokens(tokenizer, "abab", tmp_path / "t.npy")
    for text, message in [("", "no tokens for .*t.npy"), ([], "no tokens"), (["ab", "x"], "character 'x'")]:
        with pytest.raises(InputError, match=message):
            write_tokens(tokenizer, text, tmp_path / "t.npy")
    assert open_tokens(tmp_path / "t.npy").tolist() == [0, 1, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["t.npy"]


def test_token_files_that_are_none(tmp_path):
    path = tmp_path / "t.npy"
    write_tokens(CharacterTokenizer("ab"), "ab" * 50, path)
    whole = path.read_bytes()
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "table.npy", np.ones((3, 3), np.uint16))
    np.savez(tmp_path / "many.npz", a=np.ones(3, np.uint16))
    (tmp_path / "object.npy").write_bytes(whole.replace(b"'<u2'", b"'|O' "))
    for damaged in (whole[:-2], whole[:50], b"", b"text" * 40):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="t.npy.*write them again"):
            open_tokens(path)
    for name in ("floats.npy", "table.npy", "many.npz", "object.npy", "absent.npy"):
        with pytest.raises(InputError, match=f"{name}.*write them again"):
            open_tokens(tmp_path / name)
