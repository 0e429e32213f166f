"""LLaMA and LLaMA 2: what is special to them. What every causal model must hold is in test_family.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import autograd.functional as F
import tinyllm
from autograd import Tensor, nn, no_grad
from tinyllm.errors import InputError
from tinyllm.models import LLaMA, LLaMAConfig
from tinyllm.models.llama import SIZES, rope_frequencies

from .folders import assert_identical, edit, one_line, stored
from .tiny import LLAMA2_CONFIG, LLAMA_CONFIG, assert_dropout_in_training_only, scramble, tokens

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
ODD = replace(  # everything that a published file may have otherwise than the first LLaMA
    LLAMA2_CONFIG, head_dim=10, rope_theta=500.0, rope_scaling=LLAMA3, attention_bias=True, mlp_bias=True,
    rms_norm_eps=1e-3,
)  # fmt: skip


def scrambled(config, **options):
    return scramble(LLaMA(replace(config, **options)))


# Sizes and first weights


COUNTS = {  # Touvron et al. 2023a, table 2: 6.7B, 13.0B, 32.5B, 65.2B; 2023b: 7B, 13B, 70B
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
}


@pytest.mark.parametrize("name, config", SIZES.items(), ids=SIZES)
def test_parameter_counts(name, config):
    with nn.skeleton():
        assert LLaMA(config, seed=None).parameter_count() == COUNTS[name]
    assert COUNTS.keys() == SIZES.keys()
    assert config.max_position_embeddings == (4096 if "-2-" in name else 2048)


def test_first_weights():
    config = LLaMAConfig(400, 64, 176, 8, 4, 2)
    model = LLaMA(config, seed=0)
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        assert values.dtype == np.float32
        if parameter.ndim == 1:
            assert (values == 1).all(), name
        else:
            assert values.std() == pytest.approx(0.02, rel=0.05), name
            assert abs(values.mean()) < 5 * 0.02 / math.sqrt(values.size), name
    again, other = LLaMA(config, seed=0).state_dict(), LLaMA(config, seed=1).state_dict()
    for name, array in model.state_dict().items():
        assert np.array_equal(array, again[name])
        assert array.ndim == 1 or not np.array_equal(array, other[name])
    with_biases = LLaMA(replace(config, attention_bias=True, mlp_bias=True))
    biases = [p for name, p in with_biases.named_parameters() if name.endswith("bias")]
    assert len(biases) == 8 * 7 and not any(bias.numpy().any() for bias in biases)
    assert not any(name.endswith("bias") for name in model.state_dict())


# Positions


def test_attention_sees_distances_and_not_places():
    """Keys and queries that move on together, by 1,000 positions, attend to each other as before."""
    config = replace(ODD, max_position_embeddings=5000, rope_scaling=None)
    model = scramble(LLaMA(config)).to(dtype=np.float64)
    rng = np.random.default_rng(0)
    d, T = config.head_size, 12
    q, k, v = (Tensor(rng.standard_normal((2, T, heads * d))) for heads in (6, 3, 3))
    here, there = (F.rotary_attention(q, k, v, *model._rotation(at, T)).numpy() for at in (0, 1000))
    turned = (np.abs(F.rotary(q, *model._rotation(at, T)).numpy() - q.numpy()).max() for at in (0, 1000))
    assert min(turned) > 1
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-3)  # angles in float32


def test_a_rotation_turns_each_point_by_its_angle():
    """By the definition, with complex numbers made of the halves of a head."""
    config = replace(ODD, rope_scaling=None)
    model = scramble(LLaMA(config)).to(dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((2, 7, 3, 2, 5))  # (B, T, heads, halves, points)
    frequencies = 500.0 ** (-np.arange(5) / 5)
    z = (x[..., 0, :] + 1j * x[..., 1, :]) * np.exp(1j * np.arange(4, 11)[:, None, None] * frequencies)
    found = F.rotary(Tensor(x.reshape(2, 7, 30)), *model._rotation(4, 7)).numpy()
    expected = np.stack([z.real, z.imag], axis=-2).reshape(2, 7, 30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_frequencies():
    plain = LLaMAConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=32, rope_theta=1e4)
    f = rope_frequencies(plain)
    assert f.dtype == np.float32
    np.testing.assert_allclose(f, 1e4 ** (-np.arange(16) / 16), rtol=2e-7)
    linear = rope_frequencies(replace(plain, rope_scaling={"rope_type": "linear", "factor": 4.0}))
    np.testing.assert_allclose(linear, f / 4, rtol=1e-7)
    assert np.array_equal(
        rope_frequencies(replace(plain, rope_scaling={"rope_type": "dynamic", "factor": 4.0})), f
    )
    llama3 = rope_frequencies(
        replace(plain, rope_scaling={**LLAMA3, "original_max_position_embeddings": 200})
    )
    turns = 200 * f / (2 * math.pi)
    assert np.array_equal(llama3[turns >= 4], f[turns >= 4]) and (turns >= 4).sum() > 3
    assert np.array_equal(llama3[turns <= 1], f[turns <= 1] / 8) and (turns <= 1).sum() > 3
    between = (turns > 1) & (turns < 4)
    share = (turns - 1) / 3
    assert between.any()
    expected = ((1 - share) * f / 8 + share * f)[between]
    np.testing.assert_allclose(llama3[between], expected, rtol=1e-6)


# Heads


def test_each_key_head_serves_neighbours():
    """Grouped heads are plain heads whose keys and values repeat: 0 0 1 1 2 2, not 0 1 2 0 1 2."""
    grouped = scrambled(LLAMA2_CONFIG)
    plain = LLaMA(replace(LLAMA2_CONFIG, num_key_value_heads=None), seed=None).eval()
    state = grouped.state_dict()
    for name, array in state.items():
        if ".key." in name or ".value." in name:
            state[name] = np.repeat(array.reshape(3, 4, 24), 2, axis=0).reshape(24, 24)
    plain.load_state_dict(state)
    ids = tokens(grouped, 2, 70)
    np.testing.assert_allclose(plain(ids).numpy(), grouped(ids).numpy(), rtol=0, atol=1e-5)


def test_the_cache_holds_key_heads_only():
    sizes = {}
    for kv_heads in (6, 3, 1):
        model = scrambled(LLAMA2_CONFIG, num_key_value_heads=kv_heads)
        cache = model.new_cache(10)
        with no_grad():
            model(tokens(model, 2, 5), cache)
        sizes[kv_heads] = cache.nbytes
    assert sizes == {heads: 2 * 2 * 2 * 10 * heads * 4 * 4 for heads in (6, 3, 1)}


def test_every_norm_has_the_eps_of_the_config():
    norms = [module for module in LLaMA(ODD).modules() if isinstance(module, nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [ODD.rms_norm_eps] * (2 * ODD.num_hidden_layers + 1)


@pytest.mark.parametrize("fused", [True, False])
def test_a_window(fused):
    """The hook for Mistral: with windows of 5 in both layers, 9 positions matter, itself among them."""
    model = scrambled(LLAMA2_CONFIG)
    for block in model.blocks:
        block.attention.window = 5
    ids = tokens(model, 1, 75)
    F.use_fused(fused)
    try:
        last = model(ids).numpy()[0, -1]
        for back in range(75):
            other = ids.copy()
            other[0, -1 - back] = (other[0, -1 - back] + 1) % 31
            assert np.any(model(other).numpy()[0, -1] != last) == (back < 9), back
        with no_grad():
            cache = model.new_cache(75)
            found = [model(ids[:, i : i + 3], cache).numpy() for i in range(0, 75, 3)]
        np.testing.assert_allclose(np.concatenate(found, 1), model(ids).numpy(), rtol=0, atol=1e-5)
    finally:
        F.use_fused(True)


def test_dropout_of_attention_is_on_in_training_only():
    model, without = scrambled(LLAMA2_CONFIG, attention_dropout=0.5), scrambled(LLAMA2_CONFIG)
    ids = tokens(model, 2, 20)
    assert_dropout_in_training_only(model, without, ids)


# Published folders


@pytest.fixture
def saved(tmp_path):
    """(folder, model) of a saved model with everything unusual at once."""
    model = scrambled(ODD)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_published_layout(saved):
    folder, _ = saved
    C, inner, wide, narrow = 24, 40, 60, 30
    block = {
        "input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
        "self_attn.q_proj.weight": (wide, C), "self_attn.q_proj.bias": (wide,),
        "self_attn.k_proj.weight": (narrow, C), "self_attn.k_proj.bias": (narrow,),
        "self_attn.v_proj.weight": (narrow, C), "self_attn.v_proj.bias": (narrow,),
        "self_attn.o_proj.weight": (C, wide), "self_attn.o_proj.bias": (C,),
        "mlp.gate_proj.weight": (inner, C), "mlp.gate_proj.bias": (inner,),
        "mlp.up_proj.weight": (inner, C), "mlp.up_proj.bias": (inner,),
        "mlp.down_proj.weight": (C, inner), "mlp.down_proj.bias": (C,),
    }  # fmt: skip
    expected = {"model.embed_tokens.weight": (31, C), "model.norm.weight": (C,), "lm_head.weight": (31, C)}
    expected |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert {name: array.shape for name, array in stored(folder).items()} == expected


@pytest.mark.parametrize("tied", [True, False])
def test_the_head(tmp_path, tied):
    """Its own or the embedding's, which is then not in the file; a file that has it must have the same."""
    model = scrambled(LLAMA2_CONFIG, tie_word_embeddings=tied)
    assert (model.output.weight is model.token_embedding.weight) == tied
    model.save_pretrained(tmp_path)
    arrays = stored(tmp_path)
    assert ("lm_head.weight" in arrays) != tied
    assert_identical(tinyllm.from_pretrained(tmp_path), model)
    if not tied:
        edit(tmp_path, tie_word_embeddings=...)  # missing means false
        assert_identical(tinyllm.from_pretrained(tmp_path), model)
        edit(tmp_path, tie_word_embeddings=True)
        message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path))
        assert "lm_head.weight" in message and "tie_word_embeddings" in message
        return
    save_file(
        {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"]}, tmp_path / "model.safetensors"
    )
    assert_identical(tinyllm.from_pretrained(tmp_path), model)
    edit(tmp_path, tie_word_embeddings=...)
    untied = tinyllm.from_pretrained(tmp_path)
    assert untied.output.weight is not untied.token_embedding.weight
    save_file(arrays, tmp_path / "model.safetensors")
    assert "missing (lm_head.weight)" in one_line(pytest.raises(InputError, LLaMA.from_pretrained, tmp_path))


@pytest.mark.parametrize("place", ["layers.0.self_attn.", "layers.1.self_attn.", ""])
def test_stored_frequencies_are_no_parameters(saved, place):
    folder, model = saved
    arrays = stored(folder) | {f"model.{place}rotary_emb.inv_freq": np.ones(5, np.float32)}
    save_file(arrays, folder / "model.safetensors")
    assert_identical(LLaMA.from_pretrained(folder), model)


REFUSED = [
    ({"pretraining_tp": 2}, "pretraining_tp"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"sliding_window": 5}, "sliding_window"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"qk_layernorm": True}, "qk_layernorm"),
    ({"num_attention_heads": 5, "head_dim": ..., "num_key_value_heads": ...}, "5 heads do not divide"),
    ({"num_key_value_heads": 4}, "4 heads of keys and values do not divide 6"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_key_value_heads": "3"}, "num_key_value_heads"),
    ({"head_dim": 5}, "even number"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"rope_theta": -1e4}, "rope_theta is -10000.0"),
    ({"rope_theta": math.inf}, "rope_theta"),
    ({"attention_bias": "no"}, "attention_bias"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"attention_dropout": 1.0}, "attention_dropout"),
    ({"rope_scaling": [1]}, "rope_scaling is [1]"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 4.0}}, "['linear']"),
    ({"rope_scaling": {"type": "linear"}}, "needs factor, and has nothing"),
    ({"rope_scaling": {"factor": 2.0}}, "of type default needs nothing, and has factor"),
    ({"rope_scaling": {**LINEAR, "low_freq_factor": 1.0}}, "low_freq_factor"),
    ({"rope_scaling": {**LINEAR, "factor": 0}}, "factor in rope_scaling is 0"),
    ({"rope_scaling": {**LINEAR, "factor": "2"}}, "factor in rope_scaling is '2'"),
    ({"rope_scaling": {**LINEAR, "type": "dynamic"}}, "'dynamic'"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "contradict"),
    ({"rope_parameters": LINEAR}, "contradict"),
    ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, "contradict"),
    ({"rope_parameters": 3}, "rope_parameters is 3"),
    ({"model_type": "mistral"}, "'mistral'"),
]


@pytest.mark.parametrize("options, said", REFUSED, ids=str)
def test_options_that_are_refused(saved, options, said):
    folder, _ = saved
    edit(folder, **options)
    assert said in one_line(pytest.raises(InputError, LLaMA.from_pretrained, folder))


def test_the_options_left_out_are_those_of_the_first_llama():
    assert LLaMAConfig.from_published({"model_type": "llama"}) == SIZES["llama-7b"]
    published = LLAMA_CONFIG.to_published()
    assert not {"head_dim", "num_key_value_heads", "rope_scaling"} & published.keys()
    nulls = {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "rope_parameters": None}
    assert LLaMAConfig.from_published({**published, **nulls}) == LLAMA_CONFIG
    for kind in ({}, {"type": "default"}, {"rope_type": "default"}, {"rope_theta": 1e4}):
        assert LLaMAConfig.from_published({**published, "rope_parameters": kind}) == LLAMA_CONFIG
        assert LLaMAConfig.from_published({**published, "rope_scaling": kind}) == LLAMA_CONFIG
    for head_dim in (8, 10):
        config = LLaMAConfig.from_published({**published, "head_dim": head_dim})
        assert LLaMA(config, seed=None).blocks[0].attention.query.weight.shape == (3 * head_dim, 24)


# What is in the config.json of models that people load today, each with the number of its parameters.
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "transformers_version": "4.45.0",
}  # fmt: skip
TODAY = {
    "a LLaMA of 2023": (
        {"hidden_size": 4096, "intermediate_size": 11008, "max_sequence_length": 2048, "pad_token_id": 0,
         "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-6, "torch_dtype": "float16",
         "vocab_size": 32000}, 6_738_415_616),
    "TinyLlama 1.1B": (
        {"attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
         "max_position_embeddings": 2048, "num_hidden_layers": 22, "num_key_value_heads": 4,
         "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000}, 1_100_048_384),
    "Llama 3.2 1B": (
        {"attention_bias": False, "attention_dropout": 0.0, "head_dim": 64, "hidden_size": 2048,
         "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
         "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
         "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
         "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}},
        1_235_814_400),
    "SmolLM2 135M": (
        {"attention_bias": False, "attention_dropout": 0.0, "hidden_size": 576, "intermediate_size": 1536,
         "initializer_range": 0.041666666666666664, "is_llama_config": True,
         "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
         "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_interleaved": False,
         "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
         "transformers.js_config": {"dtype": "q4"}, "vocab_size": 49152}, 134_515_008),
    "of 16 times the context": (
        {"hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 16384,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
         "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100000, "vocab_size": 32256},
        6_740_512_768),
}  # fmt: skip


@pytest.mark.parametrize("name", TODAY)
def test_configs_of_today(name):
    options, count = TODAY[name]
    config = LLaMAConfig.from_published({**COMMON, **options})
    with nn.skeleton():
        assert LLaMA(config, seed=None).parameter_count() == count
    assert config.rope_theta == options.get("rope_theta", 1e4)
    assert LLaMAConfig.from_published({"model_type": "llama", **config.to_published()}) == config
