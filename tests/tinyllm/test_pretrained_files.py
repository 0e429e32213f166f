"""Published folders: what is written is read back, by us and by the library, and damage is named."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tinyllm import files
from tinyllm.errors import InputError
from tinyllm.files import ArrayFile, read_arrays, write_arrays
from tinyllm.pretrained import HARMLESS, match, read_config, read_weights, refuse_unknown, write_weights

from .folders import one_line

RNG = np.random.default_rng(0)
CONFIG = {"model_type": "gpt2", "n_layer": 2}


def tensors(count=5, shape=(4, 3)):
    return {f"h.{i}.weight": RNG.standard_normal(shape).astype(np.float32) for i in range(count)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert found[name].shape == expected[name].shape  # assert_array_equal would broadcast
        np.testing.assert_array_equal(found[name], expected[name])


def craft(path, header, data=b""):
    """A file by hand, so that the reader is not tested only against our own idea of the format."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# Reading and writing


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_round_trip_in_one_file_and_in_shards(tmp_path, max_shard_bytes):
    saved = tensors()
    write_weights(tmp_path, CONFIG, saved, max_shard_bytes)
    assert read_config(tmp_path) == CONFIG
    assert_same(read_weights(tmp_path), saved)

    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == {10**9: 0, 100: 3, 1: 5}[max_shard_bytes]  # 48 bytes a tensor
    if shards:
        assert shards[0].name == f"model-00001-of-0000{len(shards)}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
        assert index["metadata"]["total_size"] == 5 * 48
        by_library = {name: load_file(tmp_path / index["weight_map"][name])[name] for name in saved}
    else:
        by_library = load_file(tmp_path / "model.safetensors")
        assert ArrayFile(tmp_path / "model.safetensors").metadata == {"format": "pt"}  # transformers insists
    assert_same(by_library, saved)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("first, second", [(10**9, 50), (50, 10**9), (50, 100)])
def test_saving_again_in_another_number_of_shards_leaves_nothing_old_to_read(tmp_path, first, second):
    write_weights(tmp_path, CONFIG, tensors(), first)
    (tmp_path / "model_notes.safetensors").write_bytes(b"mine")
    newer = tensors()
    write_weights(tmp_path, CONFIG, newer, second)
    assert_same(read_weights(tmp_path), newer)
    one_file = (tmp_path / "model.safetensors").exists()
    assert one_file == (second == 10**9)
    assert (tmp_path / "model.safetensors.index.json").exists() != one_file
    assert len(list(tmp_path.glob("model-*"))) == {50: 5, 100: 3, 10**9: 0}[second]
    assert (tmp_path / "model_notes.safetensors").exists()


DTYPES = [np.float16, np.float32, np.float64, np.int64, np.uint64, np.int8, np.uint8, np.bool_]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_layout_in_memory_is_stored_right(tmp_path_factory, data):
    shape = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    array = data.draw(hnp.arrays(st.sampled_from(DTYPES), shape))
    view = array.transpose(data.draw(st.permutations(range(array.ndim))))
    if array.ndim:
        view = view[:: data.draw(st.sampled_from([1, 2, -1]))]
    layouts = {
        "view": view,
        "stretched": np.broadcast_to(array, (2, *array.shape)),
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
    }
    path = tmp_path_factory.getbasetemp() / "layouts.safetensors"
    write_arrays(path, layouts)
    expected = {name: np.array(a, dtype=a.dtype.newbyteorder("=")) for name, a in layouts.items()}
    assert_same(read_arrays(path), expected)


def test_float_types_come_as_asked_and_integers_as_they_are(tmp_path):
    bits = np.array([0x3FC0, 0xC000, 0x7F80], np.uint16)  # the upper halves of the float32 1.5, -2, infinity
    entries = {
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "h": {"dtype": "F16", "shape": [1], "data_offsets": [6, 8]},
        "d": {"dtype": "F64", "shape": [], "data_offsets": [8, 16]},
        "position_ids": {"dtype": "I64", "shape": [1, 2], "data_offsets": [16, 32]},
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [16, 16]},
    }
    data = [bits, np.float16(0.1), np.float64(0.1), np.int64([7, 2**53 + 1])]
    craft(tmp_path / "model.safetensors", entries, b"".join(part.tobytes() for part in data))
    expected = {"b": np.array([1.5, -2, np.inf]), "h": np.float64([np.float16(0.1)]), "d": np.float64(0.1)}
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        found = read_weights(tmp_path, dtype)
        assert_same(
            {name: found[name] for name in expected},
            {name: array.astype(dtype) for name, array in expected.items()},
        )
        assert found["none"].shape == (0, 3)
        assert_same({"p": found["position_ids"]}, {"p": np.array([[7, 2**53 + 1]])})
    assert read_weights(tmp_path)["b"].dtype == np.float32
    assert read_arrays(tmp_path / "model.safetensors")["b"].dtype == ml_dtypes.bfloat16
    assert read_weights(tmp_path)["b"].flags.writeable  # the models train these arrays in place


def test_bfloat16_is_written(tmp_path):
    saved = {"b": np.array([[1.5, -2, 3]], ml_dtypes.bfloat16).T}
    write_weights(tmp_path, CONFIG, saved)
    assert_same(read_arrays(tmp_path / "model.safetensors"), saved)


def test_loading_holds_one_stored_tensor_beyond_the_result(tmp_path):
    saved = {str(i): np.ones((512, 512), np.float16) for i in range(8)}
    write_weights(tmp_path, CONFIG, saved)
    tracemalloc.start()
    try:
        weights = read_weights(tmp_path)
        assert weights.shapes["0"] == (512, 512)
        assert tracemalloc.get_traced_memory()[0] < 2**18  # nothing read yet
        loaded = dict(weights)
        result = sum(array.nbytes for array in loaded.values())
        assert tracemalloc.get_traced_memory()[1] < result + saved["0"].nbytes + 2**18
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="sees the peak of mapped memory in /proc")
def test_loading_does_not_keep_mapped_pages_beside_the_result(tmp_path):
    write_weights(tmp_path, CONFIG, {str(i): np.ones((1024, 1024), np.float32) for i in range(16)})
    program = """if True:
        import re, sys
        from tinyllm.pretrained import read_weights
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        before = peak()
        loaded = dict(read_weights(sys.argv[1]))
        print((peak() - before) / sum(array.nbytes for array in loaded.values()))"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True
    )
    assert 0.9 < float(run.stdout) < 1.2, run.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_files_are_as_readable_as_any_other(tmp_path):
    write_weights(tmp_path, CONFIG, tensors())
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("shard", [10**9, 50])
@pytest.mark.parametrize("broken", ["fsync", "save_file"])
def test_a_full_disk_leaves_every_older_file(tmp_path, monkeypatch, shard, broken):
    write_weights(tmp_path, CONFIG, tensors(), shard)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == len(list(tmp_path.glob("*.safetensors"))):  # at the last shard, others are written
            raise (
                OSError(28, "No space left on device")
                if broken == "fsync"
                else SafetensorError("I/O error: No space left on device (os error 28)")
            )
        return None if broken == "fsync" else save_file(*arguments)

    monkeypatch.setattr(os if broken == "fsync" else files, broken, full)
    with pytest.raises(InputError, match="No space left on device") as error:
        write_weights(tmp_path, {"model_type": "other"}, tensors(), shard)
    assert str(tmp_path) in one_line(error)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("in the way")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(InputError, match="cannot write .*out") as error:
            write_weights(folder, CONFIG, tensors())
        one_line(error)
    assert (tmp_path / "out").read_text() == "in the way"


# Damage


def test_every_truncation_and_extension_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write_arrays(path, tensors(2))
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(InputError, match="model.safetensors is damaged") as error:
            read_arrays(path)
    assert f"describes {len(good)} bytes, the file has {len(good) - 1}" in one_line(error)
    path.write_bytes(good + b"\0")
    with pytest.raises(InputError, match=f"describes {len(good)} bytes, the file has {len(good) + 1}"):
        read_arrays(path)


def test_every_flip_in_the_header_is_noticed_or_changes_nothing(tmp_path):
    saved = {
        "wte": RNG.standard_normal((2, 3)).astype(np.float32),
        "ln": np.zeros(0, np.float32),
        "b": np.float16(3),
        "ids": np.arange(4),
    }
    shapes = {name: array.shape for name, array in saved.items()}
    write_weights(tmp_path, CONFIG, saved)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    header, noticed = 8 + int.from_bytes(good[:8], "little"), 0
    for place in range(header):
        for flip in (1 << place % 8, 1 << (place + 3) % 8, 0xFF):
            path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
            try:
                weights = read_weights(tmp_path)
                match(weights, shapes)
                found = dict(weights)
            except InputError:
                noticed += 1
            else:
                assert all(np.array_equal(found[name], saved[name]) for name in saved), (place, flip)
    assert noticed > 0.8 * 3 * header  # the rest is padding and free text


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, said",
    [
        (b"{", "header of 1 bytes"),
        (b"[1, 2, 3]", ""),
        (b'"abc"', ""),
        (b"\xff\xfe{}", "utf-8"),
        (b"[" * 99_999, ""),
        ("{}".encode("utf-16-le"), ""),
        ({"a": A | {"dtype": "F8_E4M3"}}, "F8_E4M3"),
        ({"a": A | {"dtype": ["F32"]}}, ""),
        ({"a": A | {"shape": [-2, -1]}}, "shape"),
        ({"a": A | {"shape": [2.0]}}, "shape"),
        ({"a": A | {"shape": [True, 2]}}, "shape"),
        ({"a": A | {"shape": [2**62, 4]}}, "shape"),
        ({"a": A | {"shape": [3]}}, "'a'"),
        ({"a": A | {"shape": 2}}, ""),
        ({"a": A | {"data_offsets": [0]}}, ""),
        ({"a": A | {"data_offsets": [4, 12]}}, "'a'"),
        ({"a": A | {"data_offsets": [8, 0]}}, ""),
        ({"a": A | {"data_offsets": [-8, 0]}}, "shape"),
        ({"a": A, "b": A}, "'b'"),
        ({"a": A, "b": A | {"data_offsets": [8, 16]}}, "describes"),
        ({}, "describes"),
        ({"a": {}}, ""),
        ({"a": A, "__metadata__": 3}, ""),
        ({"a": A, "b\n": 7}, ""),
        ({"a": A | {"shape": [2**40], "data_offsets": [0, 2**42]}}, "describes"),
        ({"a": A | {"shape": [0, 2**70], "data_offsets": [0, 0]}}, "shape"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, ' + b"9" * 5000 + b"]}}", ""),
    ],
)
def test_headers_that_lie(tmp_path, header, said):
    craft(tmp_path / "model.safetensors", header, bytes(8) if header != b"{" else b"")
    with pytest.raises(InputError, match="model.safetensors is damaged") as error:
        read_weights(tmp_path)
    assert said in one_line(error)


def test_the_crafted_header_is_good_when_nothing_is_changed(tmp_path):
    craft(tmp_path / "model.safetensors", {"a": A}, np.float32([1, 2]).tobytes())
    assert_same(read_weights(tmp_path), {"a": np.float32([1, 2])})


def test_an_empty_tensor_of_absurd_shape(tmp_path):
    for shape in ([0] * 99, [0, 2**62, 2**62]):  # NumPy has neither
        craft(tmp_path / "model.safetensors", {"a": A | {"shape": shape, "data_offsets": [0, 0]}})
        with pytest.raises(InputError, match="'a'"):
            dict(read_weights(tmp_path))


def test_a_file_that_shrinks_or_goes_after_it_was_opened(tmp_path):
    write_weights(tmp_path, CONFIG, tensors())
    weights, path = read_weights(tmp_path), tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="'h.4.weight'"):
        dict(weights)
    path.unlink()
    with pytest.raises(InputError, match="'h.0.weight'"):
        dict(weights)


def test_shards_that_do_not_fit_their_index(tmp_path):
    saved = tensors()
    write_weights(tmp_path, CONFIG, saved, max_shard_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_bytes())

    def refused(said, **changes):
        index.write_text(json.dumps(good | changes), encoding="utf-8")
        with pytest.raises(InputError, match=said) as error:
            read_weights(tmp_path)
        assert str(tmp_path) in one_line(error)

    refused("h.9.weight", weight_map=good["weight_map"] | {"h.9.weight": "model-00001-of-00003.safetensors"})
    refused("nowhere", weight_map=good["weight_map"] | {"h.0.weight": "nowhere.safetensors"})
    refused("weight_map", weight_map=[1])
    refused("weight_map", weight_map={"h.0.weight": 1})
    shutil.copy(tmp_path / "model-00001-of-00003.safetensors", tmp_path.parent / "x.safetensors")
    refused("x.safetensors", weight_map={"h.0.weight": "../x.safetensors"})
    (tmp_path / "model-00002-of-00003.safetensors").rename(tmp_path / "kept")
    refused("model-00002-of-00003.safetensors")
    (tmp_path / "kept").rename(tmp_path / "model-00002-of-00003.safetensors")

    del good["weight_map"]["h.1.weight"]  # an entry lost from the index does not lose the tensor
    index.write_text(json.dumps(good), encoding="utf-8")
    assert_same(read_weights(tmp_path), saved)
    index.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="index.json is damaged"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "text, said",
    [
        (b"", "damaged"),
        (b'{"n_layer": 2', "damaged"),
        (b'{"a": "\xff"}', "damaged"),
        (b"[1]", "list"),
        (b"[" * 99_999, "damaged"),
    ],
)
def test_damaged_config(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=f"config.json .*{said}") as error:
        read_config(tmp_path)
    one_line(error)


def test_missing_files_say_what_is_there_and_pickles_how_to_convert(tmp_path):
    for read, wanted in ((read_config, "config.json"), (read_weights, "model.safetensors")):
        with pytest.raises(InputError, match=f"nowhere has no {wanted}.*no such folder"):
            read(tmp_path / "nowhere")
        with pytest.raises(InputError, match=f"no {wanted}.*empty"):
            read(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds notes.txt$"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    for read in (read_config, read_weights):
        with pytest.raises(InputError, match="model.bin; pickled .* safe_serialization=True") as error:
            read(tmp_path)
        one_line(error)
    with pytest.raises(InputError, match="a file, not a folder"):
        read_weights(tmp_path / "notes.txt")


# What a model accepts


def test_match_names_all_that_does_not_fit(tmp_path):
    write_weights(
        tmp_path,
        CONFIG,
        {f"h.{i}.attn.{name}": np.zeros((2, 3)) for i in range(6) for name in ("bias", "c_attn.bias")},
    )
    weights, ignore = read_weights(tmp_path), r"h\.\d+\.attn\.bias"
    shapes = {f"h.{i}.attn.c_attn.bias": [2, 3] for i in range(6)}
    match(weights, shapes, ignore)
    with pytest.raises(InputError, match=r"6 left over \(h.0.attn.bias, h.1.attn.bias, .* and 2 more\)$"):
        match(weights, shapes)
    del shapes["h.3.attn.c_attn.bias"]  # ends like what is ignored, and is not
    shapes |= {"h.4.attn.c_attn.bias": (3, 2), "h.5.attn.c_attn.bias": (6,)}
    shapes |= {"wte": (1,), "h.6.attn.bias": (1,)}
    with pytest.raises(InputError) as error:
        match(weights, shapes, ignore)
    message = one_line(error)
    assert "2 missing (wte, h.6.attn.bias)" in message
    assert "1 left over (h.3.attn.c_attn.bias)" in message
    assert "2 misshapen (h.4.attn.c_attn.bias found (2, 3) expected (3, 2), h.5" in message
    assert str(tmp_path) in message


def test_names_that_are_no_names(tmp_path):
    """A tensor or an option may be called anything, and the error is one short line all the same."""
    strange = {"a\nb": np.zeros(1), "\x1b[2J": np.zeros(1), "x" * 10**5: np.zeros(1), "": np.zeros(1)}
    write_arrays(tmp_path / "model.safetensors", strange)
    with pytest.raises(InputError, match=r"4 left over .*'a\\nb'") as error:
        match(read_weights(tmp_path), {})
    assert len(one_line(error)) < 1000 and "\x1b" not in str(error.value)
    with pytest.raises(InputError) as error:
        refuse_unknown({"a\nb": 1, "y": "x" * 10**5, "\x1b[2J": 3})
    assert len(one_line(error)) < 1000 and "\x1b" not in str(error.value)


def test_renamed(tmp_path):
    write_weights(tmp_path, CONFIG, saved := tensors(2))
    weights = read_weights(tmp_path, np.float64).renamed(lambda name: "transformer." + name)
    assert weights.shapes == {f"transformer.{name}": (4, 3) for name in saved}
    assert_same(weights, {f"transformer.{name}": array.astype(np.float64) for name, array in saved.items()})
    with pytest.raises(InputError, match="old and a new name"):
        weights.renamed(lambda name: "one")


def test_refuse_unknown():
    read = {"model_type", "n_layer", "rope_scaling"}
    only = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "reorder_and_upcast_attn": (False,)}
    fine = CONFIG | {
        "activation_function": "gelu_new",
        "reorder_and_upcast_attn": False,
        "use_cache": True,
        "pruned_heads": {},
        "rope_scaling": {"factor": 2},
        "is_decoder": False,
    }
    refuse_unknown(fine, read, only)
    for option, value in {
        "activation_function": "relu",
        "reorder_and_upcast_attn": True,
        "novel": None,
        "is_decoder": True,
        "pruned_heads": {"0": [1]},
        "quantization_config": {"bits": 4},
        "tie_word_embeddings": True,
    }.items():
        with pytest.raises(InputError, match=f"{option} = ") as error:
            refuse_unknown(fine | {option: value}, read, only)
        one_line(error)
    for option, value in {"reorder_and_upcast_attn": 0, "is_decoder": 0.0}.items():  # 0 == False in Python
        with pytest.raises(InputError, match=f"{option} = 0"):
            refuse_unknown(fine | {option: value}, read, only)
    refuse_unknown(fine | {"is_decoder": True}, read, only | {"is_decoder": (True,)})
    with pytest.raises(InputError, match="'relu'.*gelu_new.*novel = 3"):
        refuse_unknown(fine | {"activation_function": "relu", "novel": 3}, read, only)


def test_what_transformers_writes_for_every_model_is_known():
    """The options of the base class, which any config.json may hold, are all judged here."""
    transformers = pytest.importorskip("transformers", reason="needs the extra reference")
    refuse_unknown(transformers.PretrainedConfig().to_dict(), read={"model_type", "tie_word_embeddings"})
    assert not HARMLESS & {"model_type", "tie_word_embeddings", "hidden_size", "is_decoder"}
