"""Cached generation beside PyTorch's: `python -m tests.benchmarks.generate --model llama`.

The shapes: GPT-2 of 124M parameters, and a LLaMA of 134M, as wide and as deep, with a vocabulary of 32,000.
Greedy, one sequence, float32, all cores, random weights. Ours is model.generate as users call it; PyTorch is
a loop written by hand over preallocated caches, under inference_mode, and, where it is installed,
transformers' own generate.
"""

import argparse
import json
import os
import statistics
import time

import numpy as np

from tests.benchmarks import harness

CONTEXT, WIDTH, LAYERS, HEADS, INNER = 1024, 768, 12, 12, 2048
VOCABULARY = {"gpt2": 50257, "llama": 32000}


def prompt(model: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY[model], (1, 32))


def timed(generate, tokens: int) -> dict[str, float]:
    generate(4)
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        generate(tokens)
        runs.append(time.perf_counter() - started)
    seconds = statistics.median(runs)
    return {"tokens/s": tokens / seconds, "peak": harness.peak_megabytes()}


def ours(name: str, tokens: int) -> dict[str, float]:
    from tinyllm.models import GPT2, GPT2Config, LLaMA, LLaMAConfig

    if name == "llama":
        config = LLaMAConfig(32000, WIDTH, INNER, LAYERS, HEADS, max_position_embeddings=CONTEXT)
        model = LLaMA(config)
    else:
        model = GPT2(GPT2Config())
    ids = prompt(name)
    return timed(lambda n: model.generate(ids, n, temperature=0), tokens)


def pytorch(name: str, tokens: int) -> dict[str, float]:
    import torch

    from tests.benchmarks.torch_gpt2 import TorchGPT2
    from tests.benchmarks.torch_llama import TorchLLaMA

    if name == "llama":
        model = TorchLLaMA(32000, CONTEXT, WIDTH, LAYERS, HEADS, HEADS, INNER)
    else:
        model = TorchGPT2(50257, CONTEXT, WIDTH, LAYERS, HEADS)

    @torch.inference_mode()
    def generate(n: int) -> None:
        ids = torch.from_numpy(prompt(name))
        room = (1, HEADS, 32 + n, WIDTH // HEADS)
        caches = [(torch.empty(room), torch.empty(room)) for _ in range(LAYERS)]
        seen, new = 0, ids
        for _ in range(n):
            logits = model(new, caches, seen, last=True)
            seen += new.shape[1]
            new = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)

    return timed(generate, tokens)


def transformers(name: str, tokens: int) -> dict[str, float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "llama":
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
        )
        model = LlamaForCausalLM(config).eval()
    else:
        model = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.from_numpy(prompt(name))
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(ids)
    return timed(lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **settings), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(VOCABULARY), default="gpt2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["ours", "pytorch", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(globals()[args.child](args.model, args.tokens)))
        return
    options = ["--model", args.model, "--tokens", str(args.tokens)]
    kinds = {kind: ([kind, *options], {}) for kind in ("ours", "pytorch", "transformers")}
    results = harness.rounds("tests.benchmarks.generate", kinds, args.rounds)
    print(
        f"{os.cpu_count()} cores, NumPy {np.__version__}; "
        f"{args.model}, {args.tokens} tokens, medians of {args.rounds} rounds"
    )
    for kind, runs in results.items():
        times = "" if kind == "ours" else f"ours is {harness.ratio(results['ours'], runs, 'tokens/s'):.2f}x"
        speed, peak = (harness.median(runs, key) for key in ("tokens/s", "peak"))
        print(f"  {kind:14} {speed:6.1f} tokens/s {peak:6,.0f} MB  {times}")


if __name__ == "__main__":
    main()
