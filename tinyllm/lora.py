"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models").

No new model: a way to train one further. All its weights are frozen, and beside some of its linear maps
stands what is learned, a product of two thin matrices (section 4.1, equation 3):

    h = W_0 x + b + (alpha / r) B A x         W_0 (m, n) frozen;  A (r, n) random, B (m, r) zero at first

So training starts from the model as it was; gradients and the optimizer's state are those of A and B alone;
and in the end W_0 + (alpha / r) B A can take the place of W_0. With alpha / sqrt(r) instead, what is added
keeps its size whatever the rank: rsLoRA (Kalajdzievski 2023).

    lora.apply(model, rank=8, alpha=16, targets=["c_attn"])       then train as ever
    lora.save(model, "adapter")                                   PEFT's two files
    lora.load(tinyllm.from_pretrained("base"), "adapter")
    lora.merge(model)                                             from here on it costs nothing
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn
from autograd.backend import Array, to_device, to_host
from tinyllm import peft
from tinyllm.errors import InputError
from tinyllm.lora_targets import (
    ALL_LINEAR,
    Place,
    chosen,
    file_name,
    learned,
    one_spelling,
    places,
    published_targets,
)
from tinyllm.model import CausalModel, PretrainedModel
from tinyllm.peft import LoRAConfig


class LoRALinear(nn.Linear):
    """A Linear with a frozen weight W (m, n), and beside it what is learned.

        out = x W^T + b + scale (dropout(x) A^T) B^T        x (..., n) -> (..., m);  A (r, n), B (m, r)

    Merged, W is W + scale B A, and A and B lie where the model does not count them among its parameters.
    """

    def __init__(self, linear: nn.Linear, A: Array, B: Array, scale: float, dropout: float) -> None:
        self.weight, self.bias = linear.weight, linear.bias
        self.factors = Factors(nn.Parameter(A), nn.Parameter(B))
        self.lora_A, self.lora_B = self.factors.A, self.factors.B
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.train(linear.training)

    @property
    def is_merged(self) -> bool:
        return self.lora_A is None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)  # (..., m)
        if self.is_merged:
            return out
        low = F.linear(self.dropout(x), self.lora_A)  # (..., r)
        return out + F.linear(low * self.scale, self.lora_B)

    def plain(self) -> nn.Linear:
        """The map alone, with its weight as it is."""
        linear = nn.Linear(0, 0)
        linear.weight, linear.bias, linear.training = self.weight, self.bias, self.training
        return linear

    def merge(self) -> None:
        """W = W + scale B A; InputError if that is done already."""
        self.expect(merged=False)
        self._add(self.scale)
        self.lora_A = self.lora_B = None

    def unmerge(self) -> None:
        """W = W - scale B A; InputError if it is not in W."""
        self.expect(merged=True)
        for factor in (self.factors.A, self.factors.B):  # the model may have moved meanwhile
            factor.data = to_device(factor.data, self.weight.device).astype(self.weight.dtype, copy=False)
        self._add(-self.scale)
        self.lora_A, self.lora_B = self.factors.A, self.factors.B

    def expect(self, merged: bool) -> None:
        """Raise InputError unless the adapter is merged, or is not."""
        if self.is_merged and not merged:
            raise InputError("the adapters are merged already: lora.unmerge(model) first")
        if merged and not self.is_merged:
            raise InputError("the adapters are not merged: lora.merge(model) first")

    def _add(self, scale: float) -> None:
        # A new array: a graph, or a state_dict, may hold the old one.
        BA = self.factors.B.data @ self.factors.A.data  # (m, n)
        self.weight.data = self.weight.data + BA * self.weight.dtype.type(scale)


@dataclass(frozen=True)
class Factors:
    """A and B of a LoRALinear. This is no Module, so a model finds no parameters in it."""

    A: nn.Parameter
    B: nn.Parameter


def apply(
    model: PretrainedModel,
    rank: int,
    alpha: float,
    targets: str | Collection[str] = ALL_LINEAR,
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    bias: str = "none",
    modules_to_save: Collection[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
) -> PretrainedModel:
    """Freeze the model and put new adapters beside its linear maps; returns the model.

    targets: ends of the maps' published names ("c_attn", "attn.c_proj"), or of ours where no published name
    ends so; a text is a regular expression of whole published names; "all-linear" is every map but the output
    head. rank_pattern, alpha_pattern: another rank or alpha for the maps whose published name ends in what
    the pattern matches. bias "lora_only" lets the biases of the chosen maps learn too, "all" every tensor
    whose published name ends in ".bias". modules_to_save: ends of published names of modules that learn as a
    whole; here a part of a word is an end too, as in PEFT.

    A is drawn from U(-1/sqrt(n), 1/sqrt(n)), as PEFT does it, and B is zero, so the model computes what it
    did before, to the bit.

    Raises:
        InputError: a name that fits nothing here or nothing that can have an adapter (the output head, an
            embedding), a number out of range, or adapters already; the model is unchanged then.
    """
    _check_bare(model)
    whole = modules_to_save if isinstance(modules_to_save, str) else list(modules_to_save) or None
    config = LoRAConfig(
        rank, alpha, published_targets(model, targets), dropout, rslora, bias, whole,
        dict(rank_pattern or {}), dict(alpha_pattern or {}),
        task_type="CAUSAL_LM" if isinstance(model, CausalModel) else None,
    )  # fmt: skip
    adapted, rng, state = chosen(model, config), np.random.default_rng(seed), model.state_dict()
    modules = [model.published_name(name).rpartition(".")[0] for name in state]
    config.check_used([p.published for p in adapted], [p.published for p in places(model)], modules)
    arrays = {}
    for name, shape in learned(model, config, adapted).items():
        if name in state:
            arrays[name] = state[name]
        elif name.endswith("lora_A"):
            limit = 1 / math.sqrt(shape[1])
            arrays[name] = rng.uniform(-limit, limit, shape).astype(model.dtype)
        else:
            arrays[name] = np.zeros(shape, model.dtype)
    _attach(model, config, adapted, arrays)
    return model


def merge(model: PretrainedModel) -> None:
    """Add every adapter to the weight beside it: the same function, at the price of the base model.

    Until `unmerge`, A and B are no parameters of the model, so save_pretrained writes the merged model.

    Raises:
        InputError: no adapters, or merged already.
    """
    for adapter in _adapters(model, merged=False):
        adapter.merge()


def unmerge(model: PretrainedModel) -> None:
    """Take every adapter out of the weight beside it again; A and B learn on, by the same optimizer.

    The weights are those before `merge` but for the rounding of two sums: each within one unit in the last
    place of the larger of itself and its merged value.

    Raises:
        InputError: no adapters, or none merged.
    """
    for adapter in _adapters(model, merged=True):
        adapter.unmerge()


def remove(model: PretrainedModel) -> None:
    """Make plain maps of the adapted ones, with their weights as they are, and let every weight learn again.

    After `merge` that leaves the merged model, otherwise the base; biases and modules_to_save stay as they
    have become.

    Raises:
        InputError: no adapters.
    """
    _adapters(model)
    for place in places(model):
        if isinstance(place.linear, LoRALinear):
            place.put(place.linear.plain())
    for parameter in model.parameters():
        parameter.requires_grad = True
    del model.adapter_config


def save(model: PretrainedModel, folder: str | Path, base: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them, whole or not at all.

    base: the name or the folder of the base model, for readers who look for it there.

    Raises:
        InputError: no adapters, merged ones, or the disk refuses.
    """
    _adapters(model, merged=False)
    config, adapted = model.adapter_config, chosen(model, model.adapter_config)
    state, tensors = model.state_dict(), {}
    for name in learned(model, config, adapted):
        tensors[file_name(model, name, adapted)] = model.as_published(name, to_host(state[name]))
    transposed = any(model.is_transposed(f"{place.path}.weight") for place in adapted)
    base = base or config.base_model_name_or_path
    peft.write(folder, replace(config, base_model_name_or_path=base).to_published(transposed), tensors)


def load(model: PretrainedModel, folder: str | Path) -> PretrainedModel:
    """Put the adapters that PEFT or `save` wrote beside the model's maps; returns the model.

    Raises:
        InputError: naming the file that is missing or damaged, the option that we do not implement, or what
            does not fit this model; or adapters already. The model is unchanged then.
    """
    _check_bare(model)
    folder = Path(folder)
    config = peft.read_config(folder)
    base = config.base_model_name_or_path
    try:
        adapted = chosen(model, config)
        shapes = learned(model, config, adapted)
    except InputError as error:
        made = f" (it was made for {base!r})" if base else ""
        raise InputError(f"the adapter in {folder} does not fit{made}: {error}") from None
    weights = peft.read_weights(folder, model.dtype, lambda name: one_spelling(model, name))
    keys = {name: one_spelling(model, file_name(model, name, adapted)) for name in shapes}
    expected = {keys[name]: model.published_shape(name, shape) for name, shape in shapes.items()}
    peft.check_fits(weights, expected, type(model).__name__, base)
    arrays = {name: np.empty(shape, model.dtype) for name, shape in shapes.items()}
    for name, array in arrays.items():
        weights.read(keys[name], model.as_published(name, array))
    _attach(model, config, adapted, arrays)
    return model


def _check_bare(model: PretrainedModel) -> None:
    if hasattr(model, "adapter_config"):
        if _adapters(model)[0].is_merged:
            raise InputError("the model has adapters already, merged: first lora.remove(model)")
        raise InputError(
            "the model has adapters already: first lora.merge(model), to keep them, and lora.remove"
        )


def _adapters(model: PretrainedModel, merged: bool | None = None) -> list[LoRALinear]:
    """The adapted maps of the model, which must be merged or must not be; None: either."""
    found = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not found:
        raise InputError(
            "the model has no adapters: lora.apply(model, ...) or lora.load(model, folder) first"
        )
    if merged is not None:
        for adapter in found:
            adapter.expect(merged)
    return found


def _attach(
    model: PretrainedModel, config: LoRAConfig, adapted: list[Place], arrays: Mapping[str, Array]
) -> None:
    """Freeze the model but for what is in `arrays`, and put the adapters there beside the maps."""
    device = model.parameters()[0].device
    arrays = {name: to_device(array, device) for name, array in arrays.items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad, parameter.grad = name in arrays, None
        if name in arrays:
            parameter.data = arrays[name]
    for place in adapted:
        A, B = arrays[f"{place.path}.lora_A"], arrays[f"{place.path}.lora_B"]
        place.put(LoRALinear(place.linear, A, B, config.scale(place.published), config.lora_dropout))
    model.adapter_config = config
