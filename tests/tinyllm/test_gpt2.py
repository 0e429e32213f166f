"""GPT-2: what must hold of it alone; what holds of every model is in test_family.py."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from dataclasses import replace
from fnmatch import fnmatch
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import autograd.functional as F
import tinyllm
from autograd import nn
from tinyllm import checkpoints
from tinyllm.errors import InputError
from tinyllm.models import GPT2, GPT2Config
from tinyllm.models.gpt2 import SIZES
from tinyllm.pretrained import write_weights
from tinyllm.tokenizers import CharacterTokenizer
from tinyllm.training import Recipe, Trainer

from .folders import assert_identical, edit, one_line, stored
from .test_family import train
from .tiny import (
    GPT2_CONFIG,
    assert_dropout_in_training_only,
    assert_gradients_are_derivatives,
    scramble,
)

TINY = GPT2_CONFIG
SHORT = replace(TINY, n_positions=6, n_embd=6, vocab_size=7)


def scrambled(config=TINY, seed=0, dtype=np.float32):
    return scramble(GPT2(config, seed), seed, dtype)


def tokens(*shape, config=TINY, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


# The function that it computes


def test_gradients_are_derivatives(both):
    """Of the whole model with dropout on, with respect to every parameter."""
    config = replace(SHORT, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    model = scrambled(config, dtype=np.float64).train()
    ids = np.array([[1, 4, 1, 0, 6], [3, 3, 2, 5, 1]])
    targets = np.array([[4, 1, 0, 6, -100], [3, 2, 5, 1, 1]])
    assert_gradients_are_derivatives(model, ids, targets, projections=2)


def test_composed_operations_train_alike():
    config = replace(TINY, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    fused = train(GPT2(config, seed=1))
    F.use_fused(False)
    try:
        composed = train(GPT2(config, seed=1))
    finally:
        F.use_fused(True)
    assert fused[-1] < fused[0] - 0.2
    assert np.abs(fused - composed).max() < 1e-4
    assert np.abs(fused - train(GPT2(TINY, seed=1))).max() > 1e-2  # so the masks were there


@pytest.mark.parametrize(
    "kind, silent",
    [("embd_pdrop", ""), ("attn_pdrop", "mlp"), ("resid_pdrop", "mlp"), ("resid_pdrop", "attention")],
)
def test_dropout_is_on_in_training_and_off_in_evaluation(kind, silent):
    """Each alone: a sub-block that is silent adds nothing to the stream, so its dropout changes nothing."""
    model, without, ids = scrambled(replace(TINY, **{kind: 0.5})), scrambled(), tokens(2, 20)
    for name, parameter in [*model.named_parameters(), *without.named_parameters()]:
        if silent and f"{silent}.projection" in name:
            parameter.data = np.zeros_like(parameter.data)
    assert_dropout_in_training_only(model, without, ids)


# Its sizes and its first weights


@pytest.mark.parametrize(
    "name, count",
    {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }.items(),
)
def test_parameter_counts(name, count):
    """Radford et al. 2019, table 2, as corrected."""
    with nn.skeleton():
        assert GPT2(SIZES[name], seed=None).parameter_count() == count


def test_first_weights():
    config = GPT2Config(400, 300, 64, 8, 4)
    model = GPT2(config, seed=0)
    projections, others = [], []
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        assert values.dtype == np.float32
        if parameter.ndim == 1:
            assert (values == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            (projections if "projection" in name else others).append(values.ravel())
            assert values.std() == pytest.approx(values.ravel()[: values.size // 2].std(), rel=0.1), name
    assert len(projections) == 16 and len(others) == 18
    assert np.concatenate(others).std() == pytest.approx(0.02, rel=0.01)
    assert np.concatenate(projections).std() == pytest.approx(0.02 / math.sqrt(16), rel=0.01)
    assert abs(np.concatenate(others).mean()) < 2e-4
    again, other = GPT2(config, seed=0).state_dict(), GPT2(config, seed=1).state_dict()
    assert all(np.array_equal(array, again[name]) for name, array in model.state_dict().items())
    assert not np.array_equal(other["token_embedding.weight"], again["token_embedding.weight"])


# Published folders


@pytest.fixture
def saved(tmp_path):
    """(folder, model) of a saved model whose MLP is not four times as wide as the model."""
    model = scrambled(replace(TINY, n_inner=40, layer_norm_epsilon=1e-3))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_published_layout(saved):
    """Names and shapes as in the published files: matrices of blocks (in, out), the head only once."""
    folder, model = saved
    C, inner = 24, 40
    block = {
        "ln_1.weight": (C,), "ln_1.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
        "mlp.c_fc.weight": (C, inner), "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, C), "mlp.c_proj.bias": (C,),
    }  # fmt: skip
    expected = {"wte.weight": (31, C), "wpe.weight": (80, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    expected |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected = {f"transformer.{name}": shape for name, shape in expected.items()}
    found = stored(folder)
    assert {name: array.shape for name, array in found.items()} == expected
    square = found["transformer.h.1.attn.c_proj.weight"]  # whose shape does not tell the layout
    assert np.array_equal(square, model.blocks[1].attention.projection.weight.numpy().T)


def test_shards(saved):
    folder, model = saved
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_weights(folder, config, stored(folder), max_shard_bytes=8000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3 and not (folder / "model.safetensors").exists()
    assert_identical(GPT2.from_pretrained(folder), model)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("head", [False, True])
def test_old_files(saved, prefix, head):
    """Without the prefix, with the mask of each layer as a buffer, and perhaps with the tied head."""
    folder, model = saved
    arrays = {name.replace("transformer.", prefix): array for name, array in stored(folder).items()}
    for i in range(2):
        arrays[f"{prefix}h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 80, 80), np.uint8))
        arrays[f"{prefix}h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    if head:
        arrays["lm_head.weight"] = arrays[f"{prefix}wte.weight"]
    save_file(arrays, folder / "model.safetensors")
    edit(folder, n_ctx=80, dtype=..., activation_function=..., n_inner=40)
    assert_identical(GPT2.from_pretrained(folder), model)


def test_a_matrix_stored_as_we_hold_it_is_misshapen(saved):
    folder, _ = saved
    arrays = stored(folder)
    name = "transformer.h.0.attn.c_attn.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    save_file(arrays, folder / "model.safetensors")
    message = one_line(pytest.raises(InputError, GPT2.from_pretrained, folder))
    assert name in message and "(72, 24)" in message and "(24, 72)" in message


@pytest.mark.parametrize(
    "options, said",
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"n_ctx": 40}, "n_ctx"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"n_head": 5}, "5 heads do not divide the width 24"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_layer": "2"}, "n_layer is '2'"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"n_positions": 80.0, "n_ctx": 80.0}, "n_positions is 80.0"),
        ({"attn_pdrop": 1.0}, "attn_pdrop is 1.0"),
        ({"attn_pdrop": None}, "attn_pdrop is None"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan"),
        ({"model_type": "gpt_neo"}, "'gpt_neo'"),
        ({"model_type": ...}, "None"),
    ],
    ids=str,
)
def test_options_that_are_refused(saved, options, said):
    folder, _ = saved
    edit(folder, **options)
    for load in (GPT2.from_pretrained, tinyllm.from_pretrained):
        assert said in one_line(pytest.raises(InputError, load, folder))


def test_options_that_are_understood(saved):
    folder, model = saved
    edit(
        folder, n_ctx=80, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True, reorder_and_upcast_attn=False, activation_function="gelu_pytorch_tanh",
        summary_type="cls_index", task_specific_params={"text-generation": {"max_length": 50}},
    )  # fmt: skip
    assert_identical(GPT2.from_pretrained(folder), model)


def test_the_options_of_published_files(saved):
    """What the files of gpt2 ... gpt2-xl and of models trained from them carry beside the sizes."""
    folder, model = saved
    edit(
        folder, architectures=["GPT2LMHeadModel"], bos_token_id=50256, eos_token_id=50256, n_special=0,
        predict_special_tokens=True, summary_activation=None, summary_first_dropout=0.1, output_past=True,
        summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, is_decoder=True,
        finetuning_task=None, num_labels=1, torchscript=False, use_bfloat16=False, pruned_heads={},
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    )  # fmt: skip
    assert_identical(GPT2.from_pretrained(folder), model)


def test_the_options_left_out_are_those_of_the_smallest_model():
    assert GPT2Config.from_published({"model_type": "gpt2"}) == SIZES["gpt2"]
    for n_inner, width in ((None, 96), (40, 40), (96, 96)):
        config = GPT2Config.from_published({**TINY.to_published(), "n_inner": n_inner})
        assert GPT2(config, seed=None).blocks[0].mlp.expand.weight.shape == (width, 24)
    with pytest.raises(InputError, match="'n_positions'|n_ctx"):
        GPT2Config.from_published({"n_ctx": 512})  # its n_positions would be 1024


@pytest.mark.parametrize("stored_as", [np.float32, ml_dtypes.bfloat16])
def test_loading_takes_the_memory_of_the_model_and_little_more(tmp_path, stored_as):
    """None for weights that are not read yet, nor for what they were before they are turned or widened."""
    model = GPT2(GPT2Config(500, 64, 192, 8, 3)).to(dtype=stored_as)
    model.save_pretrained(tmp_path)
    tracemalloc.start()
    try:
        size = 4 * GPT2.from_pretrained(tmp_path).parameter_count()
        assert size < tracemalloc.get_traced_memory()[1] < size + 2 * 2**20 < 1.2 * size
    finally:
        tracemalloc.stop()


def test_a_tied_head_that_is_stored_too_takes_no_memory(tmp_path):
    """As old files have it: it is compared with the embedding a piece at a time."""
    model = GPT2(GPT2Config(10_000, 64, 96, 1, 3))
    model.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"].copy()
    save_file(arrays, tmp_path / "model.safetensors")
    tracemalloc.start()
    try:
        size = 4 * GPT2.from_pretrained(tmp_path).parameter_count()
        assert tracemalloc.get_traced_memory()[1] < size + 3 * 2**20 < 1.8 * size  # two heads: 1.9
    finally:
        tracemalloc.stop()
    arrays["lm_head.weight"][-1, -1] += 1
    save_file(arrays, tmp_path / "model.safetensors")
    assert "lm_head.weight" in one_line(pytest.raises(InputError, GPT2.from_pretrained, tmp_path))


# tinyllm.from_pretrained


def test_folders_that_are_no_checkpoint(tmp_path, saved):
    folder, model = saved
    for bad, said in ((tmp_path / "none", "no such folder"), (folder / "config.json", "not a folder")):
        assert said in one_line(pytest.raises(InputError, tinyllm.from_pretrained, bad))
    (tmp_path / "empty").mkdir()
    assert "it is empty" in one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path / "empty"))
    edit(folder, model_type="bert2")
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))
    assert "'bert2'" in message and "gpt2" in message
    run = tmp_path / "run"
    checkpoints.save(run, 3, model.save_pretrained)
    assert_identical(tinyllm.from_pretrained(run), model)
    assert_identical(GPT2.from_pretrained(run), model)


def test_a_name_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, "somebody/model"))
    assert "no folder somebody/model" in message and "[hub]" in message
    for path in ("./model", "/no/model", "a/b/c"):
        assert "hub" not in one_line(pytest.raises(InputError, tinyllm.from_pretrained, path))


def test_a_name_with_the_hub(monkeypatch, tmp_path, saved):
    folder, model = saved
    hub, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    for name in ("HfHubHTTPError", "HFValidationError", "LocalEntryNotFoundError"):
        setattr(errors, name, type(name, (Exception,), {}))
        setattr(hub, name, getattr(errors, name))
    hub.errors = hub.utils = errors
    asked = []

    def snapshot_download(name, allow_patterns=None):
        asked.append(name)
        if name != "somebody/model":
            raise errors.LocalEntryNotFoundError("no connection\nand a long story")
        assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
        return str(folder)

    hub.snapshot_download = snapshot_download
    for name in ("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils"):
        monkeypatch.setitem(sys.modules, name, hub if name == "huggingface_hub" else errors)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_identical(tinyllm.from_pretrained("somebody/model"), model)
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, "somebody/else"))
    assert "somebody/else" in message and "no connection" in message
    model.save_pretrained("somebody/else")
    assert_identical(tinyllm.from_pretrained("somebody/else"), model)
    assert asked == ["somebody/model", "somebody/else"]


# On a device


def test_dropout_on_the_stand_in_for_a_gpu(both, strict_cupy):
    config = replace(TINY, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    plain, dropped = train(GPT2(TINY, seed=0).to("cuda"), 3), train(GPT2(config, seed=0).to("cuda"), 3)
    assert np.isfinite(dropped).all() and (plain != dropped).all()
    assert np.array_equal(dropped, train(GPT2(config, seed=0).to("cuda"), 3))


def test_a_run_on_the_stand_in_for_a_gpu(strict_cupy, tmp_path):
    """The whole loop gives the losses of the CPU, and goes on from a checkpoint as if it had not stopped."""
    tokenizer = CharacterTokenizer("abcdefgh")
    row = np.random.default_rng(0).integers(0, 8, 600)
    config = replace(TINY, vocab_size=tokenizer.vocabulary_size, n_positions=16)
    recipe = Recipe(steps=4, batch=4, context=16, accumulate=2, lr=1e-2, warmup=2)

    def run(device, name, model, resume=None):
        out = tmp_path / name
        trainer = Trainer(model.to(device), tokenizer, row[:500], row[500:], recipe, out, save_every=2)
        if resume is not None:
            trainer.resume(resume)
        trainer.run(say=lambda line: None, sample_tokens=4)
        return trainer.progress

    on_cpu = run("cpu", "cpu", GPT2(config, seed=0))
    on_gpu = run("cuda", "cuda", GPT2(config, seed=0))
    half = tmp_path / "cuda" / "step-00000002"
    resumed = run("cuda", "resumed", tinyllm.from_pretrained(half), half)
    assert on_gpu.losses == resumed.losses and on_gpu.validation[-1] == resumed.validation[-1]
    assert on_gpu.losses == pytest.approx(on_cpu.losses, abs=1e-5) and len(on_cpu.losses) == 4
    assert on_gpu.validation == pytest.approx(np.array(on_cpu.validation), abs=1e-5)
    last = [tinyllm.from_pretrained(tmp_path / name) for name in ("cuda", "resumed")]
    assert_identical(*last)
