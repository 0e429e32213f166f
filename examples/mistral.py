"""A window on the past: Mistral's sliding-window attention, and the cache that rolls.

Without arguments: trains a Mistral of about a million parameters, 4 layers with a window of 32 tokens, on the
prose of Python's own documentation, in about a minute on 2 cores. The validation loss falls from 7.0 to
3.3 nats a token, and stays there for texts 32 times as long as those in training; the same weights without
the window lose more than a nat there.

Then it writes ten windows of text and checks them: the cache, which holds one window, gives the tokens and
the logits that reading everything again gives. A table shows what that is worth: memory and time for a token
stay as they were after the first window, and grow for a cache of all of the past.

The picture in runs/mistral has the bytes of both caches, who sees whom through 1 to 4 layers, and how much
what a layer computes depends on tokens further and further away: not at all beyond 31 tokens a layer.

    python examples/mistral.py
    python examples/mistral.py --data book.txt --out runs/book
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autograd import Tensor, grad, no_grad
from autograd.backend import to_device
from tinyllm import cli, corpus, plots
from tinyllm.datasets import Sampler, evaluation_batches
from tinyllm.evaluation import cost, loss
from tinyllm.models import Mistral, MistralConfig
from tinyllm.training import Recipe, fit

CONFIG = MistralConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    sliding_window=32,
)
BATCH, CONTEXT = 16, 128  # in training
POSITIONS = [64, 256, 1024, 4096]  # where memory and time are measured, over the last TIMED tokens
TIMED = 32


def main() -> None:
    args = arguments()
    cli.start(args)
    tokenizer, train, validation = corpus.load(args.data, CONFIG.vocab_size)
    config = replace(CONFIG, vocab_size=tokenizer.vocabulary_size)
    model = Mistral(config, args.seed).to(args.device)
    window, layers = config.sliding_window, config.num_hidden_layers
    print(f"corpus: {len(train):,} tokens to train on, {len(validation):,} to validate")
    print(f"model:  {model.parameter_count():,} parameters, {layers} layers with a window of {window} tokens")
    learn(model, train, validation, args)

    free = variation(model, sliding_window=None)
    longest = POSITIONS[-1]
    print("\nvalidation loss, nats a token")
    print(f"   {loss(model, validation, CONTEXT):.3f}   reading {CONTEXT} tokens at a time, as in training")
    print(f"   {loss(model, validation, longest):.3f}   reading {longest:,}")
    print(f"   {loss(free, validation, longest):.3f}   reading {longest:,} without the window, same weights")

    prompt = validation[: window // 2].astype(np.int64)[None]
    compare(model, prompt, new=10 * window - prompt.shape[1])
    text = cli.sample(model, tokenizer, prompt[0], 4 * window, args.seed)
    print(f"\na text, drawn at temperature 0.8\n{text}")

    ids = np.resize(train.astype(np.int64), (1, longest))
    print("\n            cache, KiB            a token, ms")
    print("position    window       all      window       all")
    for n in POSITIONS:
        (rolling, fast), (full, slow) = (cost(kind, ids[:, :n], TIMED) for kind in (model, free))
        print(f"{n:8,}{rolling / 1024:10,.0f}{full / 1024:10,.0f}{1e3 * fast:12.2f}{1e3 * slow:10.2f}")

    draw(args.out / "mistral.png", model, free, ids, args.seed)
    print(f"\nthe caches, and who sees whom, are drawn in {args.out / 'mistral.png'}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/mistral", steps=400)
    return parser.parse_args()


def learn(model: Mistral, train: np.ndarray, validation: np.ndarray, args: argparse.Namespace) -> None:
    context = max(min(CONTEXT, len(train) - 1), 1)
    recipe = Recipe(args.steps, BATCH, context, seed=args.seed, shards=2)
    sampler = Sampler(train, recipe.batch, recipe.context, args.seed)
    evaluation = lambda: evaluation_batches(validation, BATCH, CONTEXT)
    every = max(1, args.steps // 4)
    progress = fit(model, lambda step: sampler.next(), recipe, "mistral", evaluation, every)
    print(f"\n{cli.losses(progress)}")


def variation(model: Mistral, **options: Any) -> Mistral:
    """A model with other options and the same weights; with fewer layers, the first ones."""
    other = Mistral(replace(model.config, **options)).to(model.parameters()[0].device)
    weights = model.state_dict()
    other.load_state_dict({name: weights[name] for name in other.state_dict()})
    return other.eval()


def compare(model: Mistral, prompt: np.ndarray, new: int) -> None:
    """Greedy text with the rolling cache, and by reading all of it again for each token."""
    cached = model.generate(prompt, new, temperature=0)
    again = model.generate(prompt, new, temperature=0, use_cache=False)
    start, end = prompt.shape[1], cached.shape[1]
    with no_grad():
        cache = model.new_cache(end)
        steps = [model(cached[:, :start], cache).numpy()]
        for i in range(start, end):
            steps.append(model(cached[:, i : i + 1], cache).numpy())
        difference = np.abs(np.concatenate(steps, axis=1) - model(cached).numpy()).max()
    same = int((cached == again)[0, start:].sum())
    print(f"\nthe cache against reading everything again, {end / model.config.sliding_window:.0f} windows")
    print(f"   {same} of {new} greedy tokens are equal; the largest difference of logits is {difference:.1e}")


def held(model: Mistral, ids: np.ndarray) -> int:
    """Bytes of a cache with room for ids (1, T)."""
    with no_grad():
        cache = model.new_cache(ids.shape[1])
        model.hidden_states(ids[:, :1], cache)
    return cache.nbytes


def layers_between(config: MistralConfig, T: int) -> np.ndarray:
    """(T, T): through how many layers position i (row) sees position j first, nan if through none."""
    i, j = np.arange(T)[:, None], np.arange(T)
    visible = (j <= i) & (j > i - config.sliding_window)
    found, reached = np.full((T, T), np.nan), np.eye(T, dtype=bool)
    for layer in range(1, config.num_hidden_layers + 1):
        reached = reached @ visible
        found[reached & np.isnan(found)] = layer
    return found


def influence(model: Mistral, T: int, rng: np.random.Generator, draws: int = 16) -> np.ndarray:
    """(T,): the size of the gradient of the last position's result by the token 0, 1, 2 ... before it."""
    table, total = model.token_embedding.weight, np.zeros(T)
    for _ in range(draws):
        ids = rng.permutation(model.vocabulary_size)[:T]  # none twice: a row of the table is a position
        hidden = model.hidden_states(ids[None])[0, -1]
        direction = to_device(rng.standard_normal(hidden.shape, np.float32), table.device)
        (g,) = grad((hidden * Tensor(direction)).sum(), [table])
        total += np.linalg.norm(g.numpy()[ids[::-1]], axis=1)
    return total / draws


def draw(path: Path, model: Mistral, free: Mistral, ids: np.ndarray, seed: int) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    config, rng = model.config, np.random.default_rng(seed)
    window, layers = config.sliding_window, config.num_hidden_layers
    figure, (left, middle, right) = plots.figure(1, 3, (11.2, 3.9))

    at = np.linspace(1, 10 * window, 41).astype(int)
    for kind, name, color in ((free, "all of the past", 1), (model, f"a window of {window}", 0)):
        left.plot(at, [held(kind, ids[:, :n]) / 1024 for n in at], color=plots.COLORS[color], label=name)
    plots.finish(left, xlabel="tokens read", ylabel="KiB", title="what a cache takes")
    left.set_ylim(bottom=0)

    T = layers * (window - 1) + 20
    colors = [f"C{layer}" for layer in range(layers)]
    image = middle.imshow(
        layers_between(config, T),
        cmap=ListedColormap(colors),
        norm=BoundaryNorm(np.arange(layers + 1) + 0.5, layers),
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=middle, ticks=range(1, layers + 1), shrink=0.8)
    bar.set_label("layers it takes")
    middle.set(xlabel="token that is seen", ylabel="position that sees it", title="who sees whom")

    for layer in tqdm(range(1, layers + 1), desc="gradients", unit="layer", leave=False):
        size = influence(variation(model, num_hidden_layers=layer), T, rng)
        reach = np.flatnonzero(size)
        label = f"{layer} layer{'s' * (layer > 1)}: {reach[-1]} back"
        right.semilogy(reach, size[reach], "o-", color=colors[layer - 1], markevery=[-1], label=label)
    plots.finish(right, xlabel="tokens back", ylabel="size of the gradient", title="what a result depends on")
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
