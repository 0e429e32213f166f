"""llama.py: three models of one size, what the script prints of them and draws; its errors."""

from __future__ import annotations

import re

import pytest

from .helpers import check_bad_paths, check_help, refused, run

ROW = r"^(GPT-2|LLaMA|LLaMA 2) +([\d,]+) +([\d.]+) +([\d.]+) nats a token = ([\d.]+) bits a byte +([\d,]+)$"


@pytest.fixture
def llama(script, module, monkeypatch):
    """llama(*arguments): the script in this process, its models tiny."""
    tiny = {"VOCABULARY": 300, "WIDTH": 24, "LAYERS": 2, "HEADS": 4, "BATCH": 3, "CONTEXT": 16}
    for name, value in tiny.items():
        monkeypatch.setattr(module, name, value)
    return script


def table(out):
    """name -> (parameters, training loss, validation loss, bits a byte, bytes a token), as printed."""
    rows = re.findall(ROW, out, re.MULTILINE)
    return {name: tuple(float(value.replace(",", "")) for value in values) for name, *values in rows}


def test_what_it_prints_and_draws(llama, book, tmp_path):
    code, out, err = llama("--data", book, "--steps", 30, "--out", tmp_path / "out")
    assert code == 0, err
    rows = table(out)
    assert list(rows) == ["GPT-2", "LLaMA", "LLaMA 2"]
    sizes = [parameters for parameters, *_ in rows.values()]
    assert max(sizes) - min(sizes) < 3 * 24 * 2  # one more hidden number in the MLPs is too much
    scale = rows["GPT-2"][3] / rows["GPT-2"][2]
    for _, trained, loss, bits, _ in rows.values():
        assert 3 < loss < 5.8 and 3 < trained < 5.8 and bits == pytest.approx(scale * loss, rel=1e-3)
    # Keys and values of 4, 4 and 2 heads of 6, in 2 layers, of 4 bytes.
    assert [row[-1] for row in rows.values()] == [2 * heads * 6 * 2 * 4 for heads in (4, 4, 2)]
    assert re.search(r"^LLaMA 2 writes:\n   \| The class statement", out, re.MULTILINE)
    assert f"drawn in {tmp_path / 'out' / 'llama.png'}" in out.splitlines()[-1]
    assert (tmp_path / "out" / "llama.png").read_bytes().startswith(b"\x89PNG")
    for name in rows:
        assert f"{name}: " in err and "/30 " in err


def test_the_default_sizes_are_equal(module):
    """973,568 is GPT-2 of 4 layers, width 128, a context of 128 and 1,280 tokens."""
    models = module.three(1280, 0)
    counts = {name: model.parameter_count() for name, model in models.items()}
    assert counts["GPT-2"] == 973_568
    assert all(abs(count - counts["GPT-2"]) < 1000 for count in counts.values())
    assert models["LLaMA"].config.intermediate_size < models["LLaMA 2"].config.intermediate_size
    assert models["LLaMA"].config.key_value_heads == 2 * models["LLaMA 2"].config.key_value_heads
    assert [model.context for model in models.values()] == [128] * 3


def test_all_models_see_the_same_batches(module, llama, book, tmp_path, monkeypatch):
    seen = {}

    def fit(model, batch, recipe, label, validation, every):
        batches = [batch(step) for step in range(3)]
        seen[label] = [array.tolist() for pair in batches for array in pair]
        return module.Progress([1.0], [(0, 1.0)])

    monkeypatch.setattr(module, "fit", fit)
    assert llama("--data", book, "--out", tmp_path).code == 0
    assert seen["GPT-2"] == seen["LLaMA"] == seen["LLaMA 2"]


def test_the_seed_decides(llama, book, tmp_path):
    outputs = [llama("--data", book, "--steps", 2, "--seed", s, "--out", tmp_path).out for s in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_in_a_process_of_its_own(book, tmp_path):
    code, out, err = run("llama", "--data", book, "--steps", 1, cwd=tmp_path)
    assert code == 0, err
    assert len(table(out)) == 3 and (tmp_path / "runs" / "llama" / "llama.png").exists()


def test_help_and_bad_input(llama, module, book, tmp_path):
    check_help(llama, module)
    check_bad_paths(llama, book, tmp_path)
    (tmp_path / "short.txt").write_text("a short text, too short", encoding="utf-8")
    refused(llama("--data", tmp_path / "short.txt", "--out", tmp_path), "too short for a context of 16")
