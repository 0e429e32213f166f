"""What every model has in common: published weights in and out, and for causal models generation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from autograd import nn
from autograd.backend import to_host
from tinyllm import generation, pretrained
from tinyllm.checkpoints import resolve, verify
from tinyllm.errors import InputError


class PretrainedModel(nn.Module):
    """A model that reads and writes its published format.

    A subclass states `published_names`, our module names beside the published ones with {} for the number
    of the layer, and which published matrices are stored transposed.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[Any]
    published_names: ClassVar[dict[str, str]]
    published_prefix: ClassVar[str] = ""  # of all names; absent in some old files
    transposed: ClassVar[frozenset[str]] = frozenset()  # our module names, {} for the layer
    ignored: ClassVar[str] = ""  # a pattern of published names that hold nothing learned

    def published_name(self, name: str) -> str:
        """The published name of one of our parameters: "blocks.3.norm_1.bias" -> "h.3.ln_1.bias"."""
        module, kind, layer = _without_layer(name)
        return self.published_prefix + self.published_names[module].format(layer) + "." + kind

    def _is_transposed(self, name: str) -> bool:
        module, kind, _ = _without_layer(name)
        return kind == "weight" and module in self.transposed

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: Any = np.float32) -> Any:
        """The model in a folder of published weights, or in the newest checkpoint of a training run.

        Raises:
            InputError: naming the file that is missing or damaged, the option that we do not implement, or
                the tensors that are missing, left over or misshapen.
        """
        folder = resolve(folder)
        verify(folder)
        config = pretrained.read_config(folder)
        if config.get("model_type") != cls.model_type:
            raise InputError(
                f"{folder} holds a model of type {config.get('model_type')!r}, not {cls.model_type!r}: "
                "tinyllm.from_pretrained(folder) picks the class by itself"
            )
        model = cls(cls.config_class.from_published(config), seed=None)
        weights = pretrained.read_weights(folder, dtype)
        if cls.published_prefix:
            known = tuple(name.split(".")[0] + "." for name in cls.published_names.values())
            prefix = cls.published_prefix
            weights = weights.renamed(lambda name: prefix + name if name.startswith(known) else name)
        shapes = {}
        for name, parameter in model.named_parameters():
            shape = parameter.shape[::-1] if model._is_transposed(name) else parameter.shape
            shapes[model.published_name(name)] = shape
        pretrained.match(weights, shapes, cls.ignored)
        for name, parameter in model.named_parameters():
            array = weights[model.published_name(name)]
            if array.dtype != np.dtype(dtype):
                raise InputError(
                    f"{model.published_name(name)} in {folder} holds {array.dtype}, not real numbers"
                )
            parameter.data = np.ascontiguousarray(array.T) if model._is_transposed(name) else array
        model.check_published(weights)
        return model.eval()

    def check_published(self, weights: pretrained.Weights) -> None:
        """Raise InputError if tensors that `ignored` lets pass contradict the model."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, from which transformers reads the same model."""
        tensors = {}
        for name, parameter in self.named_parameters():
            array = to_host(parameter.data)
            tensors[self.published_name(name)] = array.T if self._is_transposed(name) else array
        config = {"model_type": self.model_type, **self.config.to_published(), "dtype": str(self.dtype)}
        pretrained.write_weights(folder, config, tensors)

    @property
    def dtype(self) -> np.dtype:
        return self.parameters()[0].dtype


def _without_layer(name: str) -> tuple[str, str, str]:
    """ "blocks.3.norm_1.bias" -> ("blocks.{}.norm_1", "bias", "3")."""
    module, _, kind = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    return re.sub(r"\.\d+\.", ".{}.", module), kind, layer[1] if layer else ""


class CausalModel(PretrainedModel):
    """A model that predicts the next token: it has `context`, `vocabulary_size`, and two halves of forward,
    hidden_states(input_ids, cache) -> (B, T, C) and head(hidden) -> logits."""

    context: int
    vocabulary_size: int

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> np.ndarray:
        """The prompts (B, T) with max_new_tokens more tokens each; see `generation.stream`."""
        return generation.generate(
            self,
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            use_cache=use_cache,
        )
