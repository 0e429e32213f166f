"""GPT-2 against transformers: the same function, gradients, files and text."""

from __future__ import annotations

import numpy as np
import pytest

import tinyllm
from tinyllm.models import GPT2, GPT2Config

from .reference import (
    VOCABULARY,
    assert_same_gradients,
    assert_same_hidden_states,
    assert_same_logits,
    assert_same_text_of_prompts_of_different_lengths,
    assert_shards_are_read,
    blocks_transposed,
    converted,
    gradients_of_same_loss,
    greedy,
    logits_of,
    random_ids,
    read_back,
    scrambled,
    torch,
    transformers,
)

CONFIGS = {
    "plain": {},
    "narrow mlp": {"n_inner": 20, "layer_norm_epsilon": 1e-2},
    "one head": {"n_head": 1, "n_layer": 1, "activation_function": "gelu_pytorch_tanh"},
}


def reference(**options):
    """transformers' model with random weights."""
    config = transformers.GPT2Config(
        **{
            "vocab_size": VOCABULARY, "n_positions": 70, "n_embd": 24, "n_layer": 3, "n_head": 4,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "bos_token_id": None, "eos_token_id": None, **options,
        }
    )  # fmt: skip
    return scrambled(transformers.GPT2LMHeadModel, config)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from its folder, the folder)."""
    theirs, folder = reference(**CONFIGS[request.param]), tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, tinyllm.from_pretrained(folder), folder


@pytest.mark.parametrize("length", [1, 2, 65, 70])
def test_logits(pair, length):
    theirs, ours, _ = pair
    found = assert_same_logits(theirs, ours, random_ids(3, length))
    assert found.dtype == np.float32 and np.abs(found).max() > 1


def test_logits_and_hidden_states_in_float64(pair):
    """Where rounding hides nothing: another formula, or another epsilon, would show."""
    theirs, _, folder = pair
    theirs, ours = converted(theirs, np.float64), GPT2.from_pretrained(folder, np.float64)
    assert_same_logits(theirs, ours, random_ids(2, 70), 1e-11)
    assert_same_hidden_states(theirs, ours, random_ids(2, 70), 1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_loss_and_gradients(pair, dtype, tolerance):
    theirs, _, folder = pair
    theirs, ours = converted(theirs, dtype), GPT2.from_pretrained(folder, dtype)
    gradients = gradients_of_same_loss(theirs, ours, random_ids(2, 70), tolerance)
    assert_same_gradients(ours, blocks_transposed(gradients), tolerance)


def test_transformers_reads_what_we_write(pair, tmp_path):
    theirs, ours, _ = pair
    again = read_back(theirs, ours, tmp_path)
    for option in ("n_inner", "n_head", "layer_norm_epsilon", "resid_pdrop", "n_positions"):
        assert getattr(again.config, option) == getattr(theirs.config, option)
    ids = random_ids(2, 70)
    np.testing.assert_allclose(logits_of(again, ids), logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_a_model_of_ours_is_one_of_theirs(tmp_path):
    """Not read from their files before: our configuration and initialization, written and read by them."""
    ours = GPT2(GPT2Config(VOCABULARY, 70, 24, 2, 3), seed=0).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_logits(theirs, ours, random_ids(2, 70))
    assert GPT2.from_pretrained(tmp_path).config == ours.config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    """A half is exact in float32, so the same weights give the same logits."""
    halves = reference().to(getattr(torch, dtype))
    halves.save_pretrained(tmp_path)
    assert_same_logits(halves.float(), tinyllm.from_pretrained(tmp_path), random_ids(2, 70))


def test_float16_is_written(tmp_path):
    ours = GPT2(GPT2Config(VOCABULARY, 70, 24, 2, 3), seed=0).to(dtype=np.float16)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float16
    expected = ours.state_dict()["position_embedding.weight"]
    assert np.array_equal(theirs.transformer.wpe.weight.detach().numpy(), expected)


def test_shards(tmp_path):
    assert_shards_are_read(reference(), tmp_path, random_ids(2, 70))


def test_the_bare_model_without_a_head(tmp_path):
    """Written by GPT2Model: no tensor has the prefix, as in the files of the first releases."""
    theirs = reference()
    theirs.transformer.save_pretrained(tmp_path)
    assert_same_logits(theirs, tinyllm.from_pretrained(tmp_path), random_ids(2, 70))


def test_greedy_text(pair):
    theirs, ours, _ = pair
    ids = random_ids(2, 6)
    found = ours.generate(ids, 64, temperature=0)
    assert np.array_equal(found, greedy(theirs, ids, 64)) and found.shape == (2, 70)


def test_text_of_prompts_of_different_lengths(pair):
    theirs, ours, _ = pair
    assert_same_text_of_prompts_of_different_lengths(theirs, ours, 40)


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
