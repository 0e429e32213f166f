"""GPT-3 (Brown et al. 2020, "Language Models are Few-Shot Learners").

Changed since GPT-2 (section 2.1): every second layer attends to a band only, the last `window_size`
positions, as in the Sparse Transformer (Child et al. 2019), and the context grows to 2,048. In training
(section 2.3 and appendix B) the batch grows, and weight decay is named but no dropout. The rest is size.

    layers 0, 2, 4 ...    position i reads from positions 0 to i
    layers 1, 3, 5 ...    position i reads from positions i - window_size + 1 to i

GPT-3's weights were never published, and neither was the width of its band; 256 is that of GPT-Neo, the open
model after the same description. So the model type "gpt3" is our own name, known to no other program: a
folder of it holds GPT-2's tensors under GPT-2's names, and `window_size` in its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autograd.optim import warmup_cosine
from tinyllm.errors import InputError
from tinyllm.models.gpt2 import GPT2, GPT2Config
from tinyllm.pretrained import check_options


@dataclass(frozen=True)
class GPT3Config(GPT2Config):
    """GPT-2's options with the defaults of the smallest GPT-3 (125M), and the width of the band."""

    n_positions: int = 2048
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    window_size: int = 256  # positions that a banded layer sees, the last one among them

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, whole="window_size")

    @classmethod
    def from_published(cls, config: Mapping[str, Any]) -> GPT3Config:
        """From the contents of a config.json; InputError for an option that we do not implement."""
        if "window_size" not in config:  # else one wrong letter would make a GPT-3 of a GPT-2
            raise InputError("config.json of a gpt3 must say its window_size, the width of the band")
        return super().from_published({name: config[name] for name in config if name != "model_type"})

    def to_published(self) -> dict[str, Any]:
        """The options for a config.json."""
        return {**super().to_published(), "architectures": ["GPT3"]}


class GPT3(GPT2):
    """GPT3(config, seed): weights drawn from the seed; seed None leaves them zero, to be loaded."""

    model_type = "gpt3"
    config_class = GPT3Config

    def __init__(self, config: GPT3Config, seed: int | None = 0) -> None:
        super().__init__(config, seed)
        for block in self.blocks[1::2]:
            block.attention.window = config.window_size


# Brown et al. 2020, table 2.1. Two rows of it cannot be: XL prints 24 heads of 128 for a width of 2048, 13B a
# width of 5140 for 40 heads of 128. With 16 heads, and with 5120, every size has the parameters of table D.1.
SIZES = {
    "gpt3-small": GPT3Config(),
    "gpt3-medium": GPT3Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt3-large": GPT3Config(n_embd=1536, n_layer=24, n_head=16),
    "gpt3-xl": GPT3Config(n_embd=2048, n_layer=24, n_head=16),
    "gpt3-2.7b": GPT3Config(n_embd=2560, n_layer=32, n_head=32),
    "gpt3-6.7b": GPT3Config(n_embd=4096, n_layer=32, n_head=32),
    "gpt3-13b": GPT3Config(n_embd=5120, n_layer=40, n_head=40),
    "gpt3-175b": GPT3Config(n_embd=12288, n_layer=96, n_head=96),
}


def learning_rate(seen: int, peak: float, warmup: float = 375e6, total: float = 260e9) -> float:
    """The rate after `seen` tokens: up to the peak in a line, in a cosine down to a tenth of it, which stays.

    Appendix B counts tokens where our `Recipe` counts steps; with batches of one size b the two agree, but
    for one step of the warm-up, for Recipe(steps=total / b, warmup=warmup / b, lr=peak). Its other defaults
    are the appendix' too: Adam with 0.9, 0.95 and 1e-8, gradients clipped at a norm of 1, weight decay 0.1.
    """
    return warmup_cosine(seen, peak, warmup, total, floor=0.1 * peak)


def batch_tokens(seen: int, full: int, ramp: float, first: int = 32_768) -> int:
    """Tokens in the next batch after `seen`: from `first` in a line to `full`, over `ramp` tokens.

    Appendix B: from 32k over the first 4 to 12 billion tokens. Small batches are enough while the gradient is
    large and plain; later its noise has to be averaged out (McCandlish et al. 2018).
    """
    return round(first + (full - first) * min(seen / ramp, 1.0))
