"""Mistral against transformers: the same function, gradients, files and text, far past the window."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import below, which reads it
torch = pytest.importorskip("torch", reason="needs the extra: pip install -e '.[reference]'")
transformers = pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[reference]'")

from transformers.models.mistral import modeling_mistral  # noqa: E402

import tinyllm  # noqa: E402
from autograd import no_grad  # noqa: E402
from tinyllm.models import Mistral, MistralConfig  # noqa: E402
from tinyllm.models.mistral import SIZES  # noqa: E402

CONFIGS = {
    "window": {},
    "no window": {"sliding_window": None},
    "window of one": {"sliding_window": 1},
    "wide heads": {"head_dim": 10, "num_attention_heads": 6, "rms_norm_eps": 1e-2},
    "a key head for each, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "as later versions": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "stretched": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
}


def configuration(**options):
    return transformers.MistralConfig(
        **{
            "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 150,
            "sliding_window": 16, "bos_token_id": None, "eos_token_id": None, **options,
        }
    )  # fmt: skip


def reference(**options):
    """transformers' model with random weights that make mistakes visible, no norm's weight near 1.

    Its eager attention, which has a mask for the window; some of the others leave that to the kernel.
    """
    torch.manual_seed(0)
    config = configuration(**options)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
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


@pytest.fixture
def in_double(monkeypatch):
    """double(theirs, ours): transformers' model computing in float64 what it always rounds to float32, except
    for the angles of the positions, which are float32 in both, and here the same."""

    def double(theirs, ours):
        exact = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
        monkeypatch.setattr(modeling_mistral, "torch", exact)

        def rotation(x, position_ids):
            tables = (np.concatenate([a, a], axis=1) for a in ours._rotation(0, position_ids.shape[1]))
            return tuple(torch.from_numpy(table)[None] for table in tables)

        monkeypatch.setattr(theirs.model.rotary_emb, "forward", rotation)
        return theirs.double()

    return double


def random_ids(*shape):
    return np.random.default_rng(shape).integers(0, 61, shape)


def logits_of(theirs, ids):
    with torch.no_grad():
        return theirs(torch.from_numpy(ids)).logits.float().numpy()


def our_logits(ours, ids):
    with no_grad():
        return ours(ids).numpy()


# A window is 16: around its end, around the end of a block of our attention, and many windows.
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 65, 150])
def test_logits(pair, length):
    theirs, ours, _ = pair
    assert type(ours) is Mistral
    ids = random_ids(3, length)
    expected, found = logits_of(theirs, ids), our_logits(ours, ids)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


def test_their_window_is_at_work(pair):
    """Or agreeing with them would say little: without it their logits differ, from the window's end on."""
    theirs, _, _ = pair
    window, ids = theirs.config.sliding_window, random_ids(3, 150)
    expected = logits_of(theirs, ids)
    theirs.config.sliding_window = None
    try:
        difference = np.abs(logits_of(theirs, ids) - expected).max(axis=(0, 2))
    finally:
        theirs.config.sliding_window = window
    if window is None:
        assert (difference == 0).all()
    else:
        assert (difference[:window] < 1e-5).all() and (difference[window:] > 1e-3).all()


def test_rotation(pair):
    """The tables of cosines and sines: float32 in both, where only the last digit may differ."""
    theirs, ours, _ = pair
    positions = torch.arange(150)[None]
    for expected, found in zip(theirs.model.rotary_emb(torch.zeros(1), positions), ours._rotation(0, 150)):
        np.testing.assert_allclose(np.tile(found, 2), expected[0].numpy(), rtol=0, atol=2e-7)


def test_logits_and_hidden_states_in_float64(pair, in_double):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    ours, ids = Mistral.from_pretrained(folder, np.float64), random_ids(2, 150)
    with torch.no_grad():
        found = in_double(theirs, ours)(torch.from_numpy(ids), output_hidden_states=True)
    theirs.float()
    with no_grad():
        hidden = ours.hidden_states(ids).numpy()
    np.testing.assert_allclose(hidden, found.hidden_states[-1].numpy(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(our_logits(ours, ids), found.logits.numpy(), rtol=0, atol=1e-11)


# float32: a gradient here is a sum over 298 positions of terms of either sign, each rounded to 6e-8 of
# itself; so its error is measured against the largest of its tensor.
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-12)])
def test_loss_and_gradients(pair, in_double, dtype, tolerance):
    theirs, _, folder = pair
    ours, ids = Mistral.from_pretrained(folder, dtype), random_ids(2, 150)
    theirs.zero_grad()
    if dtype == np.float64:
        in_double(theirs, ours)
    labels = torch.from_numpy(ids).clone()
    labels[1, 5:9] = -100
    logits = theirs(torch.from_numpy(ids)).logits  # theirs(ids, labels=labels) rounds them to float32
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss = ours.loss(ids[:, :-1], labels.numpy()[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert len(gradients) == len(ours.parameters())
    for name, parameter in ours.named_parameters():
        g, found = gradients[ours.published_name(name)], parameter.grad.numpy()
        if theirs.config.sliding_window == 1 and name.split(".")[-2] in ("query", "key"):
            assert np.abs([g, found]).max() < 1e-6  # of a single score the softmax is 1, whatever it is
            continue
        np.testing.assert_allclose(found, g, rtol=0, atol=tolerance * np.abs(g).max(), err_msg=name)
    theirs.float()


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert type(again) is transformers.MistralForCausalLM and again.dtype == torch.float32
    assert {kind: list(names) for kind, names in report.items() if names} == {}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    options = "sliding_window num_key_value_heads head_dim rms_norm_eps rope_parameters tie_word_embeddings"
    for option in (*options.split(), "max_position_embeddings"):
        assert getattr(again.config, option) == getattr(theirs.config, option)
    ids = random_ids(2, 150)
    # The same weights; but where an array happens to lie in memory, its sums may round otherwise.
    np.testing.assert_allclose(logits_of(again.eval(), ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    config = MistralConfig(61, 24, 40, 3, 4, 2, max_position_embeddings=150, sliding_window=16)
    ours = Mistral(config, seed=0).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = random_ids(2, 150)
    np.testing.assert_allclose(our_logits(ours, ids), logits_of(theirs, ids), rtol=0, atol=5e-5)
    assert Mistral.from_pretrained(tmp_path).config == config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    ours, ids = tinyllm.from_pretrained(tmp_path), random_ids(2, 150)
    assert ours.dtype == np.float32
    # Their positions' frequencies were rounded to halves with the weights; those are made anew.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    np.testing.assert_allclose(our_logits(ours, ids), logits_of(theirs.eval(), ids), rtol=0, atol=5e-5)


def test_shards(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = random_ids(2, 150)
    np.testing.assert_allclose(
        our_logits(tinyllm.from_pretrained(tmp_path), ids), logits_of(theirs, ids), rtol=0, atol=5e-5
    )


@pytest.mark.parametrize("start, end", [(3, 70), (40, 60)])
@pytest.mark.parametrize("window", [16, 5, None])
def test_greedy_text(window, start, end, tmp_path):
    """Both with their caches, theirs cut at the window and ours rolling; prompts within it and past it."""
    theirs, ids = reference(sliding_window=window), random_ids(2, start)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            max_new_tokens=end - start,
            do_sample=False,
            pad_token_id=0,
        )
    found = tinyllm.from_pretrained(tmp_path).generate(ids, end - start, temperature=0)
    assert np.array_equal(found, expected.numpy()) and found.shape == (2, end)


@pytest.mark.parametrize(
    "option",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
        {"layer_types": ["full_attention"] * 3},
    ],
    ids=str,
)
def test_what_we_do_not_implement_is_refused_as_transformers_writes_it(option, tmp_path):
    reference(**option).save_pretrained(tmp_path)
    name = "rope_" if "rope_parameters" in option else next(iter(option))
    with pytest.raises(tinyllm.InputError, match=name):
        tinyllm.from_pretrained(tmp_path)


def test_the_defaults_are_theirs():
    """An option left out of config.json means what it means to transformers."""
    theirs, ours = transformers.MistralConfig(), MistralConfig()
    same = set(vars(ours)) - {"head_dim", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias"}
    assert all(getattr(theirs, name) == getattr(ours, name) for name in same)
    assert theirs.head_dim == ours.head_size
    assert theirs.rope_parameters == {"rope_theta": ours.rope_theta, "rope_type": "default"}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    options = {k: v for k, v in SIZES[name].to_published().items() if k != "architectures"}
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**options))
    expected = {"mistral-7b": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552}
    assert sum(parameter.numel() for parameter in model.parameters()) == expected[name]
