"""Mistral against transformers: the same function, gradients, files and text, far past the window."""

from __future__ import annotations

import numpy as np
import pytest

import tinyllm
from tinyllm.models import Mistral, MistralConfig
from tinyllm.models.mistral import SIZES

from .reference import (
    VOCABULARY,
    assert_same_gradients,
    assert_same_hidden_states,
    assert_same_logits,
    assert_shards_are_read,
    converted,
    gradients_of_same_loss,
    greedy,
    in_float64,
    logits_of,
    random_ids,
    read_back,
    scrambled,
    torch,
    transformers,
)

modeling_mistral = transformers.models.mistral.modeling_mistral
EAGER = {"attn_implementation": "eager"}  # has a mask for the window; some others leave that to the kernel

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
            "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 150,
            "sliding_window": 16, "bos_token_id": None, "eos_token_id": None, **options,
        }
    )  # fmt: skip


def reference(**options):
    """transformers' model with random weights."""
    return scrambled(transformers.MistralForCausalLM._from_config, configuration(**options), **EAGER)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(**CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


# A window is 16: around its end, around the end of a block of our attention, and many windows.
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 65, 150])
def test_logits(pair, length):
    theirs, ours, _ = pair
    assert type(ours) is Mistral
    found = assert_same_logits(theirs, ours, random_ids(3, length))
    assert found.dtype == np.float32 and np.abs(found).max() > 1


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


def test_logits_and_hidden_states_in_float64(pair, monkeypatch):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    ours = Mistral.from_pretrained(folder, np.float64)
    theirs = in_float64(theirs, ours, modeling_mistral, monkeypatch)
    assert_same_hidden_states(theirs, ours, random_ids(2, 150), 1e-11)
    assert_same_logits(theirs, ours, random_ids(2, 150), 1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-12)])
def test_loss_and_gradients(pair, monkeypatch, dtype, tolerance):
    theirs, _, folder = pair
    ours = Mistral.from_pretrained(folder, dtype)
    if dtype == np.float64:
        theirs = in_float64(theirs, ours, modeling_mistral, monkeypatch)
    else:
        theirs = converted(theirs, dtype)
    gradients = gradients_of_same_loss(theirs, ours, random_ids(2, 150), tolerance)
    if theirs.config.sliding_window == 1:  # of a single score the softmax is 1, whatever it is
        for name, parameter in ours.named_parameters():
            if name.split(".")[-2] in ("query", "key"):
                found = parameter.grad.numpy()
                assert np.abs([gradients[name], found]).max() < 1e-6
                gradients[name] = found  # nothing but rounding in both
    assert_same_gradients(ours, gradients, tolerance)


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    again = read_back(theirs, ours, tmp_path, **EAGER)
    options = "sliding_window num_key_value_heads head_dim rms_norm_eps rope_parameters tie_word_embeddings"
    for option in (*options.split(), "max_position_embeddings"):
        assert getattr(again.config, option) == getattr(theirs.config, option)
    ids = random_ids(2, 150)
    np.testing.assert_allclose(logits_of(again, ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    config = MistralConfig(VOCABULARY, 24, 40, 3, 4, 2, max_position_embeddings=150, sliding_window=16)
    ours = Mistral(config, seed=0).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER).eval()
    assert_same_logits(theirs, ours, random_ids(2, 150))
    assert Mistral.from_pretrained(tmp_path).config == config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    # Their positions' frequencies were rounded to halves with the weights; those are made anew.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **EAGER)
    assert_same_logits(theirs.eval(), tinyllm.from_pretrained(tmp_path), random_ids(2, 150))


def test_shards(tmp_path):
    assert_shards_are_read(reference(), tmp_path, random_ids(2, 150))


@pytest.mark.parametrize("start, end", [(3, 70), (40, 60)])
@pytest.mark.parametrize("window", [16, 5, None])
def test_greedy_text(window, start, end, tmp_path):
    """Both with their caches, theirs cut at the window and ours rolling; prompts within it and past it."""
    theirs, ids = reference(sliding_window=window), random_ids(2, start)
    theirs.save_pretrained(tmp_path)
    found = tinyllm.from_pretrained(tmp_path).generate(ids, end - start, temperature=0)
    assert np.array_equal(found, greedy(theirs, ids, end - start)) and found.shape == (2, end)


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
