"""RWKV against transformers: the same function, gradients, states, files and text."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import below, which reads it
torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[reference]'")

import tinyllm  # noqa: E402
from autograd import no_grad  # noqa: E402
from tinyllm.models import RWKV, RWKVConfig  # noqa: E402

V = 61
CONFIGS = {
    "plain": {},
    "never halved": {"rescale_every": 0},
    "halved each time": {"rescale_every": 1, "layer_norm_epsilon": 1e-2},
    "narrow and wide": {"attention_hidden_size": 20, "intermediate_size": 36, "rescale_every": 3},
    "tied head": {"tie_word_embeddings": True, "rescale_every": -1, "num_hidden_layers": 2},
}
STATEFUL = [name for name in CONFIGS if name != "narrow and wide"]  # transformers' states have hidden_size


def reference(**options):
    """transformers' model with random weights that make mistakes visible: no norm near 1, no bias near 0."""
    config = transformers.RwkvConfig(
        **{
            "vocab_size": V, "context_length": 50, "hidden_size": 24, "num_hidden_layers": 4,
            "rescale_every": 2, "bos_token_id": None, "eos_token_id": None, **options,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


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
    return reference(**CONFIGS[name]).eval(), tinyllm.from_pretrained(folder)


@pytest.fixture
def in_float64(monkeypatch):
    """Their WKV rounds keys to float32 by calling .float() on them: let it leave them as they are."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def random_ids(*shape):
    return np.random.default_rng(shape).integers(0, V, shape)


def logits_of(theirs, ids, **options):
    with torch.no_grad():
        return theirs(torch.from_numpy(ids), **options).logits.numpy()


def our_logits(ours, ids, state=None):
    with no_grad():
        return ours(ids, state).numpy()


@pytest.mark.parametrize("length", [1, 2, 50, 130])
def test_logits(pair, length):
    """In evaluation and in training, which differ by the halving; and longer than context_length."""
    theirs, ours = pair
    ids = random_ids(3, length)
    for training in (False, True):
        expected = logits_of(theirs.train(training), ids, use_cache=False)
        found = our_logits(ours.train(training), ids)
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_logits_in_float64(pair, folder, name, in_float64):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, ids = pair[0].double(), random_ids(2, 70)
    ours, found = RWKV.from_pretrained(folder, np.float64), {}
    for training in (False, True):
        expected = logits_of(theirs.train(training), ids, use_cache=False)
        found[training] = our_logits(ours.train(training), ids)
        np.testing.assert_allclose(found[training], expected, rtol=0, atol=1e-11)
    # The halving shows in the epsilon of the norms alone, and so little that float32 could hide it.
    difference = np.abs(found[True] - found[False]).max()
    assert difference > 1e-9 if CONFIGS[name].get("rescale_every", 2) > 0 else difference == 0


# float32: a gradient here is a sum over 138 positions of terms of either sign, each rounded to 6e-8 of
# itself; so its error is measured against the largest of its tensor.
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-11)])
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients(pair, folder, dtype, tolerance, training, request):
    theirs, ours, ids = pair[0], RWKV.from_pretrained(folder, dtype).train(training), random_ids(2, 70)
    if dtype == np.float64:
        request.getfixturevalue("in_float64")
        theirs.double()
    theirs.train(training)
    labels = torch.from_numpy(ids).clone()
    labels[1, 5:9] = -100
    logits = theirs(torch.from_numpy(ids), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss = ours.loss(ids[:, :-1], labels.numpy()[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert len(gradients) == len(ours.parameters())
    for name, parameter in ours.named_parameters():
        g, found = gradients[ours.published_name(name)], parameter.grad.numpy()
        assert g.shape == ours.published_shape(name, found.shape)
        if not training and name.endswith(("time_mix.output.weight", "channel_mix.value.weight")):
            # Theirs is of weights divided by 2^halvings, so it is 2^halvings as large.
            g = g / 2 ** ours.blocks[int(name.split(".")[1])].halvings
        np.testing.assert_allclose(
            found, g.reshape(found.shape), rtol=0, atol=tolerance * np.abs(g).max(), err_msg=name
        )


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
    ours.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is transformers.RwkvForCausalLM and again.dtype == torch.float32
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for option in RWKVConfig.__dataclass_fields__:
        assert getattr(again.config, option) == getattr(theirs.config, option), option
    expected = logits_of(theirs, ids, use_cache=False)
    # The same weights; but where an array happens to lie in memory, its sums may round otherwise.
    np.testing.assert_allclose(logits_of(again.eval(), ids, use_cache=False), expected, rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    ours = RWKV(RWKVConfig(V, 50, 24, 3, 20, 30, rescale_every=2), seed=0).eval()
    rng = np.random.default_rng(0)
    for block in ours.blocks:  # whose zeros would hide most of it
        for linear in (block.time_mix.output, block.time_mix.key, block.channel_mix.value):
            linear.weight.data = rng.normal(0, 0.2, linear.weight.shape).astype(np.float32)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 70)
    expected = logits_of(theirs, ids, use_cache=False)
    np.testing.assert_allclose(our_logits(ours, ids), expected, rtol=0, atol=5e-5)
    assert RWKV.from_pretrained(tmp_path).config == ours.config


def test_their_own_initialization(tmp_path):
    """Ours is theirs where theirs follows the paper; their bonus u is 1 throughout."""
    sizes = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 3, "attention_hidden_size": 20}
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
    ours, ids = tinyllm.from_pretrained(tmp_path), random_ids(2, 70)
    assert ours.dtype == np.float32
    expected = logits_of(halves.float().eval(), ids, use_cache=False)
    np.testing.assert_allclose(our_logits(ours, ids), expected, rtol=0, atol=5e-5)


def test_shards(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = random_ids(2, 70)
    expected = logits_of(theirs.eval(), ids, use_cache=False)
    np.testing.assert_allclose(
        our_logits(tinyllm.from_pretrained(tmp_path), ids), expected, rtol=0, atol=5e-5
    )


def test_the_bare_model_without_a_head(tmp_path):
    """Written by RwkvModel: no tensor has the prefix. A tied head needs no more; another is missed."""
    theirs = reference(tie_word_embeddings=True)
    theirs.rwkv.save_pretrained(tmp_path)
    ids = random_ids(2, 70)
    expected = logits_of(theirs.eval(), ids, use_cache=False)
    np.testing.assert_allclose(
        our_logits(tinyllm.from_pretrained(tmp_path), ids), expected, rtol=0, atol=5e-5
    )
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
    for row, prompt in zip(found, torch.from_numpy(ids)):
        with torch.no_grad():
            expected = theirs.generate(prompt[None], max_new_tokens=64, do_sample=False, pad_token_id=0)
        assert np.array_equal(row, expected[0].numpy())


@pytest.mark.parametrize("option", [{"is_decoder": True}, {"add_cross_attention": True}], ids=str)
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, tmp_path):
    reference(**option).save_pretrained(tmp_path)
    with pytest.raises(tinyllm.InputError, match=next(iter(option))):
        tinyllm.from_pretrained(tmp_path)
