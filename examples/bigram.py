"""The bigram model twice: a table of counts, and the same table learned by gradient descent.

Character by character, on the prose of Python's own documentation. Counting looks at the text once and gives
the best table that there is; 1,000 steps of gradient descent, which know nothing of counting, arrive at the
same loss, 2.54 nats a character, and at the same table, in ten seconds on 2 cores. Then both write, with the
same random numbers. The folder runs/bigram gets a picture of both losses and both tables.

    python examples/bigram.py
    python examples/bigram.py --data book.txt --out runs/book
    python examples/bigram.py --steps 30                        # stopped before the two have met
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

import autograd.functional as F
from tinyllm import cli, corpus, plots
from tinyllm.datasets import Sampler, evaluation_batches
from tinyllm.models import Bigram, BigramConfig
from tinyllm.models.bigram import count_pairs
from tinyllm.tokenizers import CharacterTokenizer
from tinyllm.training import Progress, Recipe, fit

SMOOTHINGS = [0, 0.01, 0.1, 1, 10]
BATCH, CONTEXT = 16, 256  # only pairs count: windows are but a way to take 4,096 of them at a time
CHARACTERS = 255  # the most frequent ones are known, all others are one
OTHER = "\N{REPLACEMENT CHARACTER}"
SHOWN = 26  # characters in the picture of the table


def main() -> None:
    args = arguments()
    cli.start(args)
    tokenizer, train, validation = characters(args.data)
    V = tokenizer.vocabulary_size
    print(f"corpus: {len(train):,} characters to train on, {len(validation):,} to validate, {V} different\n")

    counted = {s: Bigram.from_counts(train, V, s).to(args.device) for s in SMOOTHINGS}
    counts = [count_pairs(row, V) for row in (train, validation)]
    losses = {s: [nats(model, count) for count in counts] for s, model in counted.items()}
    best = min(SMOOTHINGS, key=lambda s: losses[s][1])
    print("nats a character         training   validation")
    print(line("all equally likely", math.log(V), math.log(V)))
    for s in SMOOTHINGS:
        print(line(f"counted, smoothing {s}", *losses[s]))
    learned = Bigram(BigramConfig(V), args.seed).to(args.device)
    progress = learn(learned, train, validation, args.steps, args.seed)
    print(line(f"learned, {progress.step} steps", *(nats(learned, count) for count in counts)))
    lowest, step = min((loss, step) for step, loss in progress.validation)
    rise = progress.validation[-1][1] - lowest
    print(f"its validation loss was lowest after {step} steps, and rose by {rise:.4f} from there")

    models = {f"counted, smoothing {best}": counted[best], "learned": learned}
    p, q = (model.probabilities().numpy() for model in models.values())  # (V, V)
    frequency = np.bincount(train, minlength=V) / len(train)  # of each character
    apart = frequency @ np.abs(p - q).sum(axis=1) / 2
    print(f"\nthe two tables differ in the place of {apart:.1%} of the probability")
    for name, model in models.items():
        print(f"\n{name}, it writes:\n{sample(model, tokenizer, args.seed)}")

    lines = {
        "counted, training: no table is better": losses[0][0],
        f"counted, smoothing {best}, validation": losses[best][1],
    }
    shown = np.sort(np.argsort(-frequency, kind="stable")[:SHOWN])
    names = [{" ": "␣", "\n": "↵", "\t": "⇥"}.get(c, c) for c in tokenizer.decode(shown)]
    tables = {name: table[np.ix_(shown, shown)] for name, table in zip(models, (p, q))}
    draw(args.out / "bigram.png", progress, lines, tables, names)
    print(f"\nthe losses and both tables are drawn in {args.out / 'bigram.png'}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/bigram", steps=1000)
    return parser.parse_args()


def characters(data: Path | None) -> tuple[CharacterTokenizer, np.ndarray, np.ndarray]:
    """The tokenizer and both sides of the corpus as rows of tokens. A character that training does not know,
    or not well, is OTHER: what is held out may hold anything."""
    train, validation = ("\n\n".join(texts) for texts in corpus.split_texts(data))
    known = "".join(character for character, _ in Counter(train).most_common(CHARACTERS))
    tokenizer = CharacterTokenizer(known + OTHER)
    unknown = re.compile(f"[^{re.escape(known)}]")
    rows = [np.array(tokenizer.encode(unknown.sub(OTHER, text)), np.uint16) for text in (train, validation)]
    return tokenizer, *rows


def nats(model: Bigram, count: np.ndarray) -> float:
    """The mean loss over a text, which it sees only through the counts (V, V) of its pairs."""
    minus_log_p = -F.log_softmax(model.table.weight).numpy()
    seen = count > 0
    return float(count[seen] @ minus_log_p[seen] / count.sum())


def line(name: str, train: float, validation: float) -> str:
    return f"{name:25s}{train:8.4f}{validation:13.4f}"


def learn(model: Bigram, train: np.ndarray, validation: np.ndarray, steps: int, seed: int) -> Progress:
    """Gradient descent, without weight decay: it would draw the table to where all are equally likely."""
    context = min(CONTEXT, len(train) - 1)
    recipe = Recipe(steps, BATCH, context, lr=0.02, warmup=1, weight_decay=0.0, seed=seed)
    sampler = Sampler(train, recipe.batch, recipe.context, seed)
    evaluation = lambda: evaluation_batches(validation, BATCH, CONTEXT)
    return fit(model, lambda step: sampler.next(), recipe, "bigram", evaluation, every=max(1, steps // 40))


def sample(model: Bigram, tokenizer: CharacterTokenizer, seed: int, length: int = 240) -> str:
    """Some text from the model, after the end of a line."""
    start = "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]
    (ids,) = model.generate([tokenizer.encode(start)], length, seed=seed)
    return cli.quoted(tokenizer.decode(ids[1:]))


def draw(
    path: Path,
    progress: Progress,
    lines: dict[str, float],
    tables: dict[str, np.ndarray],
    names: list[str],
) -> None:
    """Left the losses over the steps, with those of counting as lines; beside them tables (shown, shown)."""
    from matplotlib.colors import PowerNorm

    figure, (left, *others) = plots.figure(1, 3, (12.4, 4.4))
    plots.training_curve(left, progress.losses, "learned, training", plots.COLORS[0])
    left.plot(*zip(*progress.validation), ".", color=plots.COLORS[1], label="learned, validation")
    for (name, loss), color in zip(lines.items(), plots.COLORS):
        left.axhline(loss, color=color, linestyle="--", label=name)
    plots.finish(left, xlabel="step", ylabel="nats a character", title="the two losses meet")
    for axes, (name, table) in zip(others, tables.items()):
        image = axes.imshow(table, cmap="magma_r", norm=PowerNorm(0.5, 0, 1))  # small ones can be told apart
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(length=0)
        axes.set(title=f"p(next | last): {name}", xlabel="next character", ylabel="last character")
    figure.colorbar(image, ax=others, shrink=0.85, pad=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that the font lacks is drawn as a box
        plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
