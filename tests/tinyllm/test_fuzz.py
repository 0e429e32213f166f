"""Damaged folders of every model: one line that says so, or the very model that the files now describe."""

from __future__ import annotations

import json
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import tinyllm
from tinyllm.errors import InputError
from tinyllm.models import LLaMA
from tinyllm.pretrained import HARMLESS, write_weights

from .folders import one_line
from .tiny import LLAMA_CONFIG, TINY, scramble, tokens

SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
OPTIONS = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 6}
LLAMA_WITH_OPTIONS = replace(LLAMA_CONFIG, rope_scaling=SCALING, **OPTIONS)
MODELS = TINY | {"llama with options": lambda seed: scramble(LLaMA(LLAMA_WITH_OPTIONS))}
# Flips of one bit (a digit, a letter, a quote becomes another) and of all.
BITS = [1 << bit for bit in range(8)]
MASKS = lambda place: (1 << place % 8, 1 << (place + 3) % 8, 0xFF)


class Folder:
    """A saved model whose files a test may spoil, and what must come of it."""

    def __init__(self, path, name):
        self.path, self.model = path, MODELS[name](0)
        self.model.save_pretrained(path)
        self.good = {file.name: file.read_bytes() for file in path.iterdir()}
        self.config = json.loads(self.good["config.json"])
        self.state = self.model.state_dict()
        self.accepted = self.refused = 0

    def put(self, name, content):
        (self.path / name).unlink()  # some file systems wait for the disk where a file is written over
        (self.path / name).write_bytes(content)

    def load(self, name, content):
        """What from_pretrained makes of the folder with this content of one file: a model, or None."""
        self.put(name, content)
        try:
            model = tinyllm.from_pretrained(self.path)
        except InputError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1000, message
            self.refused += 1
            return None
        finally:
            self.put(name, self.good[name])
        self.accepted += 1
        assert type(model) is type(self.model)
        found = model.state_dict()
        assert found.keys() == self.state.keys()
        assert all(np.array_equal(found[key], array) for key, array in self.state.items())
        return model

    def check_config(self, content):
        """A model that is accepted has, for every option of the file, the value that stands there."""
        model = self.load("config.json", content)
        if model is None:
            return
        altered = json.loads(content)
        assert altered.keys() - HARMLESS == self.config.keys() - HARMLESS
        has = {"model_type": model.model_type, **model.config.to_published()}
        for option in altered.keys() - HARMLESS:
            assert same(altered[option], has.get(option)) or (option, altered[option]) in SYNONYMS, option
        with np.errstate(all="ignore"):  # an epsilon of 1e35 is legal, and makes zeros
            T = min(4, model.context)
            assert model(tokens(model, 1, T)).shape == (1, T, model.vocabulary_size)


# Options with several values for one thing; null also for what is left out of the file.
SYNONYMS = [
    ("activation_function", "gelu_pytorch_tanh"),
    ("predict_special_tokens", False),
    ("hidden_act", "swish"),
    ("rope_scaling", {}),
]


def same(a, b):
    return a == b and (type(a) is type(b) or {type(a), type(b)} == {int, float})


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    return Folder(tmp_path, request.param)


def flipped(content, place, mask):
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


def some(n, count):
    """`count` of n places, the first and the last among them, the same in each run."""
    return sorted({0, n - 1, *np.random.default_rng(n).integers(0, n, count).tolist()})


def fuzz_config(folder, places, masks=MASKS):
    good = folder.good["config.json"]
    for place in places:
        folder.check_config(good[:place])
        for mask in masks(place):
            folder.check_config(flipped(good, place, mask))


def fuzz_header(folder, places, masks=MASKS):
    good = folder.good["model.safetensors"]
    for place in places:
        assert folder.load("model.safetensors", good[:place]) is None
        for mask in masks(place):
            folder.load("model.safetensors", flipped(good, place, mask))


def header_size(folder):
    return 8 + int.from_bytes(folder.good["model.safetensors"][:8], "little")


def test_some_bytes_of_the_config(folder):
    fuzz_config(folder, some(len(folder.good["config.json"]), 60))
    assert folder.refused > 3 * folder.accepted > 0


def test_some_bytes_of_the_header(folder):
    fuzz_header(folder, some(header_size(folder), 50))
    assert folder.refused > 10 * folder.accepted


@pytest.mark.slow
def test_every_byte_of_the_config_and_the_header(folder):
    fuzz_config(folder, range(len(folder.good["config.json"])), lambda place: [*BITS, 0xFF])
    fuzz_header(folder, range(header_size(folder)), lambda place: MASKS(place)[place % 3 :][:1])


@pytest.mark.parametrize("other", [b"I32", b"U32"])
def test_whole_numbers_in_the_place_of_real_ones(folder, other):
    """Four bytes each, so that nothing but the header's word for them is wrong."""
    good = folder.good["model.safetensors"]
    for place in (good.index(b"F32"), good.rindex(b"F32", 0, header_size(folder))):
        (folder.path / "model.safetensors").write_bytes(good[:place] + other + good[place + 3 :])
        with pytest.raises(InputError, match="not real numbers"):
            tinyllm.from_pretrained(folder.path)


@pytest.mark.parametrize("wrong", ["missing", "left over", "misshapen"])
def test_tensors_that_do_not_fit(folder, wrong):
    """Each of them is named."""
    good = load_file(folder.path / "model.safetensors")
    for name, array in good.items():
        others = {other: good[other] for other in good if other != name}
        if wrong == "left over":
            others[name] = array
            bias = name.replace("weight", "bias")
            name = name + "_2" if bias in good else bias
            others[name] = np.zeros(3, np.float32)
        elif wrong == "misshapen":
            others[name] = array[:-1]
        folder.put("model.safetensors", save(others))
        with pytest.raises(InputError) as error:
            tinyllm.from_pretrained(folder.path)
        assert f"1 {wrong} ({name}" in one_line(error) and str(folder.path) in str(error.value)


VALUES = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "-1", "0", "-0.0", "1", "1.0", "1.5", "2",
    "3.0", "1e-320", "1e300", "4294967297", "9" * 5000, "true", "false", "null", '"1"', '"gelu"', '""',
    "[]", "[1]", "{}", '{"a": 1}',
]  # fmt: skip


def with_value(config, option, text):
    """The config as JSON, with this text in the place of a value."""
    marked = json.dumps({**config, option: "@"})
    return marked.replace('"@"', text).encode()


def test_every_option_at_every_kind_of_value(folder):
    for option, value in folder.config.items():
        for text in VALUES:
            folder.check_config(with_value(folder.config, option, text))
            for inner in value if isinstance(value, dict) else ():
                changed = with_value(value, inner, text).decode()
                folder.check_config(with_value(folder.config, option, changed))
    assert folder.refused > folder.accepted > 0


def test_options_left_out_twice_or_misspelt(folder):
    for option, value in folder.config.items():
        twice = json.dumps(folder.config)[:-1] + f", {json.dumps(option)}: {json.dumps(value)}}}"
        assert folder.load("config.json", twice.encode()) is None
        for name in (option.upper(), option + "s", option[:-1], " " + option, ""):
            renamed = {name if key == option else key: v for key, v in folder.config.items()}
            folder.check_config(json.dumps(renamed).encode())  # where the name counts, it may not be lost


@pytest.mark.parametrize("size", [10**4, 10**9, 10**18, 10**30])
def test_a_config_that_asks_for_more_than_there_is_fails_at_once(folder, size):
    """Before memory is taken for it: the weights say how large the model is."""
    tracemalloc.start()
    try:
        for option, value in folder.config.items():
            if type(value) is int:
                before = time.process_time()
                folder.check_config(with_value(folder.config, option, str(size)))
                assert time.process_time() - before < 1, option
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert folder.refused > 0


@pytest.mark.parametrize("name", ["gpt2"])
def test_some_bytes_of_the_index_of_shards(tmp_path, name):
    folder = Folder(tmp_path, name)
    arrays = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    write_weights(tmp_path, folder.config, arrays, max_shard_bytes=20_000)
    folder.good = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    index = folder.good["model.safetensors.index.json"]
    for place in some(len(index), 80):
        assert place > len(index) - 2 or folder.load("model.safetensors.index.json", index[:place]) is None
        for mask in MASKS(place):
            folder.load("model.safetensors.index.json", flipped(index, place, mask))
    assert folder.refused > 3 * folder.accepted
