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
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn
from autograd.backend import Array, to_device, to_host
from tinyllm import peft
from tinyllm.errors import InputError
from tinyllm.model import CausalModel, PretrainedModel
from tinyllm.peft import LoRAConfig

ALL_LINEAR = "all-linear"  # every linear map but the output head


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

    def merge(self) -> None:
        """W = W + scale B A."""
        self._add(self.scale)
        self.lora_A = self.lora_B = None

    def unmerge(self) -> None:
        """W = W - scale B A."""
        for factor in (self.factors.A, self.factors.B):  # the model may have moved meanwhile
            factor.data = to_device(factor.data, self.weight.device).astype(self.weight.dtype, copy=False)
        self._add(-self.scale)
        self.lora_A, self.lora_B = self.factors.A, self.factors.B

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
    the pattern matches. bias "lora_only" lets the biases of the chosen maps learn too, "all" those of all
    modules; modules_to_save: ends of published names of modules that learn as a whole.

    A is drawn from U(-1/sqrt(n), 1/sqrt(n)), as PEFT does it, and B is zero, so the model computes what it
    did before, to the bit.

    Raises:
        InputError: a name that fits nothing here or nothing that can have an adapter (the output head, an
            embedding), a number out of range, or adapters already; the model is unchanged then.
    """
    _check_bare(model)
    config = LoRAConfig(
        rank, alpha, _published_targets(model, targets), dropout, rslora, bias, list(modules_to_save) or None,
        dict(rank_pattern or {}), dict(alpha_pattern or {}),
        task_type="CAUSAL_LM" if isinstance(model, CausalModel) else None,
    )  # fmt: skip
    chosen = _chosen(model, config)
    modules = [model.published_name(name).rpartition(".")[0] for name in model.state_dict()]
    published = lambda places: [place.published for place in places]
    config.check_used(published(chosen), published(_places(model)), modules)
    rng, state = np.random.default_rng(seed), model.state_dict()
    arrays = {}
    for name, shape in _learned(model, config, chosen).items():
        if name in state:
            arrays[name] = state[name]
        elif name.endswith("lora_A"):
            limit = 1 / math.sqrt(shape[1])
            arrays[name] = rng.uniform(-limit, limit, shape).astype(model.dtype)
        else:
            arrays[name] = np.zeros(shape, model.dtype)
    _attach(model, config, chosen, arrays)
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
    for place in _places(model):
        if isinstance(place.linear, LoRALinear):
            plain = nn.Linear(0, 0)
            plain.weight, plain.bias, plain.training = (
                place.linear.weight,
                place.linear.bias,
                place.linear.training,
            )
            _put(place, plain)
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
    config, chosen = model.adapter_config, _chosen(model, model.adapter_config)
    state, tensors = model.state_dict(), {}
    for name in _learned(model, config, chosen):
        tensors[_key(model, name, chosen)] = model.as_published(name, to_host(state[name]))
    transposed = any(model.is_transposed(f"{place.path}.weight") for place in chosen)
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
        chosen = _chosen(model, config)
        shapes = _learned(model, config, chosen)
    except InputError as error:
        made = f" (it was made for {base!r})" if base else ""
        raise InputError(f"the adapter in {folder} does not fit{made}: {error}") from None
    weights = peft.read_weights(folder, model.dtype, lambda name: _normal(model, name))
    keys = {name: _normal(model, _key(model, name, chosen)) for name in shapes}
    expected = {keys[name]: model.published_shape(name, shape) for name, shape in shapes.items()}
    peft.check_fits(weights, expected, type(model).__name__, base)
    arrays = {name: np.empty(shape, model.dtype) for name, shape in shapes.items()}
    for name, array in arrays.items():
        weights.read(keys[name], model.as_published(name, array))
    _attach(model, config, chosen, arrays)
    return model


class Place(NamedTuple):
    """A linear map of a model, and where it is: its path, its published name, who holds it by what name."""

    path: str
    published: str
    parent: nn.Module
    name: str
    linear: nn.Linear


def _places(model: PretrainedModel) -> list[Place]:
    """Of all linear maps."""

    def below(module: nn.Module, prefix: str) -> Iterable[Place]:
        for name, child in module.children():
            path = prefix + name
            if isinstance(child, nn.Linear):
                published = model.published_name(f"{path}.weight").removesuffix(".weight")
                yield Place(path, published, module, name, child)
            yield from below(child, f"{path}.")

    return list(below(model, ""))


def _put(place: Place, linear: nn.Linear) -> None:
    """Let the map's parent hold `linear` in its place."""
    attribute, _, key = place.name.partition(".")
    if not key:
        setattr(place.parent, attribute, linear)
    else:
        holder = getattr(place.parent, attribute)
        holder[int(key) if isinstance(holder, list) else key] = linear


def _is_head(model: PretrainedModel, weight: nn.Parameter) -> bool:
    """Whether it is the output head's weight, which the loss reads by itself, without calling a map."""
    return weight is getattr(model, "head_weight", None)


def _is_tied(model: PretrainedModel, weight: nn.Parameter) -> bool:
    """Whether it is a table that something else reads too: another embedding, or the output head."""
    holders = [module for module in model.modules() if getattr(module, "weight", None) is weight]
    is_table = any(isinstance(module, nn.Embedding) for module in holders)
    of_bert = getattr(model, "masked_lm", None) is not None and weight is model.token_embedding.weight
    return is_table and (len(holders) > 1 or of_bert or _is_head(model, weight))


def _published_targets(model: PretrainedModel, targets: str | Collection[str]) -> str | list[str]:
    """targets in published names."""
    places = [place for place in _places(model) if not _is_head(model, place.linear.weight)]
    if not places:
        raise InputError(f"{type(model).__name__} has no linear maps to adapt")
    if targets == ALL_LINEAR:
        return [place.published for place in places]
    if isinstance(targets, str):
        return targets
    found: dict[str, None] = {}
    for target in targets:
        ours = [place.published for place in places if peft.ends(place.path, target)]
        is_published = any(peft.ends(place.published, target) for place in places)
        found |= dict.fromkeys([target] if is_published or not ours else ours)
    return list(found)


def _chosen(model: PretrainedModel, config: LoRAConfig) -> list[Place]:
    """The maps that the config's target_modules name."""
    places = _places(model)
    chosen = [place for place in places if config.targets(place.published)]
    for place in chosen:
        if _is_head(model, place.linear.weight):
            raise InputError(
                f"{place.published} is the output head, which gets no adapter here: leave it out of the "
                "targets, or name it in modules_to_save, to learn as a whole"
            )
    if not chosen:
        targets, hint = config.target_modules, ""
        if isinstance(targets, str):
            targets, hint = [targets], "; a text is a pattern of whole names: give a list for ends of names"
        wanted, known = " or ".join(map(repr, targets[:6])), peft.last_words(p.published for p in places)
        raise InputError(f"{type(model).__name__} has no linear map {wanted}; it has {known}{hint}")
    return chosen


def _learned(model: PretrainedModel, config: LoRAConfig, chosen: list[Place]) -> dict[str, tuple[int, ...]]:
    """name -> shape of all that learns: A and B of the chosen maps, and what of the model itself."""
    learned = {}
    for place in chosen:
        (m, n), r = place.linear.weight.shape, config.rank(place.published)
        learned |= {f"{place.path}.lora_A": (r, n), f"{place.path}.lora_B": (m, r)}
    with_bias = {place.path for place in chosen} if config.bias == "lora_only" else set()
    for name, parameter in model.named_parameters():
        if name in learned:
            continue
        path, _, kind = name.rpartition(".")
        module = model.published_name(name).rpartition(".")[0]
        whole = config.saves(module)
        if whole and _is_tied(model, parameter):
            raise InputError(
                f"modules_to_save names {module}, whose weight is the output head's too: PEFT would part them"
            )
        # A bias of no module, as a translator's head has, is a buffer for PEFT, which never learns.
        biases = module and config.bias == "all"
        if whole or ("bias" in kind and (biases or path in with_bias)):
            learned[name] = parameter.shape
    return learned


def _key(model: PretrainedModel, name: str, chosen: list[Place]) -> str:
    """The name that PEFT's file has for what we call `name`, but for the prefix of all."""
    module, _, kind = model.published_name(name).rpartition(".")
    if kind in ("lora_A", "lora_B"):
        return f"{module}.{kind}.weight"
    inner = ".base_layer" if module in {place.published for place in chosen} else ""
    return f"{module}{inner}.{kind}"


def _normal(model: PretrainedModel, name: str) -> str:
    """One spelling of a tensor's name: old files have no base_layer, those of bare models no prefix."""
    name = name.replace(".base_layer.", ".")
    known = tuple(published.split(".")[0] + "." for published in model.published_names.values())
    return model.published_prefix + name if model.published_prefix and name.startswith(known) else name


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
    if merged is False and found[0].is_merged:
        raise InputError("the adapters are merged already: lora.unmerge(model) first")
    if merged is True and not found[0].is_merged:
        raise InputError("the adapters are not merged: lora.merge(model) first")
    return found


def _attach(
    model: PretrainedModel, config: LoRAConfig, chosen: list[Place], arrays: Mapping[str, Array]
) -> None:
    """Freeze the model but for what is in `arrays`, and put the adapters there beside the chosen maps."""
    device = model.parameters()[0].device
    arrays = {name: to_device(array, device) for name, array in arrays.items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in arrays
        if name in arrays:
            parameter.data = arrays[name]
    for place in chosen:
        A, B = arrays[f"{place.path}.lora_A"], arrays[f"{place.path}.lora_B"]
        _put(place, LoRALinear(place.linear, A, B, config.scale(place.published), config.lora_dropout))
    model.adapter_config = config
