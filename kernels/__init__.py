"""Hand-written CUDA, and the means to run it without a GPU."""

from .flash_attention import flash_attention, flash_attention_backward

__all__ = ["flash_attention", "flash_attention_backward"]
