"""train_gpt2.py: what it says, saves and offers, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import gzip
import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import tinyllm
from autograd import backend
from tinyllm import checkpoints
from tinyllm.files import read_arrays, read_json
from tinyllm.models import GPT2Config
from tinyllm.tokenizers import load_tokenizer, train_bpe
from tinyllm.training import Trainer

from .helpers import files, losses, run, same_run, training

TRAIN_OPTIONS = """--data --preset --steps --batch --context --lr --device --dtype --accumulate --save-every
    --resume --init --out --seed --no-fused""".split()
GENERATE_OPTIONS = "--tokens --temperature --top-k --top-p --seed --device --no-cache".split()


def test_a_whole_run_says_what_it_does(laptop_run):
    code, out, err = laptop_run.result
    assert code == 0, err
    assert re.search(r"corpus: [\d,]+ tokens to train on, [\d,]+ to validate", out)
    assert re.search(r"model:  GPT-2 with \d{3},\d{3} parameters, 4 layers of width 128", out)
    assert re.search(r"memory: .* = \d+\.\d\d GB", out)
    assert "24 steps of 64 tokens" in out
    line = r"step +(\d+) .*validation loss ([\d.]+) nats/token = ([\d.]+) bits/byte"
    found = [(int(step), float(nats), float(bits)) for step, nats, bits in re.findall(line, out)]
    assert [step for step, _, _ in found] == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert found[-1][1] < found[0][1] - 0.3
    per_byte = training(laptop_run.out)["bytes_per_token"] * math.log(2)
    for _, nats, bits in found:
        assert abs(bits - nats / per_byte) < 0.002
    assert len(re.findall(r"^   after .* it writes:\n   \| ", out, re.MULTILINE)) == 8  # samples
    assert "24/24" in err and "tok/s" in err and re.search(r"loss \d\.\d", err)
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", err)  # time gone and time left


def test_a_whole_run_leaves_a_folder_that_holds_everything(laptop_run):
    newest = checkpoints.latest(laptop_run.out)
    assert newest.name == "step-00000024"
    assert {path.name for path in newest.iterdir()} == {
        "config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json",
        "optimizer.safetensors", "training.json", "checksums.json",
    }  # fmt: skip
    assert sorted(path.name for path in laptop_run.out.iterdir()) == [
        "loss.png", "step-00000020", "step-00000024", "tokens.npy",
    ]  # fmt: skip
    assert (laptop_run.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(losses(laptop_run.out)) == 24
    assert training(laptop_run.out)["options"]["recipe"]["shards"] == min(os.cpu_count(), 4)
    model = tinyllm.from_pretrained(laptop_run.out)
    assert model.context == 16
    assert model.vocabulary_size == load_tokenizer(newest).vocabulary_size
    assert sorted(path.name for path in laptop_run.folder.iterdir()) == ["runs"]


def test_the_command_that_it_suggests_writes_text(laptop_run):
    suggested = re.search(r"write with it:  \S+ examples/(\w+)\.py (.*)", laptop_run.result.out)
    result = run(suggested[1], *shlex.split(suggested[2]), "--tokens", 5, cwd=laptop_run.folder)
    assert result.code == 0 and result.out.startswith("The class statement")


@pytest.mark.parametrize("name", ["train_gpt2", "generate"])
def test_help(name, modules, train, generate):
    call, module = {"train_gpt2": (train, modules.train), "generate": (generate, modules.generate)}[name]
    code, out, err = call("--help")
    assert code == 0 and not err
    assert module.__doc__.strip() in out  # examples of use, with their line breaks
    table = out.partition("  -h, --help")[2]
    for option in TRAIN_OPTIONS if name == "train_gpt2" else GENERATE_OPTIONS:
        said = re.search(rf"^  {option} ([A-Z_]+|{{[\w,.-]+}})?\s+(\w.*)$", table, re.MULTILINE)
        assert said and len(said[2]) > 10, option


# ---- a run that is stopped and resumed -------------------------------------------------------------------


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


class PowerCut(BaseException):
    """Ends a run as kill -9 would: nothing gets a chance to be saved."""


def power_cut() -> None:
    raise PowerCut


VARIANTS = {
    "plain": ([], {}),
    "dropout": ([], {"resid_pdrop": 0.2, "embd_pdrop": 0.1, "attn_pdrop": 0.3}),
    "accumulate": (["--accumulate", 2], {"resid_pdrop": 0.2, "attn_pdrop": 0.3}),
    "float64": (["--dtype", "float64"], {}),
    "primitives": (["--no-fused"], {"attn_pdrop": 0.3}),
    "epochs": (["--batch", 64, "--seed", 5], {}),  # a batch goes over the end of an epoch
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(train, shrink, stop_after, tmp_path, book, variant):
    extra, config = VARIANTS[variant]
    shrink(**config)
    arguments = ["--data", book, *extra]
    assert train(*arguments, "--out", tmp_path / "whole", "--save-every", 4).code == 0
    assert len(losses(tmp_path / "whole")) == 10
    out = ["--out", tmp_path / "parts"]
    again = [*out, "--resume", *(["--no-fused"] if variant == "primitives" else [])]

    stop_after(3, ctrl_c)  # saves there, where no save was due
    code, _, err = train(*arguments, *out, "--save-every", 4)
    assert code == 130 and "saved at step 3;" in err
    assert checkpoints.latest(tmp_path / "parts").name == "step-00000003"
    stop_after(7, power_cut)  # the last save was before
    with pytest.raises(PowerCut):
        train(*again, "--save-every", 6)
    assert checkpoints.latest(tmp_path / "parts").name == "step-00000006"
    stop_after(9, ctrl_c)
    assert train(*again).code == 130
    assert train(*again).code == 0
    same_run(tmp_path / "parts", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(train, tmp_path, tiny_run):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    before = files(out)
    result = train("--out", out, "--resume")
    assert result.code == 0 and "step-00000010" in result.out
    assert files(out) == before


def test_what_a_run_may_change_when_it_is_resumed(train, tmp_path, tiny_run):
    """How often it saves is no part of the run, and the same options again are no others."""
    out = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(out / "step-00000010")
    options = training(out)["options"]
    same = ["--data", options["data"], "--steps", 10, "--batch", 3, "--lr", 0.01, "--seed", 0]
    assert train("--out", out, "--resume", "--save-every", 1, "--device", "cpu", *same).code == 0
    same_run(out, tiny_run)


def test_the_command_that_continues_keeps_what_a_run_does_not_remember(modules, monkeypatch):
    def again(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["train_gpt2.py", *arguments])
        return modules.train.again(modules.train.arguments())

    monkeypatch.setattr("sys.executable", str(Path.cwd() / ".venv" / "python"))
    this = f"{Path('.venv') / 'python'} examples/train_gpt2.py"
    assert again() == f"{this} --resume"
    assert again("--steps", "7", "--out", "a") == f"{this} --out a --resume"
    assert again("--out", "my runs/a") == f"{this} --out 'my runs/a' --resume"  # as the shell reads it
    words = "--device cuda --save-every 9 --no-fused --resume"
    assert again(*words.split()) == f"{this} {words}"


# ---- options ---------------------------------------------------------------------------------------------


def test_without_data_it_learns_from_pythons_own_documentation(train, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer, say: None)
    assert train("--steps", 1, "--out", tmp_path / "run").code == 0
    tokens = np.load(tmp_path / "run" / "tokens.npy")
    text = load_tokenizer(checkpoints.latest(tmp_path / "run")).decode(tokens)
    assert len(text) > 200_000 and "statement" in text


def test_folders_and_compressed_files_are_texts_too(train, tmp_path, book):
    text = book.read_bytes()
    half = len(text) // 2
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_bytes(text[:half])
    (tmp_path / "texts" / "more" / "b.txt").write_bytes(text[half:])
    found = {}
    for data in (book, tmp_path / "book.txt.gz", tmp_path / "texts"):
        out = tmp_path / "runs" / data.name
        assert train("--data", data, "--steps", 2, "--out", out).code == 0
        found[data.name] = load_tokenizer(checkpoints.latest(out)).decode(np.load(out / "tokens.npy"))
    assert found["book.txt"] == found["book.txt.gz"] == text.decode()
    assert found["texts"] == text[:half].decode() + "\n\n" + text[half:].decode() + "\n\n"


def test_the_seed_and_the_options_decide_and_nothing_else(train, tmp_path, book):
    def found(name: str, *arguments: object) -> list[float]:
        assert train("--data", book, "--steps", 4, "--out", tmp_path / name, *arguments).code == 0
        return losses(tmp_path / name)

    first = found("a")
    assert found("b") == first
    assert found("c", "--seed", 1)[0] != first[0]
    assert found("d", "--lr", 0.001)[:1] == first[:1] and losses(tmp_path / "d") != first
    assert len(found("e", "--steps", 6, "--batch", 2, "--context", 8, "--accumulate", 3)) == 6
    recipe = training(tmp_path / "e")["options"]["recipe"]
    assert (recipe["batch"], recipe["context"], recipe["accumulate"], recipe["lr"]) == (2, 8, 3, 0.01)
    assert tinyllm.from_pretrained(tmp_path / "e").context == 8


def test_precision(train, tmp_path, book):
    single, double = (tmp_path / dtype for dtype in ("float32", "float64"))
    for out in (single, double):
        assert train("--data", book, "--dtype", out.name, "--out", out).code == 0
        arrays = read_arrays(checkpoints.latest(out) / "model.safetensors")
        assert {str(array.dtype) for array in arrays.values()} == {out.name}
    assert losses(single) != losses(double)
    np.testing.assert_allclose(losses(single), losses(double), atol=1e-4)


def test_primitives_alone_give_the_same_losses(train, tmp_path, book):
    fused, primitives = tmp_path / "fused", tmp_path / "primitives"
    assert train("--data", book, "--steps", 20, "--out", fused).code == 0
    assert train("--data", book, "--steps", 20, "--out", primitives, "--no-fused").code == 0
    assert losses(fused) != losses(primitives)  # it was not the same computation
    np.testing.assert_allclose(losses(fused), losses(primitives), atol=1e-4)


def test_a_context_of_one_token(train, tmp_path, book):
    assert train("--data", book, "--context", 1, "--steps", 2, "--out", tmp_path / "run").code == 0


def test_fine_tuning_begins_where_the_weights_are(train, tmp_path, tiny_run, book):
    """--init takes a run or a folder of published weights, with their size, context and tokenizer."""
    published = shutil.copytree(tiny_run / "step-00000010", tmp_path / "published")
    for name in ("checksums.json", "optimizer.safetensors", "training.json"):
        (published / name).unlink()
    for init in (tiny_run, published):
        out = tmp_path / f"from-{init.name}"
        assert train("--init", init, "--data", book, "--steps", 2, "--lr", 1e-4, "--out", out).code == 0
        assert training(out)["validation"][0] == [0, training(tiny_run)["validation"][-1][1]]
        newest = checkpoints.latest(out)
        for name in ("config.json", "vocab.json", "merges.txt"):
            assert (newest / name).read_bytes() == (published / name).read_bytes()
        assert len(losses(out)) == 2 and abs(losses(out)[0] - losses(tiny_run)[-1]) < 1
        assert train("--out", out, "--resume").code == 0  # also a run of this kind knows its own options


def test_fine_tuning_with_a_shorter_context_keeps_the_models_positions(train, tmp_path, tiny_run, book):
    out = tmp_path / "run"
    assert train("--init", tiny_run, "--data", book, "--steps", 1, "--context", 8, "--out", out).code == 0
    assert tinyllm.from_pretrained(out).context == 16
    assert training(out)["options"]["recipe"]["context"] == 8


def test_a_preset_without_a_vocabulary_of_its_own_takes_gpt2s(train, modules, monkeypatch, tmp_path, book):
    tokenizer = train_bpe(book.read_text(encoding="utf-8"), 270)
    monkeypatch.setattr(modules.train, "gpt2_tokenizer", lambda: tokenizer)
    small = modules.train.PRESETS["laptop"]
    preset = modules.train.Preset(small.config, small.recipe, vocabulary=None)
    monkeypatch.setitem(modules.train.PRESETS, "gpt2-124m", preset)
    assert train("--preset", "gpt2-124m", "--data", book, "--steps", 1, "--out", tmp_path / "a").code == 0
    assert tinyllm.from_pretrained(tmp_path / "a").vocabulary_size == 270


def test_the_published_preset_is_the_published_recipe(modules):
    preset = modules.train.PRESETS["gpt2-124m"]
    assert preset.vocabulary is None
    assert preset.config == GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    recipe = preset.recipe
    assert recipe.batch * recipe.context * recipe.accumulate == 2**19
    assert (recipe.betas, recipe.weight_decay, recipe.clip) == ((0.9, 0.95), 0.1, 1.0)


def test_the_memory_adds_up_and_fits_a_card_of_10_gb(modules):
    preset = modules.train.PRESETS["gpt2-124m"]
    text = modules.train.memory_sum(preset.config, preset.recipe, 4, "cuda")
    *parts, total = (float(size) for size in re.findall(r"([\d.]+) GB", text))
    assert text.startswith("2.49 GB weights, gradients and optimizer")  # 5 * 124,439,808 * 4 bytes
    assert "0.41 GB logits" in text  # 2 * 1024 * 50257 * 4 bytes
    assert abs(sum(parts) - total) < 0.02 and total < 10
    twice = modules.train.memory_sum(preset.config, preset.recipe, 8, "cuda")
    assert abs(float(re.findall(r"([\d.]+) GB", twice)[-1]) - 2 * total) < 0.02


def test_the_model_in_the_memory_sum_is_the_model(modules):
    from tinyllm.models import GPT2

    config = GPT2Config(1000, 64, 96, 3, 4, n_inner=200)
    text = modules.train.memory_sum(config, modules.train.Recipe(), 10**6, "cpu")  # an item of a megabyte
    assert float(text.split()[0]) == 5 * GPT2(config, seed=None).parameter_count() / 1e3


def test_training_on_the_gpu_and_resuming_on_the_cpu(train, tmp_path, book, strict_cupy, stop_after):
    out = tmp_path / "run"
    stop_after(4, ctrl_c)
    code, _, err = train("--data", book, "--out", out, "--device", "cuda")
    assert code == 130 and "--device cuda" in err
    assert train("--out", out, "--resume").code == 0
    assert train("--data", book, "--out", tmp_path / "cpu").code == 0
    np.testing.assert_allclose(losses(out), losses(tmp_path / "cpu"), atol=1e-5)
    assert backend.device_of(tinyllm.from_pretrained(out).parameters()[0].data) == "cpu"


def test_training_json_is_readable_by_people(tiny_run):
    found = read_json(tiny_run / "step-00000010" / "training.json")
    assert found["step"] == 10 and found["sampler_position"] == 10
    assert [step for step, _ in found["validation"]] == [0, 2, 4, 6, 8, 10]
    assert found["options"]["recipe"]["lr"] == 0.01 and found["options"]["data"].endswith("book.txt")
