"""Reading, cutting, storing and sampling text: nothing lost, nothing twice, every refusal clear."""

import gzip
import inspect
import json
import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm import datasets
from tinyllm.datasets import (
    Document,
    Sampler,
    bytes_per_token,
    default_corpus,
    documents,
    evaluation_batches,
    folder_documents,
    read_text,
    split,
    split_documents,
    stream_text,
)
from tinyllm.errors import InputError
from tinyllm.token_file import open_tokens, write_tokens
from tinyllm.tokenizers import CharacterTokenizer, train_bpe


@pytest.fixture(scope="module")
def corpus():
    return default_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_bpe(corpus[:20_000], 400)


# Text


def test_default_corpus_is_english_without_ruled_lines(corpus):
    assert 300_000 < len(corpus) < 500_000
    assert corpus.index('The "assert" statement\n\nAssert') < corpus.index("Yield expressions")
    assert not any(line and set(line) <= set("-=*~^+|") and len(line) > 2 for line in corpus.split("\n"))
    letters = sum(c.isalpha() or c == " " for c in corpus)
    assert letters > 0.85 * len(corpus) and corpus == default_corpus()


def test_the_last_tenth_of_the_default_corpus_are_the_documents_for_validation(corpus):
    """Near enough, for what a cut at nine tenths takes from another document stands nowhere else either."""
    train, validation = split_documents(documents("prose"))
    start = corpus.index(validation[0].text)
    assert 0.85 * len(corpus) < start < 0.95 * len(corpus)
    assert all(corpus.index(document.text) >= start for document in validation)
    assert all(corpus.index(document.text) < start for document in train)


def test_a_python_without_the_default_corpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="pydoc_data.*--data"):
        default_corpus()


@given(st.text(), st.integers(1, 9))
def test_reads_what_was_written_whatever_the_chunks(tmp_path, text, chunk):
    text = "x" + text
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "CHUNK", chunk)
        assert read_text(tmp_path / "a.txt") == read_text(str(tmp_path / "a.gz")) == text
        assert "".join(stream_text(tmp_path / "a.txt")) == text


@pytest.mark.parametrize("chunk", [3, 4, 100])
def test_a_mark_of_utf8_is_no_text(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(datasets, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes("\ufeffabc\ufeff".encode())
    assert read_text(tmp_path / "a.txt") == "abc\ufeff"


def test_folder_in_order_without_binaries_and_hidden_files(tmp_path):
    for name, data in {
        "b.txt": b"B\n",
        "a/z.md": b"AZ",
        "a/b/c.rst": b"ABC",
        "a.txt": b"A",
        "c.gz": gzip.compress(b"C"),
        "picture.png": b"\x89PNG\0\0",
        "data.npy.gz": gzip.compress(b"\x93NUMPY\0"),
        ".git/x": b"\xff",
        ".hidden": b"no",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert read_text(tmp_path) == "ABC\n\nAZ\n\nA\n\nB\n\n\nC\n\n\n\n"


@example("a", b"\xe2\x82", "", 2)
@given(
    st.text("a€世", max_size=20),
    st.sampled_from([b"\xff", b"\xe2\x82", b"\x80", b"\xc3(", b"\xed\xa0\x80"]),
    st.sampled_from(["", "z", "世界"]),
    st.integers(1, 7),
)
def test_the_byte_that_is_not_utf8_is_named(tmp_path, before, wrong, after, chunk):
    data = before.encode() + wrong + after.encode()
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "CHUNK", chunk)
        found = rf"byte {len(before.encode())}, 0x{wrong[0]:02x},"
        with pytest.raises(InputError, match=f"a.txt is not UTF-8: {found}.*UTF-8 or leave"):
            read_text(tmp_path / "a.txt")


def test_missing_empty_and_broken_files(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "binary").write_bytes(b"\0")
    for name, message in [
        ("absent", "does not exist"),
        ("empty.txt", "no text"),
        ("empty.gz", "no text"),
        ("mark.txt", "no text"),
        ("folder", "no text"),
    ]:
        with pytest.raises(InputError, match=f"{name} .*{message}.*; give"):
            read_text(tmp_path / name)
    whole = bytearray(gzip.compress(bytes(range(128)) * 50))
    flipped = whole[:20] + bytes([whole[20] ^ 255]) + whole[21:]
    for damaged in (b"plain text", whole[:-4], whole[:40], flipped):
        (tmp_path / "a.gz").write_bytes(damaged)
        with pytest.raises(InputError, match="cannot read .*a.gz"):
            read_text(tmp_path / "a.gz")


@given(st.text("ab\n", min_size=1, max_size=300), st.floats(0, 0.99))
def test_split_keeps_every_character_in_order(text, fraction):
    train, validation = split(text, fraction)
    assert train + validation == text
    exact = len(text) - math.floor(len(text) * fraction)
    if exact == len(text):
        assert validation == ""
    else:
        assert len(train) <= exact and (train.endswith("\n") or "\n" not in text[:exact])
        assert "\n" not in text[len(train) : exact]


def test_split_by_position_near_the_line():
    train, validation = split("a line of text\n" * 1000)
    assert len(train) % 15 == 0 and 1500 <= len(validation) < 1515
    assert split("\n" + "x" * 9999)[1] == "x" * 1000  # no line ends near the place
    for fraction in (-0.1, 1, 2, float("nan")):
        with pytest.raises(InputError, match=r"fraction of .* is not in \[0, 1\)"):
            split("text", fraction)


# Documents

KINDS = ["prose", "docstrings", "sources"]


@pytest.fixture(scope="module")
def all_documents():
    return {kind: documents(kind) for kind in KINDS}


@pytest.mark.parametrize(
    "kind, count, size",
    [
        ("prose", 60, 300_000),
        ("docstrings", 5_000, 1_200_000),
        ("sources", 300, 6_000_000),
    ],
)
def test_documents_are_many_and_distinct_and_their_split_takes_a_tenth(all_documents, kind, count, size):
    found = all_documents[kind]
    texts = [document.text for document in found]
    assert len(found) >= count and sum(map(len, texts)) >= size
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)
    train, validation = split_documents(found)
    assert sorted(train + validation) == sorted(found)
    held_out = sum(len(document.text) for document in validation)
    assert 0.08 < held_out / sum(map(len, texts)) < 0.18 and 0.08 < len(validation) / len(found) < 0.16


def test_docstrings_are_those_of_the_objects_that_they_are_named_after(all_documents):
    found = {document.name: document for document in all_documents["docstrings"]}
    for owner, name in [
        (json, "json"),
        (json.decoder, "json.decoder"),
        (inspect.getsource, "inspect.getsource"),
        (json.JSONDecoder, "json.decoder.JSONDecoder"),
        (json.JSONDecoder.raw_decode, "json.decoder.JSONDecoder.raw_decode"),
    ]:
        assert found[name] == (name.split(".")[0], name, inspect.getdoc(owner))
    labels = {document.label for document in found.values()}
    assert {"asyncio", "email", "logging", "xml", "http", "multiprocessing"} < labels
    assert not labels & {"test", "idlelib", "lib2to3", "site-packages", "encodings", "numpy"}


def test_definitions_are_found_wherever_they_stand(tmp_path, monkeypatch):
    (tmp_path / "package" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "package" / "__init__.py").write_bytes(b'"""The package."""')
    (tmp_path / "package" / "old.py").write_bytes(b'# coding: latin-1\r\n"""Fran\xe7ois."""\r\n')
    (tmp_path / "broken.py").write_text('"""Broken."""\nprint "two"', encoding="utf-8")
    (tmp_path / "bytes.py").write_bytes(b'"""\xff"""')
    hidden = ["package/tests/a.py", "site-packages/b.py", "test.py", "_sysconfigdata_x.py", "a.txt", "c-d.py"]
    for name in hidden:
        (tmp_path / name).write_text('"""Hidden."""', encoding="utf-8")
    (tmp_path / "module.py").write_text(
        '''
def first(x="""No docstring."""):
    """First.

    At the margin.
        Indented.
    """
    def inner():
        "Inner."
class Second:
    """Second."""
    """Not this one."""
    @property
    async def third(self): "Third."
    def fourth(self): return "no docstring"
    def fifth(self): "First.\\n\\nAt the margin.\\n    Indented."
    def sixth(self): b"Bytes."
    def seventh(self): ""
try:
    if True: pass
    elif False:
        def eighth(): "Eighth."
except ImportError:
    class Ninth: "Ninth."
else:
    with open("") as f:
        def tenth(): "Tenth."
''',
        encoding="utf-8",
    )
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    assert documents("docstrings") == [
        ("module", "module.first", "First.\n\nAt the margin.\n    Indented."),
        ("module", "module.first.inner", "Inner."),
        ("module", "module.Second", "Second."),
        ("module", "module.Second.third", "Third."),
        ("module", "module.eighth", "Eighth."),
        ("module", "module.Ninth", "Ninth."),
        ("module", "module.tenth", "Tenth."),
        ("package", "package", "The package."),
        ("package", "package.old", "Fran\xe7ois."),
    ]
    assert [document[:2] for document in documents("sources")] == [
        ("broken", "broken"),
        ("module", "module"),
        ("package", "package"),
        ("package", "package.old"),
    ]
    assert documents("sources")[3].text == '# coding: latin-1\n"""Fran\xe7ois."""\n'


def test_documents_import_nothing_and_are_the_same_in_every_process(all_documents):
    code = (
        "import sys, zlib; from tinyllm.datasets import documents\n"
        "found = [documents(kind) for kind in ('prose', 'docstrings', 'sources')]\n"
        "print({'this', 'turtle', 'mailbox'} & set(sys.modules), zlib.crc32(repr(found).encode()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = zlib.crc32(repr([all_documents[kind] for kind in KINDS]).encode())
    assert ran.stdout == f"set() {expected}\n"


def test_no_paragraph_of_the_prose_stands_twice(all_documents, corpus):
    words = [" ".join(p.split()) for document in all_documents["prose"] for p in document.text.split("\n\n")]
    assert len(set(words)) == len(words)
    assert set(words) == {" ".join(p.split()) for p in corpus.split("\n\n")} - {""}  # and none is lost
    train, validation = split_documents(all_documents["prose"])
    lines = {line.strip() for document in train for line in document.text.split("\n")}
    held_out = [line.strip() for document in validation for line in document.text.split("\n")]
    held_out = [line for line in held_out if len(line) > 40]
    assert sum(line in lines for line in held_out) < 0.02 * len(held_out)


names = st.lists(st.text(max_size=8), min_size=1, max_size=60, unique=True)


@given(names, st.randoms(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_document_never_moves(drawn, random, smaller, larger):
    smaller, larger = sorted([smaller, larger])
    found = [Document("label", name, name) for name in drawn]
    train, validation = split_documents(found, smaller)
    assert sorted(train + validation) == sorted(found)
    assert train == [d for d in found if d in train] and validation == [d for d in found if d in validation]
    some = random.sample(found, random.randint(0, len(found)))
    assert split_documents(some, smaller)[1] == [d for d in some if d in validation]
    assert set(validation) <= set(split_documents(found, larger)[1])
    assert split_documents(found, 0)[1] == []


def test_the_split_of_many_names_takes_the_fraction_and_these_never_change():
    found = [Document("", f"name {i}", "") for i in range(10_000)]
    for fraction in (0.01, 0.1, 0.5):
        count = len(split_documents(found, fraction)[1])
        assert abs(count - 10_000 * fraction) < 5 * math.sqrt(10_000 * fraction * (1 - fraction))
    some = [Document("", name, "") for name in ("floating", "yield", "types", "json.decoder", "é")]
    sides = split_documents(some)
    assert [[document.name for document in side] for side in sides] == [
        ["types", "json.decoder", "é"],
        ["floating", "yield"],
    ]
    for fraction in (-0.1, 1, float("nan")):
        with pytest.raises(InputError, match=r"fraction of .* is not in \[0, 1\)"):
            split_documents(found, fraction)


def test_kinds_and_a_python_without_sources(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="kind 'poems'; take prose, docstrings or sources"):
        documents("poems")
    (tmp_path / "python313.zip").write_bytes(b"")
    for root in (tmp_path, tmp_path / "absent", tmp_path / "python313.zip"):
        monkeypatch.setattr("sysconfig.get_path", lambda name, root=root: str(root))
        for kind in ("docstrings", "sources"):
            with pytest.raises(InputError, match="without the sources .*; give text with --data"):
                documents(kind)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="pydoc_data.*--data"):
        documents("prose")


def test_a_folder_of_texts_gives_a_document_for_each_file(tmp_path):
    for name, data in {
        "b/x.txt": b"\xef\xbb\xbfX",
        "b/c/y.txt.gz": gzip.compress(b"Y"),
        "a.txt": b"A",
        "twice.txt": b"A",
        "b/.hidden": b"no",
        "b/picture.png": b"\x89PNG\0\0",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert folder_documents(str(tmp_path)) == [
        ("", "a.txt", "A"),
        ("b", "b/c/y.txt.gz", "Y"),
        ("b", "b/x.txt", "X"),
    ]
    (tmp_path / "b" / "x.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="x.txt is not UTF-8"):
        folder_documents(tmp_path)
    with pytest.raises(InputError, match="none holds no text"):
        folder_documents(tmp_path / "none")


# Batches


@given(st.integers(2, 200), st.integers(1, 12), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_shows_a_grid_of_windows_once(n, context, batch, seed):
    n = max(n, context + 1)
    tokens = np.random.default_rng(seed).permutation(n).astype(np.uint16)  # distinct: a token tells its place
    place = np.argsort(tokens)
    sampler = Sampler(tokens, batch, context, seed)
    inputs, targets = map(np.concatenate, zip(*(sampler.next() for _ in range(3 * sampler.windows))))
    assert inputs.shape == (3 * sampler.windows * batch, context) == targets.shape
    assert inputs.dtype == targets.dtype == np.int64
    assert (place[inputs] == place[inputs[:, :1]] + np.arange(context)).all()
    assert (place[targets] == place[inputs] + 1).all()
    starts = place[inputs[:, 0]]
    for epoch in range(0, len(starts), sampler.windows):
        grid = np.sort(starts[epoch : epoch + sampler.windows])
        assert (np.diff(grid) == context).all()
    assert sampler.windows * context > n - 2 * context or sampler.windows == 1
    assert sampler.position == 3 * sampler.windows


def test_every_token_is_seen_in_the_course_of_time():
    sampler = Sampler(np.arange(50), batch=5, context=7)
    pairs = [sampler.next() for _ in range(200)]
    assert {int(t) for inputs, _ in pairs for t in inputs.flat} == set(range(49))
    assert {int(t) for _, targets in pairs for t in targets.flat} == set(range(1, 50))
    orders = {tuple(inputs[:, 0]) for inputs, _ in pairs}
    assert len(orders) > 150  # shuffled anew, from another start


def test_position_is_all_the_state():
    tokens = np.arange(1000, dtype=np.uint16)
    sampler = Sampler(tokens, 6, 10, seed=3)
    batches = [sampler.next() for _ in range(60)]  # several epochs
    for position in (59, 0, 17, 16, 33):
        again = Sampler(tokens, 6, 10, seed=3)
        again.position = sampler.position = position
        for one in (again, sampler):
            np.testing.assert_array_equal(one.next(), batches[position])
            assert json.loads(json.dumps(one.position)) == position + 1
    other = Sampler(tokens, 6, 10, seed=4)
    assert not np.array_equal(other.next()[0], batches[0][0])


def test_samples_from_a_file_and_makes_one_permutation_an_epoch(tmp_path, monkeypatch):
    text = "abcdefgh" * 400
    write_tokens(CharacterTokenizer(text), text, tmp_path / "t.npy")
    tokens = open_tokens(tmp_path / "t.npy")
    made, fresh = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or fresh(seed))
    sampler = Sampler(tokens, 8, 16)
    for _ in range(50):  # 400 windows of the 199 in an epoch
        inputs, targets = sampler.next()
        assert type(inputs) is np.ndarray and inputs.flags.c_contiguous and targets.flags.c_contiguous
        assert ((inputs + 1) % 8 == targets).all()
    assert sampler.windows == 199 and made == [[0, 0], [0, 1], [0, 2]]


def test_a_corpus_shorter_than_one_context():
    with pytest.raises(InputError, match="corpus of 64 tokens .* context of 64, which needs 65; give"):
        Sampler(np.arange(64), 2, 64)
    inputs, targets = Sampler(np.arange(65), 2, 64).next()
    assert (inputs == np.arange(64)).all() and (targets == np.arange(1, 65)).all()
    with pytest.raises(InputError, match="0 tokens"):
        Sampler(np.arange(0), 2, 1)


@given(st.integers(2, 100), st.integers(1, 5), st.integers(1, 9))
def test_evaluation_predicts_every_token_once(n, batch, context):
    tokens = np.arange(1, n + 1, dtype=np.uint16)
    batches = list(evaluation_batches(tokens, batch, context))
    assert all(inputs.shape == targets.shape and inputs.shape[1] == context for inputs, targets in batches)
    assert all(len(inputs) == batch for inputs, _ in batches[:-1]) and 1 <= len(batches[-1][0]) <= batch
    inputs, targets = (np.concatenate(side).ravel() for side in zip(*batches))
    assert inputs.dtype == targets.dtype == np.int64
    assert targets[: n - 1].tolist() == list(range(2, n + 1)) and (targets[n - 1 :] == -100).all()
    assert inputs[: n - 1].tolist() == list(range(1, n)) and (inputs[n - 1 :] == 0).all()
    assert len(targets) - (n - 1) < context


def test_evaluation_of_less_than_two_tokens():
    for n in (0, 1):
        with pytest.raises(InputError, match=f"{n} tokens have nothing to predict"):
            evaluation_batches(np.arange(n), 2, 4)


def test_bytes_per_token(tokenizer, corpus):
    text = corpus[:5000] + "€世"
    tokens = np.array(tokenizer.encode(text), np.uint16)
    assert bytes_per_token(tokenizer, tokens) * len(tokens) == pytest.approx(len(text.encode()))
    characters = CharacterTokenizer("a€")
    assert bytes_per_token(characters, np.array([0, 1, 1, 0], np.uint32)) == 2
    with pytest.raises(InputError, match="token id 2 is outside"):
        bytes_per_token(characters, np.array([0, 2]))
