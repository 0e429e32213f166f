"""BERT's tasks (Devlin et al. 2019, sections 3.2 and 4): one new layer on the encoder, all of it fine-tuned.

A text or a pair has a class, each token has a tag, or the answer to a question is a span of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import autograd.functional as F
from autograd import Tensor, nn
from autograd.backend import array_module
from tinyllm.errors import InputError
from tinyllm.models.bert import BERT, TASKS, Output, parts

NEW = ("classifier.", "span.")  # parameters of a task's head


class Task(BERT):
    """BERT with one new layer on top, to be fine-tuned as a whole (section 3.2)."""

    architecture: str
    _answer: Callable[[Output], Tensor]  # the head's logits, from what BERT gives

    @classmethod
    def on(cls, bert: BERT, labels: Sequence[str] = (), seed: int = 0) -> Any:
        """A copy of a pre-trained model with this task's head, its weights drawn from the seed.

        labels: the names of the classes, where the task has such.

        Raises:
            InputError: labels that do not fit the task, or adapters that are not merged.
        """
        if any(name.endswith(".lora_A") for name in bert.state_dict()):
            raise InputError("the model has adapters: merge and remove the adapters first (tinyllm.lora)")
        config = replace(bert.config, architecture=cls.architecture, heads=(), labels=tuple(labels))
        model = cls(config, seed).to(bert.token_embedding.weight.device, bert.dtype)
        given = {name: array for name, array in bert.state_dict().items() if not name.startswith(NEW)}
        model.load_state_dict({name: given.get(name, array) for name, array in model.state_dict().items()})
        return model

    def _add_head(self) -> None:
        labels, dropout = self.config.labels, self.config.classifier_dropout
        if not labels or len(set(labels)) != len(labels):
            raise InputError(f"a {type(self).__name__} needs labels, each once: {labels}")
        self.head_dropout = nn.Dropout(self.config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(self.config.hidden_size, len(labels))

    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Output:
        """As BERT, with the head's logits."""
        out = super().forward(input_ids, attention_mask, token_type_ids)
        return out._replace(logits=self._answer(out))

    def loss(self, inputs: Any, targets: Any, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of the classes, targets of the shape of the logits without the last axis;
        -100 does not count. inputs as for `BERT.loss`.

        Raises:
            InputError: there is one class alone, as in published models that score a pair of texts.
        """
        if len(self.config.labels) == 1:
            raise InputError(
                f"a {type(self).__name__} with one label has logits but no loss: the cross-entropy of one "
                "class is always 0, and regression, for which transformers takes it, is not implemented"
            )
        logits = self(*parts(inputs)).logits
        return F.cross_entropy(logits, array_module(logits.data).asarray(targets), reduction=reduction)


class SequenceClassifier(Task):
    """logits (B, labels) of a text or a pair of texts, from what the pooler makes of [CLS]."""

    architecture = "BertForSequenceClassification"

    def _answer(self, out: Output) -> Tensor:
        return self.classifier(self.head_dropout(out.pooler_output))


class TokenTagger(Task):
    """logits (B, T, labels) of every token. A target of -100 leaves out what is not tagged: [CLS], padding,
    all tokens of a word but the first (section 5.3)."""

    architecture = "BertForTokenClassification"

    def _answer(self, out: Output) -> Tensor:
        return self.classifier(self.head_dropout(out.last_hidden_state))


class SpanFinder(Task):
    """logits (B, T, 2): S . h_t and E . h_t, whether an answer starts, and ends, at t (section 4.2)."""

    architecture = "BertForQuestionAnswering"

    def _add_head(self) -> None:
        self.span = nn.Linear(self.config.hidden_size, 2)

    def _answer(self, out: Output) -> Tensor:
        return self.span(out.last_hidden_state)

    def loss(self, inputs: Any, targets: Any, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of where the answer starts and where it ends, targets (B, 2), among all
        positions but the padding. No answer: both 0, at [CLS] (section 4.3). inputs as for `BERT.loss`."""
        ids, mask, *segments = (*parts(inputs), None)[:3]
        logits = self(ids, mask, *segments).logits.transpose(0, 2, 1)  # (B, 2, T)
        xp = array_module(logits.data)
        if mask is not None:
            padding = xp.asarray(mask)[:, None] == 0
            logits = logits + Tensor(xp.where(padding, -math.inf, 0.0).astype(logits.dtype))
        return F.cross_entropy(logits, xp.asarray(targets), reduction=reduction)


TASKS.update({task.architecture: task for task in (SequenceClassifier, TokenTagger, SpanFinder)})
