"""RWKV: trained like a Transformer, on whole texts at once; writing like a recurrent network, from a state.

Without arguments: trains an RWKV of about a million parameters on the prose of Python's own documentation and
lets it write, all in about a minute on 2 cores. The validation loss falls from 7.0 to 3.2 nats a token, and
is no worse when it reads 16 times as much at once as in training. Then it reads 64 to 16,384 tokens, and so
does a GPT-2 of its size, with random weights, for their values cost no time. The table says what each has to
remember by then, and what the next token costs: RWKV's state and time stay what they were, GPT-2's cache
grows with every token, and in the end its time too. The folder runs/rwkv gets a picture of both, of the
training, and of the decays that were learned: after how many tokens each channel has forgotten half.

    python examples/rwkv.py
    python examples/rwkv.py --data book.txt --steps 2000 --out runs/book     # a longer text bears more steps
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinyllm import cli, plots
from tinyllm.corpus import Corpus, load
from tinyllm.datasets import Sampler, evaluation_batches
from tinyllm.evaluation import cost, loss
from tinyllm.models import GPT2, RWKV, GPT2Config, RWKVConfig
from tinyllm.training import Progress, Recipe, fit

VOCABULARY, WIDTH, LAYERS = 1024, 128, 4
GPT2_LAYERS, GPT2_HEADS = 5, 4  # so that it has as many parameters, its table of positions left out
BATCH, CONTEXT = 16, 128  # in training
LENGTHS = [64, 256, 1024, 4096, 16384]
TIMED = 32  # tokens, of which the median counts
PROMPT = "The class statement"

Costs = dict[str, list[tuple[int, float]]]  # model -> (bytes, seconds a token) for each of LENGTHS


def main() -> None:
    args = arguments()
    cli.start(args)
    corpus = load(args.data, VOCABULARY)
    V = corpus.tokenizer.vocabulary_size
    model = RWKV(RWKVConfig(V, CONTEXT, WIDTH, LAYERS), args.seed)
    untrained = half_lives(model)
    print(f"corpus: {len(corpus.train):,} tokens to train on, {len(corpus.validation):,} to validate")
    print(f"model:  {model.parameter_count():,} parameters, {LAYERS} layers of width {WIDTH}")
    progress = learn(model.to(args.device), corpus, args)

    print("\nvalidation loss, nats a token")
    for context in (CONTEXT, 16 * CONTEXT):
        print(f"   {loss(model, corpus.validation, context):.3f}   reading {context:,} at a time")
    prompt = corpus.tokenizer.encode(PROMPT)  # the text gets longer than those it was trained on
    print(f"\nit writes:\n{cli.sample(model, corpus.tokenizer, prompt, 2 * CONTEXT, args.seed)}")

    gpt2 = GPT2(GPT2Config(V, LENGTHS[-1], WIDTH, GPT2_LAYERS, GPT2_HEADS), args.seed).to(args.device)
    tokens = np.resize(corpus.train.astype(np.int64), (1, LENGTHS[-1]))
    costs: Costs = {}
    for name, kind in (("RWKV", model), ("GPT-2", gpt2)):
        bar = tqdm(LENGTHS, desc=f"{name} reads", unit="text", leave=False)
        costs[name] = [cost(kind, tokens[:, :n], TIMED) for n in bar]
    print("\n               memory, KiB             a token, ms")
    print("tokens read      RWKV     GPT-2        RWKV     GPT-2")
    for n, (state, fast), (cache, slow) in zip(LENGTHS, costs["RWKV"], costs["GPT-2"]):
        print(f"{n:11,}{state / 1024:10,.1f}{cache / 1024:10,.0f}{1e3 * fast:12.2f}{1e3 * slow:10.2f}")

    picture = args.out / "rwkv.png"
    draw(picture, progress, untrained, half_lives(model), costs)
    print(f"\nmemory, time, the training and the decays are drawn in {picture}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/rwkv", steps=250)
    return parser.parse_args()


def learn(model: RWKV, corpus: Corpus, args: argparse.Namespace) -> Progress:
    recipe = Recipe(args.steps, BATCH, CONTEXT, lr=4e-3, warmup=50, seed=args.seed, shards=2)
    sampler = Sampler(corpus.train, BATCH, CONTEXT, args.seed)
    validation = corpus.validation[: 100 * BATCH * CONTEXT + 1]
    evaluation = lambda: evaluation_batches(validation, BATCH, CONTEXT)
    every = math.ceil(args.steps / 8)
    progress = fit(model, lambda step: sampler.next(), recipe, "rwkv", evaluation, every)
    print(f"\n{cli.losses(progress)}")
    return progress


def half_lives(model: RWKV) -> list[np.ndarray]:
    """For each layer, after how many tokens each channel has forgotten half: e^(-n w) = 1/2."""
    return [np.log(2) / np.exp(block.time_mix.time_decay.numpy()) for block in model.blocks]


def draw(
    path: Path, progress: Progress, untrained: list[np.ndarray], trained: list[np.ndarray], costs: Costs
) -> None:
    figure, ((memory, seconds), (training, decays)) = plots.figure(2, 2, (11, 7.5))
    for (name, found), color in zip(costs.items(), plots.COLORS):
        size, each = np.array(found).T
        memory.loglog(LENGTHS, size / 1024, "o-", color=color, label=name)
        seconds.loglog(LENGTHS, 1e3 * each, "o-", color=color, label=name)
    plots.finish(memory, xlabel="tokens read", ylabel="KiB", title="what it remembers")
    plots.finish(seconds, xlabel="tokens read", ylabel="milliseconds", title="what the next token costs")

    plots.training_curve(training, progress.losses, "training", plots.COLORS[0])
    training.plot(*zip(*progress.validation), "o-", color=plots.COLORS[1], label="validation")
    plots.finish(training, xlabel="step", ylabel="nats a token", title="RWKV learns")

    channels = np.arange(len(trained[0]))
    for layer, (before, after) in enumerate(zip(untrained, trained)):
        decays.semilogy(channels, before, ":", color=plots.COLORS[layer], linewidth=1)
        decays.semilogy(channels, after, color=plots.COLORS[layer], linewidth=1, label=f"layer {layer + 1}")
    plots.finish(
        decays, xlabel="channel", ylabel="tokens", title="until half is forgotten (dotted: at first)"
    )
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
