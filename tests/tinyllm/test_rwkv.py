"""RWKV: what is special to it; test_family.py has what it shares with the other causal models."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import tinyllm
from autograd import Tensor, nn, no_grad
from tinyllm.errors import InputError
from tinyllm.models import RWKV, RWKVConfig
from tinyllm.models.rwkv import SIZES

from .folders import edit, one_line, stored
from .tiny import RWKV_CONFIG, TINY, scramble, tokens


@pytest.fixture
def model():
    return TINY["rwkv"](0)


# The function that it computes


def plain_logits(model, ids):
    """Logits of one text (T,), by the equations, token by token, in NumPy alone."""
    c, w = model.config, {name: p.numpy().astype(np.float64) for name, p in model.named_parameters()}

    def norm(x, name, eps=c.layer_norm_epsilon):
        y = (x - x.mean()) / np.sqrt(x.var() + eps)
        return y * w[name + ".weight"] + w[name + ".bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    C, A = c.hidden_size, c.attention_hidden_size or c.hidden_size
    before = {
        (part, i): np.zeros(C) for part in ("time_mix", "channel_mix") for i in range(len(model.blocks))
    }
    sums = [(np.zeros(A), np.zeros(A)) for _ in model.blocks]
    logits = []
    for token in ids:
        x = norm(w["token_embedding.weight"][token], "embedding_norm")
        for i in range(len(model.blocks)):

            def read(part, kind, y, i=i):
                name = f"blocks.{i}.{part}"
                mu = w[f"{name}.time_mix_{kind}"]
                return w[f"{name}.{kind}.weight"] @ (mu * y + (1 - mu) * before[part, i])

            y = norm(x, f"blocks.{i}.norm_1")
            r, k, v = (read("time_mix", kind, y) for kind in ("receptance", "key", "value"))
            before["time_mix", i] = y
            decay, u = np.exp(w[f"blocks.{i}.time_mix.time_decay"]), w[f"blocks.{i}.time_mix.time_first"]
            a, b = sums[i]
            wkv = (a + np.exp(u + k) * v) / (b + np.exp(u + k))
            sums[i] = np.exp(-decay) * a + np.exp(k) * v, np.exp(-decay) * b + np.exp(k)
            x = x + w[f"blocks.{i}.time_mix.output.weight"] @ (sigmoid(r) * wkv)
            y = norm(x, f"blocks.{i}.norm_2")
            r, k = read("channel_mix", "receptance", y), read("channel_mix", "key", y)
            before["channel_mix", i] = y
            x = x + sigmoid(r) * (w[f"blocks.{i}.channel_mix.value.weight"] @ np.maximum(k, 0) ** 2)
        logits.append(w["output.weight"] @ norm(x, "norm", 1e-5))
    return np.array(logits)


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_it_is_the_equations(epsilon):
    """Without the halving; the last norm has an epsilon of its own."""
    model = scramble(RWKV(replace(RWKV_CONFIG, layer_norm_epsilon=epsilon, rescale_every=0)))
    (ids,) = tokens(model, 1, 40)
    np.testing.assert_allclose(model(ids[None]).numpy()[0], plain_logits(model, ids), rtol=0, atol=2e-5)


def test_parallel_and_recurrent_form_agree_over_a_long_text(model):
    """A thousand tokens at once, and one by one, far beyond context_length, to 1e-5 of the largest logit."""
    ids = tokens(model, 2, 1000)
    with no_grad():
        whole, state = model(ids).numpy(), model.new_cache(0)
        single = np.stack([model(ids[:, t : t + 1], state).numpy()[:, 0] for t in range(1000)], axis=1)
    largest = np.abs(whole).max()
    assert 1 < largest < 100
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-5 * largest)


def halves(model, ids):
    """The stream behind each block."""
    x, found = model.embedding_norm(model.token_embedding(ids)), []
    for block in model.blocks:
        x = block(x, None)
        found.append(x.numpy())
    return found


@pytest.mark.parametrize(
    "every, halvings", [(1, [1, 2, 3, 4, 5]), (2, [0, 1, 1, 2, 2]), (0, 5 * [0]), (-3, 5 * [0])]
)
def test_the_stream_is_halved_in_evaluation_only(every, halvings):
    """By exact powers of two, where the epsilon of the norms is too small to tell."""
    config = replace(RWKV_CONFIG, rescale_every=every, num_hidden_layers=5, layer_norm_epsilon=1e-30)
    model = scramble(RWKV(config))
    model.norm.eps = 1e-30
    ids = tokens(model, 2, 30)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    found, logits = halves(model, ids), model(ids).numpy()
    for x, y, n in zip(found, halves(model.train(), ids), halvings):
        assert np.array_equal(x * 2.0**n, y)
    assert np.array_equal(logits, model(ids).numpy())
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())


def test_the_token_before_the_first_is_zero(model):
    x = Tensor(np.random.default_rng(0).normal(0, 1, (2, 5, 24)).astype(np.float32))
    for mix in (model.blocks[0].time_mix, model.blocks[0].channel_mix):
        shifted = mix.shifted(x, None).numpy()
        assert np.array_equal(shifted[:, 1:], x.numpy()[:, :-1]) and (shifted[:, 0] == 0).all()


# Its state


def test_a_state_has_the_same_size_after_any_text(model):
    sizes = []
    with no_grad():
        for T in (1, 2, 50, 500):
            state = model.new_cache(T)
            model(tokens(model, 3, T), state)
            assert state.length == T
            sizes.append(state.nbytes)
        for _ in range(20):
            model(tokens(model, 3, 1), state)
            sizes.append(state.nbytes)
    # In float32, for 3 rows and 2 layers, two inputs of 24 channels and three numbers for each of 20.
    assert set(sizes) == {4 * 3 * 2 * (2 * 24 + 3 * 20)}


def test_a_state_holds_on_to_nothing_else(model):
    """Each array is one of its own: a view would keep the activations of a whole text."""
    with no_grad():
        state = model.new_cache(0)
        model(tokens(model, 2, 50), state)
    for name in [f"{part} {i}" for part in ("TimeMix", "ChannelMix", "WKV TimeMix") for i in range(2)]:
        for array in state.get(name):
            assert array.base is None and len(array) == 2, name


def test_a_state_keeps_no_graph(model):
    with pytest.raises(RuntimeError, match="no_grad"):
        model(tokens(model, 1, 3), model.new_cache(3))


def test_a_longer_text_than_any_it_was_trained_on(model):
    """context_length is what the file says of the training, not a limit."""
    model = scramble(RWKV(replace(RWKV_CONFIG, context_length=8)))
    prompt = tokens(model, 1, 30)
    found = model.generate(prompt, 20, temperature=0)
    assert found.shape == (1, 50)
    assert np.array_equal(found, model.generate(prompt, 20, temperature=0, use_cache=False))
    assert model.loss(prompt, prompt).item() > 0


# Its sizes and its first weights


@pytest.mark.parametrize(
    "name, count, printed",
    [
        ("rwkv-4-169m", 169_342_464, 1.693e8),
        ("rwkv-4-430m", 430_397_440, 4.304e8),
        ("rwkv-4-1b5", 1_515_106_304, 1.515e9),
        ("rwkv-4-3b", 2_984_627_200, 2.985e9),
        ("rwkv-4-7b", 7_392_649_216, 7.393e9),
        ("rwkv-4-14b", 14_148_597_760, 1.415e10),
    ],
)
def test_parameter_counts(name, count, printed):
    """As table 2 prints them, and as its formula 2 V D + 13 D^2 L + D (11 L + 4)."""
    config = SIZES[name]
    with nn.skeleton():
        assert RWKV(config, seed=None).parameter_count() == count
    V, D, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
    assert count == 2 * V * D + 13 * D**2 * L + D * (11 * L + 4)
    assert float(f"{count:.3e}") == printed
    assert SIZES.keys() == {"rwkv-4-" + size for size in "169m 430m 1b5 3b 7b 14b".split()}


def test_first_weights():
    config = RWKVConfig(100, 16, 32, 3, attention_hidden_size=16)
    model = RWKV(config, seed=0)
    state = model.state_dict()
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in state.values())
    for layer in range(3):
        name = f"blocks.{layer}."
        zero = [
            "time_mix.key",
            "time_mix.receptance",
            "time_mix.output",
            "channel_mix.receptance",
            "channel_mix.value",
        ]
        assert all((state[f"{name}{part}.weight"] == 0).all() for part in zero)
        value, key = state[name + "time_mix.value.weight"], state[name + "channel_mix.key.weight"]
        assert value.shape == (16, 32) and key.shape == (128, 32)
        np.testing.assert_allclose(value @ value.T, np.eye(16), atol=1e-5)
        np.testing.assert_allclose(key.T @ key, 4 * np.eye(32), atol=1e-5)
        decay, x = state[name + "time_mix.time_decay"], np.arange(32) / 32
        assert decay[0] == -5 and decay[-1] == 3 and (np.diff(decay) > 0).all()
        h, rest = 5, 1 - layer / 3
        assert decay[h] == pytest.approx(-5 + 8 * (h / 15) ** (0.7 + 1.3 * layer / 2), rel=1e-6)
        np.testing.assert_allclose(
            state[name + "time_mix.time_first"][:4], math.log(0.3) + np.array([0, 0.5, -0.5, 0]), rtol=1e-6
        )
        for part, expected in {
            "time_mix.time_mix_key": x**rest,
            "time_mix.time_mix_value": x**rest + 0.3 * layer / 2,
            "time_mix.time_mix_receptance": x ** (rest / 2),
            "channel_mix.time_mix_key": x**rest,
            "channel_mix.time_mix_receptance": x**rest,
        }.items():
            np.testing.assert_allclose(state[name + part], expected, rtol=1e-6, err_msg=part)
    output, embedding = state["output.weight"], state["token_embedding.weight"]
    np.testing.assert_allclose(output.T @ output, 0.25 * 100 / 32 * np.eye(32), atol=1e-5)
    assert 0.9e-4 < np.abs(embedding).max() <= 1e-4 and embedding.std() == pytest.approx(
        1e-4 / 3**0.5, rel=0.02
    )
    again, other = RWKV(config, seed=0).state_dict(), RWKV(config, seed=1).state_dict()
    assert all(np.array_equal(array, again[name]) for name, array in state.items())
    for name in ("token_embedding.weight", "output.weight", "blocks.1.time_mix.value.weight"):
        assert not np.array_equal(other[name], state[name])
    assert not np.array_equal(
        state["blocks.0.channel_mix.key.weight"], state["blocks.1.channel_mix.key.weight"]
    )


@pytest.mark.parametrize(
    "config", [RWKVConfig(5, 4, 1, 1), RWKVConfig(5, 4, 8, 1), RWKVConfig(3, 4, 8, 2)], ids=str
)
def test_first_weights_of_the_smallest_models(config):
    """One layer, one channel: no division by L - 1 = 0."""
    model = RWKV(config)
    assert all(np.isfinite(array).all() for array in model.state_dict().values())
    assert np.isfinite(model(np.array([[0, 2, 1]])).numpy()).all()


# Published folders


@pytest.fixture
def saved(tmp_path, model):
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_published_layout(saved):
    """Names and shapes as in the published files: the mixtures (1, 1, C), no prefix for the head alone."""
    folder, model = saved
    C, A, inner = 24, 20, 40
    block = {
        "ln1.weight": (C,), "ln1.bias": (C,), "ln2.weight": (C,), "ln2.bias": (C,),
        "attention.time_decay": (A,), "attention.time_first": (A,),
        "attention.time_mix_key": (1, 1, C), "attention.time_mix_value": (1, 1, C),
        "attention.time_mix_receptance": (1, 1, C),
        "attention.key.weight": (A, C), "attention.value.weight": (A, C),
        "attention.receptance.weight": (A, C), "attention.output.weight": (C, A),
        "feed_forward.time_mix_key": (1, 1, C), "feed_forward.time_mix_receptance": (1, 1, C),
        "feed_forward.key.weight": (inner, C), "feed_forward.receptance.weight": (C, C),
        "feed_forward.value.weight": (C, inner),
    }  # fmt: skip
    expected = {f"rwkv.blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"rwkv.blocks.0.pre_ln.weight": (C,), "rwkv.blocks.0.pre_ln.bias": (C,)}
    expected |= {"rwkv.embeddings.weight": (31, C), "head.weight": (31, C)}
    expected |= {"rwkv.ln_out.weight": (C,), "rwkv.ln_out.bias": (C,)}
    found = stored(folder)
    assert {name: array.shape for name, array in found.items()} == expected
    square = found["rwkv.blocks.1.feed_forward.receptance.weight"]  # whose shape does not tell the layout
    assert np.array_equal(square, model.blocks[1].channel_mix.receptance.weight.numpy())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "rwkv" and config["architectures"] == ["RwkvForCausalLM"]
    assert config["rescale_every"] == 1 and config["attention_hidden_size"] == 20


def test_what_a_config_leaves_out(saved):
    """No tie_word_embeddings means a head of its own; null and left out mean the same widths."""
    folder, _ = saved
    model = scramble(RWKV(RWKVConfig(31, 80, 24, 2)))
    model.save_pretrained(folder)
    ids = tokens(model, 1, 9)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["attention_hidden_size"] is None and config["intermediate_size"] is None
    for change in (
        dict.fromkeys(("tie_word_embeddings", "attention_hidden_size", "intermediate_size"), ...),
        {"attention_hidden_size": 24, "intermediate_size": 96, "tie_word_embeddings": False},
        {"rescale_every": ..., "layer_norm_epsilon": ..., "context_length": ..., "use_cache": True},
    ):
        edit(folder, **change)
        assert np.array_equal(tinyllm.from_pretrained(folder)(ids).numpy(), model(ids).numpy())


def test_a_tied_head(tmp_path):
    model = scramble(RWKV(replace(RWKV_CONFIG, tie_word_embeddings=True)))
    model.save_pretrained(tmp_path)
    weights = stored(tmp_path)
    assert "head.weight" not in weights and "output.weight" not in model.state_dict()
    ids = tokens(model, 2, 9)
    expected = model(ids).numpy()
    assert np.array_equal(tinyllm.from_pretrained(tmp_path)(ids).numpy(), expected)
    embedding = weights["rwkv.embeddings.weight"]
    save_file({**weights, "head.weight": embedding}, tmp_path / "model.safetensors")
    assert np.array_equal(tinyllm.from_pretrained(tmp_path)(ids).numpy(), expected)
    save_file({**weights, "head.weight": embedding + 1}, tmp_path / "model.safetensors")
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path))
    assert "head.weight" in message and "tie_word_embeddings" in message
    edit(tmp_path, tie_word_embeddings=False)
    assert np.abs(tinyllm.from_pretrained(tmp_path)(ids).numpy() - expected).max() > 1


def test_tensors_that_do_not_fit_are_named(saved):
    folder, _ = saved
    weights = stored(folder)
    mixture = "rwkv.blocks.1.feed_forward.time_mix_key"
    weights[mixture] = weights[mixture].reshape(24)
    weights["rwkv.blocks.1.attention.time_faaaa"] = weights.pop("rwkv.blocks.1.attention.time_first")
    save_file(weights, folder / "model.safetensors")
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))
    assert "1 missing (rwkv.blocks.1.attention.time_first)" in message
    assert "1 left over (rwkv.blocks.1.attention.time_faaaa)" in message
    assert f"1 misshapen ({mixture} found (24,) expected (1, 1, 24))" in message


BAD = {
    "vocab_size": [0, -1, 3.0, "3", True, None],
    "context_length": [0, "long"],
    "hidden_size": [0, 2.5],
    "num_hidden_layers": [0, -2, None],
    "attention_hidden_size": [0, -1, 1.5, "all"],
    "intermediate_size": [0, False],
    "rescale_every": [None, 2.0, "6", True],
    "layer_norm_epsilon": [0, -1e-5, math.inf, math.nan, "1e-5", True, None],
    "tie_word_embeddings": [1, None, "no"],
}


@pytest.mark.parametrize(
    "option, value", [(option, value) for option, values in BAD.items() for value in values]
)
def test_an_option_that_cannot_be(saved, option, value):
    with pytest.raises(InputError, match=f"^{option} is .* but must be ") as error:
        replace(RWKV_CONFIG, **{option: value})
    one_line(error)
    folder, _ = saved
    edit(folder, **{option: value})
    assert option in one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))


@pytest.mark.parametrize(
    "option",
    [{"time_mix_extra_dim": 32}, {"head_size": 64}, {"num_attention_heads": 4}, {"hidden_act": "gelu"}],
    ids=str,
)
def test_an_option_of_another_model_is_refused(saved, option):
    folder, _ = saved
    edit(folder, **option)
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))
    assert next(iter(option)) in message and "unknown" in message


def test_a_decay_of_any_size():
    """e^89 is more than float32 holds; a channel that forgets at once needs no such number."""
    model = TINY["rwkv"](0)
    for block in model.blocks:
        block.time_mix.time_decay.data[::3] = 89.0
    ids = tokens(model, 2, 9)
    cache = model.new_cache(9)
    with np.errstate(over="raise", invalid="raise"), no_grad():
        whole = model(ids).numpy()
        parts = np.concatenate([model(ids[:, :4], cache).numpy(), model(ids[:, 4:], cache).numpy()], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert all(np.isfinite(p.grad.data).all() for p in model.parameters())
