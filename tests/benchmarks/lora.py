"""A training step of GPT-2 (124M) with adapters beside full fine-tuning's: `python -m tests.benchmarks.lora`.

A step is forward, backward, clipping and AdamW, in float32 on all cores. "Beyond the weights" is the largest
resident size of the process, less what it had before the model was made and less the model's own weights:
gradients, the optimizer's state, activations. Each kind runs in a process of its own.
"""

import argparse
import json
import os

import numpy as np

from tests.benchmarks import harness
from tests.benchmarks.train_step import timed

BATCH, CONTEXT, STEPS = 2, 128, 4
KINDS = {  # name -> arguments of lora.apply
    "full fine-tuning": None,
    "LoRA, rank 8, c_attn": {"targets": ["c_attn"]},
    "LoRA, rank 8, all maps": {"targets": "all-linear"},
}


def step_of(kind: str) -> dict[str, float]:
    from autograd import optim
    from tinyllm import lora
    from tinyllm.models import GPT2, GPT2Config
    from tinyllm.parallel import DataParallel

    before = harness.peak_megabytes()
    model = GPT2(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    weights = sum(p.data.nbytes for p in model.parameters()) / 1e6
    if KINDS[kind] is not None:
        lora.apply(model, rank=8, alpha=16, **KINDS[kind])
    learned = sum(p.size for p in model.parameters() if p.requires_grad)
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), 1e-4)
    x, y = np.random.default_rng(0).integers(0, model.vocabulary_size, (2, BATCH, CONTEXT))
    with DataParallel(model) as parallel:

        def step(i: int) -> None:
            optimizer.zero_grad()
            parallel.gradients(x, y, (0, i))
            optim.clip_grad_norm(parallel.parameters, 1.0, parallel.map)
            optimizer.step(parallel.map)

        seconds = timed(step, STEPS)
    return {"seconds": seconds, "beyond": harness.peak_megabytes() - before - weights, "learned": learned}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(step_of(args.kind)))
        return
    results = harness.rounds("tests.benchmarks.lora", {kind: ([kind], {}) for kind in KINDS}, args.rounds)
    print(f"{os.cpu_count()} cores, NumPy {np.__version__}; GPT-2 of 124M, {BATCH} sequences of {CONTEXT};")
    print(f"{args.rounds} rounds, medians")
    print(f"  {'':24} {'learned':>12} {'ms a step':>10} {'MB beyond the weights':>22}")
    full = results["full fine-tuning"]
    for kind, runs in results.items():
        learned, ms, beyond = (harness.median(runs, key) for key in ("learned", "seconds", "beyond"))
        faster, smaller = (harness.ratio(full, runs, key) for key in ("seconds", "beyond"))
        than = "" if runs is full else f"  {faster:.2f}x as fast, {1 / smaller:.2f} of the memory"
        print(f"  {kind:24} {learned:12,.0f} {ms * 1e3:10.0f} {beyond:22,.0f}{than}")


if __name__ == "__main__":
    main()
