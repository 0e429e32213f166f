"""lora.py: what it prints, saves and draws, that its comparison is fair; its errors."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import tinyllm
from tinyllm import evaluation
from tinyllm import lora as adapters
from tinyllm.datasets import Document
from tinyllm.models import GPT2Config
from tinyllm.tokenizers import load_tokenizer

from .helpers import check_bad_paths, check_help, refused, run

ROW = (
    r"^  (before|full fine-tuning|LoRA) +([\d.]+) +([\d.]+)(?: +([\d,]+) +([\d.]+)%"
    + r" +([\d,]+)" * 3
    + ")?$"
)


def toy(kind):
    """Prose of few words, and code of others."""
    words = {
        "prose": "the quick brown fox jumps over a lazy dog",
        "sources": "def x(self): return self.x + 1",
    }[kind]
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(words.split(), 150)) for _ in range(12))
    return [Document(kind, f"{kind}.{i}", text) for i, text in enumerate(texts)]


@pytest.fixture
def lora(script, module, monkeypatch):
    """lora(*arguments): the script in this process, with a tiny model and the toy's texts."""
    config = GPT2Config(
        n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    monkeypatch.setattr(module, "CONFIG", config)
    monkeypatch.setattr(module, "VOCABULARY", 280)
    for name in ("PRETRAINING", "FINE_TUNING"):
        recipe = replace(getattr(module, name), batch=4, context=16, warmup=2, lr=1e-2)
        monkeypatch.setattr(module, name, recipe)
    monkeypatch.setattr("tinyllm.corpus.documents", toy)
    return script


def rows(out):
    """name -> (loss on the new text, on prose, what learns, its share, optimizer, file, ms), as printed."""
    number = lambda text: float(text.replace(",", "")) if text else None
    return {name: tuple(map(number, values)) for name, *values in re.findall(ROW, out, re.MULTILINE)}


def test_what_it_prints_saves_and_draws(lora, tmp_path):
    out_folder = tmp_path / "out"
    code, out, err = lora("--pretraining", 30, "--steps", 40, "--out", out_folder)
    assert code == 0, err
    found = rows(out)
    assert list(found) == ["before", "full fine-tuning", "LoRA"]
    for name in ("full fine-tuning", "LoRA"):
        assert found[name][0] < found["before"][0] - 0.3
    base, adapted = (tinyllm.from_pretrained(out_folder / "base") for _ in range(2))
    adapters.load(adapted, out_folder / "adapter")
    learned = sum(p.size for p in adapted.parameters() if p.requires_grad)
    # A and B of rank 1 beside maps of 16 x 48, 16 x 16, 16 x 64 and 64 x 16, in 2 layers.
    assert learned == 2 * (64 + 32 + 80 + 80) == found["LoRA"][2]
    assert found["full fine-tuning"][2] == base.parameter_count() and found["full fine-tuning"][3] == 100
    assert found["LoRA"][3] == pytest.approx(100 * learned / base.parameter_count(), abs=0.01)
    for name in ("full fine-tuning", "LoRA"):  # m and v in float32, and the number of steps
        assert found[name][4] == 8 * found[name][2] + 8 and found[name][6] >= 0
    assert adapted.adapter_config.base_model_name_or_path == str(out_folder / "base")
    difference, largest = map(
        float, re.search(r"logits but for (\S+); .* (\S+)$", out, re.MULTILINE).groups()
    )
    assert 0 < difference < 1e-5 * largest
    files = {"LoRA": "adapter/adapter_model.safetensors", "full fine-tuning": "full/model.safetensors"}
    assert all(found[name][5] == (out_folder / file).stat().st_size for name, file in files.items())
    for title in ("before", "full fine-tuning", "LoRA"):
        assert re.search(rf"^{title}, it writes:\n   \| def __init__\(self", out, re.MULTILINE)
    assert out.splitlines()[-1] == f"losses and costs are drawn in {out_folder / 'lora.png'}"
    assert (out_folder / "lora.png").read_bytes().startswith(b"\x89PNG")
    for label in ("prose: ", "full fine-tuning: ", "LoRA: "):
        assert label in err


def test_the_numbers_are_those_of_the_models(lora, module, tmp_path, monkeypatch):
    """The losses are on the texts that they are said to be on, of the model that is saved."""
    drawn = SimpleNamespace()
    monkeypatch.setattr(
        module, "draw", lambda path, runs, base, name: vars(drawn).update(runs=runs, base=base)
    )
    code, out, err = lora("--pretraining", 20, "--steps", 16, "--out", tmp_path)
    assert code == 0, err
    found, tokenizer = rows(out), load_tokenizer(tmp_path / "base")
    adapted = adapters.load(tinyllm.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    measure = lambda model, row: evaluation.loss(model, row, 16)
    prose = module.corpus.load(None, 280).validation
    code = module.tokens(None, tokenizer).validation
    models = {"before": drawn.base, "full fine-tuning": drawn.runs["full fine-tuning"].model, "LoRA": adapted}
    for name, model in models.items():
        assert measure(model, code) == pytest.approx(found[name][0], abs=6e-4), name
        assert measure(model, prose) == pytest.approx(found[name][1], abs=6e-4), name
    for run_ in drawn.runs.values():
        assert run_.steps == list(range(0, 17, 2)) and len(run_.old) == len(run_.new) == 9
        assert (run_.new[0], run_.old[0]) == (drawn.runs["LoRA"].new[0], drawn.runs["LoRA"].old[0])


def test_the_comparison_is_fair(lora, module, tmp_path, monkeypatch):
    """Both ways begin with the same weights and see the same batches."""
    seen, original = {}, module.fit

    def fit(model, batch, recipe, label, validation, every):
        weights = {name: a for name, a in model.state_dict().items() if "lora_" not in name}

        def seeing(step):
            seen[label][1].append(batch(step))
            return seen[label][1][-1]

        seen[label] = ({name: a.copy() for name, a in weights.items()}, [])
        return original(model, seeing, recipe, label, validation, every)

    monkeypatch.setattr(module, "fit", fit)
    assert lora("--pretraining", 2, "--steps", 3, "--out", tmp_path).code == 0
    (weights, batches), (others, other_batches) = seen["full fine-tuning"], seen["LoRA"]
    assert weights.keys() == others.keys() and len(batches) == 3
    assert all(np.array_equal(weights[name], array) for name, array in others.items())
    assert all(np.array_equal(a, b) for x, y in zip(batches, other_batches) for a, b in zip(x, y))


def test_the_default_adapters_are_less_than_a_hundredth(module):
    model = module.GPT2(replace(module.CONFIG, vocab_size=1280), 0)
    count = model.parameter_count()
    adapters.apply(model, 1, module.ALPHA)
    learned = sum(p.size for p in model.parameters() if p.requires_grad)
    assert learned == 8192 and learned < 0.01 * count


def test_another_text_and_rank(lora, book, tmp_path):
    code, out, err = lora("--data", book, "--pretraining", 1, "--steps", 1, "--rank", 3, "--out", tmp_path)
    assert code == 0, err
    assert "of book.txt" in out and rows(out)["LoRA"][2] == 3 * 512
    config = (tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    assert '"r": 3' in config and '"lora_alpha": 6.0' in config


def test_the_seed_decides(lora, tmp_path):
    outputs = []
    for seed in (1, 1, 2):
        out = lora("--pretraining", 2, "--steps", 2, "--seed", seed, "--out", tmp_path).out
        outputs.append(re.sub(r" +\d+$", "", out, flags=re.MULTILINE))  # but for the milliseconds
    assert outputs[0] == outputs[1] != outputs[2]


def test_help_and_bad_input(lora, module, book, tmp_path):
    check_help(lora, module, "--pretraining", "--rank")
    check_bad_paths(lora, book, tmp_path)
    (tmp_path / "short.txt").write_text("the quick brown fox over", encoding="utf-8")
    refused(lora("--data", tmp_path / "short.txt", "--out", tmp_path), "too short for a context of 16")
    assert lora("--rank", 0).code == 2


def test_in_a_process_of_its_own(book, tmp_path):
    code, out, err = run("lora", "--data", book, "--pretraining", 1, "--steps", 1, cwd=tmp_path)
    assert code == 0, err
    assert rows(out)["LoRA"][2:4] == (8192, 0.84)
    assert (tmp_path / "runs" / "lora" / "lora.png").read_bytes().startswith(b"\x89PNG")
