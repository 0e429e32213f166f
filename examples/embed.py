"""Sentence embeddings: how near sentences are in meaning, to a BERT that somebody published.

    python examples/embed.py FOLDER "The cat sat on the mat." "A kitten rests on a rug." "Stocks fell."

Each sentence becomes one vector, the mean of its last hidden states, and the table shows the cosine of each
two: 1 for the same direction, 0 for nothing in common. FOLDER holds config.json of model_type bert,
model.safetensors and the tokenizer (tokenizer.json or vocab.txt: pip install -e ".[tokenizers]"), or is one
of sentence-transformers with a BERT in it, whose own pooling is followed. With the extra `hub` installed a
name on the Hugging Face hub works too, such as sentence-transformers/all-MiniLM-L6-v2.

A BERT that was only pre-trained, such as bert-base-uncased, finds almost all sentences near each other; the
ones of sentence-transformers were trained for this. Loading takes a second, a sentence some milliseconds.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from autograd.backend import device_module
from tinyllm import cli
from tinyllm.embeddings import SentenceEncoder, cosines
from tinyllm.errors import InputError


def main() -> None:
    args = arguments()
    if len(args.sentences) < 2:
        raise InputError("one sentence alone is near to nothing: give two or more")
    device_module(args.device)
    encoder = SentenceEncoder.from_pretrained(args.folder)
    encoder.model.to(args.device)
    vectors, cut = encoder.encode(args.sentences)
    if cut:
        print(
            f"{cut} of {len(args.sentences)} sentences are longer than the {encoder.longest} tokens that the "
            "model reads: of them only the beginning counts",
            file=sys.stderr,
        )
    print(table(args.sentences, cosines(vectors)))


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("folder", help="a folder of published weights, or a name on the hub")
    parser.add_argument("sentences", nargs="+", help="two or more")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default: cpu)"
    )
    return parser.parse_args()


def table(sentences: list[str], found: np.ndarray) -> str:
    """The cosines, a row for each sentence, and which other one is nearest to it."""
    numbers = range(1, len(sentences) + 1)
    lines = ["cosine" + "".join(f"{number:>7}" for number in numbers) + "  nearest"]
    others = np.where(np.eye(len(sentences), dtype=bool), -np.inf, found)
    for number, sentence, row, nearest in zip(numbers, sentences, found, others.argmax(axis=1)):
        short = " ".join(sentence.split())
        short = short if len(short) <= 60 else f"{short[:57]}..."
        lines.append(f"{number:>6}" + "".join(f"{x:7.3f}" for x in row) + f"{nearest + 1:>9}  {short}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
