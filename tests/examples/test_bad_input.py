"""Bad input ends in one line that says what is wrong and what to do, exit code 2, and changes nothing."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tinyllm
from tinyllm import cli
from tinyllm.files import read_arrays, write_arrays
from tinyllm.models import BERT, BERTConfig, LLaMA, LLaMAConfig
from tinyllm.parallel import DataParallel
from tinyllm.tokenizers import train_bpe

from .helpers import Result, files, refused, run

FILES = ["model.safetensors", "optimizer.safetensors", "training.json", "config.json", "vocab.json",
         "merges.txt", "tokenizer_config.json", "checksums.json"]  # fmt: skip


@pytest.fixture
def unfinished(tiny_run: Path, tmp_path: Path) -> Path:
    """A run with two steps to go."""
    out = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(out / "step-00000010")
    return out


@pytest.fixture
def published(tiny_run: Path, tmp_path: Path) -> Path:
    """A folder such as other programs publish: weights and tokenizer, no checksums."""
    folder = shutil.copytree(tiny_run / "step-00000010", tmp_path / "published")
    for name in ("checksums.json", "optimizer.safetensors", "training.json"):
        (folder / name).unlink()
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


# ---- the corpus ------------------------------------------------------------------------------------------


# Data that cannot be used, and words of the error
UNUSABLE = {
    "missing.txt": ["does not exist"],
    "empty.txt": ["holds no text"],
    "latin-1.txt": ["is not UTF-8", "byte 2250, 0xe9"],
    "cut-off.txt": ["is not UTF-8", "byte 2250, 0xc3"],
    "short.txt": ["the corpus has 10 tokens", "too few", "--data", "--context"],
    "cut.gz": ["cannot read", "cut.gz"],
    "no.gz": ["cannot read", "no.gz"],
    "latin-1.gz": ["is not UTF-8"],
    "nothing": ["holds no text"],
    "binaries": ["holds no text"],
    "one-bad": ["b.txt is not UTF-8: byte 3, 0xff"],
}


def write_texts(folder: Path) -> None:
    """The files and folders of UNUSABLE."""
    english = b"The quick brown fox jumps over the lazy dog. " * 50
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin-1.txt").write_bytes(english + "é".encode("latin-1") + english)
    (folder / "cut-off.txt").write_bytes(english + "é".encode()[:1])
    (folder / "short.txt").write_bytes(b"Too short.")
    (folder / "cut.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5000))[:-2000])
    (folder / "no.gz").write_bytes(english)
    (folder / "latin-1.gz").write_bytes(gzip.compress(english + b"\xe9"))
    for name in ("nothing", "binaries", "one-bad"):
        (folder / name).mkdir()
    (folder / "binaries" / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "binaries" / ".hidden.txt").write_bytes(english)
    (folder / "one-bad" / "a.txt").write_bytes(english)
    (folder / "one-bad" / "b.txt").write_bytes(b"abc\xff" + english)


@pytest.mark.parametrize("name, said", UNUSABLE.items())
def test_data(train, tmp_path, name, said):
    write_texts(tmp_path)
    refused(train("--data", tmp_path / name, "--out", tmp_path / "out"), *said)
    assert set(files(tmp_path / "out")) <= {"tokens.npy"}  # whole, and written anew by the next start


def test_a_name_with_a_line_break(train, tmp_path):
    refused(
        train("--data", tmp_path / "no\nsuch.txt", "--out", tmp_path / "out"), "no such.txt does not exist"
    )


def test_a_corpus_that_only_just_is_long_enough(train, tmp_path):
    """The shortest that trains, and one letter less."""
    data, out = tmp_path / "a.txt", tmp_path / "out"
    data.write_bytes(bytes(range(97, 97 + 18)))  # 18 tokens: 16 + 1 to train on, but 2 must be for validation
    line = refused(train("--data", data, "--out", out), "18 tokens, of which 16 are for training")
    assert "window of 16 + 1" in line
    data.write_bytes(bytes(range(97, 97 + 19)))
    assert train("--data", data, "--out", out, "--steps", 2).code == 0


# ---- folders ---------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_already(train, tiny_run, book):
    before = files(tiny_run)
    line = refused(train("--data", book, "--out", tiny_run), tiny_run, "holds a run already")
    assert "--resume" in line and "--out" in line
    assert files(tiny_run) == before


def test_nothing_to_resume(train, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name in ("missing", "empty", "file"):
        refused(train("--out", tmp_path / name, "--resume"), tmp_path / name, "no checkpoint to resume")
    assert not (tmp_path / "missing").exists()


def test_folders_that_hold_no_model(train, generate, tmp_path, book, published, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed, and never asked in a test
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((published / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    without = shutil.copytree(published, tmp_path / "without")
    (without / "vocab.json").unlink()
    (without / "merges.txt").unlink()
    other = shutil.copytree(published, tmp_path / "other")
    edit(other / "config.json", model_type="t5")
    for name, said in {
        "missing": "no such folder",
        "empty": "it is empty",
        "published/config.json": "it is a file",
        "pickled": "pickled weights are refused",
        "without": "no tokenizer in",
        "other": "'t5'",
    }.items():
        result = generate(tmp_path / name, "The")
        refused(result, said, tmp_path / name)
        assert not result.out
        refused(
            train("--init", tmp_path / name, "--data", book, "--out", tmp_path / "out"), said, tmp_path / name
        )
    refused(generate("no-such-model", "The"), "there is no folder no-such-model", '".[hub]"')
    for model in (LLaMA(LLaMAConfig(64, 8, 16, 1, 2)), BERT(BERTConfig(64, 8, 1, 2, 16))):
        model.save_pretrained(tmp_path / model.model_type)
        result = train("--init", tmp_path / model.model_type, "--data", book, "--out", tmp_path / "out")
        refused(result, f"holds a {type(model).__name__}, and this script trains GPT-2 and GPT-3 only")
        assert not (tmp_path / "out").exists()


def test_too_little_memory(train, book, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("Unable to allocate 7 TiB")

    monkeypatch.setattr(DataParallel, "gradients", fail)
    code, _, err = train("--data", book, "--out", tmp_path / "out", "--steps", "1")
    assert code == 2 and err.endswith("\nerror: there is not enough memory: Unable to allocate 7 TiB\n")


# ---- damaged files ---------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random, count: int) -> list[bytes]:
    """Flipped bits, at the start, the end and at random places between, and files cut short."""
    places = [0, 9 % len(data), len(data) - 1] + [rng.randrange(len(data)) for _ in range(count)]
    flips = [data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :] for i in places]
    return flips + [data[:n] for n in (0, 7, len(data) // 2, len(data) - 1) if n < len(data)]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_a_run_is_noticed(train, generate, unfinished, name):
    path = unfinished / "step-00000008" / name
    whole = path.read_bytes()
    for data in damaged(whole, random.Random(name), 6):
        if name == "checksums.json" and data == whole.rstrip():
            continue  # nothing but the last newline is gone
        path.write_bytes(data)
        before = files(unfinished)
        for result in (train("--out", unfinished, "--resume"), generate(unfinished, "The", "--tokens", 2)):
            line = refused(result, unfinished / "step-00000008")
            assert "damaged" in line or "missing" in line or "JSON" in line, line
            assert not result.out
        assert files(unfinished) == before
    path.unlink()
    if name == "checksums.json":
        return  # then the files are as good as published ones
    refused(train("--out", unfinished, "--resume"), name)
    refused(generate(unfinished, "The"), name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in FILES if name != "checksums.json"])
def test_without_checksums_damage_is_one_line_or_harmless(train, generate, unfinished, name):
    """A flipped bit in a weight makes another weight. But nothing ends in a traceback."""
    (unfinished / "step-00000008" / "checksums.json").unlink()
    path = unfinished / "step-00000008" / name
    whole, pristine = path.read_bytes(), files(unfinished)
    for data in damaged(whole, random.Random(name), 8):
        path.write_bytes(data)
        result = generate(unfinished, "The", "--tokens", 2)
        refused(result) if result.code else None
        code, _, err = result = train("--out", unfinished, "--resume")
        assert code in (0, 1, 2)
        if "tok/s" not in err and code:  # it had not begun
            refused(result)
        for leftover in unfinished.glob("step-*"):
            if leftover.name != "step-00000008":
                shutil.rmtree(leftover)
        for file, content in pristine.items():
            (unfinished / file).write_bytes(content)


def test_weights_of_the_wrong_shape(train, generate, published, unfinished, tmp_path, book):
    (unfinished / "step-00000008" / "checksums.json").unlink()
    for folder in (published, unfinished / "step-00000008"):
        path = folder / "model.safetensors"
        arrays = read_arrays(path)
        name = "transformer.h.0.mlp.c_fc.weight"
        arrays[name] = np.ascontiguousarray(arrays[name].T)  # Linear's layout instead of Conv1D's
        del arrays["transformer.ln_f.bias"]
        arrays["surplus"] = np.zeros(3, np.float32)
        write_arrays(path, arrays)
    said = [
        "1 missing (transformer.ln_f.bias)", "1 left over (surplus)",
        f"1 misshapen ({name} found (64, 16) expected (16, 64))",
    ]  # fmt: skip
    refused(generate(published, "The"), *said)
    refused(train("--init", published, "--data", book, "--out", tmp_path / "out"), *said)
    refused(train("--out", unfinished, "--resume"), *said)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"n_head": 3}, "3 heads do not divide the width 16"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_embd": 16.0}, "n_embd is 16.0"),
        ({"n_layer": 2}, "missing"),
        ({"n_layer": "1"}, "n_layer is '1'"),
        ({"vocab_size": 299}, "misshapen"),
        ({"n_positions": 17}, "misshapen"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"rotary_dim": 4}, "rotary_dim = 4 (unknown)"),
        ({"attn_pdrop": 1.0}, "attn_pdrop is 1.0"),
        ({"model_type": None}, "None"),
    ],
)
def test_configs_that_no_model_has(generate, train, published, unfinished, tmp_path, book, change, said):
    (unfinished / "step-00000008" / "checksums.json").unlink()
    for folder in (published, unfinished / "step-00000008"):
        edit(folder / "config.json", **change)
    refused(generate(published, "The"), said)
    refused(train("--init", published, "--data", book, "--out", tmp_path / "out"), said)
    refused(train("--out", unfinished, "--resume"), said)


def test_a_tokenizer_that_does_not_fit(generate, train, published, unfinished, tmp_path, book):
    (unfinished / "step-00000008" / "checksums.json").unlink()
    larger = train_bpe(book.read_text(encoding="utf-8"), 320)
    for folder in (published, unfinished / "step-00000008"):
        larger.save(folder)
    said = "the tokenizer has 320 tokens, the model only 300"
    refused(generate(published, "The"), said)
    refused(train("--init", published, "--data", book, "--out", tmp_path / "out"), said)
    refused(train("--out", unfinished, "--resume"), said)
    assert not (tmp_path / "out").exists()


# ---- options of train_gpt2.py ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value, was",
    [
        ("steps", 11, 10), ("batch", 4, 3), ("context", 8, 16), ("accumulate", 2, 1), ("lr", 0.02, 0.01),
        ("seed", 1, 0), ("dtype", "float64", "float32"), ("preset", "gpt2-124m", "laptop"),
        ("data", "other.txt", "book.txt"), ("init", "folder", "(default)"),
    ],
)  # fmt: skip
def test_resume_with_another_option(train, unfinished, option, value, was):
    before = files(unfinished)
    result = train("--out", unfinished, "--resume", f"--{option}", value)
    line = refused(result, f"has --{option} ", "not ", value, was, "leave it out", "--init")
    assert "Recipe" not in line and files(unfinished) == before


def test_a_folder_of_another_script_is_no_run_to_resume(train, unfinished):
    step = unfinished / "step-00000008"
    (step / "checksums.json").unlink()
    for options in (None, {}, [], {"recipe": {}}, {"recipe": {"speed": 3}}, {"recipe": {"betas": 3}}):
        edit(step / "training.json", options=options)
        refused(train("--out", unfinished, "--resume"), step / "training.json", "not of a run of this script")


def test_a_checkpoint_whose_parts_are_of_different_steps(train, tiny_run, unfinished):
    step = unfinished / "step-00000008"
    (step / "checksums.json").unlink()
    shutil.copy(tiny_run / "step-00000010" / "optimizer.safetensors", step)
    refused(train("--out", unfinished, "--resume"), step, "step 8 with 10 losses")


def test_a_context_longer_than_the_models(train, published, tmp_path, book):
    result = train("--init", published, "--context", 17, "--data", book, "--out", tmp_path / "out")
    refused(result, "--context 17", "16", published)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "gpt9"], ["--steps", "-1"], ["--steps", "0"], ["--steps", "many"], ["--batch", "0"],
        ["--context", "0"], ["--accumulate", "-2"], ["--lr", "-0.1"], ["--lr", "nan"], ["--lr", "inf"],
        ["--seed", "-1"], ["--seed", "0.5"], ["--save-every", "0"], ["--dtype", "int8"], ["--device", "tpu"],
        ["--colour", "blue"], ["--data"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_out_of_range(train, tmp_path, arguments):
    code, out, err = train("--out", tmp_path / "out", *arguments)
    assert code == 2 and not out
    last = err.splitlines()[-1]
    assert last.startswith("train_gpt2.py: error: ") and arguments[0] in last
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_of_zero(train, tmp_path, book):
    refused(train("--lr", 0, "--data", book, "--out", tmp_path / "out"), "the learning rate is 0")
    assert not (tmp_path / "out").exists()


# ---- options of generate.py ------------------------------------------------------------------------------


def test_prompts(generate, tiny_run):
    refused(generate(tiny_run, ""), "the prompt is empty")
    long = "word " * 40
    result = generate(tiny_run, long)
    line = refused(result, "the model's context is 16", "shorten it")
    assert len(line) < 200 and not result.out


@pytest.mark.parametrize("p", ["0", "-0.5", "1.5", "nan", "inf"])
def test_top_p_out_of_range(generate, tiny_run, p):
    result = generate(tiny_run, "The", "--top-p", p)
    refused(result, f"top_p is {float(p)}")
    assert not result.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tokens", "-1"], ["--temperature", "-1"], ["--temperature", "nan"], ["--top-k", "0"],
        ["--top-k", "1.5"], ["--top-p", "most"], ["--seed", "-3"], ["--device", "tpu"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_out_of_range(generate, tiny_run, arguments):
    code, out, err = generate(tiny_run, "The", *arguments)
    assert code == 2 and not out
    last = err.splitlines()[-1]
    assert last.startswith("generate.py: error: ") and arguments[0] in last


@pytest.mark.parametrize("ids", [[[300]], [[-1]], [[5, 10**9]], [[]], [[1.5]], [5], [list(range(17))]])
def test_token_ids(tiny_run, capsys, ids):
    model = tinyllm.from_pretrained(tiny_run)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: model.generate(ids, 3))
    refused(Result(stop.value.code, *capsys.readouterr()))


# ---- no GPU ----------------------------------------------------------------------------------------------


def cupy_that(count: Callable[[], int]) -> SimpleNamespace:
    runtime = SimpleNamespace(getDeviceCount=count)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), ndarray=type("ndarray", (), {}))


def no_driver() -> int:
    raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nfor the runtime")


@pytest.mark.parametrize(
    "cupy, said",
    [
        (None, ["CuPy, which is not installed", '".[cuda12]"', '".[cuda13]"']),
        (
            cupy_that(no_driver),
            ["needs an NVIDIA GPU", "cudaErrorInsufficientDriver", "--device cpu", '".[cuda12]"'],
        ),
        (cupy_that(lambda: 0), ["needs an NVIDIA GPU", "--device cpu"]),
    ],
    ids=["no CuPy", "no driver", "no GPU"],
)
def test_cuda_without_a_gpu(train, generate, tiny_run, tmp_path, book, monkeypatch, cupy, said):
    monkeypatch.setattr("autograd.backend.cupy", cupy)
    refused(train("--device", "cuda", "--data", book, "--out", tmp_path / "out"), *said)
    refused(generate(tiny_run, "The", "--device", "cuda"), *said)
    assert not (tmp_path / "out").exists()


# ---- as a user meets it ----------------------------------------------------------------------------------


def test_in_processes_of_their_own(tmp_path):
    refused(run("train_gpt2", "--data", "nowhere.txt", cwd=tmp_path), "nowhere.txt does not exist")
    refused(run("train_gpt2", "--resume", cwd=tmp_path), Path("runs/gpt2"), "no checkpoint to resume")
    refused(run("generate", ".", "Hello", cwd=tmp_path), "it is empty")
    assert list(tmp_path.iterdir()) == []
