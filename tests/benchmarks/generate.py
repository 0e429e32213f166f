"""Cached generation at the shape of GPT-2 124M beside PyTorch: `python -m tests.benchmarks.generate`.

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

PROMPT = np.random.default_rng(0).integers(0, 50257, (1, 32))


def timed(generate, tokens: int) -> dict[str, float]:
    generate(4)
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        generate(tokens)
        runs.append(time.perf_counter() - started)
    seconds = statistics.median(runs)
    return {"tokens/s": tokens / seconds, "peak": harness.peak_megabytes()}


def ours(tokens: int) -> dict[str, float]:
    from tinyllm.models import GPT2, GPT2Config

    model = GPT2(GPT2Config())
    return timed(lambda n: model.generate(PROMPT, n, temperature=0), tokens)


def pytorch(tokens: int) -> dict[str, float]:
    import torch

    from tests.benchmarks.torch_gpt2 import TorchGPT2

    model = TorchGPT2(50257, 1024, 768, 12, 12)

    @torch.inference_mode()
    def generate(n: int) -> None:
        ids = torch.from_numpy(PROMPT)
        caches = [(torch.empty(1, 12, 32 + n, 64), torch.empty(1, 12, 32 + n, 64)) for _ in range(12)]
        seen, new = 0, ids
        for _ in range(n):
            logits = model(new, caches, seen, last=True)
            seen += new.shape[1]
            new = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)

    return timed(generate, tokens)


def transformers(tokens: int) -> dict[str, float]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.from_numpy(PROMPT)
    settings = {"do_sample": False, "pad_token_id": 50256, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(ids)
    return timed(lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, **settings), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["ours", "pytorch", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(globals()[args.child](args.tokens)))
        return
    kinds = {kind: ([kind, "--tokens", str(args.tokens)], {}) for kind in ("ours", "pytorch", "transformers")}
    results = harness.rounds("tests.benchmarks.generate", kinds, args.rounds)
    print(
        f"{os.cpu_count()} cores, NumPy {np.__version__}; "
        f"{args.tokens} tokens, medians of {args.rounds} rounds"
    )
    for kind, runs in results.items():
        times = "" if kind == "ours" else f"ours is {harness.ratio(results['ours'], runs, 'tokens/s'):.2f}x"
        speed, peak = (harness.median(runs, key) for key in ("tokens/s", "peak"))
        print(f"  {kind:14} {speed:6.1f} tokens/s {peak:6,.0f} MB  {times}")


if __name__ == "__main__":
    main()
