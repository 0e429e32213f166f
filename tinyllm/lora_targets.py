"""An adapter's config read against a model: which of its linear maps get an adapter, what else of it learns,
and by which names PEFT's file holds all that.

Names in a config are published ones, "transformer.h.0.attn.c_attn"; here is where they meet ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from autograd import nn
from tinyllm import peft
from tinyllm.errors import InputError
from tinyllm.model import PretrainedModel
from tinyllm.peft import LoRAConfig

ALL_LINEAR = "all-linear"  # every linear map but the output head


class Place(NamedTuple):
    """A linear map of a model, and where it is: its path, its published name, who holds it by what name."""

    path: str
    published: str
    parent: nn.Module
    name: str
    linear: nn.Linear

    def put(self, linear: nn.Linear) -> None:
        """Let the map's parent hold `linear` in its place."""
        attribute, _, key = self.name.partition(".")
        if not key:
            setattr(self.parent, attribute, linear)
        else:
            holder = getattr(self.parent, attribute)
            holder[int(key) if isinstance(holder, list) else key] = linear


def places(model: PretrainedModel) -> list[Place]:
    """Of all linear maps."""

    def below(module: nn.Module, prefix: str) -> Iterable[Place]:
        for name, child in module.children():
            path = prefix + name
            if isinstance(child, nn.Linear):
                published = model.published_name(f"{path}.weight").removesuffix(".weight")
                yield Place(path, published, module, name, child)
            yield from below(child, f"{path}.")

    return list(below(model, ""))


def published_targets(model: PretrainedModel, targets: str | Collection[str]) -> str | list[str]:
    """What `lora.apply` takes as targets, in published names; InputError if the model has no linear maps."""
    free = [place for place in places(model) if not _is_head(model, place.linear.weight)]
    if not free:
        raise InputError(f"{type(model).__name__} has no linear maps to adapt")
    if targets == ALL_LINEAR:
        return [place.published for place in free]
    if isinstance(targets, str):
        return targets
    found: dict[str, None] = {}
    for target in targets:
        ours = [place.published for place in free if peft.ends(place.path, target)]
        is_published = any(peft.ends(place.published, target) for place in free)
        found |= dict.fromkeys([target] if is_published or not ours else ours)
    return list(found)


def chosen(model: PretrainedModel, config: LoRAConfig) -> list[Place]:
    """The maps that get adapters. InputError if there are none, or if the output head is among them."""
    known = places(model)
    found = [place for place in known if config.targets(place.published)]
    for place in found:
        if _is_head(model, place.linear.weight):
            raise InputError(
                f"{place.published} is the output head, which gets no adapter here: leave it out of the "
                "targets, or name it in modules_to_save, to learn as a whole"
            )
    if not found:
        targets, hint = config.target_modules, ""
        if isinstance(targets, str):
            targets, hint = [targets], "; a text is a pattern of whole names: give a list for ends of names"
        wanted, names = " or ".join(map(repr, targets[:6])), peft.last_words(p.published for p in known)
        raise InputError(f"{type(model).__name__} has no linear map {wanted}; it has {names}{hint}")
    return found


def learned(model: PretrainedModel, config: LoRAConfig, adapted: list[Place]) -> dict[str, tuple[int, ...]]:
    """name -> shape of all that learns: A and B of the adapted maps, and what of the model itself.

    Raises:
        InputError: modules_to_save names a table that something else reads too.
    """
    found = {}
    for place in adapted:
        (m, n), r = place.linear.weight.shape, config.rank(place.published)
        found |= {f"{place.path}.lora_A": (r, n), f"{place.path}.lora_B": (m, r)}
    beside = [place.published for place in adapted]
    for name, parameter in model.named_parameters():
        if name in found:
            continue
        module, _, kind = model.published_name(name).rpartition(".")
        whole = config.saves(module)
        if whole and _is_tied(model, parameter):
            raise InputError(
                f"modules_to_save names {module}, whose table another module has too: PEFT would part them"
            )
        # Marian's final_logits_bias does not end in ".bias", and for PEFT it is a buffer, which never learns.
        free = kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in beside))
        if whole or free:
            found[name] = parameter.shape
    return found


def file_name(model: PretrainedModel, name: str, adapted: list[Place]) -> str:
    """The name that PEFT's file has for what we call `name`, but for the prefix of all."""
    module, _, kind = model.published_name(name).rpartition(".")
    if kind in ("lora_A", "lora_B"):
        return f"{module}.{kind}.weight"
    inner = ".base_layer" if module in [place.published for place in adapted] else ""
    return f"{module}{inner}.{kind}"


def one_spelling(model: PretrainedModel, name: str) -> str:
    """Of a name in a file: old files have no base_layer, those of bare models no prefix."""
    name = name.replace(".base_layer.", ".")
    known = tuple(published.split(".")[0] + "." for published in model.published_names.values())
    return model.published_prefix + name if model.published_prefix and name.startswith(known) else name


def _is_head(model: PretrainedModel, weight: nn.Parameter) -> bool:
    """Whether it is the output head's weight, which the loss reads by itself, without calling a map."""
    return weight is getattr(model, "head_weight", None)


def _is_tied(model: PretrainedModel, parameter: nn.Parameter) -> bool:
    """Whether it is a table that something else reads too: another embedding, or the output head."""
    head = getattr(model, "masked_lm", None)  # of BERT, where PEFT finds the table and the bias once more
    if head is not None and (parameter is head.bias or parameter is model.token_embedding.weight):
        return True
    holders = [module for module in model.modules() if getattr(module, "weight", None) is parameter]
    is_table = any(isinstance(module, nn.Embedding) for module in holders)
    return is_table and (len(holders) > 1 or _is_head(model, parameter))
