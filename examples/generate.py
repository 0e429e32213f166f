"""Write text with a trained model: a run of one of these examples, or a model that somebody published.

    python examples/generate.py runs/gpt2 "The class statement"
    python examples/generate.py runs/gpt2 "The class statement" --temperature 0      # the likeliest tokens
    python examples/generate.py FOLDER "Once upon a time" --top-p 0.95 --tokens 200 --seed 1
    python examples/generate.py FOLDER "Once upon a time" --beams 4                  # the likeliest text

The text streams as it is written, until --tokens are there or the model ends it by itself. FOLDER holds
config.json, model.safetensors and the tokenizer: vocab.json and merges.txt, or tokenizer.json or vocab.txt,
which pip install -e ".[tokenizers]" makes readable. A name on the Hugging Face hub works too, with the extra
`hub` installed.

A model tuned for chat has a chat template in its folder. Then the prompt is a message, spelt as the template
says, and what you see is the answer; with --raw the model continues the prompt as any other would.

    python examples/generate.py FOLDER "Why is the sky blue?" --system "Answer in one sentence."
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import numpy as np

import tinyllm
from tinyllm import checkpoints, cli
from tinyllm.errors import InputError
from tinyllm.generation import beam_search, stream
from tinyllm.model import CausalModel
from tinyllm.tokenizers import StreamDecoder, Tokenizer, check_fit, end_tokens, load_tokenizer

ALPHA = 0.6  # of beam search


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("folder", help="a run, a folder of published weights, or a name on the hub")
    add("prompt", help="the text to continue; for a model with a chat template, what to say to it")
    add("--tokens", type=cli.number(int, 0), default=100, help="how many to write at most (default: 100)")
    add("--temperature", type=cli.number(float, 0), help="0 takes the likeliest (default: 0.8)")
    add("--top-k", type=cli.number(), help="choose among the k likeliest tokens only")
    add("--top-p", type=float, help="choose among the likeliest tokens that together reach probability p")
    add("--seed", type=cli.number(int, 0), help="the same seed writes the same text")
    add(
        "--beams",
        type=cli.number(),
        help="draw nothing: keep the BEAMS likeliest texts at each step, and write the one of the highest "
        f"log-probability over its length penalty ((5 + length) / 6)^{ALPHA}, when it is complete",
    )
    add("--system", help="what the model shall be told before the prompt, where there is a chat template")
    add("--raw", action="store_true", help="no chat template: continue the prompt as it stands")
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
    model = tinyllm.from_pretrained(folder).to(args.device)
    if not isinstance(model, CausalModel):
        raise InputError(
            f"{folder} holds a {type(model).__name__}, which does not write text from left to right"
        )
    folder = checkpoints.resolve(folder)
    tokenizer = load_tokenizer(folder)
    check_fit(model, tokenizer)
    stop = end_tokens(folder, tokenizer)
    ids, text = encode(tokenizer, args)
    # An answer starts as a text of its own, a continuation where the prompt ends.
    decoder = StreamDecoder(tokenizer, ids if text else [])
    started, count = time.perf_counter(), 0
    for token in new_tokens(model, ids, stop, args):
        if token in stop:
            break
        # A published model may have more rows than its tokenizer has tokens: they stand for nothing.
        text += decoder.push(token) if token < tokenizer.vocabulary_size else ""
        print(text, end="", flush=True)
        text, count = "", count + 1
    seconds = time.perf_counter() - started
    print(text + decoder.finish())
    print(f"({count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second)", file=sys.stderr)


def encode(tokenizer: Tokenizer, args: argparse.Namespace) -> tuple[list[int], str]:
    """The prompt's tokens, and what to print of it once the model has found nothing wrong with it."""
    if tokenizer.chat is not None and not args.raw:
        said = [{"role": "system", "content": args.system}] if args.system is not None else []
        return tokenizer.encode_chat([*said, {"role": "user", "content": args.prompt}]), ""
    if args.system is not None:
        raise InputError("--system needs a chat template, and here is none: put it into the prompt")
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise InputError("the prompt is empty: give it some text to continue")
    return ids, args.prompt


def new_tokens(
    model: CausalModel, ids: list[int], stop: frozenset[int], args: argparse.Namespace
) -> Iterator[int]:
    """The continuation, token by token; that of beam search comes when it is complete."""
    if args.beams:
        if any(option is not None for option in (args.temperature, args.top_k, args.top_p, args.seed)):
            raise InputError("--beams draws nothing: leave --temperature, --top-k, --top-p and --seed out")
        beams = beam_search(model, ids, args.tokens, args.beams, ALPHA, stop, use_cache=not args.no_cache)
        yield from beams[0].tokens
        return
    tokens = stream(
        model,
        np.array([ids]),
        args.tokens,
        temperature=0.8 if args.temperature is None else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        use_cache=not args.no_cache,
        stop=stop,
    )
    for (token,) in tokens:
        yield int(token)


if __name__ == "__main__":
    cli.run(main)
