"""The family of models, one file each, and BERT's tasks in another."""

from .bert import BERT, BERTConfig
from .bert_tasks import SequenceClassifier, SpanFinder, TokenTagger
from .bigram import Bigram, BigramConfig
from .gpt1 import GPT1, GPT1Config
from .gpt2 import GPT2, GPT2Config
from .gpt3 import GPT3, GPT3Config
from .llama import LLaMA, LLaMAConfig
from .mistral import Mistral, MistralConfig
from .rwkv import RWKV, RWKVConfig
from .transformer import Transformer, TransformerConfig

__all__ = [
    "BERT",
    "BERTConfig",
    "Bigram",
    "BigramConfig",
    "GPT1",
    "GPT1Config",
    "GPT2",
    "GPT2Config",
    "GPT3",
    "GPT3Config",
    "LLaMA",
    "LLaMAConfig",
    "Mistral",
    "MistralConfig",
    "RWKV",
    "RWKVConfig",
    "SequenceClassifier",
    "SpanFinder",
    "TokenTagger",
    "Transformer",
    "TransformerConfig",
]
