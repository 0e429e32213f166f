"""Write text with a trained model: a run of train_gpt2.py, or a folder of published weights.

    python examples/generate.py runs/gpt2 "The class statement"
    python examples/generate.py runs/gpt2 "The class statement" --temperature 0      # the likeliest tokens
    python examples/generate.py FOLDER "Once upon a time" --top-p 0.95 --tokens 200 --seed 1

The text streams as it is written. FOLDER holds config.json, model.safetensors and the tokenizer's vocab.json
and merges.txt; a name on the Hugging Face hub works too, with the extra `hub` installed.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

import tinyllm
from tinyllm import checkpoints, cli
from tinyllm.errors import InputError
from tinyllm.generation import stream
from tinyllm.tokenizers import StreamDecoder, check_fit, load_tokenizer


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("folder", help="a run, a folder of published weights, or a name on the hub")
    add("prompt", help="the text to continue")
    add("--tokens", type=cli.number(int, 0), default=100, help="how many to write (default: 100)")
    add("--temperature", type=cli.number(float, 0), default=0.8, help="0 takes the likeliest (default: 0.8)")
    add("--top-k", type=cli.number(), help="choose among the k likeliest tokens only")
    add("--top-p", type=float, help="choose among the likeliest tokens that together reach probability p")
    add("--seed", type=cli.number(int, 0), help="the same seed writes the same text")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default: cpu)")
    add(
        "--no-cache",
        action="store_true",
        help="compute every position anew for each token: slower, the same text",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    folder = tinyllm.fetched(args.folder)
    model, tokenizer = (
        tinyllm.from_pretrained(folder).to(args.device),
        load_tokenizer(checkpoints.resolve(folder)),
    )
    check_fit(model, tokenizer)
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise InputError("the prompt is empty: give it some text to continue")
    decoder = StreamDecoder(tokenizer)
    text = args.prompt  # goes out with the first token, when `stream` has found nothing wrong with it
    started, count = time.perf_counter(), 0
    tokens = stream(
        model,
        np.array([ids]),
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        use_cache=not args.no_cache,
    )
    for (token,) in tokens:
        if token == tokenizer.end_of_text:
            break
        # A published model may have more rows than its tokenizer has tokens: they stand for nothing.
        text += decoder.push(int(token)) if token < tokenizer.vocabulary_size else ""
        print(text, end="", flush=True)
        text, count = "", count + 1
    seconds = time.perf_counter() - started
    print(text + decoder.finish())
    print(f"({count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second)", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
