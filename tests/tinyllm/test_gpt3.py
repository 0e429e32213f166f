"""GPT-3: what it changes of GPT-2, the band of every second layer, and the paper's numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

import autograd.functional as F
import tinyllm
from autograd import Tensor, no_grad
from autograd import nn as layers
from tinyllm.errors import InputError
from tinyllm.models import GPT2, GPT3, GPT2Config, GPT3Config
from tinyllm.models.gpt3 import SIZES, batch_tokens, learning_rate
from tinyllm.training import Recipe

from .tiny import scramble

# Longer than one block of 64 queries of the fused attention, and a band far below that.
CONFIG = GPT3Config(31, 80, 24, 4, 3, window_size=5)
SHORT = replace(CONFIG, vocab_size=11, n_positions=10, n_embd=6, n_layer=2)


def model_of(config=CONFIG, dtype=np.float32):
    return scramble(GPT3(config, seed=0), dtype=dtype)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 31, shape)


def silence(model, *layers_):
    """Let the attention of these layers add nothing to the stream."""
    for i in layers_:
        for parameter in model.blocks[i].attention.projection.parameters():
            parameter.data = np.zeros_like(parameter.data)
    return model


# The band


def seen_by_last(function, T):
    """Which of T tokens change what the function of ids (B, T) gives at the last one: (T,)."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.integers(0, 31, (1, T)), T + 1, axis=0)
    x[np.arange(T) + 1, np.arange(T)] += 7
    with no_grad():
        out = function(x % 31).numpy()[:, -1]
    return (np.abs(out[1:] - out[0]) > 1e-6).any(axis=1)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 79, 80, 200])
def test_every_second_layer_sees_its_band(both, window):
    model = model_of(replace(CONFIG, window_size=window))
    for layer, block in enumerate(model.blocks):
        seen = seen_by_last(lambda x, block=block: block.attention(model.token_embedding(x), None), 80)
        assert np.array_equal(seen, np.arange(80) >= 80 - (window if layer in (1, 3) else 80)), layer


def test_bands_pass_on_what_they_saw(both):
    """Two banded layers of 5 reach 9 positions, and one dense layer before or after them all."""
    for silent, reach in {(0, 2): 9, (0,): 30, (2,): 30, (0, 2, 3): 5, (0, 1, 2): 5}.items():
        model = silence(model_of(), *silent)
        seen = seen_by_last(model, 30)
        assert np.array_equal(seen, np.arange(30) >= 30 - reach), silent


def test_the_whole_model_in_numpy(both):
    """With the masks written out, so that scores in the band are those of dense attention."""
    model, ids = model_of(dtype=np.float64), tokens(2, 80)
    w = {name: p.numpy() for name, p in model.named_parameters()}
    linear = lambda x, name: x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w[name + ".weight"] + w[name + ".bias"]

    behind = np.arange(80)[:, None] - np.arange(80)
    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"]
    for i in range(4):
        name = f"blocks.{i}"
        qkv = linear(norm(x, name + ".norm_1"), name + ".attention.query_key_value")
        q, k, v = qkv.reshape(2, 80, 3, 3, 8).transpose(2, 0, 3, 1, 4)  # (B, H, T, d)
        hidden = (behind < 0) | (behind >= (5 if i in (1, 3) else 80))
        p = np.exp(np.where(hidden, -math.inf, q @ k.swapaxes(-1, -2) / math.sqrt(8)))
        out = (p / p.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(2, 80, 24)
        x = x + linear(out, name + ".attention.projection")
        h = linear(norm(x, name + ".norm_2"), name + ".mlp.expand")
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, name + ".mlp.projection")
    with no_grad():
        found = model(ids).numpy()
    np.testing.assert_allclose(found, norm(x, "norm") @ w["token_embedding.weight"].T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [80, 1000])
def test_a_band_as_wide_as_the_context_is_gpt2(window):
    gpt3, ids = model_of(replace(CONFIG, window_size=window)), tokens(3, 80)
    gpt2 = GPT2(GPT2Config(31, 80, 24, 4, 3), seed=None).eval()
    gpt2.load_state_dict(gpt3.state_dict())
    with no_grad():
        np.testing.assert_allclose(gpt3(ids).numpy(), gpt2(ids).numpy(), rtol=0, atol=1e-5)
        narrow = model_of()
        narrow.load_state_dict(gpt3.state_dict())
        assert np.abs(narrow(ids).numpy()[:, 5:] - gpt2(ids).numpy()[:, 5:]).max() > 0.1


@pytest.mark.parametrize("parts", [[1] * 80, [7, 1, 3, 1, 20, 1, 1, 46], [4, 76]], ids=len)
@pytest.mark.parametrize("window", [1, 5, 70])
def test_a_cache_changes_nothing(both, window, parts):
    """Reading in parts shorter and longer than the band, and past it."""
    model, ids = model_of(replace(CONFIG, window_size=window)), tokens(2, 80)
    cache, found, start = model.new_cache(80), [], 0
    with no_grad():
        for length in parts:
            found.append(model(ids[:, start : start + length], cache).numpy())
            start += length
        expected = model(ids).numpy()
    assert start == 80
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-5)


def test_generation_past_the_band_and_the_context():
    model = model_of()
    prompts = [tokens(3)[:3].tolist(), tokens(17).tolist()]
    settings = {"temperature": 0.7, "seed": 3}
    found = model.generate(prompts, 70, **settings)
    assert np.array_equal(found, model.generate(prompts, 70, use_cache=False, **settings))
    beams = model.beam_search(prompts[1], 8)
    assert len(beams) == 4 and len(beams[0].tokens) == 8


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_of_fused_and_composed_attention(p):
    """Through bands that begin inside a block of queries, with dropout of the probabilities."""
    config = replace(CONFIG, attn_pdrop=p, resid_pdrop=p)
    ids, targets = tokens(2, 80), tokens(2, 80, seed=1)
    found = {}
    for fused in (True, False):
        F.use_fused(fused)
        try:
            model = model_of(config, np.float64).train()
            F.manual_seed(4)
            model.loss(ids, targets).backward()
        finally:
            F.use_fused(True)
        found[fused] = {name: q.grad.numpy() for name, q in model.named_parameters()}
    for name, g in found[True].items():
        assert g.any(), name
        np.testing.assert_allclose(g, found[False][name], rtol=0, atol=1e-12, err_msg=name)


def test_no_dropout_by_default():
    model, ids = model_of().train(), tokens(2, 20)
    assert np.array_equal(model(ids).numpy(), model(ids).numpy())


def test_the_first_weights_are_those_of_gpt2():
    ours, theirs = GPT3(SHORT, seed=3), GPT2(GPT2Config(11, 10, 6, 2, 3), seed=3)
    assert all(np.array_equal(array, theirs.state_dict()[name]) for name, array in ours.state_dict().items())


# Against the open model after the same description


def gpt_neo(model):
    """transformers' GPT-Neo with the weights of ours, which must have no biases of q, k and v.

    It does not divide scores by sqrt(d), and holds q, k and v apart; dense layers are "global" there, banded
    ones "local".
    """
    torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra: pip install -e '.[reference]'"
    )
    c = model.config
    config = transformers.GPTNeoConfig(
        vocab_size=c.vocab_size, max_position_embeddings=c.n_positions, hidden_size=c.n_embd,
        num_layers=c.n_layer, num_heads=c.n_head, window_size=c.window_size, bos_token_id=None,
        attention_types=[[["global", "local"], c.n_layer // 2]], eos_token_id=None,
    )  # fmt: skip
    state = {}
    for name, parameter in model.named_parameters():
        array, name = torch.from_numpy(parameter.numpy()), model.published_name(name)
        if name.endswith("c_attn.weight"):
            q, k, v = array.chunk(3)
            parts = {"q": q / math.sqrt(c.n_embd / c.n_head), "k": k, "v": v}
            state |= {name.replace("c_attn", f"attention.{x}_proj"): part for x, part in parts.items()}
        elif not name.endswith("c_attn.bias"):
            state[name.replace("attn.c_proj", "attn.attention.out_proj")] = array
    theirs = transformers.GPTNeoForCausalLM(config).eval()
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    return lambda ids: theirs(torch.from_numpy(ids)).logits.detach().numpy()


@pytest.mark.parametrize("window", [1, 5, 70])
def test_logits_of_gpt_neo(window):
    model, ids = model_of(replace(CONFIG, window_size=window)), tokens(3, 80)
    for block in model.blocks:
        block.attention.query_key_value.bias.data[...] = 0
    expected = gpt_neo(model)(ids)
    with no_grad():
        found = model(ids).numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


# Folders


def test_a_folder_of_our_own_kind(tmp_path):
    """GPT-2's tensors under GPT-2's names; the type, and the band, in the config."""
    model, ids = model_of(), tokens(2, 80)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt3" and config["window_size"] == 5 and config["n_positions"] == 80
    assert config["architectures"] == ["GPT3"]
    for loaded in (GPT3.from_pretrained(tmp_path), tinyllm.from_pretrained(tmp_path)):
        assert type(loaded) is GPT3 and loaded.config == model.config
        with no_grad():
            assert np.array_equal(loaded(ids).numpy(), model(ids).numpy())
    gpt2 = GPT2(GPT2Config(31, 80, 24, 4, 3), seed=None)
    gpt2.load_state_dict(model.state_dict())
    gpt2.save_pretrained(tmp_path / "gpt2")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "gpt2"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(array, theirs[name]) for name, array in ours.items())


def test_neither_reads_the_other(tmp_path):
    model_of().save_pretrained(tmp_path / "3")
    GPT2(GPT2Config(11, 10, 6, 2, 3)).save_pretrained(tmp_path / "2")
    with pytest.raises(InputError, match="'gpt3', not 'gpt2'"):
        GPT2.from_pretrained(tmp_path / "3")
    with pytest.raises(InputError, match="'gpt2', not 'gpt3'"):
        GPT3.from_pretrained(tmp_path / "2")
    with pytest.raises(InputError, match="window_size"):  # GPT-2 knows no band
        GPT2Config.from_published({**CONFIG.to_published(), "model_type": "gpt2"})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"window_size": 0}, "window_size is 0"), ({"window_size": -5}, "window_size is -5"),
        ({"window_size": 5.0}, "window_size is 5.0"), ({"window_size": None}, "window_size is None"),
        ({"window_size": True}, "window_size is True"), ({"window_size": "5"}, "window_size is '5'"),
        ({"n_head": 5}, "5 heads do not divide the width 24"), ({"n_layer": 0}, "n_layer is 0"),
        ({"attention_types": [[["global"], 4]]}, "attention_types"), ({"n_ctx": 1024}, "n_ctx"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_refused(tmp_path, options, said):
    model_of().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | options
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=said) as error:
        tinyllm.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_the_options_left_out_are_those_of_the_smallest_model():
    config = GPT3Config.from_published({"model_type": "gpt3", "window_size": 7})
    assert config == replace(SIZES["gpt3-small"], window_size=7) == GPT3Config(window_size=7)
    assert (config.n_positions, GPT3Config().window_size, config.vocab_size) == (2048, 256, 50257)
    with pytest.raises(InputError, match="window_size"):  # a GPT-2 whose type has one letter wrong
        GPT3Config.from_published({"model_type": "gpt3"})


# The paper's numbers

PRINTED = {  # table 2.1: parameters, layers, width, heads, width of a head; table D.1: millions of parameters
    "gpt3-small": (125e6, 12, 768, 12, 64, 125),
    "gpt3-medium": (350e6, 24, 1024, 16, 64, 356),
    "gpt3-large": (760e6, 24, 1536, 16, 96, 760),
    "gpt3-xl": (1.3e9, 24, 2048, 24, 128, 1_320),
    "gpt3-2.7b": (2.7e9, 32, 2560, 32, 80, 2_650),
    "gpt3-6.7b": (6.7e9, 32, 4096, 32, 128, 6_660),
    "gpt3-13b": (13.0e9, 40, 5140, 40, 128, 12_850),
    "gpt3-175b": (175.0e9, 96, 12288, 96, 128, 174_600),
}
COUNTS = {
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
}


def rounds_to(count, millions):
    """Whether a count, rounded to the digits printed, is that many millions."""
    digits = len(str(millions).rstrip("0"))
    return float(f"{count / 1e6:.{max(digits, 3) - 1}e}") == millions


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(monkeypatch, name):
    """On arrays that are one zero, seen from everywhere."""
    zero = lambda *shape: layers.Parameter(np.broadcast_to(np.float32(0), shape))
    monkeypatch.setattr(layers, "zeros", zero)
    count = GPT3(SIZES[name], seed=None).parameter_count()
    assert count == COUNTS[name]
    printed, depth, width, heads, head, millions = PRINTED[name]
    assert abs(count / printed - 1) < 0.02 and rounds_to(count, millions)
    config = SIZES[name]
    assert config.n_layer == depth and config.n_positions == 2048
    assert config.n_embd / config.n_head == head  # which is what the two misprints come down to
    assert (config.n_embd == width) == (name != "gpt3-13b")
    assert (config.n_head == heads) == (name != "gpt3-xl")


def test_the_two_rows_that_cannot_be():
    """As printed they would have other counts than table D.1: one row is wider, one has more heads."""
    wider = 52_305 * 5140 + 40 * (12 * 5140**2 + 13 * 5140) + 2 * 5140
    assert not rounds_to(wider, PRINTED["gpt3-13b"][-1]) and 40 * 128 == 5120
    more_heads = COUNTS["gpt3-xl"] + 24 * (4 * 2048 + 3) * (24 * 128 - 2048)
    assert not rounds_to(more_heads, PRINTED["gpt3-xl"][-1]) and 16 * 128 == 2048
    with pytest.raises(InputError, match="24 heads do not divide the width 2048"):
        GPT3Config(n_embd=2048, n_head=24)


def test_learning_rate():
    """Appendix B: up over 375 million tokens, down to a tenth over 260 billion, then on at that."""
    assert learning_rate(0, 6e-4) < 1e-9
    assert learning_rate(187_500_000, 6e-4) == pytest.approx(3e-4, rel=1e-6)
    assert learning_rate(375_000_000, 6e-4) == pytest.approx(6e-4, rel=1e-6)
    half = (375e6 + 260e9) / 2
    assert learning_rate(round(half), 6e-4) == pytest.approx(0.55 * 6e-4, rel=1e-6)
    for seen in (260e9, 299e9):
        assert learning_rate(int(seen), 6e-4) == pytest.approx(6e-5, rel=1e-6)
    rates = [learning_rate(int(seen), 1.0) for seen in np.linspace(375e6, 260e9, 50)]
    assert all(np.diff(rates) < 0)


def test_the_recipe_in_steps_gives_the_same_rates():
    batch, peak = 1000, 2e-3
    recipe = Recipe(steps=400, warmup=40, lr=peak)
    for step in range(400):
        ours = learning_rate(step * batch, peak, warmup=40 * batch, total=400 * batch)
        # The recipe's first step has the rate of the warm-up's first step, not 0: one step ahead.
        ahead = peak / 40 if step < 40 else 0
        assert recipe.learning_rate(step) == pytest.approx(ours + ahead, rel=1e-3, abs=1e-6)
    assert recipe.betas == (0.9, 0.95) and recipe.clip == 1.0 and recipe.weight_decay == 0.1


def test_batch_ramp():
    full, ramp = 3_200_000, 12e9
    assert batch_tokens(0, full, ramp) == 32_768
    assert batch_tokens(6_000_000_000, full, ramp) == (full + 32_768) // 2
    assert batch_tokens(12_000_000_000, full, ramp) == batch_tokens(10**12, full, ramp) == full
    sizes = [batch_tokens(seen, full, ramp) for seen in range(0, 12_000_000_000, 10**8)]
    assert np.ptp(np.diff(sizes)) <= 1  # a line
    assert batch_tokens(50, 80, 100, first=20) == 50 and type(batch_tokens(1, 7, 3.5)) is int


def test_ids_as_tensors_and_lists():
    model = model_of()
    assert np.array_equal(model([[1, 2]]).numpy(), model(Tensor(np.array([[1, 2]]))).numpy())
