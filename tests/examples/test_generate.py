"""generate.py: the same text with and without a cache, as it is written, and nothing else on stdout."""

from __future__ import annotations

import io
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tinyllm
from tinyllm import checkpoints
from tinyllm.tokenizers import END_OF_TEXT, load_tokenizer

from .helpers import ENVIRONMENT, POSIX, finish, launch, run

STRANGE = "naïve – 你好 🦙👩‍👩‍👧 e\u0301 \u202eabc\u00a0\t\n <|endoftext|> \\n"


def test_stdout_is_text_and_statistics_are_elsewhere(laptop_run, tmp_path):
    code, out, err = run("generate", laptop_run.out, "The class", "--tokens", 30, "--seed", 3, cwd=tmp_path)
    assert code == 0 and out.startswith("The class") and out.endswith("\n")
    assert re.fullmatch(r"\(30 tokens in \d+\.\d s, \d+\.\d a second\)\n", err)
    model = tinyllm.from_pretrained(laptop_run.out)
    tokenizer = load_tokenizer(checkpoints.latest(laptop_run.out))
    ids = model.generate([tokenizer.encode("The class")], 30, temperature=0.8, seed=3)
    assert out == tokenizer.decode(ids[0]) + "\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["--temperature", 0], ["--top-k", 5, "--temperature", 1.3], ["--top-p", 0.7],
        ["--top-k", 50, "--top-p", 0.9],
    ],
    ids=str,
)  # fmt: skip
def test_the_same_text_without_a_cache(generate, laptop_run, arguments):
    """Also past the context of 16 tokens, where the window slides."""
    call = [laptop_run.out, "A name", "--tokens", 40, "--seed", 5, *arguments]
    cached, plain = generate(*call), generate(*call, "--no-cache")
    assert cached.code == plain.code == 0
    assert cached.out == plain.out and len(cached.out) > 40


def test_the_cache_option_reaches_the_model(generate, tiny_run, monkeypatch):
    lengths = []
    model_class = tinyllm.models.GPT2
    hidden_states = model_class.hidden_states

    def recorded(model: object, ids: np.ndarray, cache: object = None) -> object:
        lengths.append(np.shape(ids)[1])
        return hidden_states(model, ids, cache)

    monkeypatch.setattr(model_class, "hidden_states", recorded)
    ids = load_tokenizer(tiny_run / "step-00000010").encode("The")
    assert generate(tiny_run, "The", "--tokens", 4, "--temperature", 0).code == 0
    assert lengths == [len(ids), 1, 1, 1]
    lengths.clear()
    assert generate(tiny_run, "The", "--tokens", 4, "--temperature", 0, "--no-cache").code == 0
    assert lengths == [len(ids) + i for i in range(4)]


def test_seeds_and_greed(generate, laptop_run):
    def text(*arguments: object) -> str:
        result = generate(laptop_run.out, "The class", "--tokens", 25, *arguments)
        assert result.code == 0
        return result.out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    assert text() != text()  # another text each time, unless asked
    greedy = text("--temperature", 0)
    assert greedy == text("--temperature", 0, "--seed", 9) == text("--top-k", 1) == text("--top-p", 1e-9)
    assert text("--temperature", 5, "--seed", 1) != text("--temperature", 0.5, "--seed", 1)


def test_no_tokens(generate, tiny_run):
    assert generate(tiny_run, "The class", "--tokens", 0).out == "The class\n"


@pytest.mark.parametrize("folder", ["run", "checkpoint"])
def test_a_run_or_one_of_its_checkpoints(generate, tiny_run, folder):
    """A run stands for its newest checkpoint."""
    path = tiny_run if folder == "run" else tiny_run / "step-00000010"
    call = ["The", "--tokens", 8, "--seed", 0]
    assert generate(path, *call).out == generate(checkpoints.latest(tiny_run), *call).out
    assert generate(path, *call).out != generate(tiny_run / "step-00000008", *call).out


def test_any_prompt_comes_back_as_it_was(laptop_run, tmp_path, generate):
    strange = [STRANGE[i : i + 5] for i in range(0, len(STRANGE), 5)]
    for prompt in strange:
        assert generate(laptop_run.out, prompt, "--tokens", 2).out.startswith(prompt)
    result = run("generate", laptop_run.out, strange[2], "--tokens", 3, cwd=tmp_path)
    assert result.code == 0 and result.out.startswith(strange[2])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_that_cannot_spell_everything(laptop_run, tmp_path, encoding):
    """Such as a pipe on Windows: what has no spelling becomes a question mark."""
    environment = {**ENVIRONMENT, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    process = launch("generate", laptop_run.out, "é你", "--tokens", 40, "--temperature", 3, "--seed", 0,
                     cwd=tmp_path, env=environment)  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and b"Traceback" not in err
    assert out.startswith({"cp1252": b"\xe9?", "ascii": b"??"}[encoding])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere arguments are Unicode")
def test_a_prompt_that_is_not_utf8(laptop_run, tmp_path):
    result = run("generate", laptop_run.out, "The \udcff", "--tokens", 3, cwd=tmp_path)
    assert result.code == 0 and result.out.startswith("The ") and "Traceback" not in result.err


class Pipe(io.RawIOBase):
    """What has left the process."""

    def __init__(self) -> None:
        self.received = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self.received += bytes(data)
        return len(data)


def test_text_streams_as_it_is_written(laptop_run, generate, modules, monkeypatch):
    """Each token's text has left the process before the next token is computed."""
    tokenizer, pipe, made = load_tokenizer(checkpoints.latest(laptop_run.out)), Pipe(), []
    stream = modules.generate.stream

    def watched(*arguments: object, **settings: object) -> Iterator[np.ndarray]:
        for token in stream(*arguments, **settings):
            made.append(int(token[0]))
            yield token
            text = "The" + tokenizer.decode(made).rstrip("\ufffd")  # it waits for the end of a character
            assert pipe.received.decode().startswith(text)

    monkeypatch.setattr(modules.generate, "stream", watched)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(pipe), "utf-8", newline="\n"))
    assert generate(laptop_run.out, "The", "--tokens", 20, "--seed", 0).code == 0
    assert len(made) == 20 and pipe.received.decode() == "The" + tokenizer.decode(made) + "\n"


@pytest.mark.skipif(not POSIX, reason="Windows sends no SIGINT to one process")
def test_ctrl_c_while_text_comes_through_a_pipe(laptop_run, tmp_path):
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = launch("generate", laptop_run.out, "The", "--tokens", 100_000, cwd=tmp_path, **listen)
    read = b""
    while len(read) < 60:
        read += process.stdout.read(1)
    assert process.poll() is None  # there is more to come
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and err == "\nstopped\n"


@pytest.mark.skipif(not POSIX, reason="Windows has another error for a pipe without a reader")
@pytest.mark.parametrize("tokens", [3, 100_000])
def test_a_reader_that_leaves_early(laptop_run, tmp_path, tokens):
    """As in `generate.py ... | head -c 1`: no traceback, not even when the interpreter ends."""
    process = launch("generate", laptop_run.out, "The class", "--tokens", tokens, cwd=tmp_path)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert "Traceback" not in err and "Exception ignored" not in err and "BrokenPipe" not in err


def test_it_stops_at_the_end_of_text(generate, modules, tiny_run, monkeypatch):
    tokenizer = load_tokenizer(tiny_run / "step-00000010")
    a, b = tokenizer.encode("ab")
    tokens = [a, b, tokenizer.end_of_text, a]
    monkeypatch.setattr(modules.generate, "stream", lambda *_, **__: iter([np.array([t]) for t in tokens]))
    result = generate(tiny_run, "The")
    assert result.out == "Theab\n" and END_OF_TEXT not in result.out and "(2 tokens" in result.err


def test_rows_without_a_token_write_nothing(generate, modules, tiny_run, monkeypatch):
    """Published models pad their vocabulary; such a row is chosen hardly ever."""
    (a,) = load_tokenizer(tiny_run / "step-00000010").encode("a")
    monkeypatch.setattr(
        modules.generate, "stream", lambda *_, **__: iter([np.array([t]) for t in (a, 10**6, a)])
    )
    assert generate(tiny_run, "The").out == "Theaa\n"


def test_half_a_character_at_the_end(generate, modules, tiny_run, monkeypatch):
    tokenizer = load_tokenizer(tiny_run / "step-00000010")
    ids = [tokenizer.ranks[bytes([b])] for b in "é🦙".encode()[:-1]]
    monkeypatch.setattr(modules.generate, "stream", lambda *_, **__: iter([np.array([t]) for t in ids]))
    assert generate(tiny_run, "The").out == "Theé\ufffd\n"


def test_device_cuda(generate, laptop_run, strict_cupy):
    call = [laptop_run.out, "The", "--tokens", 20, "--seed", 4]
    result = generate(*call, "--device", "cuda")
    assert result.code == 0 and result.out == generate(*call).out


@pytest.mark.slow
def test_a_folder_that_transformers_wrote(generate, laptop_run, tmp_path):
    """Its model, and GPT-2's tokenizer files; greedy text is the one that transformers writes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source, folder = checkpoints.latest(laptop_run.out), tmp_path / "published"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=1283, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=1.0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, folder)
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)

    result = generate(folder, "The class", "--tokens", 30, "--temperature", 0)
    assert result.code == 0
    ids = tokenizer("The class", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0].tolist()
    ours = load_tokenizer(folder)
    known = [i for i in theirs if i < ours.vocabulary_size]
    assert result.out == ours.decode(known) + "\n"
    assert len(set(theirs)) > 10  # the text is not one word again and again


@pytest.mark.slow
def test_what_train_gpt2_saves_is_what_transformers_reads(laptop_run):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = Path(checkpoints.latest(laptop_run.out))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("The class statement")["input_ids"]
    assert ids == load_tokenizer(folder).encode("The class statement")
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    ours = tinyllm.from_pretrained(folder)(np.array([ids])).numpy()
    np.testing.assert_allclose(ours, theirs, atol=5e-5)
