"""Adapt a GPT-2 that knows prose to code: by LoRA, and by full fine-tuning.

Without arguments: trains a GPT-2 of a million parameters on the prose of Python's own documentation, then
goes on with the sources of its standard library, twice from the same weights and on the same batches. Once
all weights learn, once only adapters of rank 1 beside each linear map, 0.8 % of the parameters. It takes
under three minutes on 2 cores, prints what each has learned, what it has forgotten of the prose and what it
cost, and draws that in runs/lora/lora.png. The loss on code falls from 5.0 nats a token to 3.3 with all
weights and to 4.2 with the adapters, which forget half as much. Base and adapter stay in runs/lora, the
adapter in PEFT's format.

    python examples/lora.py                                       # the whole job, no network
    python examples/lora.py --data book.txt --out runs/book       # adapt to another text
    python examples/lora.py --rank 8                              # thicker adapters
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tinyllm
from autograd import no_grad
from tinyllm import cli, corpus, lora, plots
from tinyllm.datasets import Batch, Sampler, evaluation_batches
from tinyllm.models import GPT2, GPT2Config
from tinyllm.parallel import DataParallel
from tinyllm.tokenizers import Tokenizer
from tinyllm.training import Recipe, Steps, fit, mean_loss

VOCABULARY = 1280
CONFIG = GPT2Config(
    n_positions=128, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
PRETRAINING = Recipe(batch=16, context=128, lr=2e-3, warmup=50, shards=2)
FINE_TUNING = Recipe(batch=16, context=128, warmup=20, weight_decay=0.0, shards=2)
RATES = {"full fine-tuning": 3e-3, "LoRA": 3e-2}  # the best of two and of three tried
ALPHA = 2.0  # for each rank: alpha = 2 rank
PROMPT = "def __init__(self"
MEASURED = 16_000  # tokens of a validation side, which tell the loss well enough


class Tokens(NamedTuple):
    """A text's two sides."""

    train: np.ndarray
    validation: np.ndarray


@dataclass
class Run:
    """What came of a way to learn on, and what it cost."""

    model: GPT2
    learned: int  # numbers
    optimizer: int  # bytes of its state
    seconds: float  # of a step
    file: int  # bytes of what was learned
    steps: list[int]  # of the evaluations, and the losses there
    new: list[float]
    old: list[float]


def main() -> None:
    args = arguments()
    cli.start(args)
    prose = corpus.load(None, VOCABULARY)
    code = tokens(args.data, prose.tokenizer)
    base = GPT2(replace(CONFIG, vocab_size=prose.tokenizer.vocabulary_size), args.seed).to(args.device)
    name = "code" if args.data is None else args.data.name
    print(f"model: GPT-2 with {base.parameter_count():,} parameters")
    print(f"texts: {len(prose.train):,} tokens of prose, {len(code.train):,} of {name}")
    pretrain(base, prose, args)
    base.save_pretrained(args.out / "base")
    prose.tokenizer.save(args.out / "base")

    runs = {}
    for way in RATES:
        model = tinyllm.from_pretrained(args.out / "base").to(args.device)
        if way == "LoRA":
            lora.apply(model, args.rank, ALPHA * args.rank, seed=args.seed)
        runs[way] = finetune(model, way, code, Tokens(prose.train, prose.validation), args)
    print(f"\n{table(runs, base, name)}")

    print(f"\n{merged(runs['LoRA'].model, code.validation)}")
    prompt = prose.tokenizer.encode(PROMPT) if args.data is None else code.validation[:16].tolist()
    for title, model in {"before": base, **{way: run.model for way, run in runs.items()}}.items():
        print(f"\n{title}, it writes:\n{cli.sample(model, prose.tokenizer, prompt, 60, args.seed)}")
    draw(args.out / "lora.png", runs, base, name)
    print(f"\nlosses and costs are drawn in {args.out / 'lora.png'}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/lora", steps=250, data=False)
    add = parser.add_argument
    add("--data", type=cli.path, help="text to adapt to: a file, a folder, a .gz (default: Python's sources)")
    add("--pretraining", type=cli.number(), default=450, metavar="STEPS", help="on prose (default: 450)")
    add("--rank", type=cli.number(), default=1, help="of the adapters (default: 1)")
    return parser.parse_args()


def tokens(data: Path | None, tokenizer: Tokenizer) -> Tokens:
    """The text to adapt to, in the tokens that the model has: those of the prose."""
    sides = corpus.split_texts(data, "sources")
    rows = (np.array(tokenizer.encode("\n\n".join(side)), np.uint16) for side in sides)
    found = Tokens(*rows)
    Sampler(
        found.train, FINE_TUNING.batch, FINE_TUNING.context
    )  # complains of too little text before any work
    evaluation_batches(found.validation, FINE_TUNING.batch, FINE_TUNING.context)
    return found


# Training


def pretrain(model: GPT2, prose: corpus.Corpus, args: argparse.Namespace) -> None:
    recipe = replace(PRETRAINING, steps=args.pretraining, seed=args.seed)
    sampler = Sampler(prose.train, recipe.batch, recipe.context, recipe.seed)
    evaluation = lambda: measured(prose.validation, recipe)
    progress = fit(model, lambda step: sampler.next(), recipe, "prose", evaluation, every=recipe.steps)
    (_, before), *_, (steps, after) = progress.validation
    print(f"prose: {steps:,} steps, validation loss {before:.2f} -> {after:.2f} nats a token")


def measured(row: np.ndarray, recipe: Recipe) -> Iterable[Batch]:
    return evaluation_batches(row[:MEASURED], recipe.batch, recipe.context)


def finetune(model: GPT2, way: str, code: Tokens, prose: Tokens, args: argparse.Namespace) -> Run:
    """Train what learns of the model; the batches depend on the seed alone."""
    recipe = replace(FINE_TUNING, steps=args.steps, lr=RATES[way], seed=args.seed)
    sampler = Sampler(code.train, recipe.batch, recipe.context, recipe.seed)
    optimizer = sum(state.nbytes for state in Steps(model, recipe).optimizer.state_dict().values())
    learned = sum(parameter.size for parameter in model.parameters() if parameter.requires_grad)
    began: list[float] = []
    old: list[float] = []

    def batch(step: int) -> Batch:
        began.append(time.perf_counter())
        return sampler.next()

    def evaluation() -> Iterable[Batch]:
        with DataParallel(model, recipe.shards) as parallel:
            old.append(mean_loss(model, parallel, measured(prose.validation, recipe)))
        return measured(code.validation, recipe)

    progress = fit(model, batch, recipe, way, evaluation, every=-(-recipe.steps // 8))
    seconds = float(np.median(np.diff([*began, time.perf_counter()])))
    steps, new = map(list, zip(*progress.validation))
    folder = args.out / ("adapter" if way == "LoRA" else "full")
    if way == "LoRA":
        lora.save(model, folder, base=str(args.out / "base"))
    else:
        model.save_pretrained(folder)
    return Run(model, learned, optimizer, seconds, size(folder), steps, new, old)


# What it shows


def table(runs: dict[str, Run], base: GPT2, name: str) -> str:
    full = base.parameter_count()
    head = "learned (of all)  optimizer, bytes  file, bytes  ms a step"
    lines = [f"{'':18}{name[:12]:>12}       prose  {head}"]
    first = next(iter(runs.values()))
    lines.append(f"  {'before':16}{first.new[0]:12.3f}{first.old[0]:12.3f}")
    for way, run in runs.items():
        cost = f"{run.learned:9,} {run.learned / full:7.2%} {run.optimizer:17,} {run.file:12,}"
        cost += f" {1e3 * run.seconds:10.0f}"
        lines.append(f"  {way:16}{run.new[-1]:12.3f}{run.old[-1]:12.3f} {cost}")
    return "\n".join([f"validation losses in nats a token, after {first.steps[-1]} steps", *lines])


def merged(model: GPT2, row: np.ndarray) -> str:
    """How far the merged model's logits are from the adapted one's; it is unmerged again."""
    ids = row[: model.context].astype(np.int64)[None]
    with no_grad():
        adapted = model(ids).numpy()
        lora.merge(model)
        difference = np.abs(model(ids).numpy() - adapted).max()
        lora.unmerge(model)
    largest = np.abs(adapted).max()
    return f"merged, it gives the same logits but for {difference:.1e}; the largest of them is {largest:.1f}"


def size(folder: Path) -> int:
    """Bytes of the tensors' file."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def draw(path: Path, runs: dict[str, Run], base: GPT2, name: str) -> None:
    """Left the losses over the steps; right what each way costs, compared with all that there is."""
    figure, (left, right) = plots.figure(1, 2, (10, 4))
    for (way, run), color in zip(runs.items(), plots.COLORS):
        left.plot(
            run.steps, run.new, "o-", color=color, markersize=3, label=f"{way}, {name}: {run.new[-1]:.2f}"
        )
        left.plot(
            run.steps, run.old, "o--", color=color, markersize=3, label=f"{way}, prose: {run.old[-1]:.2f}"
        )
    bottom, top = left.get_ylim()
    left.set_ylim(bottom, top + 0.4 * (top - bottom))  # room for the legend
    title = f"learning {name}, forgetting prose"
    plots.finish(left, xlabel="step", ylabel="validation loss, nats a token", title=title)
    costs: dict[str, Callable[[Run], float]] = {
        "numbers\nthat learn": lambda run: run.learned,
        "optimizer,\nbytes": lambda run: run.optimizer,
        "file,\nbytes": lambda run: run.file,
    }
    for i, ((way, run), color) in enumerate(zip(runs.items(), plots.COLORS)):
        values = [cost(run) for cost in costs.values()]
        bars = right.bar(np.arange(len(costs)) + 0.4 * i - 0.2, values, 0.38, color=color, label=way)
        right.bar_label(bars, [f"{value:,.0f}" for value in values], fontsize=8)
    right.set_xticks(range(len(costs)), costs)
    right.set_yscale("log")
    sizes = [cost(run) for cost in costs.values() for run in runs.values()]
    right.set_ylim(min(sizes) / 8, 30 * max(sizes))  # room for the legend
    plots.finish(right, title="what it costs")
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
