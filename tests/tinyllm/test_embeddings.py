"""Sentence embeddings: pooling, the folders of sentence-transformers, long and empty texts."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tinyllm
from autograd import Tensor, gradcheck, no_grad
from tinyllm.embeddings import SentenceEncoder, cosines, mean_pooled
from tinyllm.errors import InputError
from tinyllm.masked import with_special_tokens
from tinyllm.models import BERT, GPT2, BERTConfig, GPT2Config
from tinyllm.tokenizers import train_bpe

from .folders import one_line
from .tiny import scramble

TEXTS = ["The class statement.", "A new execution frame, is it?", "café", "2024"]


def config(vocabulary, **options):
    return BERTConfig(
        vocabulary, 24, 2, 3, 40, max_position_embeddings=30, architecture="BertModel", **options
    )


def own(folder):
    """A BERT with a BPE of ours."""
    tokenizer = with_special_tokens(train_bpe("the class statement and the frame " * 3, 270))
    model = scramble(BERT(config(tokenizer.vocabulary_size)))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def published(tmp_path):
    """A BERT with a WordPiece tokenizer.json."""
    from . import published as libraries  # skips where the library is not

    scramble(BERT(config(95, heads=("pooler",)))).save_pretrained(tmp_path)
    return libraries.write(tmp_path, "bert")


def test_mean_pooling_leaves_padding_out():
    rng = np.random.default_rng(0)
    hidden, lengths = rng.normal(size=(3, 5, 4)), [5, 1, 3]
    mask = (np.arange(5) < np.array(lengths)[:, None]).astype(int)
    found = mean_pooled(Tensor(hidden), mask)
    expected = [row[:n].mean(axis=0) for row, n in zip(hidden, lengths)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)
    assert gradcheck(lambda h: mean_pooled(h, mask), [Tensor(hidden, requires_grad=True)])
    assert mean_pooled(Tensor(hidden.astype(np.float32)), mask).dtype == np.float32


def test_cosines():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4, 3)).astype(np.float32)
    vectors[3] = 0
    found = cosines(vectors)
    for i in range(3):
        for j in range(3):
            a, b = vectors[i], vectors[j]
            assert found[i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    assert (found[3] == 0).all() and found.dtype == np.float32
    np.testing.assert_allclose(cosines(vectors * [[2], [5], [1], [1]])[:3], found[:3], rtol=1e-5)


def assert_vectors(encoder, texts, rows, pool):
    """Each text alone gives what all together give."""
    vectors, cut = encoder.encode(texts, batch=3)
    assert vectors.shape == (len(texts), 24) and vectors.dtype == np.float32 and cut == 0
    for row, vector in zip(rows, vectors, strict=True):
        with no_grad():
            hidden = encoder.model.hidden_states([row]).numpy()[0]
        np.testing.assert_allclose(vector, pool(hidden), rtol=0, atol=1e-5)


def test_a_model_with_a_tokenizer_of_ours(tmp_path):
    encoder = SentenceEncoder.from_pretrained(own(tmp_path))
    tokenizer = encoder.tokenizer
    cls, sep = (tokenizer.special_tokens[name] for name in ("[CLS]", "[SEP]"))
    rows = [[cls, *tokenizer.encode(text), sep] for text in ("frame", "the class", "a")]
    assert_vectors(encoder, ["frame", "the class", "a"], rows, lambda hidden: hidden.mean(axis=0))


def test_a_published_folder(published):
    encoder = SentenceEncoder.from_pretrained(published)
    rows = [encoder.tokenizer.encode(text) for text in TEXTS]
    assert all(encoder.tokenizer.decode(row[:1]) == "[CLS]" for row in rows)
    assert_vectors(encoder, TEXTS, rows, lambda hidden: hidden.mean(axis=0))


def sentence_transformers(folder, pooling, path="", **settings):
    """The files that sentence-transformers puts beside a model."""
    modules = [("0", path, "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    described = [
        {"idx": int(i), "name": i, "path": where, "type": f"sentence_transformers.models.{kind}"}
        for i, where, kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (folder / path / "sentence_bert_config.json").write_text(json.dumps(settings), encoding="utf-8")


FLAGS = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False,
         "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}  # fmt: skip


@pytest.mark.parametrize(
    "pooling, pool",
    [
        (FLAGS | {"pooling_mode_mean_tokens": True}, lambda hidden: hidden.mean(axis=0)),
        (FLAGS | {"pooling_mode_cls_token": True}, lambda hidden: hidden[0]),
        ({"pooling_mode": "mean", "embedding_dimension": 24}, lambda hidden: hidden.mean(axis=0)),
    ],
)
def test_folders_of_sentence_transformers(published, pooling, pool):
    sentence_transformers(published, pooling, max_seq_length=30, do_lower_case=False)
    encoder = SentenceEncoder.from_pretrained(published)
    assert_vectors(encoder, TEXTS, [encoder.tokenizer.encode(text) for text in TEXTS], pool)


def test_a_model_in_a_folder_of_its_own_that_reads_lower_case(published):
    inner = published / "0_BERT"
    inner.mkdir()
    for file in [path for path in published.iterdir() if path.is_file()]:
        file.rename(inner / file.name)
    sentence_transformers(published, FLAGS | {"pooling_mode_mean_tokens": True}, "0_BERT", do_lower_case=True)
    encoder = SentenceEncoder.from_pretrained(published)
    assert np.array_equal(encoder.encode(["THE CLASS"])[0], encoder.encode(["the class"])[0])


def test_long_texts_are_cut_and_counted(published, tmp_path):
    """[CLS] and [SEP] stay; what is cut is the end of the text."""
    sentence_transformers(published, FLAGS | {"pooling_mode_mean_tokens": True}, max_seq_length=12)
    encoder = SentenceEncoder.from_pretrained(published)
    long = " ".join(["class"] * 40)
    tokens = encoder.tokenizer.encode(long, frame=False)
    row, was_cut = encoder._row(1, long)
    frame = encoder.tokenizer.encode("", frame=True)
    assert was_cut and row == [frame[0], *tokens[:10], frame[1]] and encoder.longest == 12
    assert encoder.encode([long, "class", long])[1] == 2
    encoder = SentenceEncoder.from_pretrained(own(tmp_path / "own"))
    row, was_cut = encoder._row(1, "the class " * 50)
    assert was_cut and len(row) == 30 and encoder.encode(["the class " * 50, "a"])[1] == 1


def test_long_texts_that_cannot_be_cut(published):
    """Where what is around a text leaves no room for it, or comes in the middle of it."""
    encoder = SentenceEncoder.from_pretrained(published)
    encoder.longest = 3
    assert len(encoder._row(1, "the class")[0]) == 3
    encoder.longest = 2
    said = "text 1 has 3 tokens, with those that the tokenizer puts around it, and cannot be cut to the 2"
    assert said in one_line(pytest.raises(InputError, encoder.encode, ["t"]))
    pipeline = json.loads((published / "tokenizer.json").read_text(encoding="utf-8"))
    text, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    pipeline["post_processor"] = {
        "type": "TemplateProcessing", "single": [text, end, text, end], "pair": [text],
        "special_tokens": {"[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}},
    }  # fmt: skip
    (published / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    encoder = SentenceEncoder.from_pretrained(published)
    row, _ = encoder._row(1, "t")
    encoder.longest = len(row) - 1
    assert f"text 1 has {len(row)} tokens" in one_line(pytest.raises(InputError, encoder.encode, ["t"]))


@pytest.mark.parametrize("text", ["", "  \n "])
def test_empty_texts(published, text):
    encoder = SentenceEncoder.from_pretrained(published)
    assert "text 2 is empty" in one_line(pytest.raises(InputError, encoder.encode, ["class", text]))


def test_parts_that_are_not_implemented(published):
    said = lambda: one_line(pytest.raises(InputError, SentenceEncoder.from_pretrained, published))
    mean = FLAGS | {"pooling_mode_mean_tokens": True}
    for pooling in (FLAGS, FLAGS | {"pooling_mode_max_tokens": True}, {"pooling_mode": "lasttoken"},
                    mean | {"pooling_mode_cls_token": True}):  # fmt: skip
        sentence_transformers(published, pooling)
        assert "asks for the pooling" in said()
    sentence_transformers(published, mean, max_seq_length=0)
    assert "max_seq_length" in said()
    sentence_transformers(published, mean)
    (published / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    assert "'query'" in said()
    modules = json.loads((published / "modules.json").read_text())
    dense = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    for content, wrong in (
        [modules + [dense], "'Dense'"],
        [modules[:1], "no Transformer with"],
        [{}, "no list"],
    ):
        (published / "modules.json").write_text(json.dumps(content))
        assert wrong in said()
    (published / "modules.json").write_text("[")
    assert "cannot read" in said()


def test_models_of_another_kind(tmp_path):
    GPT2(GPT2Config(300, 16, 16, 1, 2)).save_pretrained(tmp_path)
    message = one_line(pytest.raises(InputError, SentenceEncoder.from_pretrained, tmp_path))
    assert "a GPT2, and sentence embeddings need a BERT" in message
    folder = own(tmp_path / "own")
    tinyllm.from_pretrained(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    assert "no tokenizer" in one_line(pytest.raises(InputError, SentenceEncoder.from_pretrained, folder))


def test_pairs_of_a_published_tokenizer(published):
    """[CLS] first [SEP] second [SEP], the second with its [SEP] in segment 1."""
    tokenizer = SentenceEncoder.from_pretrained(published).tokenizer
    first, second = ("the class", "a new frame")
    ids, segments = tokenizer.encode_pair(first, second)
    a, b = (tokenizer.encode(text, frame=False) for text in (first, second))
    cls, sep = (tokenizer.special_tokens[name] for name in ("[CLS]", "[SEP]"))
    assert ids == [cls, *a, sep, *b, sep] and segments == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    mask = tokenizer.special_tokens["[MASK]"]
    assert mask in tokenizer.encode_pair("the [MASK]", second, allow_special=True)[0]
    assert mask not in tokenizer.encode_pair("the class", "a [MASK]")[0]
