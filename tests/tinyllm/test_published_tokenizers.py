"""Published tokenizers beside the library that wrote them and beside transformers; damaged files."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tinyllm
from tinyllm.errors import InputError
from tinyllm.published_tokenizers import FILES, PublishedTokenizer
from tinyllm.tokenizers import (
    BytePairTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    check_fit,
    end_tokens,
    load_tokenizer,
    train_bpe,
)

from .published import LIBRARIES, PROSE, one_line, write

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors  # isort: skip
from tokenizers.trainers import UnigramTrainer  # isort: skip

TEXTS = st.text("The clasTn'é\u0301🦙世 \n\t<s>[]|_▁.,!?0\ufffd", max_size=40) | st.text(max_size=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("published"), name) for name in LIBRARIES}


@pytest.fixture(scope="module")
def published(folders: dict[str, Path]) -> dict[str, PublishedTokenizer]:
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


def fresh(name: str, special: bool) -> Tokenizer:
    library = Tokenizer.from_str(LIBRARIES[name][0].to_str())
    library.encode_special_tokens = not special
    return library


# Ids and text


@pytest.mark.parametrize("name", LIBRARIES)
def test_ids_and_text_of_the_library(published, name):
    ours, ordinary, special = published[name], fresh(name, False), fresh(name, True)

    @example("<s> [MASK]</s><|eot_id|>  x<|endoftext|>")
    @given(TEXTS)
    def check(text):
        ids = ours.encode(text)
        assert ids == ordinary.encode(text).ids
        assert ours.encode(text, frame=False) == ordinary.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=True) == special.encode(text).ids
        assert ours.decode(ids) == ordinary.decode(ids, skip_special_tokens=False)
        assert ours.decode_bytes(ids) == ours.decode(ids).encode()

    check()


@pytest.mark.parametrize("name", LIBRARIES)
def test_ids_and_text_of_transformers(folders, published, name):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folders[name]), published[name]

    @example(" <s> [MASK]</s><|eot_id|> <tool>  x<|endoftext|>")
    @given(TEXTS)
    def check(text):
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        ids = theirs(text, split_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)

    check()
    assert ours.vocabulary_size == len(theirs) and ours.end_of_text == theirs.eos_token_id


def test_what_stands_around_a_text(published):
    """<s> where the post-processor puts it, whatever tokenizer_config.json says, and nothing else."""
    ends = {name: (t.encode("e")[0], t.encode("e")[-1]) for name, t in published.items()}
    names = {name: [t.decode([i]) for i in ends[name]] for name, t in published.items()}
    assert names["llama3"][0] == "<|begin_of_text|>" and names["llama2"][0] == names["llama2 new"][0] == "<s>"
    assert names["bert"] == ["[CLS]", "[SEP]"] and names["gpt1"] == names["rwkv"] == ["e", "e"]
    for tokenizer in published.values():
        assert not set(tokenizer.encode("e", frame=False)) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("name", LIBRARIES)
def test_special_tokens_are_found_only_where_allowed(published, name):
    ours = published[name]
    for token, i in ours.special_tokens.items():
        ids = ours.encode(f"a{token}b", frame=False)
        if token not in ("<unk>", "[UNK]"):
            assert i not in ids
        assert i in ours.encode(f"a{token}b", allow_special=True, frame=False)
        assert ours.decode([i]) == token
    if name in ("llama3", "llama2"):
        text = "".join(ours.special_tokens)
        assert ours.decode(ours.encode(text, frame=False)) == text


def test_names_of_special_tokens_that_are_words_of_the_vocabulary(tmp_path):
    """A vocabulary of texts has </s> like any other: it cannot be written, and is not let through."""
    library = Tokenizer(models.Unigram())
    trainer = UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(PROSE, trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}', encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    library.encode_special_tokens = True
    assert 1 in library.encode("The</s>").ids
    with pytest.raises(InputError, match="holds '</s>', which this tokenizer cannot tell") as error:
        ours.encode("The</s>")
    one_line(error)
    assert ours.encode("The</s>", allow_special=True)[-1] == 1
    assert ours.encode("The 世 <unk>").count(0) >= 1  # no token: that is what <unk> is for


class Hesitant:
    """A library that lets other threads run after each change of a setting."""

    def __init__(self, library: Tokenizer) -> None:
        self.__dict__["library"] = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.library, name, value)
        time.sleep(0.001)


def test_threads_do_not_change_each_others_special_tokens(published, monkeypatch):
    ours = published["llama3"]
    encode = lambda special: ours.encode("a<|eot_id|>b", allow_special=special)
    expected = [encode(False), encode(True)] * 20
    monkeypatch.setattr(ours, "_library", Hesitant(ours._library))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(encode, [False, True] * 20)) == expected


@pytest.mark.parametrize("name", ["llama2", "rwkv"])
def test_strange_texts(published, name):
    ours = published[name]
    assert ours.decode(ours.encode("a\udcffb", frame=False)) == "a\ufffdb"  # half of a pair
    assert ours.decode(ours.encode("\ud83e\udd99", frame=False)) == "🦙"  # both halves
    assert ours.encode("", frame=False) == [] and ours.decode([]) == ""
    assert (
        ours.decode(ours.encode("x" * 100_000 + " " * 100_000 + "y", frame=False))
        == "x" * 100_000 + " " * 100_000 + "y"
    )


@pytest.mark.parametrize("name", LIBRARIES)
def test_ids_out_of_range(published, name):
    ours = published[name]
    for bad in (-1, ours.vocabulary_size):
        for decode in (ours.decode, ours.decode_bytes, lambda ids: StreamDecoder(ours).push(ids[-1])):
            with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary"):
                decode([0, bad])


# Streams


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_stream_of_any_tokens_equals_decoding_at_once(published, name):
    ours = published[name]
    some = st.integers(0, ours.vocabulary_size - 1)
    rows = st.lists(some | st.sampled_from(sorted(ours.byte_tokens) or [0]), max_size=25)

    @given(rows)
    def from_the_start(ids):
        stream = StreamDecoder(ours)
        assert "".join([*map(stream.push, ids), stream.finish()]) == ours.decode(ids)

    @given(TEXTS, rows)
    def after_a_prompt(text, ids):
        prompt = ours.encode(text)
        if prompt and (prompt[-1] in ours.byte_tokens or ours.decode(prompt).endswith("\ufffd")):
            prompt += ours.encode("a", frame=False)  # else what follows could still change its last character
        stream = StreamDecoder(ours, prompt)
        written = "".join([*map(stream.push, ids), stream.finish()])
        assert ours.decode(prompt) + written == ours.decode([*prompt, *ids])

    from_the_start()
    after_a_prompt()


@pytest.mark.parametrize("name", ["llama3", "llama2", "llama2 new", "rwkv"])
def test_no_half_characters_and_no_late_ones(published, name):
    ours = published[name]
    text = "The 🦙👩‍👩‍👧 é 世界: class café"
    ids, stream, written = ours.encode(text, frame=False), StreamDecoder(ours), ""
    for i, token in enumerate(ids, 1):
        written += stream.push(token)
        assert "\ufffd" not in written and ours.decode(ids[:i]).startswith(written)
        if token not in ours.byte_tokens and not ours.decode(ids[:i]).endswith("\ufffd"):
            assert written == ours.decode(ids[:i])
    assert written + stream.finish() == text.strip() == ours.decode(ids)


def test_blanks_between_words_survive_the_seam_to_the_prompt(published):
    """Decoded alone, the first new token would lose its blank."""
    for name in ("llama2", "bert", "gpt1"):
        ours = published[name]
        prompt, new = ours.encode("the", frame=False), ours.encode("class", frame=False)
        stream = StreamDecoder(ours, prompt)
        assert "".join([*map(stream.push, new), stream.finish()]) == " class"
        stream = StreamDecoder(ours)
        assert "".join([*map(stream.push, new), stream.finish()]) == "class"


def test_streams_look_back_at_a_few_tokens_only(published, monkeypatch):
    ours, lengths = published["llama2"], []
    decode = type(ours).decode
    monkeypatch.setattr(type(ours), "decode", lambda self, ids: lengths.append(len(ids)) or decode(self, ids))
    stream = StreamDecoder(ours)
    for token in ours.encode("The class statement " * 100):
        stream.push(token)
    assert len(lengths) > 400 and max(lengths) <= 4


# Files


@pytest.mark.parametrize("name", LIBRARIES)
def test_saving_copies_every_file(folders, published, tmp_path, name):
    (tmp_path / "source").mkdir()
    for path in folders[name].iterdir():
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "source" / "generation_config.json").write_bytes(b'{"eos_token_id":\t[1, 0]}')
    (tmp_path / "source" / "chat_template.jinja").write_bytes("{{ 'Ö' }}\r\n".encode())
    (tmp_path / "source" / "model.safetensors").write_bytes(b"not a tokenizer's")
    load_tokenizer(tmp_path / "source").save(tmp_path / "copy")
    copies = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    originals = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    assert {**copies, "model.safetensors": b"not a tokenizer's"} == originals
    again = load_tokenizer(tmp_path / "copy")
    assert again.encode("The class <s>") == published[name].encode("The class <s>")
    assert end_tokens(tmp_path / "copy", again) >= {0, 1}


def bert_words() -> list[str]:
    vocabulary = LIBRARIES["bert"][0].get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False},
     {"tokenizer_class": "BertTokenizer", "mask_token": {"__type": "AddedToken", "content": "[MASK]"}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_vocab_txt(tmp_path, settings, newline):
    words = [*bert_words(), "T", "é", "世", "世界"]
    (tmp_path / "vocab.txt").write_bytes((newline.join(words) + newline).encode())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.vocabulary_size == len(words) and ours.end_of_text is None
    assert ours.special_tokens == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)

    @example("The CLASS[MASK] naïve café 世界, isn't it?")
    @given(TEXTS)
    def check(text):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)

    check()
    ours.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"[PAD]\n[CLS]\n[SEP]\na\n", "no line is [UNK]"),
        (b"", "no line is [UNK]"),
        (b"[UNK]\n\xff\n", "utf-8"),
    ],
)
def test_damaged_vocab_txt(tmp_path, content, said):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert said in one_line(error) and "vocab.txt" in str(error.value)


# GPT-2's three files


def gpt2_folder(folder: Path, change: Callable[[dict], Any] = lambda pipeline: None) -> Path:
    """vocab.json and merges.txt, and tokenizer.json as transformers 4 writes it beside them."""
    ours = train_bpe(" ".join(PROSE), 290)
    ours.save(folder)
    (folder / "tokenizer_config.json").unlink()
    library = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    library.add_special_tokens(["<|endoftext|>"])
    pipeline = json.loads(library.to_str())
    change(pipeline)
    (folder / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    return folder


def test_gpt2_needs_no_library(tmp_path, monkeypatch):
    gpt2_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, BytePairTokenizer)
    monkeypatch.undo()
    (tmp_path / "vocab.json").unlink()
    theirs = load_tokenizer(tmp_path)
    assert isinstance(theirs, PublishedTokenizer)

    @given(TEXTS)
    def check(text):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == text

    check()


END = "<|endoftext|>"
ENDS = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END, "type_id": 0}}],
    "pair": [],
    "special_tokens": {END: {"id": END, "ids": [289], "tokens": [END]}},
}
CHANGES = {
    "lower case": lambda p: p.update(normalizer={"type": "Lowercase"}),
    "a blank first": lambda p: p["pre_tokenizer"].update(add_prefix_space=True),
    "no words": lambda p: p["pre_tokenizer"].update(use_regex=False),
    "other words": lambda p: p.update(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    "an end": lambda p: p.update(post_processor=ENDS),
    "one more token": lambda p: p["added_tokens"].append(
        {**p["added_tokens"][0], "id": 290, "content": "<pad>"}
    ),
    "another id": lambda p: p["model"]["vocab"].update(
        a=p["model"]["vocab"]["b"], b=p["model"]["vocab"]["a"]
    ),
    "whole words": lambda p: p["model"].update(ignore_merges=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_json_that_says_more_is_what_counts(tmp_path, change):
    gpt2_folder(tmp_path, CHANGES[change])
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, PublishedTokenizer)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    assert ours.encode("The CLASS statement") == library.encode("The CLASS statement").ids


@pytest.mark.parametrize("place", ["file", "settings"])
def test_gpt2_with_a_chat_template(tmp_path, place):
    gpt2_folder(tmp_path)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    else:
        settings = json.dumps({"chat_template": "{{ messages[0].content }}"})
        (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.encode_chat([{"role": "user", "content": "The"}])) == "The"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer.json; let transformers write"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "spiece.model", "source.spm"])
def test_only_what_transformers_reads(tmp_path, name):
    (tmp_path / name).write_bytes(b"\n\x0e")
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    line = one_line(error)
    assert f"has {name} and no tokenizer.json" in line and "AutoTokenizer" in line and str(tmp_path) in line


@pytest.mark.parametrize(
    "files, settings, said",
    [
        ({"vocab.json": "{}", "merges.txt": ""}, {"tokenizer_class": "Qwen2Tokenizer"}, "Qwen2Tokenizer"),
        ({"vocab.json": "{}", "merges.txt": "", "added_tokens.json": "{}"}, {}, "added_tokens.json"),
        ({"vocab.json": '{"the</w>": 0}', "merges.txt": ""}, {}, "GPT-1's"),
        ({"vocab.txt": "[UNK]"}, {"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer"),
    ],
)
def test_files_that_mean_something_else(tmp_path, files, settings, said):
    for name, content in {**files, "tokenizer_config.json": json.dumps(settings)}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert said in one_line(error) and "AutoTokenizer" in str(error.value)


def test_the_command_in_that_line_helps(tmp_path):
    """GPT-1's two files become a tokenizer.json that we read to the same ids."""
    transformers = pytest.importorskip("transformers")
    vocabulary = {"<unk>": 0, "t": 1, "h": 2, "e": 3, "e</w>": 4, "th": 5, "the</w>": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "openai-gpt"}', encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    exec(str(error.value).split('python -c "')[1].removesuffix('"'))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("The the, THE") == theirs("The the, THE")["input_ids"] == [6, 6, 0, 6]


def test_the_hub_is_asked_for_every_file(monkeypatch):
    hub, errors, asked = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils"), []
    hub.snapshot_download = lambda name, allow_patterns: asked.extend(allow_patterns) or name
    for name in ("HfHubHTTPError", "HFValidationError", "LocalEntryNotFoundError"):
        setattr(errors, name, type(name, (OSError,), {}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", errors)
    assert tinyllm.fetched("somebody/no-such-folder") == Path("somebody/no-such-folder")
    wanted = [*FILES, "config.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"]
    wanted += ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    for name in wanted:
        assert any(fnmatch(name, pattern) for pattern in asked), name
    for name in ("pytorch_model.bin", "consolidated.safetensors", "flax_model.msgpack", "README.md"):
        assert not any(fnmatch(name, pattern) for pattern in asked), name


def test_without_the_libraries(folders, tmp_path, monkeypatch):
    write(tmp_path, "llama2", chat_template="{{ messages[0].content }}")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("[UNK]", encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.ext", None)
    assert ours.encode("The")
    with pytest.raises(InputError, match=r'library jinja2: pip install -e "\.\[tokenizers\]"') as error:
        ours.encode_chat([{"role": "user", "content": "The"}])
    one_line(error)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for folder in (folders["llama2"], tmp_path / "bert"):
        with pytest.raises(
            InputError, match=r'library tokenizers: pip install -e "\.\[tokenizers\]"'
        ) as error:
            load_tokenizer(folder)
        one_line(error)


# Damage


def test_an_end_of_text_that_is_no_token(tmp_path):
    write(tmp_path, "llama2", eos_token="<|im_end|>")
    with pytest.raises(InputError, match="eos_token = '<.im_end.>'.*not of one model") as error:
        load_tokenizer(tmp_path)
    one_line(error)
    write(tmp_path, "llama2", eos_token=None)
    assert load_tokenizer(tmp_path).end_of_text is None


def test_settings_of_an_older_kind(tmp_path):
    """special_tokens_map.json, over which tokenizer_config.json has the last word."""
    write(tmp_path, "llama2")
    (tmp_path / "tokenizer_config.json").unlink()
    names = {"eos_token": {"content": "</s>", "single_word": False}, "additional_special_tokens": []}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    assert load_tokenizer(tmp_path).end_of_text == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}', encoding="utf-8")
    assert load_tokenizer(tmp_path).end_of_text == 1


def try_it(folder: Path) -> bool:
    """Load and use a tokenizer; False where that ended in one line."""
    try:
        ours = load_tokenizer(folder)
        ids = ours.encode("The class <s> 🦙 </s>")
        ours.encode("The <s>", allow_special=True)
        stream = StreamDecoder(ours)
        [stream.push(i) for i in ids if i < ours.vocabulary_size]
        return True
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and str(error).isprintable()
        return False


@pytest.mark.parametrize("name", LIBRARIES)
def test_flipped_bits_and_cut_files(tmp_path, capfd, name):
    """One line, or a tokenizer. Nothing on stderr, where the library's panics would write."""
    write(tmp_path, name)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    rng = random.Random(name)
    steps = whole.replace(b" ", b"")[: whole.index(b'"vocab"')]  # before the long part
    places = [rng.randrange(len(steps)) for _ in range(60)] + [rng.randrange(len(whole)) for _ in range(60)]
    outcomes = []
    for i in places:
        (tmp_path / "tokenizer.json").write_bytes(
            whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1 :]
        )
        outcomes.append(try_it(tmp_path))
    assert {True, False} == set(outcomes)
    for i in [0, 1, *rng.sample(range(len(whole) - 1), 20), len(whole) - 1]:
        (tmp_path / "tokenizer.json").write_bytes(whole[:i])
        assert not try_it(tmp_path)
    assert capfd.readouterr().err == ""


ODD = [
    None,
    True,
    -1,
    0,
    2**32 - 1,
    2**63,
    1e300,
    "",
    "a",
    "🦙",
    "▁",
    "(",
    [],
    {},
    ["a"],
    {"a": 1},
    [["a", 1]],
]


def places_in(value: Any, way: tuple = ()) -> list[tuple]:
    inside = (
        list(value.items())[:8]
        if isinstance(value, dict)
        else list(enumerate(value))[:4]
        if isinstance(value, list)
        else []
    )
    return [way, *(place for key, entry in inside for place in places_in(entry, (*way, key)))]


@pytest.mark.parametrize("name", ["llama3", "llama2", "bert"])
def test_values_that_cannot_be(tmp_path, capfd, name):
    """Any value of the file another, or gone; among them what makes the library panic, or end the process."""
    write(tmp_path, name)
    whole, rng, outcomes = (tmp_path / "tokenizer.json").read_text(encoding="utf-8"), random.Random(name), []
    places = places_in(json.loads(whole))[1:]
    bad = [(rng.choice(places), rng.choice(ODD)) for _ in range(150)]
    for *way, last in places:
        if last in ("continuing_subword_prefix", "special_tokens", "single", "start", "stop", "processors"):
            bad += [((*way, last), value) for value in ("(", 10**6, {}, [])]
    for (*way, last), value in bad:
        pipeline = json.loads(whole)
        parent = pipeline
        for key in way:
            parent = parent[key]
        parent[last] = value
        if rng.random() < 0.2:
            del parent[last]
        (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
        outcomes.append(try_it(tmp_path))
    assert {True, False} == set(outcomes)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("named", [True, False])
def test_what_ends_the_process(tmp_path, named):
    """A BPE vocabulary with such a prefix: the library would cut its tokens in the middle of a character."""
    pipeline = json.loads(LIBRARIES["llama2"][0].to_str())
    pipeline["model"]["continuing_subword_prefix"] = "("
    if not named:  # as in files of old versions
        del pipeline["model"]["type"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    with pytest.raises(InputError, match="continuing_subword_prefix is not implemented"):
        load_tokenizer(tmp_path)


def test_no_tokens(tmp_path):
    library = Tokenizer(models.BPE())
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="it has no tokens"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_in_the_file_are_of_no_matter(tmp_path):
    library = Tokenizer.from_str(LIBRARIES["llama2"][0].to_str())
    library.enable_padding(length=100)
    library.enable_truncation(3)
    library.save(str(tmp_path / "tokenizer.json"))
    assert (
        load_tokenizer(tmp_path).encode("The class statement")
        == LIBRARIES["llama2"][0].encode("The class statement").ids
    )


# What fits a model, and what ends a text


def test_special_tokens_behind_all_others_may_be_surplus(tmp_path, published):
    model = SimpleNamespace(vocabulary_size=330)
    library = Tokenizer.from_str(LIBRARIES["llama2"][0].to_str())
    library.add_special_tokens(["<pad>"])
    library.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.vocabulary_size == published["llama2"].vocabulary_size + 1 == 331
    check_fit(model, ours)
    library.add_tokens(["word"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="the tokenizer has 332 tokens, the model only 330"):
        check_fit(model, load_tokenizer(tmp_path))
    model.vocabulary_size = 329
    with pytest.raises(InputError, match="the tokenizer has 330 tokens"):
        check_fit(model, ours)


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (None, None, {2}),
        ({}, {}, {2}),
        ({"eos_token_id": 5}, None, {2, 5}),
        ({"eos_token_id": None}, {"eos_token_id": [7, 5]}, {2, 5, 7}),
        ({"eos_token_id": [5, None]}, {"eos_token_id": 7}, {2, 5, 7}),
        ({"eos_token_id": -1}, None, {2}),
    ],
)
def test_the_tokens_that_end_a_text(tmp_path, published, config, generation, expected):
    for name, content in {"config.json": config, "generation_config.json": generation}.items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert end_tokens(tmp_path, published["llama2"]) == expected
    assert end_tokens(tmp_path, CharacterTokenizer("abc")) == expected - {2}


@pytest.mark.parametrize("bad", ["2", [2, "3"], True, 1.0, {"a": 1}])
def test_ends_that_are_no_ids(tmp_path, published, bad):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}), encoding="utf-8")
    with pytest.raises(InputError, match="generation_config.json: eos_token_id is .* but must be a token id"):
        end_tokens(tmp_path, published["llama2"])
