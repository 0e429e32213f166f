"""BERT's published files, as transformers writes them: config.json of the type "bert", and its tensors.

An encoder has one head or another on it, which the name of its architecture tells in part, and the tensors in
full. There are two spellings of norms, and names with and without "bert." before them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tinyllm.errors import InputError
from tinyllm.model import PretrainedModel
from tinyllm.pretrained import Weights, refuse_unknown

# What may stand on the encoder beside a task's head -> how its tensors' published names begin.
HEADS = {"pooler": "pooler.", "masked_lm": "cls.predictions.", "next_sentence": "cls.seq_relationship."}
# The published architectures, and the heads that each needs.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "BertModel": (),
    "BertForPreTraining": ("pooler", "masked_lm", "next_sentence"),
    "BertForMaskedLM": ("masked_lm",),
    "BertForNextSentencePrediction": ("pooler", "next_sentence"),
    "BertForSequenceClassification": ("pooler",),
    "BertForTokenClassification": (),
    "BertForQuestionAnswering": (),
}
OURS = {"architecture", "heads", "labels"}  # of our config: published under other names, or not at all
# Options at the values that we implement.
ONLY = {
    "model_type": ["bert"],
    "hidden_act": ["gelu"],  # the exact one, with erf
    "position_embedding_type": ["absolute"],
    "tie_word_embeddings": [True],
    "problem_type": [None, "single_label_classification"],  # others have another loss
}
# Options that say nothing about the model, at the values that they have in published files.
IDLE = {
    "directionality": ["bidi"], "pooler_type": ["first_token_transform"], "pooler_fc_size": [768],
    "pooler_num_attention_heads": [12], "pooler_num_fc_layers": [3], "pooler_size_per_head": [128],
}  # fmt: skip
# What the library sentence-transformers makes of the logits, and its version.
AFTERWARDS = {"sentence_transformers", "sbert_ce_default_activation_function"}


def bert_options(config: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Those of the `fields` that a config.json gives or means; InputError for what we do not implement."""
    published = set(fields) - OURS
    refuse_unknown(config, published | AFTERWARDS, ONLY | IDLE)
    architecture = architecture_of(config)
    given = {name: config[name] for name in published if name in config}
    return {**given, "architecture": architecture, "labels": _labels(config, architecture)}


def published_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round: for a config.json."""
    published = {name: value for name, value in options.items() if name not in OURS}
    labels = options["labels"]
    if labels:
        published["id2label"] = {str(i): label for i, label in enumerate(labels)}
        published["label2id"] = {label: i for i, label in enumerate(labels)}
    return {"architectures": [options["architecture"]], "hidden_act": "gelu", **published}


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first of config.json's architectures; in files without any, what the tensors tell is enough."""
    names = config.get("architectures") or ["BertModel"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(f"architectures is {names!r}, but must be a list of names")
    return names[0]


def _labels(config: Mapping[str, Any], architecture: str) -> tuple[str, ...]:
    """The classes of a task's head; two, and without names, where config.json says nothing."""
    if architecture not in ("BertForSequenceClassification", "BertForTokenClassification"):
        return ()
    count = config.get("num_labels", 2)
    if type(count) is not int or not 1 <= count < 1 << 20:
        raise InputError(f"num_labels is {count!r}, but must be a whole number of 1 or more")
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(len(names))}:
        raise InputError(f"id2label is {str(names)[:80]}, but must name the classes 0, 1, 2, ...")
    return tuple(str(names[str(i)]) for i in range(len(names)))


class BERTFiles(PretrainedModel):
    """A model in BERT's files. Its config names the architecture and the heads, and it has the masked_lm of
    that name, or None, and a token_embedding, to which masked_lm is tied."""

    model_type = "bert"
    published_names = {
        "token_embedding": "bert.embeddings.word_embeddings",
        "position_embedding": "bert.embeddings.position_embeddings",
        "segment_embedding": "bert.embeddings.token_type_embeddings",
        "norm": "bert.embeddings.LayerNorm",
        "blocks.{}.attention.query": "bert.encoder.layer.{}.attention.self.query",
        "blocks.{}.attention.key": "bert.encoder.layer.{}.attention.self.key",
        "blocks.{}.attention.value": "bert.encoder.layer.{}.attention.self.value",
        "blocks.{}.attention.projection": "bert.encoder.layer.{}.attention.output.dense",
        "blocks.{}.norm_1": "bert.encoder.layer.{}.attention.output.LayerNorm",
        "blocks.{}.mlp.expand": "bert.encoder.layer.{}.intermediate.dense",
        "blocks.{}.mlp.projection": "bert.encoder.layer.{}.output.dense",
        "blocks.{}.norm_2": "bert.encoder.layer.{}.output.LayerNorm",
        "pooler": "bert.pooler.dense",
        "masked_lm": "cls.predictions",
        "masked_lm.transform": "cls.predictions.transform.dense",
        "masked_lm.norm": "cls.predictions.transform.LayerNorm",
        "next_sentence": "cls.seq_relationship",
        "classifier": "classifier",
        "span": "qa_outputs",
    }
    # The numbers 0, 1, 2, ...; the tied matrix and its bias under a second name.
    ignored = r"(bert\.)?embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)"
    # Of the file that is being read: whether names begin with "bert.", and norms have gamma and beta.
    _spelling: tuple[bool, bool] | None = None

    @classmethod
    def _skeleton(cls, config: Any, weights: Weights) -> Any:
        """Files may hold more heads than their architecture needs: the first ones, called BertForMaskedLM,
        have all of pre-training, and many a BertModel has no pooler."""
        names = [name.removeprefix("bert.") for name in weights]
        found = tuple(head for head, start in HEADS.items() if any(n.startswith(start) for n in names))
        model = super()._skeleton(replace(config, heads=config.heads + found), weights)
        old = any(name.endswith("LayerNorm.gamma") for name in weights)
        model._spelling = any(name.startswith("bert.") for name in weights), old
        return model

    def published_name(self, name: str) -> str:
        """The published name of one of our parameters: "pooler.bias" -> "bert.pooler.dense.bias"."""
        prefix, old = self._spelling or (self.config.architecture != "BertModel", False)
        name = super().published_name(name)
        if old and ".LayerNorm." in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        return name if prefix else name.removeprefix("bert.")

    def check_published(self, weights: Weights) -> None:
        """Raise InputError if the file has an output matrix or bias other than those that are tied."""
        self._spelling = None
        if self.masked_lm is None:
            return
        tied = {"weight": self.token_embedding.weight, "bias": self.masked_lm.bias}
        for name, parameter in tied.items():
            name = f"cls.predictions.decoder.{name}"
            if name in weights and not weights.holds(name, parameter.data):
                raise InputError(
                    f"the weights in {weights.folder} have {name} of their own, but the model's is tied to "
                    "its token embedding, its bias to cls.predictions.bias (tie_word_embeddings)"
                )
