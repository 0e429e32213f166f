"""The Transformer's published files, as transformers writes them: config.json of the type "marian", and its
tensors. Marian (Junczys-Dowmunt et al. 2018) is the translator whose models the Opus project trains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import numpy as np

from autograd import nn
from autograd.backend import Array
from tinyllm.errors import InputError
from tinyllm.model import PretrainedModel
from tinyllm.pretrained import Weights, refuse_unknown

# What transformers takes for an option that a config.json of this type leaves out.
LEFT_OUT = {
    "vocab_size": 58101, "max_position_embeddings": 1024, "d_model": 1024,
    "encoder_layers": 12, "encoder_ffn_dim": 4096, "encoder_attention_heads": 16,
    "decoder_layers": 12, "decoder_ffn_dim": 4096, "decoder_attention_heads": 16,
    "activation_function": "gelu", "scale_embedding": False,
    "decoder_start_token_id": 58100, "pad_token_id": 58100, "eos_token_id": 0,
}  # fmt: skip
# Without effect in published models: for weights that are loaded, for classifiers, for positions.
IDLE = ["init_std", "classif_dropout", "classifier_dropout", "extra_pos_embeddings"]
# Options at the values that we implement; the config's own are beside these.
ONLY = {
    "model_type": ["marian"],
    "is_encoder_decoder": [True],
    "encoder_layerdrop": [0.0],
    "decoder_layerdrop": [0.0],
    "normalize_before": [False],
    "normalize_embedding": [False],
    "add_final_layer_norm": [False],
    "static_position_embeddings": [True],
    "force_bos_token_to_be_generated": [False],
    "add_bias_logits": [True, False],  # there is one, whatever this says
}


def marian_options(config: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Those of the `fields` that a config.json gives or means; InputError for what we do not implement."""
    config = {**LEFT_OUT, **config}
    refuse_unknown(config, [*fields, *IDLE], ONLY | {"num_hidden_layers": [config["encoder_layers"]]})
    return {name: config[name] for name in fields if name in config}


# The parts of a layer on either side: ours, published.
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "out_proj"}
LAYER = {
    **{f"attention.{ours}": f"self_attn.{published}" for ours, published in ATTENTION.items()},
    **{f"cross_attention.{ours}": f"encoder_attn.{published}" for ours, published in ATTENTION.items()},
    "feed_forward.expand": "fc1",
    "feed_forward.projection": "fc2",
    "attention_norm": "self_attn_layer_norm",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "feed_forward_norm": "final_layer_norm",
}


class MarianFiles(PretrainedModel):
    """A model in Marian's files.

    It has the tables source_embedding, target_embedding and output, of which some may be one, and a
    logits_bias; the `context`; and positions(start, T, width, like), what stands in place of a learned table.
    """

    model_type = "marian"
    published_names = {
        "source_embedding": "model.encoder.embed_tokens",  # model.shared if it is the target's too
        "target_embedding": "model.decoder.embed_tokens",
        "output": "lm_head",
        **{f"{side}.{{}}.{ours}": f"model.{side}.layers.{{}}.{published}"
           for side in ("encoder", "decoder") for ours, published in LAYER.items()},
    }  # fmt: skip
    # Tied tables under their other names, and positions: some files hold them, and they are checked.
    ignored = r"lm_head\.weight|model\.(encoder|decoder)\.embed_(tokens|positions)\.weight"

    config: Any
    context: int
    source_embedding: nn.Embedding
    target_embedding: nn.Embedding
    output: nn.Module
    positions: ClassVar[Callable[[int, int, int, Array], Array]]

    def published_name(self, name: str) -> str:
        if name == "logits_bias":
            return "final_logits_bias"
        if name == "source_embedding.weight" and self.config.share_encoder_decoder_embeddings:
            return "model.shared.weight"
        return super().published_name(name)

    def published_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape) if name == "logits_bias" else shape

    def check_published(self, weights: Weights) -> None:
        """Raise InputError if a table stored twice is not the same, or positions are not the sines and
        cosines that they must be."""
        tied = {
            "lm_head.weight": self.output,
            "model.encoder.embed_tokens.weight": self.source_embedding,
            "model.decoder.embed_tokens.weight": self.target_embedding,
        }
        for name, table in tied.items():
            if name in weights.shapes and not weights.holds(name, table.weight.data):
                raise InputError(
                    f"{name} in {weights.folder} is a table of its own, but by its config.json "
                    "(share_encoder_decoder_embeddings, tie_word_embeddings) it is one with another"
                )
        for side in ("encoder", "decoder"):
            name = f"model.{side}.embed_positions.weight"
            if name in weights.shapes:
                stored = weights[name]
                expected = self.positions(0, self.context, self.config.d_model, stored)
                if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=0, atol=1e-2):
                    raise InputError(f"{name} in {weights.folder} are not the sines and cosines of positions")
