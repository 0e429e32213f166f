"""Learning in context: a tiny GPT-3 trained on thousands of small tasks learns new ones from its prompt.

Every training text is a task of its own: a secret code of up to eight letters, drawn afresh, in examples.
"aq," says that a stands for q here. No weight can know the code of the next text; all that helps is to find
the letter in question among the examples before it. At first the model does not: it takes any answer that
it has seen. Then it begins to look up, and the accuracy rises to what the prompt tells. Nothing is trained
in the evaluation: codes of eight letters never seen in training, K of them shown, one asked for. With K = 4
half the questions have no answer in the prompt.

The band of the second layer is two positions wide: a letter and the one before it, which is what an answer
must know. The dense third layer then finds it.

Without arguments: under two minutes on 2 cores; it makes its data itself. It prints the accuracy at K = 0,
1, 2, 4 and 8 shots, and draws it in runs/gpt3/gpt3.png, also as it changes in training. It ends at 0.07,
0.18, 0.28, 0.54 and 1.00, about what a perfect reader gets. When the step up comes depends on the seed.

    python examples/gpt3.py
    python examples/gpt3.py --seed 1 --out runs/gpt3-seed-1
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm import cli, plots
from tinyllm.datasets import Batch
from tinyllm.evaluation import Example, Question, choose, complete, few_shot
from tinyllm.models import GPT3, GPT3Config
from tinyllm.tokenizers import CharacterTokenizer
from tinyllm.training import Recipe, fit

LETTERS, KEYS, PAIRS, BATCH = "abcdefghijklmnop", 8, 16, 32
SHOTS = [0, 1, 2, 4, 8]
CONTEXT = 3 * PAIRS  # a pair and its comma
CONFIG = GPT3Config(n_positions=CONTEXT, n_embd=64, n_layer=3, n_head=4, window_size=2, initializer_range=0.1)
TOKENIZER = CharacterTokenizer(LETTERS + ",")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/gpt3", steps=4000, data=False)
    parser.add_argument(
        "--questions", type=cli.number(), default=400, help="for each number of shots (default: 400)"
    )
    return parser.parse_args()


def code(rng: np.random.Generator, keys: int) -> list[Example]:
    """A task: which letter each of `keys` different letters stands for. Two may stand for the same."""
    known = rng.choice(list(LETTERS), keys, replace=False)
    return [Example(str(a), str(b)) for a, b in zip(known, rng.choice(list(LETTERS), keys))]


def texts(rng: np.random.Generator, count: int) -> Batch:
    """Inputs and targets (count, CONTEXT): each text repeats the pairs of one code of 1 to 8 letters."""
    rows = []
    for _ in range(count):
        task = code(rng, rng.integers(1, KEYS + 1))
        text = ",".join("".join(task[i]) for i in rng.integers(len(task), size=PAIRS + 1))
        rows.append(TOKENIZER.encode(text)[: CONTEXT + 1])
    ids = np.array(rows)
    return ids[:, :-1], ids[:, 1:]


class Quiz(NamedTuple):
    """Questions with K shots, and for each whether its answer is to be found among them."""

    questions: list[Question]
    shown: np.ndarray


def quiz(shots: int, count: int, seed: int) -> Quiz:
    """`count` questions, each about a code of its own, with that many of its pairs shown."""
    rng = np.random.default_rng([seed, 1, shots])
    questions, shown = [], []
    for _ in range(count):
        task = code(rng, KEYS)
        asked = task[rng.integers(KEYS)]
        prompt = few_shot(task, shots, asked.context, rng, separator=",")
        choices = [TOKENIZER.encode(letter) for letter in LETTERS]
        questions.append(Question(TOKENIZER.encode(prompt), choices, LETTERS.index(asked.completion)))
        shown.append("".join(asked) in prompt.split(","))
    return Quiz(questions, np.array(shown))


def accuracies(model: GPT3, quizzes: dict[int, Quiz]) -> dict[int, np.ndarray]:
    """For each number of shots which questions are answered rightly, (count,)."""
    answers = {}
    for shots, (questions, _) in quizzes.items():
        answers[shots] = choose(model, questions, batch=128) == [q.answer for q in questions]
    return answers


def main() -> None:
    args = arguments()
    cli.start(args)
    config = GPT3Config(**{**vars(CONFIG), "vocab_size": TOKENIZER.vocabulary_size})
    model = GPT3(config, seed=args.seed).to(args.device)
    quizzes = {shots: quiz(shots, args.questions, args.seed) for shots in SHOTS}
    history: list[dict[int, float]] = []

    def validation() -> Iterable[Batch]:
        found = accuracies(model, quizzes)
        history.append({shots: float(right.mean()) for shots, right in found.items()})
        return [texts(np.random.default_rng([args.seed, 2]), 256)]

    recipe = Recipe(args.steps, BATCH, CONTEXT, lr=3e-3, warmup=100, seed=args.seed, shards=2)
    print(f"a GPT-3 of {model.parameter_count():,} parameters, {args.steps:,} steps of {BATCH} texts such as")
    print("  " + TOKENIZER.decode(texts(np.random.default_rng(args.seed), 1)[0][0]))
    batch = lambda step: texts(np.random.default_rng([args.seed, 0, step]), BATCH)
    progress = fit(model, batch, recipe, "learning codes", validation, every=max(args.steps // 20, 1))
    steps = [step for step, _ in progress.validation]

    print(f"\n{args.questions} questions for each number of shots; by chance 1 in {len(LETTERS)} is right")
    print("  shots   right   the answer was shown   right where it was")
    right = accuracies(model, quizzes)
    for shots, (_, shown) in quizzes.items():
        where = f"{right[shots][shown].mean():18.2f}" if shown.any() else ""
        print(f"  {shots:5}  {right[shots].mean():6.2f}  {shown.mean():21.2f}  {where}")
    context = quizzes[SHOTS[-1]].questions[0].context
    written = complete(model, context, max_new_tokens=4, stop=TOKENIZER.encode(","))
    print(f"\nasked for text instead, it goes on: {TOKENIZER.decode(context)} -> {TOKENIZER.decode(written)}")
    draw(args.out / "gpt3.png", steps, history, quizzes)
    print(f"\nthe picture is {args.out / 'gpt3.png'}")


def draw(path: Path, steps: list[int], history: list[dict[int, float]], quizzes: dict[int, Quiz]) -> None:
    """Accuracy over the shots before, in the middle of and after training, and over the steps."""
    figure, (left, right) = plots.figure(1, 2, (11, 4.5))
    chance = 1 / len(LETTERS)
    for place, color in ((0, "tab:gray"), (len(steps) // 4, "tab:orange"), (len(steps) - 1, "tab:blue")):
        values = [history[place][shots] for shots in SHOTS]
        left.plot(SHOTS, values, "o-", color=color, label=f"after {steps[place]:,} steps")
    shown = [quizzes[shots].shown.mean() for shots in SHOTS]
    best = [share + (1 - share) * chance for share in shown]
    left.plot(SHOTS, best, "--", color="black", alpha=0.6, label="all that the prompt tells")
    left.axhline(chance, color="black", linestyle=":", alpha=0.6, label="chance")
    left.set_xticks(SHOTS)
    plots.finish(left, xlabel="shots K", ylabel="accuracy", title="a code never seen, K pairs shown")
    for shots, color in zip(SHOTS, plots.COLORS):
        right.plot(
            steps, [h[shots] for h in history], "o-", color=color, label=f"{shots} shots", markersize=3
        )
    right.axhline(chance, color="black", linestyle=":", alpha=0.6)
    plots.finish(right, xlabel="step", ylabel="accuracy", title="looking up emerges")
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
