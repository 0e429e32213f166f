"""GPT-2, LLaMA and LLaMA 2 side by side: three models of the same size on the same tokens.

Without arguments: trains the three, about a million parameters each, on the prose of Python's own
documentation, three minutes in all on 2 cores. They differ in nothing but their architecture: the same tokens
in the same order, the same optimizer, a head tied to the embedding in each, no dropout. LLaMA's MLP takes the
room that position embedding and biases leave; LLaMA 2's also that of the keys and values which its heads
share. GPT-2 ends at about 4.1 nats a token on the validation text, both LLaMAs at about 3.7, LLaMA 2 with
half the cache. The table says so exactly, and the picture in runs/llama has the three curves.

    python examples/llama.py
    python examples/llama.py --data book.txt --steps 1000 --out runs/book
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autograd import nn, no_grad
from tinyllm import cli, plots
from tinyllm.corpus import Corpus, load
from tinyllm.datasets import Sampler, bytes_per_token, evaluation_batches
from tinyllm.model import CausalModel
from tinyllm.models import GPT2, GPT2Config, LLaMA, LLaMAConfig
from tinyllm.training import Progress, Recipe, fit

VOCABULARY, WIDTH, LAYERS, HEADS = 1280, 128, 4, 4
BATCH, CONTEXT = 16, 128
PROMPT = "The class statement"


def main() -> None:
    args = arguments()
    cli.start(args)
    corpus = load(args.data, VOCABULARY)
    print(f"corpus: {len(corpus.train):,} tokens to train on, {len(corpus.validation):,} to validate")
    print(f"run:    {args.steps:,} steps of {BATCH * CONTEXT:,} tokens for each model\n")
    models = three(corpus.tokenizer.vocabulary_size, args.seed)
    progress = {name: learn(name, model.to(args.device), corpus, args) for name, model in models.items()}

    scale = 1 / (math.log(2) * bytes_per_token(corpus.tokenizer, corpus.validation))
    print("             parameters   training   validation loss                    cache, bytes a token")
    for name, model in models.items():
        trained = np.mean(progress[name].losses[-50:])
        loss = progress[name].validation[-1][1]
        nats = f"{loss:.3f} nats a token = {loss * scale:.3f} bits a byte"
        print(f"{name:10s}{model.parameter_count():13,}{trained:11.3f}   {nats}{cache_bytes(model):17,}")
    prompt = corpus.tokenizer.encode(PROMPT)
    print(f"\nLLaMA 2 writes:\n{cli.sample(models['LLaMA 2'], corpus.tokenizer, prompt, 80, args.seed)}")
    picture = args.out / "llama.png"
    draw(progress, scale, picture)
    print(f"\nthe three curves are drawn in {picture}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/llama", steps=450)
    return parser.parse_args()


def three(vocabulary: int, seed: int) -> dict[str, CausalModel]:
    """The models, LLaMA's MLPs as wide as GPT-2's size asks for."""
    gpt2 = GPT2(GPT2Config(vocabulary, CONTEXT, WIDTH, LAYERS, HEADS, None, 0.0, 0.0, 0.0), seed)
    llama = LLaMAConfig(
        vocabulary, WIDTH, 1, LAYERS, HEADS, max_position_embeddings=CONTEXT, tie_word_embeddings=True
    )
    size = gpt2.parameter_count()
    return {
        "GPT-2": gpt2,
        "LLaMA": LLaMA(sized(llama, size), seed),
        "LLaMA 2": LLaMA(sized(replace(llama, num_key_value_heads=HEADS // 2), size), seed),
    }


def sized(config: LLaMAConfig, size: int) -> LLaMAConfig:
    """The config with as much in its MLPs as makes the whole `size` parameters, or nearly."""
    with nn.skeleton():
        rest = size - LLaMA(config, seed=None).parameter_count()
    return replace(config, intermediate_size=1 + round(rest / (3 * WIDTH * LAYERS)))


def learn(name: str, model: CausalModel, corpus: Corpus, args: argparse.Namespace) -> Progress:
    """Train the model; the batches depend on the seed alone, so all models see the same."""
    recipe = Recipe(args.steps, BATCH, CONTEXT, warmup=min(50, args.steps), seed=args.seed, shards=2)
    sampler = Sampler(corpus.train, BATCH, CONTEXT, args.seed)
    validation = corpus.validation[: 100 * BATCH * CONTEXT + 1]
    return fit(
        model,
        lambda step: sampler.next(),
        recipe,
        name,
        lambda: evaluation_batches(validation, BATCH, CONTEXT),
        every=max(1, args.steps // 15),
    )


def cache_bytes(model: CausalModel) -> int:
    """What one more token of text adds to the cache."""
    cache = model.new_cache(CONTEXT)
    with no_grad():
        model.hidden_states([[0]], cache)
    return cache.nbytes // CONTEXT


def draw(progress: dict[str, Progress], scale: float, path: Path) -> None:
    """The validation losses over the steps, those of training faintly behind; bits a byte at the right."""
    figure, axes = plots.figure()
    for (name, run), color in zip(progress.items(), plots.COLORS):
        axes.plot(*plots.running_mean(run.losses), color=color, alpha=0.35, linewidth=1)
        steps, losses = zip(*run.validation)
        axes.plot(steps, losses, "o-", color=color, markersize=3, label=f"{name}: {losses[-1]:.2f}")
    plots.finish(
        axes,
        xlabel="step",
        ylabel="nats a token",
        title="the same size, the same tokens: validation loss, and faintly that of training",
    )
    axes.set_xlim(left=0)
    bits: Any = axes.secondary_yaxis("right", functions=(lambda x: x * scale, lambda x: x / scale))
    bits.set_ylabel("bits a byte")
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
