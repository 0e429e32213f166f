"""Sentence embeddings: a text as one vector, from the hidden states of a BERT (Reimers and Gurevych 2019,
"Sentence-BERT", section 3). Where the model was trained for it, like meanings have like directions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tinyllm
from autograd import Tensor, no_grad
from autograd.backend import array_module, to_host
from tinyllm.checkpoints import resolve
from tinyllm.datasets import padded
from tinyllm.errors import InputError
from tinyllm.files import read_json
from tinyllm.masked import SpecialTokens
from tinyllm.models import BERT
from tinyllm.published_tokenizers import PublishedTokenizer
from tinyllm.tokenizers import Tokenizer, check_fit, load_tokenizer

MODULES = "modules.json"  # what the library sentence-transformers writes: the parts of a model, in order


def mean_pooled(hidden: Tensor, attention_mask: Any) -> Tensor:
    """sum_t mask[t] hidden[t] / sum_t mask[t].   hidden (B, T, C), attention_mask (B, T) -> (B, C)."""
    xp = array_module(hidden.data)
    weights = xp.asarray(attention_mask).astype(hidden.dtype)
    weights /= weights.sum(axis=1, keepdims=True)
    return (hidden * Tensor(weights[..., None])).sum(axis=1)


def cosines(vectors: np.ndarray) -> np.ndarray:
    """a . b / (|a| |b|) of each pair of N vectors (N, C) -> (N, N); 0 where one of them is 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths == 0, 1, lengths)
    return unit @ unit.T


class SentenceEncoder:
    """Texts to vectors: a BERT, its tokenizer, and how the hidden states become one: "mean" or "cls".

    longest: how many tokens of a text are read, with those around it.
    """

    def __init__(
        self, model: BERT, tokenizer: Tokenizer, pooling: str = "mean", longest: int | None = None
    ) -> None:
        check_fit(model, tokenizer)
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.longest = min(longest or model.context, model.context)
        self.lower = False

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SentenceEncoder:
        """From a folder of a BERT with its tokenizer, or one of sentence-transformers with a BERT in it.

        Without the latter's files the pooling is the mean, over all that is no padding.

        Raises:
            InputError: another kind of model, or a part that we do not implement.
        """
        folder = tinyllm.fetched(folder)
        where, pooling = _modules(folder) if (folder / MODULES).exists() else (resolve(folder), "mean")
        model = tinyllm.from_pretrained(where)
        if not isinstance(model, BERT):
            raise InputError(f"{where} holds a {type(model).__name__}, and sentence embeddings need a BERT")
        settings = _settings(where / "sentence_bert_config.json")
        longest = settings.get("max_seq_length")
        if longest is not None and (type(longest) is not int or longest < 3):
            raise InputError(
                f"max_seq_length in {where} is {longest!r}, but must be a whole number of 3 or more"
            )
        encoder = cls(model, load_tokenizer(where), pooling, longest)
        encoder.lower = bool(settings.get("do_lower_case"))
        prompt = _settings(folder / "config_sentence_transformers.json").get("default_prompt_name")
        if prompt is not None:
            raise InputError(f"{folder} puts the prompt {prompt!r} before each text: that is not implemented")
        return encoder

    def encode(self, texts: Sequence[str], batch: int = 32) -> tuple[np.ndarray, int]:
        """(vectors (N, C), how many of the texts were cut because they were longer than `longest`).

        Raises:
            InputError: a text is empty, has no token, or is too long and cannot be cut.
        """
        rows = [self._row(number, text) for number, text in enumerate(texts, 1)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        vectors = np.zeros((len(rows), self.model.config.hidden_size), self.model.dtype)
        self.model.eval()
        for start in range(0, len(rows), batch):
            some = order[start : start + batch]
            ids, lengths = padded([rows[i][0] for i in some])
            mask = np.arange(ids.shape[1]) < lengths[:, None]
            with no_grad():
                hidden = self.model.hidden_states(ids, mask)  # (B, T, C)
                pooled = hidden[:, 0] if self.pooling == "cls" else mean_pooled(hidden, mask)
            vectors[some] = to_host(pooled.data)
        return vectors, sum(was_cut for _, was_cut in rows)

    def _row(self, number: int, text: str) -> tuple[list[int], bool]:
        """The ids of a text with those around it, and whether some of its own had to go."""
        text = text.lower() if self.lower else text
        published = isinstance(self.tokenizer, PublishedTokenizer)
        tokens = self.tokenizer.encode(text, frame=False) if published else self.tokenizer.encode(text)
        if not tokens:
            raise InputError(f"text {number} is empty: there is nothing to embed")
        if not published:
            row, _ = SpecialTokens.of(self.tokenizer).row(tokens, longest=self.longest)
            return row, len(row) < len(tokens) + 2
        row = self.tokenizer.encode(text)
        surplus = len(row) - self.longest
        if surplus <= 0:
            return row, False
        starts = [i for i in range(len(row)) if row[i : i + len(tokens)] == tokens]
        if not starts or surplus >= len(tokens):
            raise InputError(
                f"text {number} has {len(row)} tokens, with those that the tokenizer puts around it, and "
                f"cannot be cut to the {self.longest} that the model reads: shorten it"
            )
        end = starts[0] + len(tokens)
        return row[: end - surplus] + row[end:], True


def _modules(folder: Path) -> tuple[Path, str]:
    """(the folder of the model, the pooling) that modules.json tells."""
    pooling, where = None, None
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / MODULES}: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InputError(f"{folder / MODULES} is damaged: it is no list of a model's parts")
    for module in modules:
        kind, path = str(module.get("type")).rsplit(".")[-1], folder / str(module.get("path", ""))
        if kind == "Transformer":
            where = path
        elif kind == "Pooling":
            pooling = _pooling(path / "config.json")
        elif kind != "Normalize":  # which changes no cosine
            raise InputError(f"{folder / MODULES} has a part {kind!r}, which is not implemented")
    if where is None or pooling is None:
        raise InputError(f"{folder / MODULES} names no Transformer with a Pooling after it")
    return where, pooling


def _pooling(path: Path) -> str:
    """ "mean" or "cls", as a config.json of Pooling tells in flags or in one word."""
    settings = _settings(path)
    flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    modes = [
        flags.get(name, name) for name, on in settings.items() if name.startswith("pooling_mode_") and on
    ]
    modes += [settings["pooling_mode"]] if "pooling_mode" in settings else []
    if modes not in (["mean"], ["cls"]):
        raise InputError(f"{path} asks for the pooling {modes}: mean and cls are implemented, each alone")
    return modes[0]


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
