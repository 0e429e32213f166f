"""What holds of every causal model, whatever is inside: each test runs on each model of tiny.py."""

from __future__ import annotations

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import autograd.functional as F
import tinyllm
from autograd import backend, no_grad, optim
from tinyllm.errors import InputError
from tinyllm.generation import beam_search
from tinyllm.model import CausalModel
from tinyllm.parallel import DataParallel
from tinyllm.pretrained import read_config

from .folders import assert_identical, edit, one_line, stored
from .tiny import TINY, assert_gradients_are_derivatives, fresh, tokens

# Models that see the last token alone.
FORGETFUL = {"bigram"}
# Parameters that a loss cannot see, as slices of their gradients: a key's bias adds the same to all scores of
# a query, and softmax takes what is common away.
UNSEEN = {"query_key_value.bias": lambda n: np.s_[n // 3 : 2 * n // 3]}


@pytest.fixture(params=TINY)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return TINY[name](0)


def length(model):
    """Positions to test: all that the model has, but at most 80, more than one block of attention."""
    return min(model.context, 80)


def test_every_causal_model_has_a_row():
    causal = {kind for kind in tinyllm._MODELS.values() if issubclass(kind, CausalModel)}
    rows = {name: make(0) for name, make in TINY.items()}
    assert causal <= {type(model) for model in rows.values()}
    for name, model in rows.items():
        assert not any(module.training for module in model.modules()), name
        again, other = TINY[name](0).state_dict(), TINY[name](1).state_dict()
        for key, array in model.state_dict().items():
            assert array.dtype == np.float32
            assert np.array_equal(array, again[key]) and not np.array_equal(array, other[key]), (name, key)
            # Scrambled: no weight that is left out, or stands in another's place, goes unnoticed.
            assert np.unique(array).size > 0.9 * array.size and np.abs(array).std() > 0.05, (name, key)


# The function that it computes


def test_the_future_changes_nothing_before_it(both, model):
    """In float64, for rounding alone may tell of the future: WKV scales a block of steps by its largest."""
    L = length(model)
    assert model(tokens(model, 2, L)).dtype == np.float32
    ids = tokens(model, 2, L)
    before = model.to(dtype=np.float64)(ids).numpy()
    assert before.shape == (2, L, model.vocabulary_size)
    for changed in (1, L // 2, L - 1):
        other = ids.copy()
        other[:, changed:] = (other[:, changed:] + 5) % model.vocabulary_size
        difference = np.abs(model(other).numpy() - before).max(axis=(0, 2))  # (L,)
        assert (difference[:changed] < 1e-12).all() and (difference[changed:] > 1e-4).all()


def test_every_earlier_token_and_its_place_matter(both, name, model):
    ids = tokens(model, 1, 10)
    last = model(ids).numpy()[0, -1]
    others = [np.concatenate([ids[:, 8::-1], ids[:, 9:]], axis=1)]
    for i in range(9):
        others.append(ids.copy())
        others[-1][0, i] = (ids[0, i] + 1) % model.vocabulary_size
    effects = [np.abs(model(other).numpy()[0, -1] - last).max() for other in others]
    assert np.max(effects) == 0 if name in FORGETFUL else np.min(effects) > 1e-4


def test_rows_do_not_meet(both, model):
    ids = tokens(model, 3, 20)
    together = model(ids).numpy()
    for row, alone in zip(together, ids):
        np.testing.assert_allclose(model(alone[None]).numpy()[0], row, rtol=0, atol=1e-5)


def test_loss_is_the_cross_entropy_of_the_logits(both, model):
    ids, targets = tokens(model, 3, 20), tokens(model, 3, 20, seed=1)
    targets[0, :7] = targets[2, 5] = -100
    logits = model(ids).numpy().astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kept = targets != -100
    nats = -log_p[kept, targets[kept]]
    assert model.loss(ids, targets).item() == pytest.approx(nats.mean(), rel=1e-5)
    assert model.loss(ids, targets, reduction="sum").item() == pytest.approx(nats.sum(), rel=1e-5)


def test_hidden_states_and_head_are_the_halves_of_forward(both, model):
    ids = tokens(model, 2, 9)
    assert np.array_equal(model.head(model.hidden_states(ids)).numpy(), model(ids).numpy())
    with no_grad():  # the last position alone, as generation asks for it
        np.testing.assert_allclose(
            model.head(model.hidden_states(ids)[:, -1]).numpy(), model(ids).numpy()[:, -1], rtol=0, atol=1e-5
        )


def gradients(model):
    """Of every parameter, from a loss that sees every position and every token of the vocabulary."""
    B, T = 4, length(model)
    ids, targets = (np.resize(tokens(model, B * T, seed=seed), B * T + 1) for seed in (0, 1))
    ids[: model.vocabulary_size] = targets[: model.vocabulary_size] = np.arange(model.vocabulary_size)
    model.train().loss(ids[:-1].reshape(B, T), targets[1:].reshape(B, T)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_gets_a_gradient(both, model):
    for name, g in gradients(model).items():
        parameter, g = model.state_dict()[name], g.numpy()
        assert g.shape == parameter.shape and g.dtype == np.float32, name
        for ending, part in UNSEEN.items():
            if name.endswith(ending):
                assert np.abs(g[part(len(g))]).max() < 1e-6
                g = np.delete(g, part(len(g)))
        assert np.isfinite(g).all() and (g != 0).all(), name


def test_frozen_parameters_get_none_and_the_others_the_same(both, name, model):
    expected = gradients(model)
    for i in (0, 1)[: len(expected)]:
        again = TINY[name](0)
        for j, parameter in enumerate(again.parameters()):
            parameter.requires_grad = j % 2 == i
        for j, (key, g) in enumerate(gradients(again).items()):
            assert (g is None) == (j % 2 != i), key
            if g is not None:
                np.testing.assert_allclose(g.numpy(), expected[key].numpy(), rtol=0, atol=1e-5, err_msg=key)


def test_gradients_are_derivatives(both, model):
    model.to(dtype=np.float64).train()
    ids, targets = tokens(model, 2, 7), tokens(model, 2, 7, seed=1)
    targets[0, 3] = -100
    assert_gradients_are_derivatives(model, ids, targets)


def test_float64_is_the_same_function_without_a_float32_in_it(both, model):
    """Rounded once: a float32 anywhere inside would leave an error of 1e-7 of the largest number there."""
    ids = tokens(model, 2, length(model))
    single = model(ids).numpy()
    double = model.to(dtype=np.float64)(ids).numpy()
    assert double.dtype == np.float64 and np.abs(double).max() > 1
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-4)
    F.use_fused(both == "composed")  # the other way of computing it
    np.testing.assert_allclose(model(ids).numpy(), double, rtol=0, atol=1e-11)
    loss = model.train().loss(ids, ids)
    loss.backward()
    assert loss.dtype == np.float64
    assert all(parameter.grad.dtype == np.float64 for parameter in model.parameters())


def train(model, steps=20, batch=4, context=32):
    """Its losses over some steps of AdamW with clipping, and dropout as the model has it."""
    model.train()
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        F.manual_seed((0, step))
        ids = tokens(model, batch, min(context, length(model) - 1) + 1, seed=step % 2)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def test_composed_operations_train_alike(model):
    fused = train(fresh(model, seed=1))
    F.use_fused(False)
    try:
        composed = train(fresh(model, seed=1))
    finally:
        F.use_fused(True)
    assert fused[-1] < fused[0] - 0.2
    assert np.abs(fused - composed).max() < 1e-4


def test_a_batch_overfits(name, model):
    """All tokens but each row's first are certain in the end, though a token has many followers there."""
    model, ids = fresh(model).train(), tokens(model, 4, 17)
    ids[:, 0] = np.arange(4)
    if name in FORGETFUL:  # there a token has one follower
        ids = (ids[:, :1] + np.arange(17)) % model.vocabulary_size
    optimizer = optim.AdamW(model.parameters(), lr=0.3 if name in FORGETFUL else 2e-2, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.02
    assert (model.eval()(ids[:, :-1]).numpy().argmax(-1) == ids[:, 1:]).mean() > 0.99


def test_bad_ids(model):
    V = model.vocabulary_size
    for bad in (V, -1):
        with pytest.raises(IndexError, match=str(bad)):
            model(np.array([[0, bad]]))
        with pytest.raises(IndexError, match=str(bad)):
            model.loss(np.array([[0, 0]]), np.array([[0, bad]]))
    with pytest.raises(TypeError, match="integer"):
        model(np.array([[0.0, 1.0]]))
    for bad in (np.array([0, 1]), np.zeros((0, 3), int), np.zeros((2, 0), int)):
        with pytest.raises(InputError, match=r"\(batch, length\)"):
            model(bad)
    if model.context < 10_000:
        with pytest.raises(InputError, match=f"{model.context + 1} tokens .* context of {model.context}"):
            model(np.zeros((1, model.context + 1), int))
    from_list = model([[1, 2]]).numpy()
    assert np.array_equal(from_list, model(np.array([[1, 2]], np.uint8)).numpy())


# Generation


def pieces(L):
    """Ways of cutting L positions into the calls that a cache meets."""
    yield [1] * L
    yield [3, 4, L - 7]
    yield [L]
    yield [L - 2, 1, 1]
    yield [7] * (L // 7) + [L % 7] * (L % 7 > 0)


def test_cached_logits_are_the_uncached(both, model):
    """However the positions are cut; tokens of one row are another's in the other order, as a select does."""
    L = length(model)
    ids = tokens(model, 2, L)
    with no_grad():
        expected = model(ids).numpy()
        assert np.abs(expected).max() > 1
        for cut in pieces(L):
            cache, found = model.new_cache(L), []
            for start, size in zip(itertools.accumulate([0, *cut]), cut):
                assert cache.length == start
                found.append(model(ids[:, start : start + size], cache).numpy())
            assert cache.length == L
            np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-5)


def test_a_cache_goes_on_with_the_rows_selected(both, model):
    """In another order, some twice and some not at all; and whoever is selected shares nothing."""
    L = length(model)
    ids, rows = tokens(model, 3, L), [2, 0, 2, 2]
    later = tokens(model, 4, L, seed=1)
    for half in (3, L // 2):
        whole = np.concatenate([ids[rows, :half], later[:, half:]], axis=1)
        with no_grad():
            cache = model.new_cache(L)
            model(ids[:, :half], cache)
            cache.select(rows)
            found = [model(whole[:, i : i + 1], cache).numpy() for i in range(half, L)]
            np.testing.assert_allclose(
                np.concatenate(found, axis=1), model(whole).numpy()[:, half:], rtol=0, atol=1e-5
            )


def test_a_cache_says_what_memory_it_holds(name, model):
    with no_grad():
        cache = model.new_cache(12)
        before = cache.nbytes
        model(tokens(model, 2, 3), cache)
        one = cache.nbytes
        cache.select([0, 1, 1, 0])
    assert before == 0 and cache.nbytes == 2 * one
    assert (one == 0) == (name in FORGETFUL)


SETTINGS = [{"temperature": 0}, {"seed": 2, "temperature": 0.7, "top_k": 9, "top_p": 0.9}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "drawn"])
def test_cached_tokens_are_the_uncached(model, settings):
    """Past the context too, where the window of tokens moves."""
    L = length(model)
    for start, new in ((1, 20), (L - 3, 6)):
        ids = tokens(model, 2, start)
        cached = model.generate(ids, new, **settings)
        assert cached.shape == (2, start + new) and np.array_equal(cached[:, :start], ids)
        assert np.array_equal(cached, model.generate(ids, new, use_cache=False, **settings))


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_takes_the_likeliest_of_what_the_context_shows(model, use_cache):
    L = length(model)
    ids = tokens(model, 2, L - 3)
    found = model.generate(ids, 6, temperature=0, use_cache=use_cache)
    for end in range(L - 3, L + 3):
        seen = found[:, max(0, end - model.context) : end]
        assert np.array_equal(model(seen).numpy()[:, -1].argmax(-1), found[:, end])


def ragged(model, longest=14):
    """Prompts of different lengths, the shortest in the middle."""
    return [tokens(model, n, seed=n).tolist() for n in (9, 1, longest, 9, 4)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths_write_what_each_alone_does(model, use_cache):
    """With a cache one of them goes past the context."""
    prompts = ragged(model, length(model) - 2 if use_cache else 14)
    together = model.generate(prompts, 6, temperature=0, use_cache=use_cache)
    for row, prompt in zip(together, prompts):
        alone = model.generate([prompt], 6, temperature=0, use_cache=use_cache)[0]
        assert row[: len(alone)].tolist() == alone.tolist() and (row[len(alone) :] == -1).all()


def test_stop_tokens_end_each_row_by_itself(model):
    prompts = ragged(model)
    free = [model.generate([prompt], 12, temperature=0)[0].tolist() for prompt in prompts]
    stop = {free[0][9], free[2][-2]}  # the first token that row 0 writes, and a late one of row 2
    expected = []
    for row, prompt in zip(free, prompts):
        ends = [i for i in range(len(prompt), len(row)) if row[i] in stop]
        expected.append(row[: ends[0] + 1] if ends else row)
    assert len(expected[0]) == 10
    found = model.generate(prompts, 12, temperature=0, stop=stop)
    assert [row[row != -1].tolist() for row in found] == expected
    assert found.shape == (5, max(map(len, expected)))


def test_the_seed_decides(model):
    ids = tokens(model, 2, 4)
    one = model.generate(ids, 20, seed=7)
    assert np.array_equal(one, model.generate(ids, 20, seed=7))
    assert not np.array_equal(one, model.generate(ids, 20, seed=8))
    assert np.array_equal(one[:, :10], model.generate(ids, 6, seed=7))


def every_continuation(model, prompt, n, alpha, stop):
    """(tokens, score) of all texts of n tokens, or fewer that end with a token of stop, the best first."""
    V = model.vocabulary_size
    found, rows, scores = [], np.zeros((1, 0), int), np.zeros(1)
    for size in range(1, n + 1):
        logits = model(np.concatenate([np.tile(prompt, (len(rows), 1)), rows], axis=1)).numpy()[:, -1]
        logits = logits.astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = np.concatenate([np.repeat(rows, V, axis=0), np.tile(np.arange(V), len(rows))[:, None]], axis=1)
        scores = (scores[:, None] + log_p).reshape(-1)
        ended = np.isin(rows[:, -1], list(stop)) | (size == n)
        found += zip(rows[ended].tolist(), scores[ended] / ((5 + size) / 6) ** alpha)
        rows, scores = rows[~ended], scores[~ended]
    return sorted(found, key=lambda pair: -pair[1])


@pytest.mark.parametrize("alpha, stop", [(0.0, ()), (0.6, (3,)), (2.0, (3, 5, 8))])
def test_a_beam_as_wide_as_all_texts_finds_the_best(model, alpha, stop):
    prompt, n = tokens(model, 5), 2
    expected = every_continuation(model, prompt, n, alpha, stop)
    assert len(expected) == model.vocabulary_size * (model.vocabulary_size - len(stop)) + len(stop)
    for use_cache in (True, False):
        found = beam_search(model, prompt, n, len(expected), alpha, stop, use_cache)
        assert sorted(beam.tokens for beam in found) == sorted(text for text, _ in expected)
        np.testing.assert_allclose(
            [beam.score for beam in found], [score for _, score in expected], rtol=0, atol=1e-5
        )
        of_text = {tuple(text): score for text, score in expected}
        assert all(beam.score == pytest.approx(of_text[tuple(beam.tokens)], abs=1e-5) for beam in found)


def test_a_beam_of_one_is_greedy(model):
    L = length(model)
    for start in (4, L - 3):  # past the context too
        prompt = tokens(model, start)
        (beam,) = model.beam_search(prompt, 6, width=1)
        assert beam.tokens == model.generate([prompt], 6, temperature=0)[0, start:].tolist()


def test_beams_with_a_cache_are_those_without(model):
    prompt = tokens(model, 6)
    for stop in ((), (1, 2, 3, 4)):
        cached = beam_search(model, prompt, 8, 4, 0.6, stop)
        uncached = beam_search(model, prompt, 8, 4, 0.6, stop, use_cache=False)
        assert [beam.tokens for beam in cached] == [beam.tokens for beam in uncached]
        assert [b.score for b in cached] == pytest.approx([b.score for b in uncached], abs=1e-5)
        assert len(cached) == 4 and len({tuple(beam.tokens) for beam in cached}) == 4
        assert all(beam.score >= other.score for beam, other in itertools.pairwise(cached))


# Folders


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_saving_and_loading_is_the_identity(tmp_path, model, dtype):
    model.to(dtype=dtype).save_pretrained(tmp_path)
    for load in (type(model).from_pretrained, tinyllm.from_pretrained):
        loaded = load(str(tmp_path), dtype)
        assert_identical(loaded, model)
        assert not any(module.training for module in loaded.modules())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == np.dtype(dtype).name and config["model_type"] == model.model_type
    if dtype == np.float32:
        ids = tokens(model, 2, length(model))
        assert np.array_equal(loaded(ids).numpy(), model(ids).numpy())


def test_the_ids_of_tokens_come_back(tmp_path, model):
    """They change no number, but who writes a text with the model asks config.json where it ends."""
    ids = {"bos_token_id": 4, "eos_token_id": [5, 6], "pad_token_id": None}
    model.save_pretrained(tmp_path / "a")
    own = read_config(tmp_path / "a")
    edit(tmp_path / "a", **ids)
    tinyllm.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert read_config(tmp_path / "b") == {**own, **ids}


@pytest.mark.parametrize("stored_as", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(tmp_path, model, stored_as):
    """A half is exact in the wider types. The type in the config, here under its older name, says nothing."""
    model.save_pretrained(tmp_path)
    halves = {name: array.astype(stored_as) for name, array in stored(tmp_path).items()}
    save_file(halves, tmp_path / "model.safetensors")
    edit(tmp_path, dtype=..., torch_dtype="bfloat16")
    for dtype in (np.float32, np.float64):
        for parameter in model.parameters():
            parameter.data = parameter.data.astype(stored_as).astype(dtype)
        assert_identical(type(model).from_pretrained(tmp_path, dtype), model)


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "gpt3"])
def test_a_head_that_is_not_the_embedding(tmp_path, model):
    """In the last bit of one number."""
    model.save_pretrained(tmp_path)
    arrays = stored(tmp_path)
    head = arrays["lm_head.weight"] = arrays[model.published_name("token_embedding.weight")].copy()
    save_file(arrays, tmp_path / "model.safetensors")
    assert_identical(tinyllm.from_pretrained(tmp_path), model)
    head[3, 5] = np.nextafter(head[3, 5], np.float32(9))
    save_file(arrays, tmp_path / "model.safetensors")
    assert "lm_head.weight" in one_line(pytest.raises(InputError, tinyllm.from_pretrained, tmp_path))


# On a device


def step_and_generate(device, folder, make):
    """What two training steps, a checkpoint between them and generation give on a device, on the host."""
    model = fresh(make(0)).train().to(device)
    xp = backend.device_module(device)
    ids = tokens(model, 4, 21)

    def new_optimizer(model):
        return optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)

    def step(model, optimizer):
        optimizer.zero_grad()
        with DataParallel(model) as parallel:
            loss = parallel.gradients(ids[:, :-1], ids[:, 1:], seed=(0,))
        norm = optim.clip_grad_norm(model.parameters(), 0.5)
        assert all(type(p.grad.data) is xp.ndarray for p in model.parameters())
        optimizer.step()
        return loss, norm

    optimizer = new_optimizer(model)
    found = {"first": step(model, optimizer)}
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).train().to(device)
    resumed = new_optimizer(again)
    resumed.load_state_dict(optimizer.state_dict())
    found["second"], found["resumed"] = step(model, optimizer), step(again, resumed)
    for m in (model, again):
        assert all(type(p.data) is xp.ndarray and p.dtype == np.float32 for p in m.parameters())
    with no_grad():
        found["logits"] = model.eval()(ids).numpy()
    model, L = make(0).to(device), length(model)
    prompts = [tokens(model, n, seed=n).tolist() for n in (3, 5, 1)]
    found["greedy"] = model.generate(prompts, 4, temperature=0, stop=[3])
    drawn = {"seed": 5, "top_k": 7, "top_p": 0.9}
    found["drawn"] = model.generate(xp.asarray(tokens(model, 2, L - 2)), 4, **drawn)  # past the context
    assert np.array_equal(
        model.generate(prompts, 3, **drawn), model.generate(prompts, 3, use_cache=False, **drawn)
    )
    found["beams"] = model.beam_search(prompts[0], 4, width=3, stop=[3])
    return found


def assert_alike(found, expected, tolerance):
    for name in ("first", "second", "resumed", "logits"):
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)
    assert found["second"] == pytest.approx(found["resumed"], rel=1e-6)
    assert found["second"][0] < found["first"][0]
    for name in ("greedy", "drawn"):
        assert type(found[name]) is np.ndarray and np.array_equal(found[name], expected[name])
    for beam, other in zip(found["beams"], expected["beams"], strict=True):
        assert beam.tokens == other.tokens and beam.score == pytest.approx(other.score, abs=tolerance)


@pytest.mark.parametrize("name", TINY)
def test_on_the_stand_in_for_a_gpu(strict_cupy, tmp_path, name):
    found, expected = (step_and_generate(device, tmp_path / device, TINY[name]) for device in ("cuda", "cpu"))
    assert_alike(found, expected, 1e-5)


def test_composed_operations_on_the_stand_in_for_a_gpu(strict_cupy, tmp_path):
    """Of one model: that each composition runs there, the table of operations tests."""
    F.use_fused(False)
    try:
        test_on_the_stand_in_for_a_gpu(strict_cupy, tmp_path, "gpt2")
    finally:
        F.use_fused(True)
