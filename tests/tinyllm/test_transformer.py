"""The Transformer: its function, its files, its translations, and what all models here must hold."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

import autograd.functional as F
import tinyllm
from autograd import Tensor, backend, gradcheck, nn, no_grad, optim
from tinyllm.datasets import padded
from tinyllm.errors import InputError
from tinyllm.models import Transformer, TransformerConfig
from tinyllm.models.transformer import SIZES, learning_rate, positions
from tinyllm.parallel import DataParallel

from .folders import assert_identical, edit, one_line, stored
from .tiny import scramble

# A context longer than one block of 64 queries of the fused attention; heads that are not d.
# The sides differ in all that they can.
SHARED = TransformerConfig(
    31, 24, 2, 3, 3, 4, 40, 36, dropout=0.0, max_position_embeddings=80,
    eos_token_id=2, pad_token_id=30, decoder_start_token_id=29,
)  # fmt: skip
SWISH = replace(SHARED, activation_function="swish", scale_embedding=False)
APART = replace(
    SHARED, share_encoder_decoder_embeddings=False, decoder_vocab_size=23, pad_token_id=22,
    decoder_start_token_id=21,
)  # fmt: skip
UNTIED = replace(APART, tie_word_embeddings=False)
CONFIGS = {"shared": SHARED, "swish": SWISH, "apart": APART, "untied": UNTIED}
LENGTHS = np.array([70, 1, 33])  # of sources


def scrambled(config=SHARED, seed=0, dtype=np.float32):
    return scramble(Transformer(config, seed), seed, dtype)


@pytest.fixture(params=CONFIGS)
def model(request):
    return scrambled(CONFIGS[request.param])


def source(model, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape)


def target(model, *shape, seed=1):
    return np.random.default_rng(seed).integers(0, model.config.target_vocabulary, shape)


def ragged(model, lengths=(9, 1, 14, 9, 4)):
    """Sources of different lengths."""
    return [source(model, n, seed=n).tolist() for n in lengths]


def batch(model, S=14, T=11, seed=0):
    """Inputs and targets of a step, with padding on both sides."""
    ids, tokens = source(model, 4, S, seed=seed), target(model, 4, T + 1, seed=seed + 1)
    targets = tokens[:, 1:].copy()
    targets[0, T // 2 :] = targets[2, 3:] = -100
    return (ids, np.array([S, S // 2, S, 1]), tokens[:, :-1]), targets


# The function that it computes


def in_numpy(model, ids, lengths, decoder_ids):
    """The paper's sections 3.1 to 3.5 in float64, each source by itself without padding: logits (B, T, V)."""
    w = {name: p.numpy().astype(np.float64) for name, p in model.named_parameters()}
    c = model.config

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return y * w[name + ".weight"] + w[name + ".bias"]

    def attention(x, memory, name, heads, causal=False):
        q, k, v = (linear(a, f"{name}.{n}") for a, n in ((x, "query"), (memory, "key"), (memory, "value")))
        out, d = np.zeros_like(q), c.d_model // heads
        for h in range(heads):
            part = slice(h * d, h * d + d)
            s = q[:, part] @ k[:, part].T / np.sqrt(d)
            if causal:
                s[np.triu_indices(len(x), 1)] = -np.inf
            p = np.exp(s - s.max(-1, keepdims=True))
            out[:, part] = p / p.sum(-1, keepdims=True) @ v[:, part]
        return linear(out, name + ".projection")

    def feed_forward(x, name):
        x = linear(x, name + ".expand")
        x = np.maximum(x, 0) if c.activation_function == "relu" else x / (1 + np.exp(-x))
        return linear(x, name + ".projection")

    def embedded(ids, table):
        t, i = np.arange(len(ids))[:, None], np.arange(c.d_model // 2)
        angles = t / 10000 ** (2 * i / c.d_model)
        scale = np.sqrt(c.d_model) if c.scale_embedding else 1
        return w[table][ids] * scale + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    shared = c.share_encoder_decoder_embeddings
    of_target = "source_embedding.weight" if shared else "target_embedding.weight"
    head = w[of_target if c.tie_word_embeddings else "output.weight"]
    rows = []
    for row, length, decoder_row in zip(ids, lengths, decoder_ids):
        x = embedded(row[:length], "source_embedding.weight")
        for i in range(c.encoder_layers):
            layer = f"encoder.{i}."
            heads = c.encoder_attention_heads
            x = norm(x + attention(x, x, layer + "attention", heads), layer + "attention_norm")
            x = norm(x + feed_forward(x, layer + "feed_forward"), layer + "feed_forward_norm")
        y = embedded(decoder_row, of_target)
        for i in range(c.decoder_layers):
            layer = f"decoder.{i}."
            heads = c.decoder_attention_heads
            y = norm(y + attention(y, y, layer + "attention", heads, True), layer + "attention_norm")
            read = attention(y, x, layer + "cross_attention", heads)
            y = norm(y + read, layer + "cross_attention_norm")
            y = norm(y + feed_forward(y, layer + "feed_forward"), layer + "feed_forward_norm")
        rows.append(y @ head.T + w["logits_bias"])
    return np.stack(rows)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-4), (np.float64, 1e-11)])
def test_the_formula(both, model, dtype, tolerance):
    model.to(dtype=dtype)
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 80)
    expected = in_numpy(model, ids, LENGTHS, decoder_ids)
    for padding in (LENGTHS, (np.arange(70) < LENGTHS[:, None]).astype(np.int64)):
        found = model(ids, decoder_ids, padding).numpy()
        assert found.dtype == dtype and found.shape == (3, 80, model.config.target_vocabulary)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("width", [6, 7])
def test_positions(width):
    """One by one: column i of the sines and of the cosines turns with 10000^(-2 i / width)."""
    like, half = np.zeros(1), (width + 1) // 2
    table = positions(3, 5, width, like)
    assert table.shape == (5, width) and table.dtype == np.float64
    for row, t in zip(table, range(3, 8)):
        for column, value in enumerate(row):
            i = column % half
            function = np.sin if column < half else np.cos
            assert value == pytest.approx(function(t / 10000 ** (2 * i / width)), abs=1e-14)
    assert positions(0, 2, width, like.astype(np.float32)).dtype == np.float32
    # Far out, rounded once: float32 angles would be wrong by 1e-4 there.
    far = positions(5000, 1, width, like.astype(np.float32))
    np.testing.assert_allclose(far, positions(5000, 1, width, like), rtol=0, atol=1e-7)


def test_nothing_leaks_from_the_future(both, model):
    model.to(dtype=np.float64)
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 80)
    before = model(ids, decoder_ids, LENGTHS).numpy()
    for changed in (1, 40, 79):
        other = decoder_ids.copy()
        other[:, changed:] = (other[:, changed:] + 5) % model.config.target_vocabulary
        difference = np.abs(model(ids, other, LENGTHS).numpy() - before).max(axis=(0, 2))  # (T,)
        assert (difference[:changed] < 1e-12).all() and (difference[changed:] > 1e-4).all()


def test_nothing_leaks_from_padding(both, model):
    """Whatever stands there, and however much of it: not even a number that is none."""
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 20)
    before = model(ids, decoder_ids, LENGTHS).numpy()
    other = np.where(np.arange(70) < LENGTHS[:, None], ids, (ids + 7) % model.config.vocab_size)
    longer = np.concatenate([other, source(model, 3, 10, seed=5)], axis=1)
    for changed in (other, longer):
        np.testing.assert_allclose(
            model(changed, decoder_ids, LENGTHS).numpy(), before, rtol=0, atol=1e-6 * np.abs(before).max()
        )
    for row, n in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :n], decoder_ids[row : row + 1]).numpy()
        np.testing.assert_allclose(alone[0], before[row], rtol=0, atol=1e-5)


def test_every_source_token_and_its_place_matter(both, model):
    """To every position of the target; the last token of a source too, and the order."""
    ids, decoder_ids = source(model, 1, 10), target(model, 1, 6)
    before = model(ids, decoder_ids, [9]).numpy()
    others = [np.concatenate([ids[:, 8::-1], ids[:, 9:]], axis=1)]
    for i in range(10):
        others.append(ids.copy())
        others[-1][0, i] = (ids[0, i] + 1) % model.config.vocab_size
    effects = [np.abs(model(other, decoder_ids, [9]).numpy() - before).max(axis=-1) for other in others]
    assert np.min(effects[:-1]) > 1e-4 and np.max(effects[-1]) < 1e-6  # the tenth is padding


def test_rows_do_not_meet(both, model):
    ids, decoder_ids = source(model, 3, 20), target(model, 3, 9)
    together = model(ids, decoder_ids).numpy()
    for row in range(3):
        alone = model(ids[row : row + 1], decoder_ids[row : row + 1]).numpy()[0]
        np.testing.assert_allclose(alone, together[row], rtol=0, atol=1e-5)


def test_halves_of_forward(model):
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 9)
    hidden = model.hidden_states(ids, decoder_ids, LENGTHS)
    logits = model(ids, decoder_ids, LENGTHS).numpy()
    assert np.array_equal(model.head(hidden).numpy(), logits)
    again = model.decode(decoder_ids, model.encode(ids, LENGTHS), LENGTHS)
    assert np.array_equal(again.numpy(), hidden.numpy())


def test_the_attention_maps(both):
    """They are those of the forward pass: memory summed with these weights gives what the layer reads."""
    model = scrambled()
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 9)
    maps = model.cross_attention_weights(ids, decoder_ids, LENGTHS)
    assert [m.shape for m in maps] == [(3, 4, 9, 70)] * 3
    memory = model.encode(ids, LENGTHS)
    y = model.dropout(model.target_embedding(decoder_ids)) * np.sqrt(24).astype(np.float32)
    y = y + Tensor(positions(0, 9, 24, y.data))
    for layer, found in zip(model.decoder, maps):
        found = found.numpy()
        np.testing.assert_allclose(found.sum(-1), 1, rtol=0, atol=1e-6)
        assert (found[1, :, :, 1:] == 0).all() and (found[2, :, :, 33:] == 0).all()
        cross, asks = layer.cross_attention, layer.among_targets(y)
        v = cross.value(memory).numpy().reshape(3, 70, 4, 6).transpose(0, 2, 1, 3)
        read = (found @ v).transpose(0, 2, 1, 3).reshape(3, 9, 24)
        expected = cross(asks, memory, LENGTHS).numpy()
        np.testing.assert_allclose(cross.projection(Tensor(read)).numpy(), expected, rtol=0, atol=1e-4)
        y = layer(y, memory, LENGTHS)


# The loss and its gradients


def log_softmax(logits):
    z = logits.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_loss(both, model, smoothing):
    """Cross-entropy with (1 - s) at the target and s spread over all tokens in training, plain otherwise."""
    model.label_smoothing = smoothing
    (ids, lengths, decoder_ids), targets = batch(model)
    log_p, kept = log_softmax(model(ids, decoder_ids, lengths).numpy()), targets != -100
    plain = -log_p[kept, targets[kept]]
    smooth = (1 - smoothing) * plain - smoothing * log_p[kept].mean(-1)
    for training, expected in ((True, smooth), (False, plain)):
        model.train(training)
        for reduction, value in (("mean", expected.mean()), ("sum", expected.sum())):
            loss = model.loss((ids, lengths, decoder_ids), targets, reduction)
            assert loss.item() == pytest.approx(value, rel=1e-5)
    assert Transformer(SHARED).label_smoothing == 0.1  # section 5.4


def gradients(model):
    """Of every parameter, from a loss that sees every token on either side."""
    c, B, L = model.config, 6, 12
    ids = np.resize(np.arange(c.vocab_size), (B, L))
    tokens = np.resize(np.arange(c.target_vocabulary), (B, L))
    model.train().loss((ids, np.array([12, 9, 12, 12, 12, 10]), tokens), tokens[:, ::-1]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_gets_a_gradient(both, model):
    for name, g in gradients(model).items():
        parameter, g = model.state_dict()[name], g.numpy()
        assert g.shape == parameter.shape and g.dtype == np.float32, name
        if name.endswith("attention.key.bias"):  # the same for all scores of a query: softmax takes it away
            assert np.abs(g).max() < 1e-6
        else:  # a rectifier that is off for all tokens has none
            rectified = "feed_forward" in name and model.config.activation_function == "relu"
            assert np.isfinite(g).all() and (g == 0).mean() < (0.5 if rectified else 1e-3), name


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_derivatives(both, shared):
    """With label smoothing, padding, the same elements dropped each time, and no kinks of a rectifier."""
    config = TransformerConfig(
        9, 8, 1, 2, 2, 4, 10, 12, 0.2, 0.2, 0.2, "swish", share_encoder_decoder_embeddings=shared,
        tie_word_embeddings=shared,
    )  # fmt: skip
    model = scrambled(config).to(dtype=np.float64).train()
    inputs, targets = batch(model, S=6, T=5)
    parameters = model.parameters()

    def loss(*values):
        F.manual_seed(3)
        before = [parameter.data for parameter in parameters]
        for parameter, value in zip(parameters, values):
            parameter.data = value.data
        try:
            return model.loss(inputs, targets)
        finally:
            for parameter, data in zip(parameters, before):
                parameter.data = data

    assert gradcheck(loss, parameters, projections=1)


def test_float64_is_the_same_function_without_a_float32_in_it(both, model):
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 80)
    single = model(ids, decoder_ids, LENGTHS).numpy()
    double = model.to(dtype=np.float64)(ids, decoder_ids, LENGTHS).numpy()
    assert single.dtype == np.float32 and double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-4)
    F.use_fused(both == "composed")
    np.testing.assert_allclose(model(ids, decoder_ids, LENGTHS).numpy(), double, rtol=0, atol=1e-11)
    loss = model.train().loss(*batch(model))
    loss.backward()
    assert loss.dtype == np.float64
    assert all(parameter.grad.dtype == np.float64 for parameter in model.parameters())


def train(model, steps=20):
    model.train()
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=3e-3, betas=(0.9, 0.98))
    losses = []
    for step in range(steps):
        F.manual_seed((0, step))
        loss = model.loss(*batch(model, 20, 16, seed=2 * (step % 2)))
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("name", ["shared", "untied"])
def test_composed_operations_train_alike(name):
    config = replace(CONFIGS[name], dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)
    fused = train(Transformer(config, 1))
    F.use_fused(False)
    try:
        composed = train(Transformer(config, 1))
    finally:
        F.use_fused(True)
    assert fused[-1] < fused[0] - 0.2
    assert np.abs(fused - composed).max() < 1e-4


def test_a_batch_overfits(model):
    """To near zero without smoothing, though nothing but the source tells one row from another."""
    model = Transformer(model.config, 0, label_smoothing=0.0).train()
    ids, tokens = source(model, 4, 9), target(model, 4, 12)
    tokens[:, 0] = model.config.decoder_start_token_id
    inputs, targets = (ids, np.array([9, 5, 9, 7]), tokens[:, :-1]), tokens[:, 1:]
    optimizer = optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(inputs, targets)
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.02
    assert (model.eval()(ids, inputs[2], inputs[1]).numpy().argmax(-1) == targets).all()


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_of_a_batch(model, shards):
    """Cut between rows that are padded differently: the same loss and gradients."""
    model.train()
    inputs, targets = batch(model)
    model.loss(inputs, targets).backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    with DataParallel(model, shards) as parallel:
        loss = parallel.gradients(inputs, targets, (0,))
    assert loss == pytest.approx(model.loss(inputs, targets).item(), rel=1e-5)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_in_training_only(kind):
    model, without = scrambled(replace(SHARED, **{kind: 0.5})), scrambled()
    ids, decoder_ids = source(model, 2, 20), target(model, 2, 12)
    plain = without(ids, decoder_ids).numpy()
    assert np.array_equal(model(ids, decoder_ids).numpy(), plain)
    model.train()
    F.manual_seed(0)
    first, second = model(ids, decoder_ids).numpy(), model(ids, decoder_ids).numpy()
    assert np.abs(first - plain).max() > 1e-2 and np.abs(first - second).max() > 1e-2
    for row in model.generate(ids, 8, temperature=0), without.generate(ids, 8, temperature=0):
        assert np.array_equal(row, model.generate(ids, 8, temperature=0))
    assert model.training and all(module.training for module in model.modules())


def test_where_dropout_stands():
    """On each sub-layer's output and on embedding + position: of each layer silenced but one kind, it is
    seen that it drops."""
    for part in ("attention.projection", "cross_attention.projection", "feed_forward.projection", ""):
        model = scrambled(replace(SHARED, dropout=0.5, encoder_layers=1, decoder_layers=1)).train()
        plain = scrambled(replace(SHARED, encoder_layers=1, decoder_layers=1))
        for name, parameter in [*model.named_parameters(), *plain.named_parameters()]:
            if ".projection." in name and not (part and f".{part}." in name):
                parameter.data = np.zeros_like(parameter.data)
        if part:
            model.dropout.p = 0.0
        ids, decoder_ids = source(model, 2, 9), target(model, 2, 9)
        assert np.abs(model(ids, decoder_ids).numpy() - plain(ids, decoder_ids).numpy()).max() > 1e-2, part


# Sizes, first weights, the schedule


@pytest.mark.parametrize("name, count, paper", [
    ("transformer-base", 63_119_496, 65e6), ("transformer-big", 214_282_376, 213e6),
    ("opus-mt-en-de", 73_944_309, 74e6),
])  # fmt: skip
def test_parameter_counts(name, count, paper):
    """Table 3 rounds, at a vocabulary of which the paper says about 37,000."""
    c = SIZES[name]
    with nn.skeleton():
        found = Transformer(c, seed=None).parameter_count()
    C, inner = c.d_model, c.encoder_ffn_dim
    attention, feed_forward = 4 * (C * C + C), 2 * C * inner + inner + C
    layers = 6 * (attention + feed_forward + 4 * C) + 6 * (2 * attention + feed_forward + 6 * C)
    assert found == count == c.vocab_size * (C + 1) + layers
    assert found == pytest.approx(paper, rel=0.03)


def test_first_weights():
    model = Transformer(TransformerConfig(900, 64, 2, 2, 4, 4, 256, 128), seed=0)
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        assert values.dtype == np.float32
        if parameter.ndim == 1:
            assert (values == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        elif "embedding" in name:
            assert values.std() == pytest.approx(1 / 8, rel=0.02)
        else:
            most = np.sqrt(6 / sum(values.shape))
            assert 0.98 * most < values.max() <= most and -most <= values.min() < -0.98 * most, name
            assert values.std() == pytest.approx(most / np.sqrt(3), rel=0.03), name
    other = Transformer(model.config, seed=1).state_dict()
    assert not np.array_equal(other["source_embedding.weight"], model.source_embedding.weight.numpy())


def test_learning_rate():
    """Equation 3, with steps from 1."""
    for step in (1, 2, 3999, 4000, 4001, 100_000):
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert learning_rate(step - 1, 512) == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(step, 64, warmup=10) for step in range(40)]
    assert np.argmax(rates) == 9 and rates[0] == pytest.approx(rates[9] / 10)
    assert rates[39] == pytest.approx(rates[9] / 2)


# Bad input


def test_bad_ids(model):
    ids, decoder_ids = source(model, 2, 5), target(model, 2, 4)
    V, V_target = model.config.vocab_size, model.config.target_vocabulary
    for bad in (V, -1):
        with pytest.raises(IndexError, match=str(bad)):
            model(np.array([[0, bad]]), np.array([[0]]))
    for bad in (V_target, -1):
        with pytest.raises(IndexError, match=str(bad)):
            model(np.array([[0]]), np.array([[0, bad]]))
        with pytest.raises(IndexError, match=str(bad)):
            model.loss((np.array([[0]]), np.array([1]), np.array([[0]])), np.array([[bad]]))
    with pytest.raises(TypeError, match="integer"):
        model(ids.astype(float), decoder_ids)
    for bad in (np.array([0, 1]), np.zeros((0, 3), int), np.zeros((2, 0), int)):
        for arguments in ((bad, decoder_ids), (ids, bad)):
            with pytest.raises(InputError, match=r"\(batch, length\)"):
                model(*arguments)
    for arguments in ((np.zeros((1, 81), int), decoder_ids[:1]), (ids[:1], np.zeros((1, 81), int))):
        with pytest.raises(InputError, match="81 tokens .* context of 80"):
            model(*arguments)
    assert np.array_equal(model(ids.tolist(), decoder_ids.tolist()).numpy(), model(ids, decoder_ids).numpy())


@pytest.mark.parametrize(
    "padding",
    [[0, 5], [5, 6], [5.0, 5.0], [5], [[1, 0, 1, 1, 1]] * 2, [[0] * 5, [1] * 5], np.ones((2, 4)),
     np.full((2, 5), 2)],
    ids=str,
)  # fmt: skip
def test_bad_padding(padding):
    model = scrambled()
    ids, decoder_ids = source(model, 2, 5), target(model, 2, 4)
    for call in (lambda: model(ids, decoder_ids, padding), lambda: model.generate(ids, 3, padding)):
        assert one_line(pytest.raises(InputError, call))


def test_bad_translations(model):
    V = model.config.vocab_size
    for ids, said in (
        ([], "no prompt"), ([[]], "length"), ([[V]], f"token id {V}"), ([[0.5]], "integers"),
        ([[0] * 81], "81 tokens"),
    ):  # fmt: skip
        assert said in one_line(pytest.raises(InputError, model.generate, ids, 3))
    assert "81" in one_line(pytest.raises(InputError, model.generate, [[0]], 81))
    assert "81" in one_line(pytest.raises(InputError, model.beam_search, [0], 81))
    for settings in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0}):
        one_line(pytest.raises(InputError, model.generate, [[0]], 3, **settings))
    for settings in ({"width": 0}, {"alpha": -1}):
        one_line(pytest.raises(InputError, model.beam_search, [0], 3, **settings))


# Writing translations


def test_cached_decoding_is_the_uncached(both, model):
    """However the positions are cut."""
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 80)
    with no_grad():
        expected = model.decode(decoder_ids, model.encode(ids, LENGTHS), LENGTHS).numpy()
        given = model._given([row[:n] for row, n in zip(ids, LENGTHS)], 80)
        for cut in ([1] * 80, [3, 4, 73], [80], [78, 1, 1]):
            cache, found = given.new_cache(80), []
            for start, size in zip(itertools.accumulate([0, *cut]), cut):
                assert cache.length == start
                found.append(given.hidden_states(decoder_ids[:, start : start + size], cache).numpy())
            np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-5)


def test_a_cache_goes_on_with_the_rows_selected(both, model):
    """With the sources of those rows, and their lengths."""
    ids, first, rows = source(model, 3, 70), target(model, 3, 5), [2, 0, 2, 1]
    later = target(model, 4, 6, seed=9)
    with no_grad():
        given = model._given([row[:n] for row, n in zip(ids, LENGTHS)], 20)
        cache = given.new_cache(11)
        before = cache.nbytes
        given.hidden_states(first, cache)
        one = cache.nbytes
        cache.select(rows)
        assert 0 < before < one and cache.nbytes == pytest.approx(one * 4 / 3)
        found = [given.hidden_states(later[:, i : i + 1], cache).numpy() for i in range(6)]
        whole = np.concatenate([first[rows], later], axis=1)
        expected = model.hidden_states(ids[rows], whole, LENGTHS[rows]).numpy()[:, 5:]
        np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-5)


SETTINGS = [{"temperature": 0}, {"seed": 2, "temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"seed": 3}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "cut", "drawn"])
def test_cached_translations_are_the_uncached(model, settings):
    """Up to the context, of sources of different lengths."""
    sources = ragged(model)
    found = model.generate(sources, 80, stop=(), **settings)
    assert found.shape == (5, 80) and found.dtype == np.int64
    assert np.array_equal(found, model.generate(sources, 80, stop=(), use_cache=False, **settings))
    assert not (found == model.config.pad_token_id).any() and (found >= 0).all()


def test_greedy_takes_the_likeliest_that_is_no_padding(model):
    sources, c = ragged(model), model.config
    model.logits_bias.data[c.pad_token_id] += 1000  # else it would be written
    found = model.generate(sources, 12, temperature=0, stop=())
    ids, lengths = padded(sources)
    decoder_ids = np.concatenate([np.full((5, 1), c.decoder_start_token_id), found], axis=1)
    logits = model(ids, decoder_ids[:, :-1], lengths).numpy()
    assert (logits.argmax(-1) == c.pad_token_id).all()
    logits[..., c.pad_token_id] = -np.inf
    assert np.array_equal(logits.argmax(-1), found)


def test_masks_lengths_and_rows_are_one(model):
    """And each source alone gives what it gives in a batch."""
    sources = ragged(model)
    ids, lengths = padded(sources, fill=7)
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    expected = model.generate(sources, 9, seed=1, stop=())
    for padding in (mask, lengths, lengths.tolist()):
        assert np.array_equal(model.generate(ids, 9, padding, seed=1, stop=()), expected)
    assert not np.array_equal(model.generate(ids, 9, seed=1, stop=()), expected)
    expected = model.generate(sources, 9, temperature=0, stop=())
    for row, alone in zip(expected, sources):
        assert np.array_equal(model.generate([alone], 9, temperature=0, stop=())[0], row)


def test_rows_end_by_themselves(model):
    """With the end of a sentence, or what `stop` says; -1 stands behind."""
    sources = ragged(model)
    free = model.generate(sources, 12, seed=1, temperature=3.0, stop=())
    eos = int(free[0, 4])
    model.config = replace(model.config, eos_token_id=eos)
    expected = []
    for row in free.tolist():
        end = row.index(eos) + 1 if eos in row else 12
        expected.append(row[:end] + [-1] * (12 - end))
    width = max(sum(token != -1 for token in row) for row in expected)
    assert len({tuple(row).index(-1) if -1 in row else 12 for row in expected}) > 1
    for stop in (None, (eos,)):
        found = model.generate(sources, 12, seed=1, temperature=3.0, stop=stop)
        assert found.tolist() == [row[:width] for row in expected]


def test_the_seed_decides(model):
    sources = ragged(model)
    one = model.generate(sources, 20, seed=7, stop=())
    assert np.array_equal(one, model.generate(sources, 20, seed=7, stop=()))
    assert not np.array_equal(one, model.generate(sources, 20, seed=8, stop=()))


def every_translation(model, ids, n, alpha, stop):
    """(tokens, score) of all texts of n tokens, or fewer that end with one of stop, the best first."""
    V, found, rows, scores = model.config.target_vocabulary, [], np.zeros((1, 0), int), np.zeros(1)
    for size in range(1, n + 1):
        start = np.full((len(rows), 1), model.config.decoder_start_token_id)
        decoder_ids = np.concatenate([start, rows], axis=1)
        logits = model(np.tile(ids, (len(rows), 1)), decoder_ids).numpy()[:, -1]
        logits[:, model.config.pad_token_id] = -np.inf
        rows = np.concatenate([np.repeat(rows, V, axis=0), np.tile(np.arange(V), len(rows))[:, None]], axis=1)
        scores = (scores[:, None] + log_softmax(logits)).reshape(-1)
        ended = np.isin(rows[:, -1], list(stop)) | (size == n)
        found += zip(rows[ended].tolist(), scores[ended] / ((5 + size) / 6) ** alpha)
        rows, scores = rows[~ended], scores[~ended]
        rows, scores = rows[np.isfinite(scores)], scores[np.isfinite(scores)]
    return sorted([pair for pair in found if np.isfinite(pair[1])], key=lambda pair: -pair[1])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_as_wide_as_all_texts_finds_the_best(alpha):
    config = TransformerConfig(
        6, 8, 1, 1, 2, 2, 12, 12, max_position_embeddings=9, eos_token_id=2, pad_token_id=5,
        decoder_start_token_id=4,
    )  # fmt: skip
    model = scrambled(config, seed=3)
    ids = source(model, 5)
    expected = every_translation(model, ids, 3, alpha, (2,))
    assert len(expected) == 1 + 4 + 16 * 5
    for use_cache in (True, False):
        found = model.beam_search(ids, 3, len(expected), alpha, use_cache=use_cache)
        assert [beam.tokens for beam in found] == [text for text, _ in expected]
        np.testing.assert_allclose(
            [beam.score for beam in found], [score for _, score in expected], rtol=0, atol=1e-5
        )
    best = model.beam_search(ids, 3, 4, alpha)[0]
    assert best.score <= expected[0][1] + 1e-5 and len(best.tokens) <= 3


def test_a_beam_of_one_is_greedy(model):
    for ids in ragged(model):
        (beam,) = model.beam_search(ids, 40, width=1, stop=())
        assert beam.tokens == model.generate([ids], 40, temperature=0, stop=())[0].tolist()


def test_beams_with_a_cache_are_those_without(model):
    ids = source(model, 14)
    cached = model.beam_search(ids, 12)
    uncached = model.beam_search(ids, 12, use_cache=False)
    assert [beam.tokens for beam in cached] == [beam.tokens for beam in uncached]
    assert [b.score for b in cached] == pytest.approx([b.score for b in uncached], abs=1e-5)
    assert len(cached) == 4 and len({tuple(beam.tokens) for beam in cached}) == 4
    for beam in cached:
        start = [model.config.decoder_start_token_id]
        logits = model(ids[None], [start + beam.tokens[:-1]]).numpy()[0].copy()
        logits[:, model.config.pad_token_id] = -np.inf
        log_p = log_softmax(logits)[np.arange(len(beam.tokens)), beam.tokens].sum()
        assert beam.score == pytest.approx(log_p / ((5 + len(beam.tokens)) / 6) ** 0.6, abs=1e-4)


# Folders

# The options of the Opus project's English-German model, as its config.json has them.
PUBLISHED = {
    "_num_labels": 3, "activation_dropout": 0.0, "activation_function": "swish", "add_bias_logits": False,
    "add_final_layer_norm": False, "architectures": ["MarianMTModel"], "attention_dropout": 0.0,
    "bad_words_ids": [[58100]], "bos_token_id": 0, "classif_dropout": 0.0, "classifier_dropout": 0.0,
    "d_model": 512, "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0,
    "decoder_layers": 6, "decoder_start_token_id": 58100, "decoder_vocab_size": 58101, "dropout": 0.1,
    "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "encoder_layerdrop": 0.0, "encoder_layers": 6,
    "eos_token_id": 0, "extra_pos_embeddings": 58101, "force_bos_token_to_be_generated": False,
    "forced_eos_token_id": 0, "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, "init_std": 0.02,
    "is_encoder_decoder": True, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "max_length": 512,
    "max_position_embeddings": 512, "model_type": "marian", "normalize_before": False,
    "normalize_embedding": False, "num_beams": 4, "num_hidden_layers": 6, "pad_token_id": 58100,
    "scale_embedding": True, "share_encoder_decoder_embeddings": True, "static_position_embeddings": True,
    "transformers_version": "4.22.0.dev0", "use_cache": True, "vocab_size": 58101,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    model = scrambled()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_the_published_config():
    found = TransformerConfig.from_published(PUBLISHED)
    assert replace(found, decoder_vocab_size=None) == SIZES["opus-mt-en-de"]
    # What transformers takes for what is left out; gelu among it.
    with pytest.raises(InputError, match="activation_function is 'gelu'"):
        TransformerConfig.from_published({"model_type": "marian"})
    found = TransformerConfig.from_published({"model_type": "marian", "activation_function": "silu"})
    assert found == TransformerConfig(
        58101, 1024, 12, 12, 16, 16, 4096, 4096, activation_function="silu", scale_embedding=False,
        pad_token_id=58100, decoder_start_token_id=58100,
    )  # fmt: skip


def test_the_published_layout(tmp_path, model):
    model.save_pretrained(tmp_path)
    c = model.config
    C = c.d_model
    linear = lambda name, n, m: {f"{name}.weight": (m, n), f"{name}.bias": (m,)}
    attention = lambda name: (
        {key: shape for p in "qkv" for key, shape in linear(f"{name}.{p}_proj", C, C).items()}
        | linear(f"{name}.out_proj", C, C)
    )
    norm = lambda name: {f"{name}.weight": (C,), f"{name}.bias": (C,)}
    expected = {"final_logits_bias": (1, c.target_vocabulary)}
    if c.share_encoder_decoder_embeddings:
        expected["model.shared.weight"] = (31, C)
    else:
        expected |= {
            "model.encoder.embed_tokens.weight": (31, C),
            "model.decoder.embed_tokens.weight": (23, C),
        }
    if not c.tie_word_embeddings:
        expected["lm_head.weight"] = (23, C)
    for side, layers, inner in (("encoder", 2, 40), ("decoder", 3, 36)):
        for i in range(layers):
            layer = f"model.{side}.layers.{i}."
            expected |= attention(layer + "self_attn") | norm(layer + "self_attn_layer_norm")
            expected |= linear(layer + "fc1", C, inner) | linear(layer + "fc2", inner, C)
            expected |= norm(layer + "final_layer_norm")
            if side == "decoder":
                expected |= attention(layer + "encoder_attn") | norm(layer + "encoder_attn_layer_norm")
    assert {name: array.shape for name, array in stored(tmp_path).items()} == expected
    assert len(expected) == len(model.parameters())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_saving_and_loading_is_the_identity(tmp_path, model, dtype):
    model.to(dtype=dtype).save_pretrained(tmp_path)
    full = replace(model.config, decoder_vocab_size=model.config.target_vocabulary)
    for load in (Transformer.from_pretrained, tinyllm.from_pretrained):
        loaded = load(str(tmp_path), dtype)
        model.config = full
        assert_identical(loaded, model)
        assert not any(module.training for module in loaded.modules())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == np.dtype(dtype).name and config["model_type"] == "marian"
    ids, decoder_ids = source(model, 3, 70), target(model, 3, 9)
    assert np.array_equal(loaded(ids, decoder_ids, LENGTHS).numpy(), model(ids, decoder_ids, LENGTHS).numpy())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stored_as", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(saved, stored_as):
    """With what old files hold besides: positions, rounded as well, and the shared table three times more."""
    folder, model = saved
    halves = {name: array.astype(stored_as) for name, array in stored(folder).items()}
    for name in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        halves[f"{name}.weight"] = halves["model.shared.weight"].copy()
    for side in ("encoder", "decoder"):
        table = positions(0, 80, 24, np.zeros(0, np.float32))
        halves[f"model.{side}.embed_positions.weight"] = table.astype(stored_as)
    save_file(halves, folder / "model.safetensors")
    edit(folder, dtype=..., torch_dtype="bfloat16")
    for dtype in (np.float32, np.float64):
        for parameter in model.parameters():
            parameter.data = parameter.data.astype(stored_as).astype(dtype)
        model.config = replace(model.config, decoder_vocab_size=31)
        assert_identical(tinyllm.from_pretrained(folder, dtype), model)


@pytest.mark.parametrize("name", ["lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"])
def test_a_shared_table_that_is_another(saved, name):
    """In the last bit of one number."""
    folder, model = saved
    arrays = stored(folder)
    table = arrays[f"{name}.weight"] = arrays["model.shared.weight"].copy()
    table[3, 5] = np.nextafter(table[3, 5], np.float32(9))
    save_file(arrays, folder / "model.safetensors")
    assert f"{name}.weight" in one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))


def test_positions_of_another_kind(saved):
    folder, model = saved
    arrays = stored(folder)
    name, table = "model.decoder.embed_positions.weight", positions(0, 80, 24, np.zeros(0, np.float32))
    for wrong in (table[:79], table[:, ::-1].copy(), np.zeros_like(table)):
        save_file(arrays | {name: wrong}, folder / "model.safetensors")
        assert name in one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))
    save_file(arrays | {name: table}, folder / "model.safetensors")
    tinyllm.from_pretrained(folder)


@pytest.mark.parametrize(
    "option, said",
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"activation_function": 3}, "activation_function is 3"),
        ({"normalize_before": True}, "normalize_before = True"),
        ({"normalize_embedding": True}, "normalize_embedding = True"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm = True"),
        ({"static_position_embeddings": False}, "static_position_embeddings = False"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop = 0.1"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop = 0.1"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder = False"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"decoder_vocab_size": 30}, "decoder_vocab_size is 30"),
        ({"encoder_attention_heads": 5}, "5 heads do not divide the width 24"),
        ({"decoder_attention_heads": 5}, "5 heads do not divide the width 24"),
        ({"encoder_layers": 0}, "encoder_layers is 0"),
        ({"decoder_layers": 0}, "decoder_layers is 0"),
        ({"dropout": 1}, "dropout is 1"),
        ({"scale_embedding": 1}, "scale_embedding"),
        ({"eos_token_id": [2, 3]}, "eos_token_id"),
        ({"eos_token_id": 31}, "eos_token_id is 31, but must be a token id below 31"),
        ({"pad_token_id": None}, "pad_token_id"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1"),
        ({"max_relative_position": 16}, "max_relative_position = 16 (unknown)"),
        ({"model_type": "gpt2"}, "vocab_size"),
    ],
    ids=str,
)
def test_configs_that_are_refused(saved, option, said):
    folder, _ = saved
    edit(folder, **option)
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, folder))
    assert said in message or option.get("model_type")


class TestDamagedFolders:
    """As test_fuzz.py does: one line that says so, or the very model that the files now describe."""

    @pytest.fixture
    def saved(self, tmp_path):
        model = scrambled(TransformerConfig(31, 12, 1, 1, 3, 3, 8, 8))
        model.save_pretrained(tmp_path)
        return tmp_path, model

    VALUES = [
        "NaN", "Infinity", "1e999", "1" * 400, "-1", "0", "-0.0", "1", "1.0", "2", "3.0", "1e300",
        "4294967297", "true", "false", "null", '"1"', '"relu"', '"swish"', '""', "[]", "[1]", "{}",
    ]  # fmt: skip

    @staticmethod
    def check(folder, model, config, content):
        """Whether it is accepted; then each option is what the file says."""
        (folder / "config.json").write_bytes(content)
        try:
            found = tinyllm.from_pretrained(folder)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return False
        for name, array in model.state_dict().items():
            assert np.array_equal(found.state_dict()[name], array)
        has = {"model_type": "marian", **found.config.to_published()}
        changed = json.loads(content)
        for option in changed.keys() - {"architectures", "dtype"}:
            a, b = changed[option], has.get(option)
            same = a == b and (type(a) is type(b) or {type(a), type(b)} == {int, float})
            assert same or (option, a) == ("decoder_vocab_size", None), (option, a, b)
        with np.errstate(all="ignore"):
            assert found([[0]], [[0]]).shape[:2] == (1, 1)
        return True

    def test_every_option_at_every_kind_of_value(self, saved):
        folder, model = saved
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        accepted = total = 0
        for option in config:
            for text in self.VALUES:
                content = json.dumps({**config, option: "@"}).replace('"@"', text).encode()
                accepted += self.check(folder, model, config, content)
                total += 1
        assert 0 < accepted < total / 2

    def test_some_bytes_of_the_config(self, saved):
        folder, model = saved
        good = (folder / "config.json").read_bytes()
        refused = 0
        for place in np.random.default_rng(0).integers(0, len(good), 80):
            refused += not self.check(folder, model, None, good[:place])
            for mask in (1 << place % 8, 0xFF):
                refused += not self.check(
                    folder, model, None, good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :]
                )
        assert refused > 150

    @pytest.mark.parametrize("size", [10**4, 10**18])
    def test_more_than_there_is_fails_at_once(self, saved, size):
        folder, model = saved
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tracemalloc.start()
        try:
            for option, value in config.items():
                if type(value) is int:
                    before = time.process_time()
                    self.check(folder, model, config, json.dumps({**config, option: size}).encode())
                    assert time.process_time() - before < 1, option
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("wrong", ["missing", "left over", "misshapen"])
    def test_tensors_that_do_not_fit(self, saved, wrong):
        folder, _ = saved
        good = stored(folder)
        for name, array in good.items():
            others = {other: good[other] for other in good if other != name}
            if wrong == "left over":
                others[name], name = array, name + "_2"
                others[name] = np.zeros(3, np.float32)
            elif wrong == "misshapen":
                others[name] = array[..., :-1].copy()
            (folder / "model.safetensors").write_bytes(save(others))
            assert f"1 {wrong} ({name}" in one_line(
                pytest.raises(InputError, tinyllm.from_pretrained, folder)
            )


# On a device


def step_and_translate(device, config):
    """What two training steps and translation give on a device, on the host."""
    model = Transformer(replace(config, dropout=0.1), 0).train().to(device)
    xp = backend.device_module(device)
    inputs, targets = batch(model)
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)
    found = {"losses": []}
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # random numbers differ between devices
    for _ in range(2):
        optimizer.zero_grad()
        with DataParallel(model) as parallel:
            loss = parallel.gradients(inputs, targets, seed=(0,))
        norm = optim.clip_grad_norm(model.parameters(), 0.5)
        assert all(type(p.grad.data) is xp.ndarray for p in model.parameters())
        optimizer.step()
        found["losses"] += [loss, norm]
    model = scrambled(config).to(device)
    on_device = [xp.asarray(a) for a in (source(model, 3, 70), target(model, 3, 9), LENGTHS)]
    with no_grad():
        found["logits"] = model(*on_device).numpy()
        found["map"] = model.cross_attention_weights(*on_device)[-1].numpy()
    found["greedy"] = model.generate(ragged(model), 8, temperature=0)
    found["masked"] = model.generate(on_device[0], 8, on_device[2], seed=4)
    drawn = {"seed": 5, "top_k": 7, "top_p": 0.9}
    assert np.array_equal(
        model.generate(ragged(model), 5, **drawn), model.generate(ragged(model), 5, use_cache=False, **drawn)
    )
    for use_cache in (True, False):
        beams = model.beam_search(ragged(model)[0], 5, use_cache=use_cache)
        found[f"beams {use_cache}"] = [beam.score for beam in beams]
    return found


@pytest.mark.parametrize("name", ["shared", "untied"])
def test_on_the_stand_in_for_a_gpu(strict_cupy, name):
    found, expected = (step_and_translate(device, CONFIGS[name]) for device in ("cuda", "cpu"))
    for key, value in expected.items():
        assert type(found[key]) is type(value)
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-4, err_msg=key)
