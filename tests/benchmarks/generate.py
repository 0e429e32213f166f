"""Cached generation beside PyTorch's: `python -m tests.benchmarks.generate --model llama`.

The shapes: GPT-2 of 124M parameters, and a LLaMA of 134M, as wide and as deep, with a vocabulary of 32,000.
Greedy, one sequence, float32, all cores. Ours and transformers read the same folder of random weights, and
each is its own generate as users call it; PyTorch is a loop written by hand over preallocated caches, under
inference_mode.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import numpy as np

from tests.benchmarks import harness

CONTEXT, WIDTH, LAYERS, HEADS, INNER = 1024, 768, 12, 12, 2048
VOCABULARY = {"gpt2": 50257, "llama": 32000}


def prompt(model: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY[model], (1, 32))


def save_model(name: str, folder: str) -> None:
    """Random weights, in the published format."""
    from tinyllm.models import GPT2, GPT2Config, LLaMA, LLaMAConfig

    if name == "llama":
        config = LLaMAConfig(32000, WIDTH, INNER, LAYERS, HEADS, max_position_embeddings=CONTEXT)
        LLaMA(config).save_pretrained(folder)
    else:
        GPT2(GPT2Config()).save_pretrained(folder)


def timed(generate, tokens: int) -> dict:
    generate(4)
    runs = []
    for _ in range(3):
        started = time.perf_counter()
        ids = generate(tokens)
        runs.append(time.perf_counter() - started)
    seconds = statistics.median(runs)
    return {"tokens/s": tokens / seconds, "peak": harness.peak_megabytes(), "text": np.asarray(ids).tolist()}


def ours(name: str, tokens: int, folder: str) -> dict:
    import tinyllm

    model, ids = tinyllm.from_pretrained(folder), prompt(name)
    return timed(lambda n: model.generate(ids, n, temperature=0), tokens)


def pytorch(name: str, tokens: int, folder: str) -> dict:
    import torch

    from tests.benchmarks.torch_gpt2 import TorchGPT2
    from tests.benchmarks.torch_llama import TorchLLaMA

    if name == "llama":
        model = TorchLLaMA(32000, CONTEXT, WIDTH, LAYERS, HEADS, HEADS, INNER)
    else:
        model = TorchGPT2(50257, CONTEXT, WIDTH, LAYERS, HEADS)

    @torch.inference_mode()
    def generate(n: int) -> torch.Tensor:
        ids = torch.from_numpy(prompt(name))
        room = (1, HEADS, 32 + n, WIDTH // HEADS)
        caches = [(torch.empty(room), torch.empty(room)) for _ in range(LAYERS)]
        seen, new = 0, ids
        for _ in range(n):
            logits = model(new, caches, seen, last=True)
            seen += new.shape[1]
            new = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
        return ids

    return timed(generate, tokens)


def transformers(name: str, tokens: int, folder: str) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
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
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(globals()[args.child](args.model, args.tokens, args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(args.model, folder)
        options = ["--model", args.model, "--tokens", str(args.tokens), "--folder", folder]
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
    texts = [results[kind][0]["text"] for kind in ("ours", "transformers")]
    print(f"  ours and transformers wrote {'the same text' if texts[0] == texts[1] else 'different texts'}")


if __name__ == "__main__":
    main()
