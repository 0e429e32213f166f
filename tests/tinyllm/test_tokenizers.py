"""Byte-pair encoding against a specification that recounts everything, its files, and what it refuses."""

import json
import random
import re
import threading
import time
from collections import Counter
from itertools import pairwise

import pytest
import regex
import tiktoken
import tiktoken.load
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm import tokenizers
from tinyllm.datasets import default_corpus
from tinyllm.errors import InputError
from tinyllm.tokenizers import (
    BytePairTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    gpt2_tokenizer,
    load_tokenizer,
    text_pieces,
    train_bpe,
)

END = "<|endoftext|>"
# Few letters make long repetitions and ties; the others lie where the split pattern decides. No unassigned
# characters: what `regex` (in training) takes for a letter may be none to an older tiktoken (in encoding).
TEXTS = st.text("aab's tl1é_!\n\r\x1c\x85\u2028世", max_size=60) | st.text(
    st.characters(exclude_categories=("Cs", "Cn")), max_size=30
)


def bpe_by_recounting(text: str, vocabulary_size: int):
    """The definition: count all pairs anew for every merge. Returns the tokens and the words as they end."""
    words = [list(word.encode()) for word in regex.findall(tokenizers.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocabulary_size - 1:
        count = Counter(pair for word in words for pair in pairwise(word))
        if not count or max(count.values()) < 2:
            break
        best = min(count, key=lambda pair: (-count[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens, words


def numbered(merged: list[bytes]) -> dict[bytes, int]:
    return {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + merged)}


@pytest.fixture(scope="module")
def corpus():
    return default_corpus()


@pytest.fixture(scope="module")
def english(corpus):
    return train_bpe(corpus, 600)


@given(TEXTS, st.integers(257, 290))
def test_training_equals_recounting(text, size):
    tokens, words = bpe_by_recounting(text, size)
    trained = train_bpe(text, size)
    assert trained.ranks == {token: i for i, token in enumerate(tokens)}
    assert trained.special_tokens == {END: len(tokens)} and trained.vocabulary_size == len(tokens) + 1
    # tiktoken, which knows ranks but no pairs, arrives at the very tokens that training left in the text.
    assert trained.encode(text) == [i for word in words for i in word]


def test_training_on_english_equals_recounting(corpus):
    tokens, words = bpe_by_recounting(corpus[50_000:58_000], 400)
    trained = train_bpe(corpus[50_000:58_000], 400)
    assert list(trained.ranks) == tokens and trained.vocabulary_size == 400
    assert trained.encode(corpus[50_000:58_000]) == [i for word in words for i in word]


def test_training_is_quick_and_shows_progress(corpus):
    shown = []
    start = time.perf_counter()
    trained = train_bpe((corpus * 3)[:1_000_000], 1257, lambda merges: (shown.append(i) or i for i in merges))
    assert time.perf_counter() - start < 10
    assert shown == list(range(256, 1256)) and trained.vocabulary_size == 1257
    assert len(trained.encode(corpus)) < len(corpus) / 2.5


@given(TEXTS | st.text())
def test_text_survives(english, text):
    ids = english.encode(text)
    assert english.decode(ids) == text and english.decode_bytes(ids) == text.encode()
    assert english.encode_bytes(text.encode()) == ids


@given(st.binary(max_size=40) | st.text(max_size=5).map(lambda s: s.encode("utf-16")))
def test_bytes_survive(english, data):
    assert english.decode_bytes(english.encode_bytes(data)) == data


def test_text_that_looks_special_is_ordinary_unless_allowed(english):
    text = f"a{END}b"
    assert english.end_of_text == 599 and 599 not in english.encode(text)
    assert english.decode(english.encode(text)) == text
    assert english.encode(text, allow_special=True) == [ord("a"), 599, ord("b")]
    assert english.decode([599]) == END


@given(st.lists(st.integers(0, 599), max_size=30))
def test_stream_of_any_tokens_equals_decoding_at_once(english, ids):
    stream = StreamDecoder(english)
    assert "".join([*map(stream.push, ids), stream.finish()]) == english.decode(ids)


def test_stream_waits_for_the_last_byte(english):
    stream = StreamDecoder(english)
    assert [stream.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.push(0xE2) == "" and stream.finish() == "\ufffd"


@example("aaaa !!\x1cbbb bb", 11, 3)  # U+001C is a space to Python, but a sign to the pattern
@example("aaaaaaaa      b b", 12, 2)  # a cut between blanks would part what is one word
@given(st.text("ab '\n\r\t!\x1c\x85\u2028é", max_size=80), st.integers(12, 30), st.integers(1, 7))
def test_pieces_have_the_tokens_of_the_whole(text, piece, part):
    """Any two characters make a token, so a cut in a word shows. A place to cut comes every 11 characters."""
    pairs = [(a + b).encode() for a in "ab '\n\r\t!\x1c" for b in "ab '\n\r\t!\x1c"]
    tokenizer = BytePairTokenizer(numbered(pairs))
    text = re.sub(r"(?s)((?:(?!\S[ \n]).){9})", r"\1a ", text)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE", piece)
        pieces = list(text_pieces(text))
        assert list(text_pieces(text[i : i + part] for i in range(0, len(text), part))) == pieces
        assert tokenizer.encode(text) == whole
    assert "".join(pieces) == text and all(0 < len(p) <= piece for p in pieces)
    assert [i for p in pieces for i in tokenizer.encode(p)] == whole


@pytest.mark.parametrize("text", [" " * 1_100_000 + "x", "x" + "\n" * 1_100_000, "x" * 1_100_000])
def test_a_million_equal_characters(english, text):
    assert english.decode(english.encode(text)) == text


def test_ids_need_no_order_but_no_gap():
    letters = [bytes([b]) for b in range(256)]
    random.Random(0).shuffle(letters)
    ranks = {token: i for i, token in enumerate([*letters, b"ab", b"abc"], 1)}
    tokenizer = BytePairTokenizer(ranks, {"<s>": 0})
    assert tokenizer.encode("abc") == [258] and tokenizer.encode("abd") == [257, ranks[b"d"]]
    assert tokenizer.vocabulary_size == 259 and tokenizer.end_of_text is None
    for wrong, special, message in [
        (ranks, {}, "258 tokens must be 0 to 257"),
        (ranks, {"<s>": 1}, "259 tokens must be 0 to 258"),
        (ranks | {b"abc": 257}, {"<s>": 0}, "259 tokens"),
        ({token: i - 1 for token, i in ranks.items()}, {"word": 258}, "'word'"),
        ({(token if token != b"q" else b"qq"): i for token, i in ranks.items()}, {"<s>": 0}, "byte 113"),
    ]:
        with pytest.raises(InputError, match=message):
            BytePairTokenizer(wrong, special)


@pytest.mark.parametrize("bad", [-1, 600, 10**6])
def test_ids_out_of_range(english, bad):
    for decode in (english.decode, english.decode_bytes, StreamDecoder(english).push):
        with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of 600"):
            decode(bad if decode.__name__ == "push" else [0, bad])
    with pytest.raises(TypeError):
        english.decode([1.5])


@pytest.mark.parametrize("size", [0, 256])
def test_a_vocabulary_needs_all_bytes(size):
    with pytest.raises(InputError, match=f"vocabulary of {size} is too small"):
        train_bpe("text", size)
    assert train_bpe("text", 257).vocabulary_size == 257


# Files


@given(TEXTS, st.integers(257, 290))
def test_saving_and_loading_is_the_identity(tmp_path, text, size):
    trained = train_bpe(text, size)
    trained.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.ranks, loaded.special_tokens) == (trained.ranks, trained.special_tokens)


def test_tiktoken_reads_our_files(english, tmp_path, monkeypatch):
    english.save(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    read = tiktoken.load.data_gym_to_mergeable_bpe_ranks
    files = str(tmp_path / "merges.txt"), str(tmp_path / "vocab.json")
    assert read(*files, clobber_one_byte_tokens=True) == english.ranks


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_transformers_reads_our_files(english, corpus, tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    english.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = corpus[:20_000] + "  naïve 世界's\t\n\n  \r\n x1 22!? \x1c\x85 I'LL we'll" + " " * 9
    assert theirs(text)["input_ids"] == english.encode(text)
    assert theirs(f"a{END}")["input_ids"] == english.encode(f"a{END}", allow_special=True)
    assert theirs.eos_token_id == english.end_of_text and len(theirs) == 600


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_reads_the_published_layout(tmp_path, newline):
    """As OpenAI published it: bytes in the order of their spelling, a merge that begins with #, no config."""
    names = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]), *map(chr, range(256, 324))]
    names += ["Ġt", "he", "Ġthe", "##", "Ã©", "ĊĊ", END]
    vocabulary = json.dumps({name: i for i, name in enumerate(names)})
    (tmp_path / "vocab.json").write_text(vocabulary, encoding="utf-8")
    merges = newline.join(["#version: 0.2", "Ġ t", "h e", "Ġt he", "# #", "Ã ©", "Ċ Ċ", ""])
    (tmp_path / "merges.txt").write_bytes(merges.encode())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text == 262 == tokenizer.vocabulary_size - 1
    assert tokenizer.encode(" the##é\n\n") == [258, 259, 260, 261]
    assert tokenizer.encode("t \u00ad") == [ord("t") - 33, 256 - 68 + 32, *tokenizer.encode("\u00ad")]
    tokenizer.save(tmp_path / "again")
    assert (tmp_path / "again" / "merges.txt").read_bytes() == merges.replace("\r", "").encode()
    assert json.loads((tmp_path / "again" / "vocab.json").read_bytes()) == json.loads(vocabulary)


DAMAGE = {  # what is wrong: file, text there, text instead, message
    "an id is text": ("vocab.json", '"a": 97', '"a": "97"', "vocab.json"),
    "a byte is missing": ("vocab.json", '"a": 97', '"<a>": 97', "vocab.json.*byte 97"),
    "a gap": ("vocab.json", f'{END}": 599', f'{END}": 600', "vocab.json.*600 tokens"),
    "not JSON": ("vocab.json", "}", "", "vocab.json"),
    "a line is missing": ("merges.txt", "\nĠ t\n", "\n", "merges.txt.*line"),
    "one token a line": ("merges.txt", "Ġ t\n", "Ġt\n", "merges.txt.*line.*no pair"),
    "unknown letters": ("merges.txt", "Ġ t\n", "世 t\n", "merges.txt.*line.*no pair"),
    "twice the same": ("merges.txt", "Ġ t\n", "Ġ t\nĠ t\n", "merges.txt.*'Ġt'"),
    "a merge that vocab.json lacks": ("merges.txt", "Ġ t\n", "Ġ t\nĠ \u0100\n", "merges.txt.*'Ġ\u0100'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(english, tmp_path, damage):
    name, there, instead, message = DAMAGE[damage]
    english.save(tmp_path)
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert there in text
    (tmp_path / name).write_bytes(text.replace(there, instead).encode())
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_merges_cut_short_anywhere(english, tmp_path):
    """Except that the last newline may go."""
    english.save(tmp_path)
    merges = (tmp_path / "merges.txt").read_bytes()
    for end in [0, *random.Random(0).sample(range(len(merges) - 1), 30), len(merges) - 2]:
        (tmp_path / "merges.txt").write_bytes(merges[:end])
        with pytest.raises(InputError, match="merges.txt is damaged"):
            load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(merges[:-1])
    assert load_tokenizer(tmp_path).ranks == english.ranks


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_or_unreadable_file(english, tmp_path, name):
    english.save(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=name):
        load_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        load_tokenizer(tmp_path)


def test_folder_without_a_tokenizer(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="no tokenizer in .*vocab.json and merges.txt, or characters"):
            load_tokenizer(folder)


@pytest.mark.parametrize("tokens", [[b"abc"], [b"abc", b"ab"]])
def test_ranks_that_no_merges_make(tmp_path, tokens):
    tokenizer = BytePairTokenizer(numbered(tokens))
    with pytest.raises(InputError, match="token b'abc' is no merge of two"):
        tokenizer.save(tmp_path)


def test_unwritable_place(english, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"):
        english.save(tmp_path / "file")


# GPT-2's own encoding


def test_gpt2_from_tiktoken(monkeypatch):
    ranks = {bytes([255 - b]): b for b in range(256)} | {b"ab": 256}
    published = tiktoken.Encoding(
        "x", pat_str=tokenizers.PATTERN, mergeable_ranks=ranks, special_tokens={END: 257}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": published}.get)
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.ranks, tokenizer.special_tokens) == (ranks, {END: 257})


def test_gpt2_without_a_network(monkeypatch):
    def no_network(name):
        raise ConnectionError("a page of details")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(InputError, match="GPT-2's tokenizer .ConnectionError.*vocab.json and merges.txt"):
        gpt2_tokenizer()


def test_gpt2_never_hangs(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    start = time.perf_counter()
    with pytest.raises(InputError, match="TimeoutError"):
        gpt2_tokenizer(seconds=0.05)
    assert time.perf_counter() - start < 3
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


# Characters


@given(st.text(max_size=50))
def test_characters_survive(text):
    tokenizer = CharacterTokenizer(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert sorted(set(ids)) == list(range(tokenizer.vocabulary_size))


def test_characters_are_sorted_saved_and_checked(tmp_path):
    CharacterTokenizer("hello é\n").save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("\n héo") == [0, 1, 3, 6, 5] and tokenizer.vocabulary_size == 7
    assert tokenizer.end_of_text is None
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in (6, 0)] == ["é", "\n"]
    with pytest.raises(InputError, match="character 'x' is not among the 7"):
        tokenizer.encode("hex")
    with pytest.raises(InputError, match="token id 7 is outside the vocabulary of 7"):
        tokenizer.decode([7])
    for damaged in ('{"characters": "ba"}', '{"characters": ["a"]}', '{"characters": "aa"}', "{}", "["):
        (tmp_path / "characters.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(InputError, match="characters.json"):
            load_tokenizer(tmp_path)
