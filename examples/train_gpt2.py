"""Train a GPT-2 on text, on a laptop's CPU or on a GPU.

Without arguments: learns a byte-pair encoding and a GPT-2 of about a million parameters from the prose of
Python's own documentation, in two minutes on 2 cores. The validation loss falls from 7.2 to about 3.8 nats a
token (1.7 bits a byte). Everything goes to the folder runs/gpt2: checkpoints, and a picture of the loss.

    python examples/train_gpt2.py                       # the whole job, no network
    python examples/train_gpt2.py --resume              # go on after Ctrl-C, a crash or a power cut
    python examples/train_gpt2.py --data book.txt --out runs/book
    python examples/train_gpt2.py --init FOLDER --data book.txt --lr 1e-4 --out runs/tuned   # fine-tune
    python examples/train_gpt2.py --preset gpt2-124m --data corpus.txt.gz --device cuda --out runs/124m
    python examples/generate.py runs/gpt2 "The class statement"          # write with what was learned
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import autograd.functional as F
import tinyllm
from autograd.backend import device_module
from tinyllm import checkpoints, cli, token_file
from tinyllm.errors import InputError
from tinyllm.models import GPT2, GPT2Config
from tinyllm.tokenizers import Tokenizer, check_fit, gpt2_tokenizer, load_tokenizer
from tinyllm.training import Interrupted, Recipe, Trainer


@dataclass(frozen=True)
class Preset:
    """A size of model and how it is trained; vocabulary None means GPT-2's own encoding.

    The vocabulary and the context of the model follow from the tokenizer and the recipe.
    """

    config: GPT2Config
    recipe: Recipe
    vocabulary: int | None


PRESETS = {
    "laptop": Preset(
        GPT2Config(n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0),
        Recipe(),
        vocabulary=1280,
    ),
    # Radford et al. 2019 with the optimizer of Brown et al. 2020, appendix B: 2 * 1024 * 256 = 0.5M tokens a
    # step. Passes of 2 sequences leave a card of 10 GB some room; see the memory sum that a run prints.
    "gpt2-124m": Preset(
        GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        Recipe(steps=600_000, batch=2, context=1024, accumulate=256, lr=6e-4, warmup=2000),
        vocabulary=None,
    ),
}


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add(
        "--data",
        type=cli.path,
        help="a UTF-8 text file, a folder of them, or a .gz (default: Python's own docs)",
    )
    add("--preset", choices=PRESETS, help="size and recipe (default: laptop)")
    add("--steps", type=cli.number(), help="steps of the optimizer")
    add("--batch", type=cli.number(), help="sequences in one pass")
    add("--context", type=cli.number(), help="tokens in a sequence")
    add("--accumulate", type=cli.number(), help="passes that make one step")
    add("--lr", type=cli.number(float, 0), help="peak learning rate")
    add("--seed", type=cli.number(int, 0), help="of weights, batches and dropout (default: 0)")
    add("--dtype", choices=["float32", "float64"], help="precision (default: float32)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute (default: cpu)")
    add("--init", type=cli.path, metavar="FOLDER", help="start from published weights or another run")
    add("--out", type=cli.path, default=Path("runs/gpt2"), help="folder of the run (default: runs/gpt2)")
    add("--resume", action="store_true", help="continue the run in --out, with its own options")
    add("--save-every", type=cli.number(), default=200, metavar="STEPS", help="default: 200")
    add("--no-fused", action="store_true", help="compute everything from primitives: slower, the same losses")
    return parser.parse_args()


# With the recipe's numbers, what a run remembers and cannot change later; and what stands for not given.
REMEMBERED = {"data": None, "init": None, "preset": "laptop", "dtype": "float32"}


def remembered(args: argparse.Namespace, name: str) -> str | None:
    """An option as a run remembers it: paths whole, so that it can be resumed from another folder."""
    value = getattr(args, name)
    return str(value.resolve()) if isinstance(value, Path) else value


def main() -> None:
    args = arguments()
    device_module(args.device)  # complains before any work if there is no GPU
    F.use_fused(not args.no_fused)
    checkpoint = checkpoints.latest(args.out)
    if args.resume and checkpoint is None:
        raise InputError(f"{args.out} holds no checkpoint to resume: start the run without --resume")
    if not args.resume and checkpoint is not None:
        raise InputError(
            f"{args.out} holds a run already: go on with --resume, or choose another folder with --out"
        )
    trainer = resumed(args, checkpoint) if args.resume else started(args)
    print(f"stop with Ctrl-C; then, or after a crash, go on with:  {again(args)}\n")
    try:
        trainer.run()
    except Interrupted:
        raise Interrupted(f"saved at step {trainer.progress.step}; go on with {again(args)}") from None
    print(f"\nthe model is in {checkpoints.latest(args.out)}, its loss curve in {args.out / 'loss.png'}")
    print(f'write with it:  {cli.script("generate", args.out)} "The class statement"')


def again(args: argparse.Namespace) -> str:
    """The command that continues this run, with the options that a run does not remember."""
    words = ["--out", args.out] if args.out != Path("runs/gpt2") else []
    words += ["--device", args.device] if args.device != "cpu" else []
    words += ["--save-every", args.save_every] if args.save_every != 200 else []
    words += ["--no-fused"] if args.no_fused else []
    return cli.script("train_gpt2", *words, "--resume")


def started(args: argparse.Namespace) -> Trainer:
    """A new run."""
    preset = PRESETS[args.preset or "laptop"]
    chosen = {f.name: getattr(args, f.name, None) for f in fields(Recipe)}
    recipe = replace(preset.recipe, **{name: value for name, value in chosen.items() if value is not None})
    # Beyond 8 threads the shards of a small batch get too small to be worth one.
    shards = 1 if args.device == "cuda" else min(os.cpu_count() or 1, recipe.batch, 8)
    recipe = replace(recipe, shards=shards)
    if args.init:
        model = tinyllm.from_pretrained(args.init)
        if not isinstance(model, GPT2):
            raise InputError(
                f"{args.init} holds a {type(model).__name__}, and this script trains GPT-2 and GPT-3 only"
            )
        tokenizer = load_tokenizer(checkpoints.resolve(args.init))
        if recipe.context > model.context and args.context is None:
            recipe = replace(recipe, context=model.context)
        if recipe.context > model.context:
            raise InputError(
                f"--context {recipe.context} is more than the {model.context} of the model in {args.init}"
            )
        check_fit(model, tokenizer)
    else:
        tokenizer = new_tokenizer(args.data, preset)
        config = replace(preset.config, vocab_size=tokenizer.vocabulary_size, n_positions=recipe.context)
        model = GPT2(config, seed=recipe.seed)
    tokens = token_file.tokenize(args.data, tokenizer, args.out)
    options = {name: remembered(args, name) or default for name, default in REMEMBERED.items()}
    options["corpus"] = token_file.fingerprint(tokens)
    return make_trainer(args, model, tokenizer, tokens, recipe, options)


def resumed(args: argparse.Namespace, folder: Path) -> Trainer:
    """The run in --out as it was saved last."""
    checkpoints.verify(folder)
    training = checkpoints.read_json(folder / "training.json")
    try:
        options = training["options"]
        saved = {**options["recipe"], **{name: options[name] for name in REMEMBERED}}
        recipe = Recipe(**{**options["recipe"], "betas": tuple(options["recipe"]["betas"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'training.json'} is not of a run of this script: {error}") from None
    for name in saved:
        given = remembered(args, name) if name in vars(args) else None
        if given is not None and given != saved[name]:
            was = "(default)" if saved[name] is None else saved[name]
            raise InputError(
                f"the run in {args.out} has --{name} {was}, and --resume goes on with "
                f"that, not {given}: leave it out, or start another run with --init {args.out} --out ANOTHER"
            )
    model, tokenizer = tinyllm.from_pretrained(folder, options["dtype"]), load_tokenizer(folder)
    check_fit(model, tokenizer)
    data = Path(options["data"]) if options["data"] else None
    tokens = token_file.restore(data, tokenizer, args.out, options.get("corpus"))
    del options["recipe"]
    trainer = make_trainer(args, model, tokenizer, tokens, recipe, options)
    trainer.resume(folder)
    print(f"going on after step {trainer.progress.step:,}")
    return trainer


def make_trainer(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    recipe: Recipe,
    options: dict[str, Any],
) -> Trainer:
    model.to(args.device, options["dtype"])
    train, validation = token_file.cut(tokens, recipe.context)
    kind = type(model).__name__.replace("GPT", "GPT-")
    layers, width = model.config.n_layer, model.config.n_embd
    print(f"corpus: {len(train):,} tokens to train on, {len(validation):,} to validate")
    print(f"model:  {kind} with {model.parameter_count():,} parameters, {layers} layers of width {width}")
    print(f"memory: {memory_sum(model.config, recipe, model.dtype.itemsize, args.device)}")
    step = recipe.batch * recipe.context * recipe.accumulate
    print(f"run:    {recipe.steps:,} steps of {step:,} tokens, into {args.out}")
    return Trainer(model, tokenizer, train, validation, recipe, args.out, options, args.save_every)


def new_tokenizer(data: Path | None, preset: Preset) -> Tokenizer:
    if preset.vocabulary is None:
        return gpt2_tokenizer()
    progress = lambda merges: tqdm(merges, desc="learning byte pairs", leave=False, disable=None)
    return token_file.train_tokenizer(data, preset.vocabulary, progress)


def memory_sum(config: GPT2Config, recipe: Recipe, itemsize: int, device: str) -> str:
    """How the memory of a step adds up.

    For each parameter: its weight, a gradient from each shard, the optimizer's copy of that, Adam's two
    moments. For each token, a layer keeps the input, the normalized input and the result of two norms (6 C),
    q, k, v and the result of attention (4 C), the hidden layer of the MLP before and after GELU and GELU's
    slope (3 inner), and the probabilities of its heads, n_head for each earlier token: the CPU computes only
    the half that causal attention needs. The logits are one row of the vocabulary for each token.
    """
    C, V, T = config.n_embd, config.vocab_size, recipe.context
    inner = config.n_inner or 4 * C
    layer = 4 * C * C + 2 * C * inner + 9 * C + inner
    parameters = (V + config.n_positions) * C + config.n_layer * layer + 2 * C
    tokens = recipe.batch * T
    probabilities = config.n_head * T * (1.0 if device == "cuda" else 0.5)
    parts = {
        "weights, gradients and optimizer": (4 + recipe.shards) * parameters,
        "activations": tokens * config.n_layer * (10 * C + 3 * inner + probabilities),
        "logits": tokens * V,
    }
    gigabytes = {name: count * itemsize / 1e9 for name, count in parts.items()}
    terms = " + ".join(f"{size:.2f} GB {name}" for name, size in gigabytes.items())
    return f"{terms} = {sum(gigabytes.values()):.2f} GB"


if __name__ == "__main__":
    cli.run(main)
