"""LLaMA against transformers: the same function, gradients, files and text."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tinyllm
from tinyllm.models import LLaMA, LLaMAConfig
from tinyllm.models.llama import rope_frequencies

from .reference import (
    VOCABULARY,
    assert_same_gradients,
    assert_same_hidden_states,
    assert_same_logits,
    assert_same_text_of_prompts_of_different_lengths,
    assert_shards_are_read,
    converted,
    gradients_of_same_loss,
    greedy,
    in_float64,
    logits_of,
    random_ids,
    read_back,
    scrambled,
    torch,
    transformers,
)

modeling_llama = transformers.models.llama.modeling_llama

LENGTH = 70  # positions: more than one block of 64 queries of the fused attention
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# rope_theta and rope_scaling, the names of transformers 4, which version 5 understands too.
CONFIGS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-2},
    "one key head, wide heads, biases": {
        "num_key_value_heads": 1, "head_dim": 10, "attention_bias": True, "mlp_bias": True,
    },
    "llama3, tied": {
        "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 200.0, "rope_scaling": LLAMA3,
    },
    "linear": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}  # fmt: skip


def reference(**options):
    """transformers' model with random weights."""
    options = deepcopy(options)  # for transformers changes what it is given
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": LENGTH,
            "bos_token_id": None, "eos_token_id": None, **options,
        }
    )  # fmt: skip
    return scrambled(transformers.LlamaForCausalLM, config)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(**CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


@pytest.mark.parametrize("length", [1, 2, 65, LENGTH])
def test_logits(pair, length):
    theirs, ours, _ = pair
    found = assert_same_logits(theirs, ours, random_ids(3, length))
    assert found.dtype == np.float32 and np.abs(found).max() > 1


def test_hidden_states(pair):
    theirs, ours, _ = pair
    assert_same_hidden_states(theirs, ours, random_ids(2, LENGTH))


def test_logits_in_float64(pair, monkeypatch):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    ours = LLaMA.from_pretrained(folder, np.float64)
    theirs = in_float64(theirs, ours, modeling_llama, monkeypatch)
    assert_same_logits(theirs, ours, random_ids(2, LENGTH), 1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-12)])
def test_loss_and_gradients(pair, monkeypatch, dtype, tolerance):
    theirs, _, folder = pair
    ours = LLaMA.from_pretrained(folder, dtype)
    if dtype == np.float64:
        theirs = in_float64(theirs, ours, modeling_llama, monkeypatch)
    else:
        theirs = converted(theirs, dtype)
    gradients = gradients_of_same_loss(theirs, ours, random_ids(2, LENGTH), tolerance)
    assert_same_gradients(ours, gradients, tolerance)


def test_greedy_text(pair):
    """With both caches, to the end of the context."""
    theirs, ours, _ = pair
    ids = random_ids(2, 6)
    found = ours.generate(ids, LENGTH - 6, temperature=0)
    assert np.array_equal(found, greedy(theirs, ids, LENGTH - 6)) and found.shape == (2, LENGTH)


def test_text_of_prompts_of_different_lengths(pair):
    theirs, ours, _ = pair
    assert_same_text_of_prompts_of_different_lengths(theirs, ours, 40)


# Angles


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 4096, "num_attention_heads": 32},  # LLaMA
        {"hidden_size": 2048, "num_attention_heads": 32, "rope_theta": 5e5,  # Llama 3.2 1B
         "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}},
        {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 1e5,
         "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"hidden_size": 24, "num_attention_heads": 4, "rope_theta": 200.0, "rope_scaling": LLAMA3},
    ],
    ids=["default", "llama3", "linear", "tiny"],
)  # fmt: skip
def test_angles_of_published_models(options):
    """The frequencies are transformers' to the last bit but one, and so are the cosines far into a text."""
    common = {"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, **options}
    rotary = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**deepcopy(common)))
    config = LLaMAConfig(**common)
    expected = rotary.inv_freq.numpy()
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1.2e-7, atol=0)
    assert (rope_frequencies(config) == expected).mean() > 0.9
    positions = torch.tensor([[0, 1, 2, 1000, 4095]])
    cosines, sines = (table[0].numpy() for table in rotary(torch.zeros(1, dtype=torch.float32), positions))
    angles = positions.numpy()[0].astype(np.float32)[:, None] * rope_frequencies(config)
    half = angles.shape[1]
    # An angle of up to 4,095 radians that differs by one bit in a few frequencies.
    for found, table in ((np.cos(angles), cosines), (np.sin(angles), sines)):
        assert np.array_equal(table[:, :half], table[:, half:])
        np.testing.assert_allclose(found, table[:, :half], rtol=0, atol=5e-4)
        assert np.median(np.abs(found - table[:, :half])) < 1e-7


# Files


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    again = read_back(theirs, ours, tmp_path)
    written, read = again.config.to_dict(), theirs.config.to_dict()
    differ = {name for name in written.keys() | read.keys() if written.get(name) != read.get(name)}
    origin = {"architectures", "_name_or_path", "dtype", "torch_dtype"}
    assert differ <= {*origin, "bos_token_id", "eos_token_id"}
    ids = random_ids(2, LENGTH)
    np.testing.assert_allclose(logits_of(again, ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_model_of_ours_is_one_of_theirs(options, tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    config = LLaMAConfig(VOCABULARY, 24, 40, 2, 4, max_position_embeddings=LENGTH, **options)
    ours = LLaMA(config, seed=0).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(theirs, ours, random_ids(2, LENGTH))
    assert LLaMA.from_pretrained(tmp_path).config == ours.config


def test_both_spellings_of_the_angles(pair, tmp_path):
    """What transformers 4 writes, rope_theta and rope_scaling, and what version 5 does, rope_parameters."""
    theirs, ours, folder = pair
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = dict(config.pop("rope_parameters", None) or config.pop("rope_scaling", None) or {})
    theta = rope.pop("rope_theta", config.pop("rope_theta", None))
    kind = rope.pop("rope_type", "default")
    old = {"rope_theta": theta, "rope_scaling": {"type": kind, **rope} if kind != "default" else None}
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **rope}}
    for options in (old, new, {**old, **new}):
        assert LLaMAConfig.from_published({**config, **options}) == ours.config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference(num_key_value_heads=2).to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    # Read anew, for halves.float() would keep halved angles, which no file holds.
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(theirs, tinyllm.from_pretrained(tmp_path), random_ids(2, LENGTH))


def test_shards(tmp_path):
    assert_shards_are_read(reference(), tmp_path, random_ids(2, LENGTH))


@pytest.mark.parametrize("tied", [True, False])
def test_old_files_with_stored_frequencies(tied, tmp_path):
    """As transformers wrote them in 2023: inv_freq in every layer, and the tied head once more."""
    theirs = reference(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in arrays) != tied
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        arrays[name] = theirs.model.rotary_emb.inv_freq.numpy()
    arrays["lm_head.weight"] = theirs.lm_head.weight.detach().numpy()
    save_file(arrays, tmp_path / "model.safetensors")
    assert_same_logits(theirs, tinyllm.from_pretrained(tmp_path), random_ids(2, LENGTH))


@pytest.mark.parametrize(
    "option, said",
    [
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3,
                           "long_factor": [2.0] * 3}}, "longrope"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "default"),
    ],
    ids=str,
)  # fmt: skip
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, said, tmp_path):
    reference(**option).save_pretrained(tmp_path)
    with pytest.raises(tinyllm.InputError, match=said):
        tinyllm.from_pretrained(tmp_path)
