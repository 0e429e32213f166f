"""GPT-2 against transformers: the same function, gradients, files and text."""

from __future__ import annotations

import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import below, which reads it
torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[reference]'")

import tinyllm  # noqa: E402
from autograd import no_grad  # noqa: E402
from tinyllm.models import GPT2, GPT2Config  # noqa: E402

CONFIGS = {
    "plain": {},
    "narrow mlp": {"n_inner": 20, "layer_norm_epsilon": 1e-2},
    "one head": {"n_head": 1, "n_layer": 1, "activation_function": "gelu_pytorch_tanh"},
}


def reference(**options):
    """transformers' model with random weights that make mistakes visible: no bias near 0, no norm near 1."""
    config = transformers.GPT2Config(
        **{
            "vocab_size": 61, "n_positions": 70, "n_embd": 24, "n_layer": 3, "n_head": 4,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": None, "eos_token_id": None, **options,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(**CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


def random_ids(*shape):
    return np.random.default_rng(shape).integers(0, 61, shape)


def logits_of(theirs, ids):
    with torch.no_grad():
        return theirs(torch.from_numpy(ids)).logits.float().numpy()


def our_logits(ours, ids):
    with no_grad():
        return ours(ids).numpy()


@pytest.mark.parametrize("length", [1, 2, 65, 70])
def test_logits(pair, length):
    theirs, ours, _ = pair
    ids = random_ids(3, length)
    expected = logits_of(theirs, ids)
    found = our_logits(ours, ids)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_logits_in_float64(pair):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    ids = random_ids(2, 70)
    with torch.no_grad():
        expected = theirs.double()(torch.from_numpy(ids)).logits.numpy()
    theirs.float()
    np.testing.assert_allclose(
        our_logits(GPT2.from_pretrained(folder, np.float64), ids), expected, rtol=0, atol=1e-11
    )


# float32: a gradient here is a sum over 138 positions of terms of either sign, each rounded to 6e-8 of
# itself; so its error is measured against the largest of its tensor. A key's bias has the gradient 0.
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_loss_and_gradients(pair, dtype, tolerance):
    theirs, _, folder = pair
    ours, ids = GPT2.from_pretrained(folder, dtype), random_ids(2, 70)
    theirs.zero_grad()
    theirs.to(torch.float64 if dtype == np.float64 else torch.float32)
    labels = torch.from_numpy(ids).clone()
    labels[1, 5:9] = -100
    logits = theirs(torch.from_numpy(ids)).logits  # theirs(ids, labels=labels) rounds them to float32
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss = ours.loss(ids[:, :-1], labels.numpy()[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    theirs.float()
    theirs.zero_grad()
    assert len(gradients) == len(ours.parameters())
    for name, parameter in ours.named_parameters():
        g = gradients[ours.published_name(name)]
        found = parameter.grad.numpy()
        # In the published layout the matrices of the blocks are stored (in, out).
        is_conv = found.ndim == 2 and "embedding" not in name
        np.testing.assert_allclose(
            found.T if is_conv else found, g, rtol=0, atol=tolerance * np.abs(g).max(), err_msg=name
        )


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is transformers.GPT2LMHeadModel and again.dtype == torch.float32
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for option in ("n_inner", "n_head", "layer_norm_epsilon", "resid_pdrop", "n_positions"):
        assert getattr(again.config, option) == getattr(theirs.config, option)
    ids = random_ids(2, 70)
    # The same weights; but where an array happens to lie in memory, its sums may round otherwise.
    np.testing.assert_allclose(logits_of(again.eval(), ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    ours = GPT2(GPT2Config(61, 70, 24, 2, 3), seed=0).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 70)
    np.testing.assert_allclose(our_logits(ours, ids), logits_of(theirs, ids), rtol=0, atol=5e-5)
    assert GPT2.from_pretrained(tmp_path).config == ours.config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    ours, ids = tinyllm.from_pretrained(tmp_path), random_ids(2, 70)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(our_logits(ours, ids), logits_of(halves.float(), ids), rtol=0, atol=5e-5)


def test_float16_is_written(tmp_path):
    ours = GPT2(GPT2Config(61, 70, 24, 2, 3), seed=0).to(dtype=np.float16)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float16
    expected = ours.state_dict()["position_embedding.weight"]
    assert np.array_equal(theirs.transformer.wpe.weight.detach().numpy(), expected)


def test_shards(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = random_ids(2, 70)
    np.testing.assert_allclose(
        our_logits(tinyllm.from_pretrained(tmp_path), ids), logits_of(theirs, ids), rtol=0, atol=5e-5
    )


def test_the_bare_model_without_a_head(tmp_path):
    """Written by GPT2Model: no tensor has the prefix, as in the files of the first releases."""
    theirs = reference()
    theirs.transformer.save_pretrained(tmp_path)
    ids = random_ids(2, 70)
    np.testing.assert_allclose(
        our_logits(tinyllm.from_pretrained(tmp_path), ids), logits_of(theirs, ids), rtol=0, atol=5e-5
    )


def test_greedy_text(pair):
    theirs, ours, _ = pair
    ids = random_ids(2, 6)
    with torch.no_grad():
        expected = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.ones(2, 6, dtype=torch.int64),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )
    found = ours.generate(ids, 64, temperature=0)
    assert np.array_equal(found, expected.numpy()) and found.shape == (2, 70)


@pytest.mark.parametrize(
    "option",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"activation_function": "gelu"},
        {"tie_word_embeddings": False},
        {"add_cross_attention": True},
    ],
    ids=str,
)
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, tmp_path):
    reference(**option).save_pretrained(tmp_path)
    with pytest.raises(tinyllm.InputError, match=next(iter(option))):
        tinyllm.from_pretrained(tmp_path)
