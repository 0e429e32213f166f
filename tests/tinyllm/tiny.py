"""A tiny model of every causal kind, for the tests that all of them must pass (test_family.py and others)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import autograd.functional as F
from autograd import Tensor, gradcheck
from tinyllm.models import (
    GPT1,
    GPT2,
    GPT3,
    RWKV,
    Bigram,
    BigramConfig,
    GPT1Config,
    GPT2Config,
    GPT3Config,
    LLaMA,
    LLaMAConfig,
    Mistral,
    MistralConfig,
    RWKVConfig,
)


def scramble(model: Any, seed: int = 0, dtype: Any = np.float32) -> Any:
    """The model with every weight moved at random: no bias near 0 and no norm's weight near 1, so that one
    left out, or one in another's place, shows."""
    rng = np.random.default_rng(seed + 1)
    for parameter in model.parameters():
        parameter.data = (parameter.data + rng.normal(0, 0.3, parameter.shape)).astype(dtype)
    return model.eval()


def fresh(model: Any, seed: int = 0) -> Any:
    """A model like it with the weights that training starts from."""
    return type(model)(model.config, seed)


def tokens(model: Any, *shape: int, seed: int = 0) -> np.ndarray:
    """Random ids that the model knows."""
    return np.random.default_rng(seed).integers(0, model.vocabulary_size, shape)


def assert_gradients_are_derivatives(model: Any, ids: Any, targets: Any, projections: int = 1) -> None:
    """Of the loss, with respect to every parameter, with the same elements dropped each time."""
    parameters = model.parameters()

    def loss(*values: Tensor) -> Tensor:
        F.manual_seed(3)
        before = [parameter.data for parameter in parameters]
        for parameter, value in zip(parameters, values):
            parameter.data = value.data
        try:
            return model.loss(ids, targets)
        finally:
            for parameter, data in zip(parameters, before):
                parameter.data = data

    assert gradcheck(loss, parameters, projections=projections)


def assert_dropout_in_training_only(model: Any, without: Any, ids: Any) -> None:
    """`without` is the model without dropout; both are in evaluation mode."""
    plain = without(ids).numpy()
    assert np.array_equal(model(ids).numpy(), plain)
    model.train()
    F.manual_seed(0)
    first, second = model(ids).numpy(), model(ids).numpy()
    assert np.abs(first - plain).max() > 1e-2 and np.abs(first - second).max() > 1e-2
    assert np.array_equal(model.eval()(ids).numpy(), plain)


# A context longer than one block of 64 queries of the fused attention; three heads, so that H is not d.
GPT2_CONFIG = GPT2Config(31, 80, 24, 2, 3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LLAMA_CONFIG = LLaMAConfig(31, 24, 40, 2, 3, max_position_embeddings=80)
LLAMA2_CONFIG = LLaMAConfig(31, 24, 40, 2, 6, num_key_value_heads=3, max_position_embeddings=80)
MISTRAL_CONFIG = MistralConfig(31, 24, 40, 2, 6, 3, head_dim=6, max_position_embeddings=80, sliding_window=7)
RWKV_CONFIG = RWKVConfig(31, 80, 24, 2, attention_hidden_size=20, intermediate_size=40, rescale_every=1)

# name -> function(seed): a scrambled model in evaluation mode, without dropout, as `type(model)(model.config,
# seed)` makes it before scrambling. Small enough that hundreds of forward passes take a second: a vocabulary
# of about 31, a context of about 80 (longer than 64), two layers, width about 24; a window well below that.
TINY: dict[str, Callable[[int], Any]] = {
    "bigram": lambda seed=0: scramble(Bigram(BigramConfig(31), seed), seed),
    "gpt1": lambda seed=0: scramble(GPT1(GPT1Config(31, 80, 24, 2, 3, 0.0, 0.0, 0.0), seed), seed),
    "gpt2": lambda seed=0: scramble(GPT2(GPT2_CONFIG, seed), seed),
    "gpt3": lambda seed=0: scramble(GPT3(GPT3Config(31, 80, 24, 2, 3, window_size=7), seed), seed),
    "llama": lambda seed=0: scramble(LLaMA(LLAMA_CONFIG, seed), seed),
    "llama-2": lambda seed=0: scramble(LLaMA(LLAMA2_CONFIG, seed), seed),
    "mistral": lambda seed=0: scramble(Mistral(MISTRAL_CONFIG, seed), seed),
    "rwkv": lambda seed=0: scramble(RWKV(RWKV_CONFIG, seed), seed),
}
