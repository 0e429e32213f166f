"""Pre-train a GPT-1 on plain text, then fine-tune it to name the package that wrote a docstring.

The labelled texts are the docstrings of the eight packages of Python's library that have most of them, three
tenths held out by name. The packages' names are masked in all of them, so that none gives itself away; near
relatives of a name (Tk, MIME, mock) stay, for they are what a text is about. Four models are fine-tuned for
equally many steps on the same batches: pre-trained on the prose of Python's documentation or from the same
first weights without that, with the auxiliary objective L1 or without. Without arguments it takes about two
minutes on 2 cores. It prints the held-out accuracies and draws them in runs/gpt1/gpt1.png.

    python examples/gpt1.py                                       # the whole job, no network
    python examples/gpt1.py --data book.txt --out runs/book       # pre-trained on another text
    python examples/gpt1.py --tune 600                            # does the lead last?
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autograd import no_grad
from tinyllm import cli, corpus, labelled, plots
from tinyllm.datasets import Batch, Document, Sampler, documents, evaluation_batches
from tinyllm.models import GPT1, GPT1Config
from tinyllm.models.gpt1 import Classifier
from tinyllm.tokenizers import Tokenizer
from tinyllm.training import Recipe, fit

VOCABULARY, CLASSES, HELD_OUT = 1024, 8, 0.3
# So small that a minute of pre-training shows it each token of the prose 27 times.
CONFIG = GPT1Config(n_positions=64, n_embd=64, n_layer=4, n_head=4, attn_pdrop=0.0)
PRETRAINING = Recipe(batch=32, context=64, lr=3e-3, shards=2)
FINE_TUNING = Recipe(batch=32, lr=2e-3, warmup=20, shards=2)
OBJECTIVES = {"L2 alone": 0.0, "L2 + L1 / 2": 0.5}  # name -> lambda


class Run(NamedTuple):
    """A fine-tuning: the steps of its evaluations, the accuracy there, and the guesses (N,) at the end."""

    steps: list[int]
    accuracies: list[float]
    guesses: np.ndarray


def main() -> None:
    args = arguments()
    cli.start(args)
    text = corpus.load(args.data, VOCABULARY)
    names, train, held_out, *_ = docstring_task(documents("docstrings"), text.tokenizer)

    config = replace(CONFIG, vocab_size=text.tokenizer.vocabulary_size)
    starts = {name: GPT1(config, args.seed).to(args.device) for name in ("pre-trained", "from scratch")}
    print(f"model:        GPT-1 with {starts['pre-trained'].parameter_count():,} parameters")
    pretrain(starts["pre-trained"], text, args)

    counts = f"{len(train.labels):,} to learn from, {len(held_out.labels)} held out"
    print(f"docstrings:   {counts}, of {', '.join(names)}\n")
    runs = {
        (start, objective): finetune(model, auxiliary, train, held_out, args, f"{start}, {objective}")
        for start, model in starts.items()
        for objective, auxiliary in OBJECTIVES.items()
    }
    shares = np.bincount(held_out.labels, minlength=len(names)) / len(held_out.labels)
    counted = (labelled.naive_bayes(train, held_out, config.vocab_size) == held_out.labels).mean()
    others = {"naive Bayes": counted, f"always {names[shares.argmax()]}": shares.max()}
    print(table(runs, others, len(held_out.labels)))
    best = max(runs, key=lambda key: runs[key].accuracies[-1])
    print(guessed(best, runs[best].guesses, held_out, names, text.tokenizer, args.seed))
    draw(args.out / "gpt1.png", runs, best, held_out.labels, names, shares.max())
    print(f"the accuracies, and what is taken for what, are drawn in {args.out / 'gpt1.png'}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/gpt1", steps=1500)
    parser.add_argument("--tune", type=cli.number(), default=150, help="steps of fine-tuning (default: 150)")
    return parser.parse_args()


# Pre-training


def pretrain(model: GPT1, text: corpus.Corpus, args: argparse.Namespace) -> None:
    """L1 on the training side of the text."""
    recipe = replace(PRETRAINING, steps=args.steps, seed=args.seed)
    sampler = Sampler(text.train, recipe.batch, recipe.context, recipe.seed)
    # A part of the validation side tells the loss well enough.
    evaluation = lambda: evaluation_batches(text.validation[:20_000], recipe.batch, recipe.context)
    progress = fit(model, lambda step: sampler.next(), recipe, "pre-training", evaluation, every=args.steps)
    (_, before), *_, (steps, after) = progress.validation
    print(f"pre-training: {steps:,} steps, validation loss {before:.2f} -> {after:.2f} nats/token")


# The task


def docstring_task(found: list[Document], tokenizer: Tokenizer) -> labelled.Task:
    """Which package a docstring is from. In what the model reads, start and extract need a place too."""
    found = labelled.masked(found, CLASSES)
    return labelled.split_task(found, tokenizer.encode, CONFIG.n_positions - 2, HELD_OUT)


def batch(model: Classifier, of: labelled.Texts, chosen: np.ndarray) -> Batch:
    """The chosen texts as ids (B, 1, T), with their labels (B,)."""
    examples = [model.special.classification(of.tokens[i]) for i in chosen]
    return model.special.batch(examples), of.labels[chosen]


def finetune(
    start: GPT1,
    auxiliary: float,
    train: labelled.Texts,
    held_out: labelled.Texts,
    args: argparse.Namespace,
    label: str,
) -> Run:
    """L3 on the labelled texts; the start itself stays as it is."""
    recipe = replace(FINE_TUNING, steps=args.tune, seed=args.seed)
    model = Classifier(start, CLASSES, auxiliary, seed=args.seed)
    rng, count = np.random.default_rng(args.seed), len(train.labels)
    epochs = -(-recipe.steps * recipe.batch // count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    rows = np.arange(len(held_out.labels))
    batches = [batch(model, held_out, rows[i : i + 64]) for i in range(0, len(rows), 64)]
    guesses: list[np.ndarray] = []

    def evaluation() -> list[Batch]:
        model.eval()
        with no_grad():
            guesses.append(np.concatenate([model(ids).numpy().argmax(axis=-1) for ids, _ in batches]))
        return batches[:1]  # its loss, L3, compares no two objectives: nobody reads it

    next_batch = lambda step: batch(model, train, order[step * recipe.batch :][: recipe.batch])
    progress = fit(model, next_batch, recipe, label, evaluation, every=max(1, recipe.steps // 6))
    steps = [step for step, _ in progress.validation]
    return Run(steps, [float((g == held_out.labels).mean()) for g in guesses], guesses[-1])


# What it shows

Runs = dict[tuple[str, str], Run]  # (start, objective) -> run


def table(runs: Runs, others: dict[str, float], count: int) -> str:
    """The accuracies at the end, and those of other ways to guess."""
    step = min(run.steps[-1] for run in runs.values())
    lines = [f"held-out accuracy after {step} steps" + "".join(f"{name:>14}" for name in OBJECTIVES)]
    for start in dict.fromkeys(start for start, _ in runs):
        accuracies = [runs[start, objective].accuracies[-1] for objective in OBJECTIVES]
        lines.append(f"  {start:<32}" + "".join(f"{accuracy:14.1%}" for accuracy in accuracies))
    lines += [f"  {name:<32}" + f"{share:14.1%}" * len(OBJECTIVES) for name, share in others.items()]
    error = max((a * (1 - a) / count) ** 0.5 for run in runs.values() for a in run.accuracies[-1:])
    return (
        "\n".join(lines)
        + f"\nwith {count} texts held out, each is sure to about {error:.1%} (one standard error)\n"
    )


def guessed(
    key: tuple[str, str],
    guesses: np.ndarray,
    held_out: labelled.Texts,
    names: list[str],
    tokenizer: Tokenizer,
    seed: int,
) -> str:
    """Some held-out texts of middle length, and what the run took them for."""
    middle = np.arange(len(guesses) // 3, 2 * len(guesses) // 3)
    chosen = np.random.default_rng(seed).choice(middle, min(6, len(middle)), replace=False)
    lines = [f"{', '.join(key)}, it guesses:"]
    for i in chosen:
        right, guess = names[held_out.labels[i]], names[guesses[i]]
        start = " ".join(tokenizer.decode(held_out.tokens[i]).split())[:60]
        lines.append(f"  {start:<62} {guess}" + ("" if right == guess else f", but it is {right}"))
    return "\n".join(lines) + "\n"


def draw(
    path: Path, runs: Runs, best: tuple[str, str], labels: np.ndarray, names: list[str], share: float
) -> None:
    """Left the accuracies over the steps; right how often the best run takes each package for which."""
    figure, (left, right) = plots.figure(1, 2, (10, 4))
    starts = list(dict.fromkeys(start for start, _ in runs))
    for (start, objective), run in runs.items():
        color = plots.COLORS[starts.index(start)]
        style = "o-" if OBJECTIVES[objective] == 0 else "o--"
        percent = 100 * np.array(run.accuracies)
        left.plot(run.steps, percent, style, color=color, markersize=4, label=f"{start}, {objective}")
    left.axhline(100 * share, color="grey", linestyle=":")
    left.text(runs[best].steps[-1], 100 * share - 5, "always the most frequent", color="grey", ha="right")
    left.set_ylim(0, 100)
    labelling = {"xlabel": "step of fine-tuning", "ylabel": "held-out accuracy, %"}
    plots.finish(left, **labelling, title="which package wrote this docstring?")

    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (labels, runs[best].guesses), 1)
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(percent):
        color = "white" if value > 60 else "black"
        right.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="guess", ylabel="package", title=f"{', '.join(best)}: guesses, % of a package")
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
