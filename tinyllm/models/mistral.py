"""Mistral 7B (Jiang et al. 2023, "Mistral 7B").

Changed since LLaMA 2 (section 2): in every layer a position sees a window only, the last `sliding_window`
positions, itself among them, so a cache needs no room for more and rolls; queries share keys and values in
the small model too; and the MLP is wider.

    layer 1    position i reads from positions i - sliding_window + 1 to i
    layer l    ... which have read before it: i depends on the last l (sliding_window - 1) + 1 positions

Mistral 7B of 2023 has a window of 4,096. Its later versions, of the same model type, have none: null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autograd import Tensor
from autograd.backend import Array, array_module
from tinyllm.errors import InputError
from tinyllm.generation import KeyValueCache
from tinyllm.models.llama import LLaMA, LLaMAConfig
from tinyllm.pretrained import check_options


@dataclass(frozen=True)
class MistralConfig(LLaMAConfig):
    """LLaMA's options with the defaults of a published config.json of this type, and the window."""

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # positions that a layer sees, the last one among them; None: all

    architecture = "MistralForCausalLM"
    implemented = {**LLaMAConfig.implemented, "model_type": ("mistral",)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, whole="sliding_window")
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self, name):
                raise InputError(f"{name} is true, but Mistral has no biases: leave it out")

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json, in which none of these two left out would mean None."""
        heads, window = self.key_value_heads, self.sliding_window
        return {**super().to_published(), "num_key_value_heads": heads, "sliding_window": window}


class RollingCache(KeyValueCache):
    """The keys and values of the last `window` positions, for each layer (section 2, "Rolling Buffer Cache").

    Position i is in slot i mod window, where it takes the place of position i - window, which no later query
    sees. The keys were turned before they came: their places in the text are in them, so their places here
    are free.
    """

    def __init__(self, window: int) -> None:
        super().__init__(capacity=window)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in keys and values (B, H_kv, T, d) of a layer; returns (B, H_kv, m, d) of each.

        They fit attention with causal=True and this window, which takes the last query to be at the last key.
        For one query they are the slots as they lie, uncopied: it sees all of them, and the order of keys is
        nothing to a softmax. For T queries they are in the order of positions, the up to window - 1 before
        them and their own.
        """
        super().extend(layer, k[:, :, :0], v[:, :, :0])  # nothing yet: it makes room
        slots = self._arrays[layer]
        return tuple(Tensor(self._roll(held, new.data)) for held, new in zip(slots, (k, v)))

    def _roll(self, slots: Array, new: Array) -> Array:
        """Put new (B, H_kv, T, d) in its slots; returns what its queries see."""
        xp, window, start = array_module(new), self.capacity, self.length
        end = start + new.shape[2]
        if new.shape[2] == 1:
            slots[:, :, start % window] = new[:, :, 0]
            return slots[:, :, :end]
        before = xp.arange(max(start - window + 1, 0), start) % window
        seen = xp.concatenate([slots[:, :, before], new], axis=2)
        kept = xp.arange(max(end - window, start), end)
        slots[:, :, kept % window] = new[:, :, kept - start]
        return seen


class Mistral(LLaMA):
    """Mistral(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded."""

    model_type = "mistral"
    config_class = MistralConfig

    def __init__(self, config: MistralConfig, seed: int | None = 0) -> None:
        super().__init__(config, seed)
        for block in self.blocks:
            block.attention.window = config.sliding_window

    def new_cache(self, capacity: int) -> KeyValueCache:
        """An empty cache for up to `capacity` positions: one that rolls if they are more than the window."""
        window = self.config.sliding_window
        return super().new_cache(capacity) if window is None or capacity <= window else RollingCache(window)


# Jiang et al. 2023, table 1, and the config of the published weights, which names 32,768 positions where the
# table has a context of 8,192. Version 0.3 is from its config: no window, more tokens, slower rotations.
SIZES = {
    "mistral-7b": MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5),
    "mistral-7b-v0.3": MistralConfig(
        vocab_size=32768,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
    ),
}
