"""Translate numbers from English into German, with the Transformer of 2017.

"forty-two" is "zweiundvierzig" in German, two-and-forty: whoever translates from left to right must look at
the source crosswise. A small encoder-decoder learns it from 40,000 random numbers below a million, spelt out
in both languages, as in the paper: byte pairs that both languages share, label smoothing, and Adam with the
warm-up of section 5.3, but at a quarter of its rate, after 400 steps instead of 4,000, with an eps of 1e-8
instead of 1e-9 and the gradient clipped to a norm of 1. Then it translates 1,000 numbers that it has never
seen, greedily and with a beam of four, and runs/transformer/transformer.png shows where it looked while it
wrote. Without arguments it takes about two minutes on 2 cores and gets more than 98 % of the held-out numbers
right to the letter.

    python examples/transformer.py                               # the whole job, no network
    python examples/transformer.py --data pairs.tsv --steps 5000 # any text: lines of source, tab, target
    python examples/transformer.py --data a.en --target a.de     # the same from two files, line by line

Other text is measured by BLEU and chrF, with sacrebleu: pip install -e ".[translation]".
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tinyllm import cli, plots
from tinyllm.errors import InputError
from tinyllm.models import Transformer, TransformerConfig
from tinyllm.models.transformer import learning_rate
from tinyllm.parallel_text import (
    Pair,
    PairSampler,
    Tokens,
    Vocabulary,
    encoded,
    evaluation_batches,
    learn_vocabulary,
    read_pairs,
    scores,
    split_pairs,
)
from tinyllm.training import Progress, Recipe, fit


@dataclass(frozen=True)
class Warmup(Recipe):
    """Section 5.3's course of the learning rate, times lr, and its betas. `fit` takes Adam's eps to be 1e-8,
    the paper 1e-9, and clips the gradient, which the paper does not."""

    lr: float = 0.25  # the paper: 1; small models that learn for minutes want less
    warmup: int = 400  # the paper: 4,000
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    shards: int = 2
    width: int = 0  # of the model

    def learning_rate(self, step: int) -> float:
        return self.lr * learning_rate(step, self.width, self.warmup)


class Setting(NamedTuple):
    """What fits a kind of text: a model, but for its vocabulary; tokens of that; pairs to hold out."""

    config: TransformerConfig
    vocabulary: int
    held_out: int


# So few byte pairs that a number's parts stay apart; and enough numbers that none is seen often: no dropout.
NUMBERS = Setting(
    TransformerConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=256, decoder_ffn_dim=256, dropout=0.0, max_position_embeddings=64,
    ),
    vocabulary=360,
    held_out=1000,
)  # fmt: skip
TEXT = Setting(
    replace(
        NUMBERS.config, d_model=128, encoder_ffn_dim=512, decoder_ffn_dim=512, dropout=0.1,
        max_position_embeddings=128,
    ),
    vocabulary=4000,
    held_out=500,
)  # fmt: skip
COUNT = 40_000  # numbers to learn from
TOKENS = 1024  # in a batch, on either side


def main() -> None:
    args = arguments()
    cli.start(args)
    setting = TEXT if args.data else NUMBERS
    pairs = read_pairs(args.data, args.target) if args.data else numbers(COUNT + setting.held_out, args.seed)
    context = args.context or setting.config.max_position_embeddings
    sources = len({source for source, _ in pairs})
    held_out = min(setting.held_out, max(1, sources // 10))
    train, unseen = split_pairs(pairs, held_out, args.seed)
    vocabulary = learn_vocabulary(train[:20_000], args.vocabulary or setting.vocabulary)
    tokens = dict(zip(pairs, encoded(pairs, vocabulary, context)))
    sides = [[tokens[pair] for pair in some] for some in (train, unseen)]
    config = replace(
        setting.config, max_position_embeddings=context, vocab_size=vocabulary.size,
        eos_token_id=vocabulary.end, pad_token_id=vocabulary.pad, decoder_start_token_id=vocabulary.pad,
    )  # fmt: skip
    model = Transformer(config, args.seed).to(args.device)
    print(f"pairs:  {len(train):,} to learn from, {len(unseen):,} held out; such as")
    print(cli.quoted("\n".join(f"{source}\n{target}" for source, target in unseen[:2])))
    print(f"model:  Transformer with {model.parameter_count():,} parameters, {vocabulary.size:,} tokens")

    progress = learn(model, vocabulary, sides, args)
    print(cli.losses(progress) + "\n")
    ways = {
        "greedy": greedy(model, vocabulary, sides[1]),
        "a beam of four": beams(model, vocabulary, sides[1]),
    }
    print(table(ways, unseen, bool(args.data)))
    print(shown(ways["greedy"], unseen))
    best = chosen(vocabulary, unseen, ways["greedy"])
    path = args.out / "transformer.png"
    print(draw(path, model, vocabulary, unseen[best], ways["greedy"][best], progress))
    print(f"where it looked, and the loss, are drawn in {path}")


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.options(parser, out="runs/transformer", steps=2000, data=False)
    add = parser.add_argument
    add("--data", type=cli.path, help="lines of source, tab, target; plain or .gz (default: numbers)")
    add("--target", type=cli.path, help="a file with the targets, where --data has the sources alone")
    size = "tokens at most in the byte pairs of both languages (default: 360 for numbers, else 4000)"
    add("--vocabulary", type=cli.number(least=258), help=size)
    longest = "tokens that a sentence may have (default: 64 for numbers, else 128)"
    add("--context", type=cli.number(), help=longest)
    args = parser.parse_args()
    if args.target and not args.data:
        raise InputError("--target is for two files: give the one with the sources by --data")
    return args


# Numbers in words

ENGLISH = "zero one two three four five six seven eight nine ten eleven twelve".split()
ENGLISH += [f"{teen}teen" for teen in "thir four fif six seven eigh nine".split()]
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN = "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split()
GERMAN += [f"{teen}zehn" for teen in "drei vier fünf sech sieb acht neun".split()]
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english(n: int) -> str:
    """A number below a million: 42 is "forty-two"."""
    if n >= 1000:
        return f"{english(n // 1000)} thousand {english(n % 1000) if n % 1000 else ''}".strip()
    if n >= 100:
        return f"{ENGLISH[n // 100]} hundred {english(n % 100) if n % 100 else ''}".strip()
    if n < 20:
        return ENGLISH[n]
    return ENGLISH_TENS[n // 10 - 2] + (f"-{ENGLISH[n % 10]}" if n % 10 else "")


def german(n: int) -> str:
    """A number below a million: 42 is "zweiundvierzig"; 1 is "eins" at the end, and "ein" before more."""
    return _german(n) + ("s" if n % 100 == 1 else "")


def _german(n: int) -> str:
    if n >= 1000:
        return f"{_german(n // 1000)}tausend{_german(n % 1000) if n % 1000 else ''}"
    if n >= 100:
        return f"{GERMAN[n // 100]}hundert{_german(n % 100) if n % 100 else ''}"
    if n < 20:
        return GERMAN[n]
    return (f"{GERMAN[n % 10]}und" if n % 10 else "") + GERMAN_TENS[n // 10 - 2]


def numbers(count: int, seed: int) -> list[Pair]:
    """So many different numbers below a million in both languages."""
    chosen = np.random.default_rng(seed).choice(10**6, count, replace=False)
    return [(english(n), german(n)) for n in chosen.tolist()]


# Training and translation


def learn(
    model: Transformer, vocabulary: Vocabulary, sides: Sequence[list[Tokens]], args: argparse.Namespace
) -> Progress:
    train, unseen = sides
    sampler = PairSampler(train, vocabulary, TOKENS, args.seed)
    recipe = Warmup(steps=args.steps, seed=args.seed, width=model.config.d_model)
    validation = lambda: evaluation_batches(unseen, vocabulary)
    return fit(model, sampler.batch, recipe, "learning", validation, every=math.ceil(args.steps / 6))


def room(model: Transformer, source: list[int]) -> int:
    """How many tokens a translation gets: half as many again as the source has, and some more."""
    return min(model.context, 3 * len(source) // 2 + 10)


def greedy(model: Transformer, vocabulary: Vocabulary, unseen: list[Tokens], rows: int = 100) -> list[str]:
    """The translations, in the order of the pairs."""
    order = sorted(range(len(unseen)), key=lambda i: len(unseen[i].source))
    found = [""] * len(unseen)
    for start in tqdm(range(0, len(order), rows), desc="greedy", leave=False):
        some = order[start : start + rows]
        sources = [unseen[i].source for i in some]
        for i, tokens in zip(some, model.generate(sources, room(model, sources[-1]), temperature=0)):
            found[i] = vocabulary.text(tokens.tolist())
    return found


def beams(model: Transformer, vocabulary: Vocabulary, unseen: list[Tokens]) -> list[str]:
    """The best of four beams for each."""
    found = []
    for pair in tqdm(unseen, desc="a beam of four", leave=False):
        best = model.beam_search(pair.source, room(model, pair.source))[0]
        found.append(vocabulary.text(best.tokens))
    return found


# What it shows


def table(ways: dict[str, list[str]], unseen: list[Pair], text: bool) -> str:
    """How many translations are right to the letter; of text also BLEU and chrF."""
    expected = [target for _, target in unseen]
    lines = [f"{len(unseen):,} held out       exact match" + ("       BLEU     chrF" if text else "")]
    missing = ""
    for way, found in ways.items():
        exact = np.mean([a == b for a, b in zip(found, expected)])
        line = f"  {way:<18}{exact:12.1%}"
        if text:
            measured = scores(found, expected)
            line += "".join(f"{value:11.1f}" for value in measured.values())
            missing = "" if measured else '\nfor BLEU and chrF: pip install -e ".[translation]"'
        lines.append(line)
    return "\n".join(lines) + missing + "\n"


def shown(found: list[str], unseen: list[Pair]) -> str:
    """Up to three translations that are right, and up to three that are not."""
    right = [i for i, (_, target) in enumerate(unseen) if found[i] == target]
    wrong = [i for i, (_, target) in enumerate(unseen) if found[i] != target]
    lines = [f"{unseen[i][0]}\n{found[i]}" for i in right[:3]]
    lines += [f"{unseen[i][0]}\n{found[i]}\nwrong, it is {unseen[i][1]}" for i in wrong[:3]]
    return "some translations:\n" + cli.quoted("\n".join(lines)) + "\n"


def chosen(vocabulary: Vocabulary, unseen: list[Pair], found: list[str]) -> int:
    """Of which pair to draw the attention: a number that crosses twice, of different words in few tokens, or
    the text nearest to 40 characters; rather one that is translated right."""
    crossing = r"\w+ty-\w+ thousand \w+ hundred \w+ty-\w+"

    def order(i: int) -> tuple:
        source, target = unseen[i]
        if re.fullmatch(crossing, source):
            words = set(re.findall(r"\w+", source))
            return False, found[i] != target, len(vocabulary.source(source)) - len(words)
        return True, found[i] != target, abs(len(source) - 40)

    return min(range(len(unseen)), key=order)


def attention(
    model: Transformer, vocabulary: Vocabulary, source: list[int], target: list[int]
) -> tuple[int, np.ndarray]:
    """Of the last layer's heads the number of the one that looks at the most different tokens, and how much
    it looks at each (columns) as it writes each (rows)."""
    read = [vocabulary.pad, *target[:-1]]
    heads = model.cross_attention_weights([source], [read])[-1].numpy()[0]  # (H, T, S)
    most = [len(set(head.argmax(axis=1).tolist())) for head in heads]
    return int(np.argmax(most)), heads[np.argmax(most)]


def draw(
    path: Path, model: Transformer, vocabulary: Vocabulary, pair: Pair, written: str, progress: Progress
) -> str:
    """Left where each token of the translation looked, right the loss. Returns what it looked at most."""
    source = vocabulary.source(pair[0])
    target = [*vocabulary.tokenizer.encode(written)[: model.context - 1], vocabulary.end]
    head, weights = attention(model, vocabulary, source, target)
    rows, columns = ([p.strip() or "blank" for p in vocabulary.pieces(ids)] for ids in (target, source))
    figure, (left, right) = plots.figure(1, 2, (12, 5))
    left.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    left.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    left.set_yticks(range(len(rows)), rows)
    left.set_title(f"where head {head + 1} of the last layer looks (columns)\nas a token is written (rows)")

    V, s = model.config.vocab_size, model.label_smoothing
    sure, rest = 1 - s + s / V, s / V  # the smoothed label: what the model is to answer at best
    plots.training_curve(right, progress.losses, "training, with smoothed labels", "tab:blue")
    right.plot(*np.array(progress.validation).T, "o-", color="tab:orange", label="held out, plain")
    for least, color in ((-sure * np.log(sure) - (V - 1) * rest * np.log(rest), "tab:blue"),
                         (-np.log(sure), "tab:orange")):  # fmt: skip
        right.axhline(least, color=color, linestyle=":")
    right.set_yscale("log")
    plots.finish(
        right, xlabel="step", ylabel="nats a token", title="loss, and the least that smoothing allows"
    )
    plots.save(figure, path)
    looks = [f"{row} <- {columns[i]}" for row, i in zip(rows, weights.argmax(axis=1))]
    return f"{pair[0]}, written piece by piece <- looking most at:\n{cli.quoted(', '.join(looks))}\n"


if __name__ == "__main__":
    cli.run(main)
