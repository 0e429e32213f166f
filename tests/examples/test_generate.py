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
from autograd import nn
from tinyllm import checkpoints
from tinyllm.files import read_json, write_json
from tinyllm.models import GPT2, GPT2Config
from tinyllm.tokenizers import END_OF_TEXT, load_tokenizer

from .helpers import ENVIRONMENT, POSIX, finish, launch, refused, run

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


# Models that somebody published: tokenizer.json, chat templates, ends, beams

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with large random weights, a tokenizer that puts <s> before a text, and a chat template."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
    pytest.importorskip("jinja2", reason="the extra `tokenizers` is not installed")
    folder = tmp_path_factory.mktemp("chat")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|start|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    library.train_from_iterator(["The class statement of a class"] * 3, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    model = GPT2(GPT2Config(library.get_vocab_size() + 3, 128, 32, 2, 4, initializer_range=1.0), seed=0)
    model.save_pretrained(folder)
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def written(folder: Path, ids: list[int], count: int) -> list[int]:
    """What the model goes on with, greedily."""
    model = tinyllm.from_pretrained(folder)
    return model.generate([ids], count, temperature=0)[0, len(ids) :].tolist()


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat(generate, chat_model, system):
    """The prompt is a message, spelt as the template says; out comes the answer alone."""
    tokenizer = load_tokenizer(chat_model)
    said = [{"role": "system", "content": system}] * (system is not None) + [
        {"role": "user", "content": "The"}
    ]
    ids = tokenizer.encode_chat(said)
    assert tokenizer.decode(ids).count("<|start|>") == len(said) + 1 and 0 not in ids
    answer = written(chat_model, ids, 12)
    options = ["--tokens", 12, "--temperature", 0, *([] if system is None else ["--system", system])]
    result = generate(chat_model, "The", *options)
    assert result.code == 0
    known = [i for i in answer if i < tokenizer.vocabulary_size]
    assert result.out == tokenizer.decode(known) + "\n" and len(set(answer)) > 5


def test_raw(generate, chat_model):
    """The same model continues a text: <s> and the prompt, and special tokens in it are text."""
    tokenizer = load_tokenizer(chat_model)
    prompt = "The <|end|>"
    ids = tokenizer.encode(prompt)
    assert ids[0] == 0 and not {1, 2} & set(ids)
    new = [i for i in written(chat_model, ids, 12) if i < tokenizer.vocabulary_size]
    result = generate(chat_model, prompt, "--raw", "--tokens", 12, "--temperature", 0)
    assert result.out == prompt + tokenizer.decode(new) + "\n"
    empty = generate(chat_model, "", "--raw", "--tokens", 5, "--temperature", 0)  # after <s> alone
    assert empty.code == 0 and len(empty.out) > 1


@pytest.mark.parametrize("place", ["config.json", "generation_config.json", "both"])
def test_every_end_of_the_model_ends_the_text(generate, chat_model, tmp_path, place):
    folder = shutil.copytree(chat_model, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    answer = written(folder, tokenizer.encode_chat([{"role": "user", "content": "The"}]), 20)
    end = next(n for n, token in enumerate(answer) if n > 2 and token not in answer[:n] and token != 2)
    ends = [answer[end], tokenizer.vocabulary_size + 1]
    if place != "generation_config.json":
        write_json(folder / "config.json", {**read_json(folder / "config.json"), "eos_token_id": ends[0]})
    if place != "config.json":
        write_json(folder / "generation_config.json", {"eos_token_id": ends[::-1] if place != "both" else 1})
    result = generate(folder, "The", "--tokens", 20, "--temperature", 0)
    assert result.out == tokenizer.decode([i for i in answer[:end] if i < tokenizer.vocabulary_size]) + "\n"
    assert f"({end} tokens" in result.err


def test_the_ends_reach_the_model(generate, modules, chat_model, monkeypatch):
    """So that a beam ends there too, and nothing is computed after the end."""
    stops = []
    for name in ("stream", "beam_search"):
        function = getattr(modules.generate, name)

        def watched(*arguments: object, function: object = function, **settings: object) -> object:
            stops.append(settings.get("stop", arguments[-1]))
            return function(*arguments, **settings)

        monkeypatch.setattr(modules.generate, name, watched)
    generate(chat_model, "The", "--tokens", 2)
    generate(chat_model, "The", "--tokens", 2, "--beams", 2)
    assert stops == [{2}, {2}]


@pytest.mark.parametrize("width", [1, 4])
def test_beams(generate, laptop_run, width):
    """Of the texts that beam search finds, the best; one beam is greedy."""
    tokenizer = load_tokenizer(checkpoints.latest(laptop_run.out))
    model = tinyllm.from_pretrained(laptop_run.out)
    ids = tokenizer.encode("The class")
    best = model.beam_search(ids, 20, width, 0.6, stop={tokenizer.end_of_text})[0].tokens
    call = [laptop_run.out, "The class", "--tokens", 20, "--beams", width]
    result = generate(*call)
    text = tokenizer.decode([i for i in best if i != tokenizer.end_of_text])
    assert result.code == 0 and result.out == "The class" + text + "\n" == generate(*call, "--no-cache").out
    if width == 1:
        assert result.out == generate(laptop_run.out, "The class", "--tokens", 20, "--temperature", 0).out
    refused(generate(laptop_run.out, "The", "--tokens", 0, "--beams", width), "beam search", "1 or more")


@pytest.mark.parametrize(
    "options", [["--temperature", 0], ["--top-k", 3], ["--top-p", 0.5], ["--seed", 0]], ids=str
)
def test_beams_draw_nothing(generate, tiny_run, options):
    refused(generate(tiny_run, "The", "--beams", 2, *options), "--beams draws nothing", options[0])


def test_no_chat_template_for_a_system(generate, tiny_run, chat_model):
    refused(generate(tiny_run, "The", "--system", "Be brief."), "--system needs a chat template")
    refused(generate(chat_model, "The", "--system", "Be brief.", "--raw"), "--system needs a chat template")


def test_a_template_that_refuses(generate, chat_model, tmp_path):
    folder = shutil.copytree(chat_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('No\nsystem') }}", encoding="utf-8")
    refused(generate(folder, "The", "--system", "Be brief."), "chat template", "fails: No system", "--raw")
    assert generate(folder, "The", "--raw", "--tokens", 2).code == 0


def test_without_the_library(generate, chat_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(generate(chat_model, "The"), 'pip install -e ".[tokenizers]"')


def test_a_model_that_reads_both_ways(generate, tiny_run, monkeypatch):
    class Reader(nn.Module):
        pass

    monkeypatch.setattr(tinyllm, "from_pretrained", lambda folder: Reader())
    refused(generate(tiny_run, "The"), "holds a Reader, which does not write text from left to right")


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["LLaMA", "Mistral"])
def test_the_whole_of_a_published_llama(generate, tmp_path, chat_model, model_class):
    """Weights, tokenizer and ends as transformers writes them; the greedy answer is the one it gives."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = model_class.replace("LLaMA", "Llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=304, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5, eos_token_id=[2, 303],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": "The class"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        theirs = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    known = [i for i in theirs.tolist() if i < len(tokenizer) and i != 2]
    result = generate(tmp_path, "The class", "--tokens", 30, "--temperature", 0)
    assert result.out == tokenizer.decode(known) + "\n" and len(set(known)) > 5
