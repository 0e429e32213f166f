"""Mistral: the window, the cache that rolls, and what else differs from LLaMA."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autograd.functional as F
import tinyllm
from autograd import Tensor, nn, no_grad
from tinyllm.errors import InputError
from tinyllm.generation import KeyValueCache
from tinyllm.models import LLaMA, LLaMAConfig, Mistral, MistralConfig
from tinyllm.models.mistral import SIZES, RollingCache

from .folders import edit, one_line, stored
from .tiny import MISTRAL_CONFIG, scramble, tokens

LONG = replace(MISTRAL_CONFIG, max_position_embeddings=200)  # several blocks of 64 queries of the attention


# The window


@pytest.mark.parametrize("window", [1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_token_is_seen_from_its_window_and_no_further(both, window, layers):
    """By itself and window - 1 positions after it in one layer; each layer more carries it as far again."""
    config = replace(LONG, num_hidden_layers=layers, sliding_window=window)
    model = scramble(Mistral(config), dtype=np.float64)
    ids = tokens(model, 1, 200)
    before = model(ids).numpy()
    for j in (0, 63, 90):
        other = ids.copy()
        other[0, j] = (other[0, j] + 1) % model.vocabulary_size
        changed = (model(other).numpy() != before).any(axis=(0, 2))
        assert np.flatnonzero(changed).tolist() == list(range(j, min(j + layers * (window - 1) + 1, 200)))


@pytest.mark.parametrize("window", [None, 80, 1000])
def test_with_all_in_the_window_it_is_llama(both, window):
    model = scramble(Mistral(replace(MISTRAL_CONFIG, sliding_window=window)))
    options = {field.name: getattr(MISTRAL_CONFIG, field.name) for field in fields(LLaMAConfig)}
    llama = LLaMA(LLaMAConfig(**options)).eval()
    llama.load_state_dict(model.state_dict())
    ids = tokens(model, 2, 80)
    assert np.array_equal(model(ids).numpy(), llama(ids).numpy())
    narrow = Mistral(replace(MISTRAL_CONFIG, sliding_window=79)).eval()
    narrow.load_state_dict(model.state_dict())
    difference = np.abs(narrow(ids).numpy() - llama(ids).numpy()).max(axis=(0, 2))
    assert (difference[:79] == 0).all() and difference[79] > 1e-5


def test_a_window_is_as_good_at_any_place_of_the_text():
    """Only distances count: the last token's scores are those of the positions that reach it, read alone."""
    model = scramble(Mistral(LONG), dtype=np.float64)
    ids = tokens(model, 2, 200)
    reach = LONG.num_hidden_layers * (LONG.sliding_window - 1) + 1
    whole, end = model(ids).numpy()[:, -1], ids[:, -reach:]
    # The angles of far positions are rounded to float32, 200 * 6e-8.
    np.testing.assert_allclose(model(end).numpy()[:, -1], whole, rtol=0, atol=1e-4)
    assert np.abs(model(end[:, 1:]).numpy()[:, -1] - whole).max() > 1e-3


def test_training_drops_probabilities_inside_the_window():
    """Dropout and the window at once: who is in sight stays in sight, and nobody else comes into it."""
    config = replace(LONG, num_hidden_layers=1, attention_dropout=0.5)
    model = scramble(Mistral(config)).train()
    ids, changed = tokens(model, 1, 100), []
    for i in range(2):
        other = ids.copy()
        other[0, 70] = (other[0, 70] + i) % model.vocabulary_size
        F.manual_seed(0)
        changed.append(model(other).numpy())
    seen = np.flatnonzero((changed[0] != changed[1]).any(axis=(0, 2)))
    assert seen[0] == 70 and seen[-1] <= 76 and len(seen) > 1


# The cache


@st.composite
def histories(draw):
    """A window, and what happens to a cache of 3 rows: chunks of some length, or a choice of rows."""
    rows, steps = 3, []
    for chunk in draw(st.lists(st.sampled_from([None, 1, 1, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=12)):
        if chunk is None:
            chosen = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            rows = len(chosen)
        steps.append(chosen if chunk is None else chunk)
    return draw(st.integers(1, 6)), steps


@given(histories(), st.integers(0, 2**32))
def test_a_rolling_cache_shows_attention_what_it_would_see_of_everything(history, seed):
    window, steps = history
    rng = np.random.default_rng(seed)
    cache, layers = RollingCache(window), (0, 1)
    kept = {layer: np.zeros((2, 3, 2, 0, 4)) for layer in layers}  # all keys and all values of 3 rows
    for step in steps:
        if isinstance(step, list):
            cache.select(step)
            kept = {layer: pair[:, step] for layer, pair in kept.items()}
            continue
        B, seen = kept[0].shape[1], kept[0].shape[3]
        assert cache.length == seen
        for layer in layers:
            new, q = rng.normal(size=(2, B, 2, step, 4)), Tensor(rng.normal(size=(B, 6, step, 4)))
            kept[layer] = np.concatenate([kept[layer], new], axis=3)
            k, v = cache.extend(layer, *map(Tensor, new))
            assert k.shape == v.shape == (B, 2, min(seen, window - 1) + step, 4)
            found = F.attention(q, k, v, causal=True, window=window)
            expected = F.attention(q, *map(Tensor, kept[layer]), causal=True, window=window)
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-12)
        cache.advance(step)
        assert cache.nbytes == len(layers) * 2 * B * 2 * window * 4 * 8


def numbered(start, stop):
    """Keys (1, 1, T, 1) that are the numbers of their positions."""
    return Tensor(np.arange(start, stop, dtype=np.float32).reshape(1, 1, -1, 1))


def test_position_i_lies_in_slot_i_mod_window():
    cache = RollingCache(4)

    def extend(start, stop):
        k, v = cache.extend(0, numbered(start, stop), -numbered(start, stop))
        cache.advance(stop - start)
        assert np.array_equal(v.numpy(), -k.numpy())
        return k.numpy().ravel().tolist()

    assert extend(0, 1) == [0]
    assert extend(1, 2) == [0, 1]
    assert extend(2, 5) == [0, 1, 2, 3, 4]  # a chunk: in order, its own keys and the three before
    assert extend(5, 6) == [4, 5, 2, 3]
    assert extend(6, 8) == [3, 4, 5, 6, 7]
    assert extend(8, 9) == [8, 5, 6, 7]
    assert extend(9, 20) == [6, 7, 8, *range(9, 20)]  # longer than the window
    assert extend(20, 21) == [20, 17, 18, 19]


def test_a_step_copies_nothing_but_its_own_key():
    cache = RollingCache(4)
    with no_grad():
        held = None
        for i in range(10):
            k, v = cache.extend(0, numbered(i, i + 1), numbered(i, i + 1))
            cache.advance(1)
            assert not np.shares_memory(k.data, v.data)
            assert held is None or np.shares_memory(k.data, held)
            held = k.data


def test_a_rolling_cache_keeps_no_graph():
    k = Tensor(np.ones((1, 1, 2, 2)), requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no_grad\(\)"):
        RollingCache(4).extend(0, k, k)


@given(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_any_chunks_give_the_uncached_logits(window, chunks):
    model = scramble(Mistral(replace(LONG, sliding_window=window)))
    ids = tokens(model, 2, min(sum(chunks), 200))
    with no_grad():
        expected = model(ids).numpy()
        cache, found = model.new_cache(200), []
        for size in chunks:
            if cache.length < ids.shape[1]:
                found.append(model(ids[:, cache.length : cache.length + size], cache).numpy())
        np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-5)


def test_the_memory_stays_at_the_window():
    model = scramble(Mistral(LONG))
    full = scramble(Mistral(replace(LONG, sliding_window=None)))
    ids = tokens(model, 3, 200)
    sizes = []
    with no_grad():
        cache, everything = model.new_cache(200), full.new_cache(200)
        full(ids[:, :1], everything)
        for i in range(200):
            model(ids[:, i : i + 1], cache)
            sizes.append(cache.nbytes)
    one = 2 * LONG.num_hidden_layers * 3 * LONG.num_key_value_heads * LONG.head_dim * 4  # bytes a position
    assert set(sizes) == {one * LONG.sliding_window} and everything.nbytes == one * 200


def test_a_cache_rolls_only_where_it_has_to():
    model = Mistral(MISTRAL_CONFIG)
    assert type(model.new_cache(7)) is KeyValueCache and model.new_cache(7).capacity == 7
    assert type(model.new_cache(8)) is RollingCache and model.new_cache(8).capacity == 7
    assert type(Mistral(replace(MISTRAL_CONFIG, sliding_window=None)).new_cache(99)) is KeyValueCache


# The configuration and the published files


def test_the_options_left_out_are_those_of_the_type():
    config = MistralConfig.from_published({"model_type": "mistral"})
    assert config == MistralConfig()
    assert (config.sliding_window, config.key_value_heads, config.intermediate_size) == (4096, 8, 14336)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope_theta) == (131072, 1e-6, 1e4)
    assert not config.tie_word_embeddings and config.head_size == 128


@pytest.mark.parametrize(
    "options",
    [{"sliding_window": None}, {"sliding_window": 1}, {"num_key_value_heads": None}, {"head_dim": None}],
    ids=str,
)
def test_null_is_written_and_read_as_null(options, tmp_path):
    """A window left out of the file would be one of 4,096, and heads left out would be 8."""
    model = scramble(Mistral(replace(MISTRAL_CONFIG, **options)))
    model.save_pretrained(tmp_path)
    again = tinyllm.from_pretrained(tmp_path)
    assert type(again) is Mistral and again.config.sliding_window == model.config.sliding_window
    assert again.config.key_value_heads == model.config.key_value_heads
    ids = tokens(model, 2, 80)
    assert np.array_equal(again(ids).numpy(), model(ids).numpy())


@pytest.fixture
def saved(tmp_path):
    model = scramble(Mistral(MISTRAL_CONFIG))
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize(
    "options, said",
    [
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": -4096}, "sliding_window is -4096"),
        ({"sliding_window": 7.0}, "sliding_window is 7.0"),
        ({"sliding_window": True}, "sliding_window is True"),
        ({"sliding_window": [7]}, "sliding_window is [7]"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"use_sliding_window": False}, "use_sliding_window"),
        ({"max_window_layers": 1}, "max_window_layers"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 4}, "4 heads of keys and values do not divide 6"),
        ({"model_type": "mixtral"}, "'mixtral'"),
    ],
    ids=str,
)
def test_options_that_are_refused(saved, options, said):
    folder, _ = saved
    edit(folder, **options)
    for load in (Mistral.from_pretrained, tinyllm.from_pretrained):
        assert said in one_line(pytest.raises(InputError, load, folder))


def test_a_llama_is_no_mistral(saved):
    """The tensors are the same, so only the type in config.json tells them apart."""
    folder, _ = saved
    message = one_line(pytest.raises(InputError, LLaMA.from_pretrained, folder))
    assert "'mistral'" in message and "'llama'" in message
    edit(folder, model_type="llama")
    assert "sliding_window" in one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))


def test_the_published_layout(saved):
    folder, _ = saved
    C, inner, q, kv = 24, 40, 6 * 6, 3 * 6
    block = {
        "input_layernorm": (C,), "post_attention_layernorm": (C,),
        "self_attn.q_proj": (q, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C),
        "self_attn.o_proj": (C, q),
        "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C), "mlp.down_proj": (C, inner),
    }  # fmt: skip
    expected = {"model.embed_tokens.weight": (31, C), "model.norm.weight": (C,), "lm_head.weight": (31, C)}
    expected |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in block.items()}
    assert {name: array.shape for name, array in stored(folder).items()} == expected
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MistralForCausalLM"] and config["model_type"] == "mistral"
    assert config["sliding_window"] == 7 and config["num_key_value_heads"] == 3 and config["head_dim"] == 6


# Table 1 of the paper says what the config says; the counts are those of the published files.
@pytest.mark.parametrize("name, count", [("mistral-7b", 7_241_732_096), ("mistral-7b-v0.3", 7_248_023_552)])
def test_published_sizes(name, count):
    with nn.skeleton():
        model = Mistral(SIZES[name], seed=None)
    assert model.parameter_count() == count


def test_mistral_7b_is_table_1():
    config = SIZES["mistral-7b"]
    found = (config.hidden_size, config.num_hidden_layers, config.head_size, config.intermediate_size)
    assert found == (4096, 32, 128, 14336)
    found = (config.num_attention_heads, config.key_value_heads, config.sliding_window, config.vocab_size)
    assert found == (32, 8, 4096, 32000)
