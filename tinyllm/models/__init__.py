"""The family of models, one file each."""

from .bigram import Bigram, BigramConfig
from .gpt1 import GPT1, GPT1Config
from .gpt2 import GPT2, GPT2Config
from .gpt3 import GPT3, GPT3Config
from .llama import LLaMA, LLaMAConfig
from .mistral import Mistral, MistralConfig
from .rwkv import RWKV, RWKVConfig

__all__ = [
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
]
