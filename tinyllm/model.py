"""What every model has in common: published weights in and out, and for causal models generation."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import autograd.functional as F
from autograd import Tensor, nn
from autograd.backend import Array, array_module, to_host
from tinyllm import generation, pretrained
from tinyllm.checkpoints import resolve, verify
from tinyllm.errors import InputError


class PretrainedModel(nn.Module):
    """A model that reads and writes its published format.

    A subclass states `published_names`, our module names beside the published ones with {} for the number
    of the layer, and which published matrices are stored transposed.
    """

    context: int  # the most positions that it can read
    model_type: ClassVar[str]
    config_class: ClassVar[Any]
    published_names: ClassVar[dict[str, str]]
    published_prefix: ClassVar[str] = ""  # of all names; absent in some old files
    transposed: ClassVar[frozenset[str]] = frozenset()  # our module names, {} for the layer
    ignored: ClassVar[str] = ""  # a pattern of published names that hold nothing learned
    # From a config.json for the next one: where texts end is no matter of the function, but of who writes.
    token_ids: Mapping[str, Any] = {}

    def published_name(self, name: str) -> str:
        """The published name of one of our parameters: "blocks.3.norm_1.bias" -> "h.3.ln_1.bias"."""
        module, kind, layer = _without_layer(name)
        return self.published_prefix + self.published_names[module].format(layer) + "." + kind

    def is_transposed(self, name: str) -> bool:
        """Whether the file holds the parameter of that name as the transpose of ours."""
        module, kind, _ = _without_layer(name)
        return kind == "weight" and module in self.transposed

    def published_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the file gives to a parameter of ours with this shape."""
        return shape[::-1] if self.is_transposed(name) else shape

    def as_published(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array of the parameter `name`, contiguous, as a view of the shape that the file gives to it."""
        shape = self.published_shape(name, array.shape)
        return array.T if self.is_transposed(name) else array.reshape(shape)

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
        pretrained.check_types(config, cls.config_class)
        token_ids = {name: config[name] for name in pretrained.TOKEN_IDS if name in config}
        config = cls.config_class.from_published(config)
        weights = pretrained.read_weights(folder, dtype)
        model = cls._skeleton(config, weights)
        if cls.published_prefix:
            known = tuple(name.split(".")[0] + "." for name in cls.published_names.values())
            prefix = cls.published_prefix
            weights = weights.renamed(lambda name: prefix + name if name.startswith(known) else name)
        shapes = {}
        for name, parameter in model.named_parameters():
            shapes[model.published_name(name)] = model.published_shape(name, parameter.shape)
        pretrained.match(weights, shapes, cls.ignored)
        for name, parameter in model.named_parameters():
            array = np.empty(parameter.shape, dtype)
            weights.read(model.published_name(name), model.as_published(name, array))
            parameter.data = array
        model.check_published(weights)
        model.token_ids = token_ids
        return model.eval()

    @classmethod
    def _skeleton(cls, config: Any, weights: pretrained.Weights) -> Any:
        """A model without memory for its weights. A config that asks for many times the tensors that there
        are fails at once; one that is wrong by a few layers goes on, and `match` will name the tensors."""
        try:
            with nn.skeleton(most=1000 + 10 * len(weights)):
                return cls(config, seed=None)
        except (ValueError, OverflowError, MemoryError) as error:
            raise InputError(
                f"config.json in {weights.folder} does not describe the {len(weights)} tensors there, or no "
                f"possible model: {error}"
            ) from error

    def check_published(self, weights: pretrained.Weights) -> None:
        """Raise InputError if tensors that `ignored` lets pass contradict the model."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, from which transformers reads the same model.

        Raises:
            InputError: the model has LoRA adapters that are not merged, for which the format has no place.
        """
        if any(name.endswith((".lora_A", ".lora_B")) for name in self.state_dict()):
            raise InputError(
                "the model has adapters, for which these files have no place: lora.merge(model) first, or "
                "lora.save(model, folder) for the adapters alone"
            )
        tensors = {
            self.published_name(name): self.as_published(name, to_host(parameter.data))
            for name, parameter in self.named_parameters()
        }
        config = {"model_type": self.model_type, **self.token_ids, **self.config.to_published()}
        pretrained.write_weights(folder, {**config, "dtype": str(self.dtype)}, tensors)

    @property
    def dtype(self) -> np.dtype:
        return self.parameters()[0].dtype

    def _ids(self, ids: Any, start: int = 0) -> Array:
        """ids (B, T) on the device of the weights.

        Raises:
            InputError: they are no batch, or more than the context with the `start` before them.
        """
        _, weight = next(self.named_parameters())
        ids = array_module(weight.data).asarray(ids.data if isinstance(ids, Tensor) else ids)
        if ids.ndim != 2 or not ids.size:
            raise InputError(
                f"token ids have the shape (batch, length), both 1 or more, and these {ids.shape}"
            )
        if start + ids.shape[1] > self.context:
            raise InputError(
                f"{start + ids.shape[1]} tokens do not fit the model's context of {self.context}"
            )
        return ids


def _without_layer(name: str) -> tuple[str, str, str]:
    """ "blocks.3.norm_1.bias" -> ("blocks.{}.norm_1", "bias", "3")."""
    module, _, kind = name.rpartition(".")
    layer = re.search(r"\.(\d+)\.", name)
    return re.sub(r"\.\d+\.", ".{}.", module), kind, layer[1] if layer else ""


class CausalModel(PretrainedModel):
    """A model that predicts the next token.

    It has the part before the head, in which models differ: hidden_states(input_ids, cache) -> (B, T, C).
    """

    published_head: ClassVar[str | None] = "lm_head.weight"  # which files of a tied head may hold too

    @property
    def vocabulary_size(self) -> int:
        return self.config.vocab_size

    @property
    def head_weight(self) -> Tensor:
        """The output head (V, C): the token embedding itself (tied), unless a model says otherwise."""
        return self.token_embedding.weight

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V) = hidden head_weight^T."""
        return F.linear(hidden, self.head_weight)

    def forward(self, input_ids: Any, cache: Any = None) -> Tensor:
        """input_ids (B, T) -> logits (B, T, V): at each position the scores of the next token.

        A cache, from new_cache, holds what came before them, and takes them in.
        """
        return self.head(self.hidden_states(input_ids, cache))

    def loss(self, input_ids: Any, targets: Any, reduction: str = "mean") -> Tensor:
        """Cross-entropy of the targets (B, T), in nats a token; targets of -100 do not count."""
        hidden, targets = self.hidden_states(input_ids), self._ids(targets)
        return F.linear_cross_entropy(hidden, self.head_weight, targets, -100, reduction)

    def _read(self, input_ids: Any, cache: Any) -> tuple[Array, int]:
        """input_ids (B, T) on the device of the weights, and the position of the first, after what the cache
        holds; InputError as for `_ids`."""
        start = cache.length if cache is not None else 0
        return self._ids(input_ids, start), start

    def check_published(self, weights: pretrained.Weights) -> None:
        """Raise InputError if a file has a head of its own where the model's is tied to its embedding."""
        name = self.published_head
        if name not in weights.shapes or self.head_weight is not self.token_embedding.weight:
            return
        if not weights.holds(name, self.token_embedding.weight.data):
            raise InputError(
                f"the weights in {weights.folder} have an output head of their own ({name}), but the model's "
                "is tied to its token embedding (tie_word_embeddings)"
            )

    def new_cache(self, capacity: int) -> Any:
        """An empty cache for up to `capacity` positions; see `generation.KeyValueCache`."""
        return generation.KeyValueCache(capacity)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
        stop: Collection[int] = (),
    ) -> np.ndarray:
        """The prompts, (B, T) or B rows, with max_new_tokens more tokens each; see `generation.generate`."""
        return generation.generate(
            self,
            input_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            use_cache=use_cache,
            stop=stop,
        )

    def beam_search(
        self,
        prompt: Any,
        max_new_tokens: int,
        width: int = 4,
        alpha: float = 0.6,
        stop: Collection[int] = (),
        use_cache: bool = True,
    ) -> list[generation.Beam]:
        """The likeliest continuations of one prompt (T,), the best first; see `generation.beam_search`."""
        return generation.beam_search(self, prompt, max_new_tokens, width, alpha, stop, use_cache)
