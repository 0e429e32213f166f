"""BERT: its formula, padding, losses, heads and files; the answer search is in test_spans.py."""

from __future__ import annotations

import json
from dataclasses import replace
from math import erf

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import autograd.functional as F
import tinyllm
from autograd import nn, no_grad, optim
from tinyllm.errors import InputError
from tinyllm.models import BERT, BERTConfig
from tinyllm.models.bert import SIZES
from tinyllm.models.bert_tasks import SequenceClassifier, SpanFinder, TokenTagger
from tinyllm.parallel import DataParallel
from tinyllm.training import Recipe, fit

from .folders import assert_identical, edit, one_line, stored
from .tiny import assert_gradients_are_derivatives, scramble

# Longer than one block of 64 queries of the fused attention; three heads, so that H is not d. The epsilon is
# large enough to be seen.
TINY = BERTConfig(31, 24, 2, 3, 40, 0.0, 0.0, max_position_embeddings=80, layer_norm_eps=1e-3)
LABELS = ("red", "green", "blue", "grey")
TASKS = {"classes": SequenceClassifier, "tags": TokenTagger, "spans": SpanFinder}
KINDS = ["pre-training", *TASKS]


def bare(architecture):
    """A config with those heads only that the architecture needs."""
    return replace(TINY, architecture=architecture, heads=())


def make(kind="pre-training", dtype=np.float32, config=TINY, seed=0):
    """A model with visible weights, in evaluation mode."""
    model = BERT(config, seed)
    if kind != "pre-training":
        model = TASKS[kind].on(model, () if kind == "spans" else LABELS, seed)
    return scramble(model, seed, dtype)


def padded(B=5, T=70, seed=0, V=31):
    """(ids, attention_mask, token_type_ids) of rows of all lengths, the longest and 1 among them."""
    rng = np.random.default_rng(seed)
    lengths = np.array([T, 1, *rng.integers(2, T, B)])[:B]
    mask = (np.arange(T) < lengths[:, None]).astype(np.int64)
    segments = (np.arange(T) >= rng.integers(1, T, (B, 1))).astype(np.int64)
    return rng.integers(0, V, (B, T)), mask, segments


def targets_for(kind, inputs, seed=1):
    """Random targets, some of which do not count, none of them at padding."""
    ids, mask, _ = inputs
    rng = np.random.default_rng(seed)
    B, T = ids.shape
    if kind == "classes":
        return np.where(np.arange(B) == 2, -100, rng.integers(0, 4, B))
    if kind == "spans":
        return np.minimum(np.sort(rng.integers(0, T, (B, 2))), mask.sum(1, keepdims=True) - 1)
    hidden = (mask == 0) | (rng.random((B, T)) < 0.5)
    hidden[0, :3] = False
    tokens = np.where(hidden, -100, rng.integers(0, 4 if kind == "tags" else 31, (B, T)))
    return (tokens, rng.integers(0, 2, B)) if kind == "pre-training" else tokens


def total(losses):
    return sum(losses[1:], losses[0]) if isinstance(losses, tuple) else losses


class Summed:
    """A model with one loss: the sum of all, which is what is minimized."""

    def __init__(self, model):
        self.model = model
        self.parameters, self.named_parameters = model.parameters, model.named_parameters

    def loss(self, inputs, targets):
        return total(self.model.loss(inputs, targets))


def gradients(model, inputs, targets):
    """Its loss, and the gradient of each parameter."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = total(model.loss(inputs, targets))
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# The function that it computes


def in_numpy(model, ids, mask, segments):
    """The paper's section 3 in float64, one sequence at a time without its padding."""
    w = {name: p.numpy().astype(np.float64) for name, p in model.named_parameters()}
    c = model.config

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + c.layer_norm_eps)
        return y * w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        return x / 2 * (1 + np.vectorize(erf)(x / np.sqrt(2)))

    def attention(x, name):
        T, d = len(x), c.hidden_size // c.num_attention_heads
        heads = []
        for h in range(c.num_attention_heads):
            q, k, v = (linear(x, f"{name}.{n}")[:, h * d : (h + 1) * d] for n in ("query", "key", "value"))
            p = np.exp(q @ k.T / np.sqrt(d))
            heads.append(p / p.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(heads, axis=-1).reshape(T, -1), name + ".projection")

    for row, kept, segment in zip(ids, mask, segments):
        T = kept.sum()
        x = w["token_embedding.weight"][row[:T]] + w["position_embedding.weight"][:T]
        x = norm(x + w["segment_embedding.weight"][segment[:T]], "norm")
        for i in range(c.num_hidden_layers):
            block = f"blocks.{i}"
            x = norm(x + attention(x, block + ".attention"), block + ".norm_1")
            x = norm(x + linear(gelu(linear(x, block + ".mlp.expand")), block + ".mlp.projection"),
                     block + ".norm_2")  # fmt: skip
        pooled = np.tanh(linear(x[0], "pooler"))
        scores = norm(gelu(linear(x, "masked_lm.transform")), "masked_lm.norm")
        scores = scores @ w["token_embedding.weight"].T + w["masked_lm.bias"]
        yield x, pooled, scores, linear(pooled, "next_sentence")


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 5e-5), (np.float64, 1e-12)])
def test_the_formula(both, dtype, tolerance):
    model, inputs = make(dtype=dtype), padded()
    out = model(*inputs)
    assert out.logits is None
    for i, expected in enumerate(in_numpy(model, *inputs)):
        T = len(expected[0])
        for found, wanted in zip(out, expected):
            found = found.numpy()[i][:T] if wanted.ndim == 2 else found.numpy()[i]
            assert found.dtype == dtype and np.abs(wanted).max() > 0.1
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def test_left_out_masks_and_segments(both):
    """No mask: no padding. No segments: the first."""
    model, (ids, _, segments) = make(), padded()
    plain = model(ids)
    for other in (model(ids, np.ones_like(ids)), model(ids, None, np.zeros_like(ids))):
        assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(plain[:4], other[:4]))
    other = model(ids, None, segments).last_hidden_state.numpy()
    assert np.abs(other - plain.last_hidden_state.numpy()).max() > 0.1


def test_both_sides_are_seen(both):
    """Each position, with its place and its segment, matters to each other one."""
    model = make(dtype=np.float64)
    ids, _, segments = padded(1, 12)
    before = model(ids, None, segments).last_hidden_state.numpy()
    for i in range(12):
        other, swapped, kinds = ids.copy(), ids.copy(), segments.copy()
        other[0, i] = (ids[0, i] + 1) % 31
        j = next(j for j in range(12) if ids[0, j] != ids[0, i])
        swapped[0, [i, j]] = swapped[0, [j, i]]
        kinds[0, i] = 1 - kinds[0, i]
        for changed in ((other, None, segments), (swapped, None, segments), (ids, None, kinds)):
            difference = np.abs(model(*changed).last_hidden_state.numpy() - before).max(axis=-1)
            assert (difference > 1e-4).all()


@pytest.mark.parametrize(
    "name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
)
def test_dropout_in_training_only(kind, name):
    """classifier_dropout, where it is given, is the task's head's own, whatever hidden_dropout_prob is."""
    model = make(kind, config=replace(TINY, **{"classifier_dropout": 0.0, name: 0.5}))
    plain, inputs = make(kind), padded()
    read = lambda model: next(x for x in model(*inputs)[::-1] if x is not None).numpy()
    expected = read(plain)
    assert np.array_equal(read(model), expected)
    model.train()
    F.manual_seed(0)
    first, second = read(model), read(model)
    works = name != "classifier_dropout" or kind in ("classes", "tags")
    assert (np.abs(first - expected).max() > 1e-2) == works == (np.abs(first - second).max() > 1e-2)


def test_without_a_dropout_of_its_own_a_head_takes_the_hidden_ones():
    assert make("classes", config=replace(TINY, hidden_dropout_prob=0.3)).head_dropout.p == 0.3
    config = replace(TINY, hidden_dropout_prob=0.3, classifier_dropout=0.0)
    assert make("classes", config=config).head_dropout.p == 0.0


@pytest.mark.parametrize(
    "size, heads, count",
    [
        ("bert-base-uncased", ("pooler",), 109_482_240),
        ("bert-base-uncased", ("masked_lm",), 109_514_298),
        ("bert-base-uncased", ("pooler", "masked_lm", "next_sentence"), 110_106_428),
        ("bert-large-uncased", ("pooler",), 335_141_888),
        ("bert-large-uncased", ("pooler", "masked_lm", "next_sentence"), 336_226_108),
    ],
)
def test_parameter_counts(size, heads, count):
    """The paper says 110M and 340M; transformers' own models of these sizes have exactly so many."""
    with nn.skeleton():
        config = replace(SIZES[size], architecture="BertModel", heads=heads)
        assert BERT(config, seed=None).parameter_count() == count


def test_first_weights():
    model = BERT(BERTConfig(400, 64, 2, 4, 256, max_position_embeddings=300), seed=0)
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        assert values.dtype == np.float32
        if parameter.ndim == 1:
            assert (values == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        elif values.size > 1000:
            assert values.std() == pytest.approx(0.02, rel=0.04), name
    assert not np.array_equal(BERT(TINY, 1).token_embedding.weight.data,
                              BERT(TINY, 0).token_embedding.weight.data)  # fmt: skip


def test_attention_weights():
    """Layer by layer, what the blocks use: put together by hand they give the hidden states."""
    model, inputs = make(dtype=np.float64), padded()
    found = [w.numpy() for w in model.attention_weights(*inputs)]
    assert len(found) == 2 and all(w.shape == (5, 3, 70, 70) for w in found)
    for w in found:
        np.testing.assert_allclose(w.sum(-1), 1, rtol=0, atol=1e-12)
        assert (w[:, :, :, 1:] * (inputs[1][:, None, None, 1:] == 0) == 0).all()
    with no_grad():
        x, _ = model._embed(*inputs)
        for block, w in zip(model.blocks, found):
            v = block.attention.value(x).numpy().reshape(5, 70, 3, 8).transpose(0, 2, 1, 3)
            read = type(x)((w @ v).transpose(0, 2, 1, 3).reshape(5, 70, 24))
            x = block.norm_1(x + block.attention.projection(read))
            x = block.norm_2(x + block.mlp(x))
        np.testing.assert_allclose(x.numpy(), model.hidden_states(*inputs).numpy(), rtol=0, atol=1e-12)


# Padding


def test_padding_changes_nothing(both, kind):
    """Whatever its ids and segments: outputs, losses and gradients stay; and longer padding is no matter."""
    model, (ids, mask, segments) = make(kind, np.float64), padded()
    targets, rng = targets_for(kind, (ids, mask, segments)), np.random.default_rng(9)
    other = np.where(mask, ids, rng.integers(0, 31, ids.shape))
    kinds = np.where(mask, segments, rng.integers(0, 2, ids.shape))
    assert (other != ids).any() and (kinds != segments).any()
    more = [np.pad(a, ((0, 0), (0, 10))) for a in (ids, mask, segments)]
    with no_grad():
        expected = model(ids, mask, segments)
        for found in (model(other, mask, kinds), model(*more)):
            for name, a, b in zip(found._fields, found, expected):
                assert (a is None) == (b is None)
                if a is None:
                    continue
                a, b = a.numpy(), b.numpy()
                if b.ndim == 3:  # a row for each position
                    a, b = a[:, :70][mask == 1], b[mask == 1]
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12, err_msg=name)
    loss, expected = gradients(model, (ids, mask, segments), targets)
    again, found = gradients(model, (other, mask, kinds), targets)
    assert again == pytest.approx(loss, rel=1e-12)
    for name, g in expected.items():
        np.testing.assert_allclose(found[name], g, rtol=0, atol=1e-12, err_msg=name)


def test_rows_do_not_meet(both, kind):
    model, (ids, mask, segments) = make(kind), padded()
    with no_grad():
        together = model(ids, mask, segments)
        for i, T in enumerate(mask.sum(axis=1)):
            alone = model(ids[i : i + 1, :T], None, segments[i : i + 1, :T])
            for a, b in zip(alone, together):
                if a is not None:
                    b = b.numpy()[i][:T] if b.ndim == 3 else b.numpy()[i]
                    np.testing.assert_allclose(a.numpy()[0], b, rtol=0, atol=1e-5)


def test_masks_that_are_none():
    model, (ids, mask, segments) = make(), padded(2, 6)
    said = lambda *inputs: one_line(pytest.raises(InputError, model, *inputs))
    assert "padding at the end" in said(ids, [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert "zeros alone" in said(ids, [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    assert "zeros and ones" in said(ids, mask * 2)
    assert "attention_mask has the shape (2, 5)" in said(ids, mask[:, :5])
    assert "token_type_ids has the shape (1, 6)" in said(ids, mask, segments[:1])
    assert "81 tokens do not fit the model's context of 80" in said(np.zeros((1, 81), int))
    for bad in (np.array([0, 1]), np.zeros((0, 3), int), np.zeros((2, 0), int)):
        assert "(batch, length)" in said(bad)
    for bad in (31, -1):
        with pytest.raises(IndexError, match=str(bad)):
            model(np.array([[0, bad]]))
    with pytest.raises(IndexError, match="2"):
        model(ids, mask, segments + 1)
    with pytest.raises(TypeError, match="integer"):
        model(ids.astype(float))
    assert np.array_equal(model(ids.tolist()).last_hidden_state.numpy(), model(ids).last_hidden_state.numpy())


# Losses


def nats(logits, targets):
    """-log softmax(logits)[target] of every target that counts, added, and their number."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = targets != -100
    return -log_p[kept, targets[kept]].sum(), kept.sum()


def test_losses_are_the_cross_entropy_of_the_logits(both, kind):
    model, inputs = make(kind), padded()
    targets, out = targets_for(kind, inputs), model(*inputs)
    if kind == "pre-training":
        expected = [nats(out.prediction_logits.numpy(), targets[0]),
                    nats(out.seq_relationship_logits.numpy(), targets[1])]  # fmt: skip
    elif kind == "spans":
        visible = np.where(inputs[1], 0, -np.inf)[..., None]
        expected = [nats((out.logits.numpy() + visible).transpose(0, 2, 1), targets)]
    else:
        expected = [nats(out.logits.numpy(), targets)]
    for reduction in ("sum", "mean"):
        found = model.loss(inputs, targets, reduction)
        found = found if isinstance(found, tuple) else (found,)
        wanted = [loss / n if reduction == "mean" else loss for loss, n in expected]
        assert [loss.item() for loss in found] == pytest.approx(wanted, rel=1e-5)


def test_masked_tokens_alone_and_inputs_without_a_mask(both):
    model, inputs = make(), padded()
    tokens, follows = targets_for("pre-training", inputs)
    alone = model.loss(inputs, tokens)
    assert alone.item() == model.loss(inputs, (tokens, follows))[0].item()
    full = model.loss((inputs[0], np.ones_like(inputs[0]), np.zeros_like(inputs[0])), tokens)
    assert model.loss(inputs[0], tokens).item() == full.item()
    spans = make("spans")
    places = np.array([[2, 3]] * 5)
    assert spans.loss(inputs[0], places).item() == spans.loss((inputs[0], None), places).item()


def test_heads_that_there_are_not():
    model, (ids, *_) = BERT(bare("BertForMaskedLM")), padded()
    out = model(ids)
    assert out.pooler_output is None and out.seq_relationship_logits is None
    assert out.prediction_logits.shape == (5, 70, 31)
    said = one_line(pytest.raises(InputError, model.loss, ids, (ids, np.zeros(5, int))))
    assert "BertForMaskedLM has no head" in said
    model = BERT(bare("BertModel"))
    assert model(ids)[1:] == (None,) * 4
    assert "BertModel has no head" in one_line(pytest.raises(InputError, model.loss, ids, ids))


def test_gradients_are_derivatives(both, kind):
    """With all dropout on, with respect to every parameter."""
    config = BERTConfig(7, 6, 2, 3, 8, 0.2, 0.2, max_position_embeddings=5, classifier_dropout=0.3)
    model, inputs = make(kind, np.float64, config).train(), padded(3, 5, V=7)
    targets = targets_for(kind, inputs)
    if kind == "pre-training":
        targets = np.where(targets[0] == -100, -100, targets[0] % 7), targets[1]
    assert_gradients_are_derivatives(Summed(model), inputs, targets, projections=2)


def test_every_parameter_gets_a_gradient(both, kind):
    """But what adds the same to all that a softmax compares: a key's bias to all scores of a query, and for
    spans the last biases to all positions."""
    model = make(kind, np.float64)
    ids, mask, segments = padded(7, 80)
    ids.flat[:31] = np.arange(31)
    _, found = gradients(model, (ids, mask, segments), targets_for(kind, (ids, mask, segments)))
    for name, g in found.items():
        assert np.isfinite(g).all(), name
        if name.endswith("key.bias") or (kind == "spans" and name in ("span.bias", "blocks.1.norm_2.bias")):
            assert np.abs(g).max() < 1e-10
        else:
            assert (g != 0).all(), name


def test_shards_add_up(kind):
    """Cut onto threads, a batch has the losses and the gradients that it has as a whole."""
    model, inputs = make(kind, np.float64), padded()
    targets = targets_for(kind, inputs)
    expected_loss, expected = gradients(model, inputs, targets)
    for parameter in model.parameters():
        parameter.grad = None
    with DataParallel(model, shards=3) as parallel:
        loss = parallel.gradients(inputs, targets, seed=(0,))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), expected[name], rtol=0, atol=1e-12, err_msg=name)


def train(kind, steps=20):
    """Its losses from the first weights on."""
    model = BERT(replace(TINY, initializer_range=0.1), 1)
    model = model if kind == "pre-training" else TASKS[kind].on(model, () if kind == "spans" else LABELS)
    model.train()
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        inputs = padded(4, 20, seed=step % 2)
        loss = total(model.loss(inputs, targets_for(kind, inputs)))
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def test_composed_operations_train_alike(kind):
    fused = train(kind)
    F.use_fused(False)
    try:
        composed = train(kind)
    finally:
        F.use_fused(True)
    assert fused[-1] < fused[0] - 0.1 and np.abs(fused - composed).max() < 1e-4


def test_a_batch_overfits(kind):
    inputs = padded(4, 12)
    targets = targets_for(kind, inputs)
    model = BERT(TINY)
    model = model if kind == "pre-training" else TASKS[kind].on(model, () if kind == "spans" else LABELS)
    recipe = Recipe(steps=150, lr=1e-2, warmup=20, weight_decay=0.0)
    progress = fit(model, lambda step: (inputs, targets), recipe)
    assert progress.losses[-1] < 0.05 < 1 < progress.losses[0]
    with no_grad():
        out = model(*inputs)
    found = (out.prediction_logits if kind == "pre-training" else out.logits).numpy()
    wanted = targets[0] if kind == "pre-training" else targets
    guesses, kept = found.argmax(-1), wanted != -100
    if kind == "spans":
        guesses = np.where(inputs[1][..., None], found, -np.inf).argmax(1)
    assert np.array_equal(guesses[kept], wanted[kept])


def test_on_the_stand_in_for_a_gpu(both, strict_cupy, kind):
    model, inputs = make(kind), padded()
    targets = targets_for(kind, inputs)
    expected_loss, expected = gradients(model, inputs, targets)
    expected_out = [x if x is None else x.numpy() for x in model(*inputs)]
    weights = [w.numpy() for w in model.attention_weights(*inputs)]
    model.to("cuda")
    for parameter in model.parameters():
        parameter.grad = None
    with DataParallel(model) as parallel:
        loss = parallel.gradients(inputs, targets, seed=(0,))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert type(parameter.grad.data) is strict_cupy.ndarray and parameter.grad.dtype == np.float32
        np.testing.assert_allclose(parameter.grad.numpy(), expected[name], rtol=0, atol=2e-5, err_msg=name)
    for found, wanted in zip(model(*map(strict_cupy.asarray, inputs)), expected_out):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert type(found.data) is strict_cupy.ndarray and found.dtype == np.float32
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-5)
    for found, wanted in zip(model.attention_weights(*inputs), weights):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5)
    if kind != "pre-training":
        again = TASKS[kind].on(model, model.config.labels)
        assert all(type(p.data) is strict_cupy.ndarray for p in again.parameters())


# A task's head on a pre-trained model


@pytest.mark.parametrize("task", TASKS.values())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_on_a_copy(task, dtype):
    bert = make(dtype=dtype)
    before = {name: array.copy() for name, array in bert.state_dict().items()}
    labels = () if task is SpanFinder else LABELS
    model, again, other = task.on(bert, labels), task.on(bert, labels, 0), task.on(bert, labels, 1)
    new = model.state_dict().keys() - before.keys()
    head = "span" if task is SpanFinder else "classifier"
    assert new == {f"{head}.weight", f"{head}.bias"}
    gone = before.keys() - model.state_dict().keys()
    kept = ("pooler",) if task is SequenceClassifier else ()
    assert all(name.startswith(("masked_lm", "next_sentence", "pooler")) for name in gone)
    assert any(name.startswith("pooler") for name in gone) == (not kept)
    for name, array in model.state_dict().items():
        assert array.dtype == dtype
        assert name in new or np.array_equal(array, before[name]), name
    weight = f"{head}.weight"
    assert 0.01 < model.state_dict()[weight].std() < 0.03
    assert np.array_equal(again.state_dict()[weight], model.state_dict()[weight])
    assert not np.array_equal(other.state_dict()[weight], model.state_dict()[weight])
    for parameter in model.parameters():
        parameter.data += 1
    assert all(np.array_equal(array, before[name]) for name, array in bert.state_dict().items())


@pytest.mark.parametrize("task", TASKS)
def test_a_head_on_a_model_that_has_one_is_new(task):
    """Whether it has as many classes or not."""
    model = make(task)
    for labels in ((), ()) if task == "spans" else (LABELS, LABELS[:3]):
        again, fresh = TASKS[task].on(model, labels), TASKS[task].on(make(), labels)
        for name, array in again.state_dict().items():
            head = name.startswith(("classifier", "span"))
            assert np.array_equal(array, (fresh if head else model).state_dict()[name]), name


def test_a_pooler_is_made_where_there_is_none():
    bert = BERT(bare("BertForMaskedLM"))
    model = SequenceClassifier.on(bert, LABELS)
    assert 0.01 < model.pooler.weight.numpy().std() < 0.03


def test_labels_and_classes_that_do_not_fit():
    bert = BERT(TINY)
    for labels in ((), ("a", "a")):
        for task in (SequenceClassifier, TokenTagger):
            assert "needs labels, each once" in one_line(pytest.raises(InputError, task.on, bert, labels))
    config = replace(TINY, architecture="BertForSequenceClassification", labels=LABELS)
    for kind in (BERT, TokenTagger):
        assert "makes no " in one_line(pytest.raises(InputError, kind, config))
    assert "makes no Span" in one_line(pytest.raises(InputError, SpanFinder, TINY))


# Published folders

# The options of the published config.json of bert-base-cased.
PUBLISHED = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True, "vocab_size": 28996, "directionality": "bidi", "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}  # fmt: skip


def test_the_published_config():
    expected = BERTConfig(28996, architecture="BertForMaskedLM")
    assert BERTConfig.from_published(PUBLISHED) == expected
    found = BERTConfig.from_published({"model_type": "bert"})
    assert found == BERTConfig(architecture="BertModel")
    assert replace(SIZES["bert-base-uncased"], architecture="BertModel", heads=()) == found


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM", "BertModel",
                                          "BertForNextSentencePrediction"])  # fmt: skip
@pytest.mark.parametrize("pooler", [(), ("pooler",)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_saving_and_loading_is_the_identity(tmp_path, architecture, pooler, dtype):
    model = scramble(BERT(replace(TINY, architecture=architecture, heads=pooler)), dtype=dtype)
    model.save_pretrained(tmp_path)
    for load in (BERT.from_pretrained, tinyllm.from_pretrained):
        assert_identical(load(str(tmp_path), dtype), model)
    bare = {name.split(".")[0] for name in stored(tmp_path)} <= {"embeddings", "encoder", "pooler"}
    assert bare == (architecture == "BertModel")


@pytest.mark.parametrize("kind", TASKS)
def test_saving_and_loading_a_task(tmp_path, kind):
    model = make(kind)
    model.save_pretrained(tmp_path)
    for load in (BERT.from_pretrained, TASKS[kind].from_pretrained, tinyllm.from_pretrained):
        assert_identical(load(tmp_path), model)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "num_labels" not in config
    if kind != "spans":
        assert config["id2label"] == {str(i): label for i, label in enumerate(LABELS)}
    said = one_line(
        pytest.raises(InputError, TASKS["tags" if kind == "spans" else "spans"].from_pretrained, tmp_path)
    )
    assert "which is no " in said and ".on(model, ...)" in said


def test_the_published_layout(tmp_path):
    """Names and shapes as in the published files, nothing transposed, the tied matrix only once."""
    model = make()
    model.save_pretrained(tmp_path)
    C, inner = 24, 40
    norm = lambda name, n=C: {f"{name}.weight": (n,), f"{name}.bias": (n,)}
    linear = lambda name, out, n=C: {f"{name}.weight": (out, n), f"{name}.bias": (out,)}
    expected = {"bert.embeddings.word_embeddings.weight": (31, C),
                "bert.embeddings.position_embeddings.weight": (80, C),
                "bert.embeddings.token_type_embeddings.weight": (2, C)}  # fmt: skip
    expected |= norm("bert.embeddings.LayerNorm") | linear("bert.pooler.dense", C)
    for i in range(2):
        layer = f"bert.encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            expected |= linear(f"{layer}attention.{name}", C)
        expected |= norm(layer + "attention.output.LayerNorm") | norm(layer + "output.LayerNorm")
        expected |= linear(layer + "intermediate.dense", inner) | linear(layer + "output.dense", C, inner)
    expected |= linear("cls.predictions.transform.dense", C) | norm("cls.predictions.transform.LayerNorm")
    expected |= {"cls.predictions.bias": (31,)} | linear("cls.seq_relationship", 2)
    found = stored(tmp_path)
    assert {name: array.shape for name, array in found.items()} == expected
    weight = model.blocks[1].attention.projection.weight.numpy()
    assert np.array_equal(found["bert.encoder.layer.1.attention.output.dense.weight"], weight)


def older(arrays):
    """The names of norms in the first published files."""
    new = {}
    for name, array in arrays.items():
        if ".LayerNorm." in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        new[name] = array
    return new


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForPreTraining", "BertModel", None])
def test_old_files(tmp_path, architecture):
    """As bert-base-uncased is: gamma and beta, position_ids, the tied tensors stored too, all heads of
    pre-training, whatever architecture config.json names."""
    model = make()
    model.save_pretrained(tmp_path)
    arrays = older(stored(tmp_path))
    assert "bert.embeddings.LayerNorm.gamma" in arrays
    arrays["bert.embeddings.position_ids"] = np.arange(80)[None]
    arrays["cls.predictions.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"].copy()
    arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"].copy()
    save_file(arrays, tmp_path / "model.safetensors")
    edit(tmp_path, dtype=..., architectures=[architecture] if architecture else ...)
    loaded = tinyllm.from_pretrained(tmp_path)
    assert loaded.config.architecture == (architecture or "BertModel")
    for name, array in model.state_dict().items():
        assert np.array_equal(loaded.state_dict()[name], array), name
    loaded.save_pretrained(tmp_path / "new")  # in today's spelling
    assert set(older(stored(tmp_path / "new"))) & set(stored(tmp_path / "new")) < set(
        stored(tmp_path / "new")
    )
    assert_identical(tinyllm.from_pretrained(tmp_path / "new"), loaded)


def test_the_bare_encoder_with_and_without_a_prefix_and_a_pooler(tmp_path):
    model = scramble(BERT(replace(TINY, architecture="BertModel", heads=("pooler",))))
    model.save_pretrained(tmp_path)
    arrays = stored(tmp_path) | {"embeddings.position_ids": np.arange(80)[None]}
    save_file(arrays, tmp_path / "model.safetensors")
    assert_identical(tinyllm.from_pretrained(tmp_path), model)
    save_file({f"bert.{name}": array for name, array in arrays.items()}, tmp_path / "model.safetensors")
    assert_identical(tinyllm.from_pretrained(tmp_path), model)
    save_file(
        {name: array for name, array in arrays.items() if "pooler" not in name},
        tmp_path / "model.safetensors",
    )
    loaded = tinyllm.from_pretrained(tmp_path)
    assert loaded.pooler is None and loaded(np.ones((1, 3), int)).pooler_output is None


def test_a_task_with_more_heads_in_its_file(tmp_path):
    """Old taggers were saved with the pooler that they do not use."""
    model = make("tags")
    model.save_pretrained(tmp_path)
    arrays = stored(tmp_path)
    arrays |= {
        "bert.pooler.dense.weight": np.ones((24, 24), np.float32),
        "bert.pooler.dense.bias": np.ones(24, np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    ids = padded(2, 9)[0]
    loaded = tinyllm.from_pretrained(tmp_path)
    assert type(loaded) is TokenTagger and loaded(ids).pooler_output.shape == (2, 24)
    assert np.array_equal(loaded(ids).logits.numpy(), model(ids).logits.numpy())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_output_layer_that_is_not_tied(tmp_path, name):
    """In the last bit of one number."""
    model = make()
    model.save_pretrained(tmp_path)
    arrays = stored(tmp_path)
    tied = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}[name]
    other = arrays[f"cls.predictions.decoder.{name}"] = arrays[tied].copy()
    other.flat[7] = np.nextafter(other.flat[7], np.float32(9))
    save_file(arrays, tmp_path / "model.safetensors")
    assert f"decoder.{name}" in one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path))


@pytest.mark.parametrize("stored_as", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(tmp_path, stored_as):
    model = make("classes")
    model.save_pretrained(tmp_path)
    save_file(
        {name: a.astype(stored_as) for name, a in stored(tmp_path).items()}, tmp_path / "model.safetensors"
    )
    edit(tmp_path, dtype=..., torch_dtype="bfloat16")
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(stored_as).astype(np.float32)
    assert_identical(tinyllm.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "lost",
    [
        ["bert.pooler.dense.bias"],
        ["bert.encoder.layer.1.output.LayerNorm.weight"],
        ["cls.seq_relationship.weight", "cls.seq_relationship.bias"],
    ],
)
def test_tensors_that_are_missing_or_left_over(tmp_path, lost):
    make().save_pretrained(tmp_path)
    arrays = stored(tmp_path)
    save_file({n: a for n, a in arrays.items() if n not in lost}, tmp_path / "model.safetensors")
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path))
    assert f"{len(lost)} missing ({', '.join(lost)})" in message
    save_file(arrays | {"classifier.weight": np.ones((2, 24), np.float32)}, tmp_path / "model.safetensors")
    message = one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path))
    assert "1 left over (classifier.weight)" in message


def test_the_number_of_labels(tmp_path):
    """Published files name it only through id2label, and two labels not at all."""
    for count in (1, 2, 4):
        model = TokenTagger.on(BERT(TINY), [f"LABEL_{i}" for i in range(count)])
        model.save_pretrained(tmp_path)
        edit(tmp_path, id2label=..., label2id=...) if count == 2 else edit(tmp_path, label2id=...)
        assert_identical(tinyllm.from_pretrained(tmp_path), model)
    edit(tmp_path, id2label=..., num_labels=1)
    assert "2 misshapen" in one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path))


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_the_problem_that_we_implement(tmp_path, problem_type):
    model = make("classes")
    model.save_pretrained(tmp_path)
    edit(tmp_path, problem_type=problem_type)
    assert_identical(tinyllm.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("task", [SequenceClassifier, TokenTagger])
def test_one_label_has_logits_and_no_loss(tmp_path, task):
    """As the cross-encoders of sentence-transformers are, with what that library adds to config.json."""
    model = scramble(task.on(BERT(TINY), ["LABEL_0"]))
    model.save_pretrained(tmp_path)
    edit(
        tmp_path, sbert_ce_default_activation_function="torch.nn.modules.linear.Identity",
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"},
    )  # fmt: skip
    loaded, inputs = tinyllm.from_pretrained(tmp_path), padded()
    assert_identical(loaded, model)
    shape = (5, 1) if task is SequenceClassifier else (5, 70, 1)
    assert loaded(*inputs).logits.shape == shape
    said = one_line(pytest.raises(InputError, loaded.loss, inputs, np.zeros(shape[:-1], int)))
    assert "one label has logits but no loss" in said and "regression" in said


@pytest.mark.parametrize(
    "option, said",
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"pooler_type": "mean"}, "pooler_type = 'mean'"),
        ({"embedding_size": 12}, "embedding_size = 12 (unknown)"),
        ({"heads": ["pooler"]}, "heads = ['pooler'] (unknown)"),
        ({"num_attention_heads": 5}, "5 heads do not divide the width 24"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"type_vocab_size": 0}, "type_vocab_size is 0"),
        ({"classifier_dropout": 2}, "classifier_dropout is 2"),
        ({"architectures": ["BertForMultipleChoice"]}, "'BertForMultipleChoice' is not one of ours"),
        ({"architectures": "BertModel"}, "must be a list of names"),
        ({"architectures": [3]}, "must be a list of names"),
        ({"id2label": {"0": "a", "2": "b"}}, "must name the classes 0, 1, 2, ..."),
        ({"id2label": ["a"]}, "must name the classes"),
        ({"id2label": ..., "num_labels": 0}, "num_labels is 0"),
        ({"problem_type": "regression"}, "problem_type = 'regression'"),
        ({"problem_type": "multi_label_classification"}, "problem_type = 'multi_label_classification'"),
        ({"model_type": "gpt2"}, "'gpt2', not 'bert'"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_are_refused(tmp_path, option, said):
    make("classes").save_pretrained(tmp_path)
    edit(tmp_path, **option)
    assert said in one_line(pytest.raises(InputError, BERT.from_pretrained, tmp_path))


def test_heads_that_are_unknown():
    assert "heads are some of" in one_line(pytest.raises(InputError, replace, TINY, heads=("classifier",)))
