"""RWKV against transformers: the same function, gradients, states, files and text."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tinyllm
from tinyllm.models import RWKV, RWKVConfig

from .reference import (
    VOCABULARY,
    assert_same_gradients,
    assert_same_hidden_states,
    assert_same_logits,
    assert_shards_are_read,
    converted,
    gradients_of_same_loss,
    greedy,
    logits_of,
    our_logits,
    random_ids,
    read_back,
    scrambled,
    torch,
    transformers,
)

CONFIGS = {
    "plain": {},
    "never halved": {"rescale_every": 0},
    "halved each time": {"rescale_every": 1, "layer_norm_epsilon": 1e-2},
    "narrow and wide": {"attention_hidden_size": 20, "intermediate_size": 36, "rescale_every": 3},
    "tied head": {"tie_word_embeddings": True, "rescale_every": -1, "num_hidden_layers": 2},
}
STATEFUL = [name for name in CONFIGS if name != "narrow and wide"]  # transformers' states have hidden_size
UNCACHED = {"use_cache": False}  # theirs without a state, for all configurations


def reference(**options):
    """transformers' model with random weights."""
    config = transformers.RwkvConfig(
        **{
            "vocab_size": VOCABULARY, "context_length": 50, "hidden_size": 24, "num_hidden_layers": 4,
            "rescale_every": 2, "bos_token_id": None, "eos_token_id": None, **options,
        }
    )  # fmt: skip
    return scrambled(transformers.RwkvForCausalLM, config)


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """A folder that transformers wrote, before any evaluation: that divides the weights themselves."""
    folder = tmp_path_factory.mktemp("published")
    reference(**CONFIGS[name]).save_pretrained(folder)
    return folder


@pytest.fixture
def pair(name, folder):
    """(transformers' model, ours read from its folder), both in evaluation mode."""
    return reference(**CONFIGS[name]), tinyllm.from_pretrained(folder)


@pytest.fixture
def in_float64(monkeypatch):
    """Their WKV rounds keys to float32 by calling .float() on them: let it leave them as they are."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


@pytest.mark.parametrize("length", [1, 2, 50, 130])
def test_logits(pair, length):
    """In evaluation and in training, which differ by the halving; and longer than context_length."""
    theirs, ours = pair
    ids = random_ids(3, length)
    for training in (False, True):
        found = assert_same_logits(theirs.train(training), ours.train(training), ids, **UNCACHED)
        assert found.dtype == np.float32 and np.abs(found).max() > 1


def test_logits_and_hidden_states_in_float64(pair, folder, name, in_float64):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, ids = pair[0].double(), random_ids(2, 70)
    ours, found = RWKV.from_pretrained(folder, np.float64), {}
    for training in (False, True):
        models = theirs.train(training), ours.train(training)
        found[training] = assert_same_logits(*models, ids, 1e-11, **UNCACHED)
        assert_same_hidden_states(*models, ids, 1e-11, **UNCACHED)
    # The halving shows in the epsilon of the norms alone, and so little that float32 could hide it.
    difference = np.abs(found[True] - found[False]).max()
    assert difference > 1e-9 if CONFIGS[name].get("rescale_every", 2) > 0 else difference == 0


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-11)])
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients(pair, folder, dtype, tolerance, training, request):
    theirs = converted(pair[0], dtype).train(training)
    ours = RWKV.from_pretrained(folder, dtype).train(training)
    if dtype == np.float64:
        request.getfixturevalue("in_float64")
    gradients = gradients_of_same_loss(theirs, ours, random_ids(2, 70), tolerance, **UNCACHED)
    for name, parameter in ours.named_parameters():
        g = gradients[name]
        assert g.shape == ours.published_shape(name, parameter.shape)
        if not training and name.endswith(("time_mix.output.weight", "channel_mix.value.weight")):
            # Theirs is of weights divided by 2^halvings, so it is 2^halvings as large.
            g = g / 2 ** ours.blocks[int(name.split(".")[1])].halvings
        gradients[name] = g.reshape(parameter.shape)
    assert_same_gradients(ours, gradients, tolerance)


@pytest.mark.parametrize("name", STATEFUL, scope="module", indirect=True)
def test_states(pair):
    """After a prompt, then after each token: the same logits, and the same numbers in the state.

    One text, for theirs takes a token (B, 1, C) and the one before it (B, C) for (B, B, C) numbers.
    """
    theirs, ours = pair
    ids, state, past = random_ids(1, 20), ours.new_cache(20), None
    for start, end in ((0, 13), (13, 14), (14, 15), (15, 20)):
        with torch.no_grad():
            out = theirs(torch.from_numpy(ids[:, start:end]), state=past, use_cache=True)
        past = out.state
        found = our_logits(ours, ids[:, start:end], state)
        np.testing.assert_allclose(found, out.logits.numpy(), rtol=0, atol=5e-5)
        for layer in range(ours.config.num_hidden_layers):
            channel, time, aa, bb, pp = (a[:, :, layer].numpy() for a in past)
            sums = state.get(f"WKV TimeMix {layer}")
            scale = np.exp(sums[2] - pp)  # whatever exponent they took out
            np.testing.assert_allclose(sums[0] * scale, aa, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(sums[1] * scale, bb, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(state.get(f"TimeMix {layer}")[0], time, rtol=0, atol=5e-5)
            np.testing.assert_allclose(state.get(f"ChannelMix {layer}")[0], channel, rtol=0, atol=5e-5)
    assert state.length == 20


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours = pair
    ids = random_ids(2, 50)
    our_logits(ours, ids)  # an evaluation, which must leave the weights alone
    again = read_back(theirs, ours, tmp_path)
    for option in RWKVConfig.__dataclass_fields__:
        assert getattr(again.config, option) == getattr(theirs.config, option), option
    found, expected = logits_of(again, ids, **UNCACHED), logits_of(theirs, ids, **UNCACHED)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    ours = RWKV(RWKVConfig(VOCABULARY, 50, 24, 3, 20, 30, rescale_every=2), seed=0).eval()
    rng = np.random.default_rng(0)
    for block in ours.blocks:  # whose zeros would hide most of it
        for linear in (block.time_mix.output, block.time_mix.key, block.channel_mix.value):
            linear.weight.data = rng.normal(0, 0.2, linear.weight.shape).astype(np.float32)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(theirs, ours, random_ids(2, 70), **UNCACHED)
    assert RWKV.from_pretrained(tmp_path).config == ours.config


def test_their_own_initialization(tmp_path):
    """Ours is theirs where theirs follows the paper; their bonus u is 1 throughout."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "attention_hidden_size": 20}
    theirs = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes)).state_dict()
    ours = RWKV(RWKVConfig(**sizes), seed=0)
    for name, parameter in ours.named_parameters():
        if "time_mix_" in name or "time_decay" in name:
            expected = theirs[ours.published_name(name)].numpy().reshape(parameter.shape)
            np.testing.assert_allclose(parameter.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    gram = lambda a: a.T @ a if len(a) > a.shape[1] else a @ a.T
    for name in ("output.weight", "blocks.1.time_mix.value.weight", "blocks.1.channel_mix.key.weight"):
        found, expected = ours.state_dict()[name], theirs[ours.published_name(name)].numpy()
        np.testing.assert_allclose(gram(found), gram(expected), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    assert_same_logits(halves.float(), tinyllm.from_pretrained(tmp_path), random_ids(2, 70), **UNCACHED)


def test_shards(tmp_path):
    assert_shards_are_read(reference(), tmp_path, random_ids(2, 70), **UNCACHED)


def test_the_bare_model_without_a_head(tmp_path):
    """Written by RwkvModel: no tensor has the prefix. A tied head needs no more; another is missed."""
    theirs = reference(tie_word_embeddings=True)
    theirs.rwkv.save_pretrained(tmp_path)
    assert_same_logits(theirs, tinyllm.from_pretrained(tmp_path), random_ids(2, 70), **UNCACHED)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["tie_word_embeddings"]  # which then means false
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(tinyllm.InputError, match=r"missing \(head.weight\)"):
        tinyllm.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", STATEFUL, scope="module", indirect=True)
def test_greedy_text(pair):
    """Longer than context_length, which limits nothing; two texts at once, where theirs writes one by one."""
    theirs, ours = pair
    ids = random_ids(2, 6)
    found = ours.generate(ids, 64, temperature=0)
    assert found.shape == (2, 70)
    for row, prompt in zip(found, ids):
        assert np.array_equal(row, greedy(theirs, prompt[None], 64)[0])


@pytest.mark.parametrize("option", [{"is_decoder": True}, {"add_cross_attention": True}], ids=str)
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, tmp_path):
    reference(**option).save_pretrained(tmp_path)
    with pytest.raises(tinyllm.InputError, match=next(iter(option))):
        tinyllm.from_pretrained(tmp_path)
