"""Training steps of GPT-2, LLaMA, BERT or the Transformer beside PyTorch's:
`python -m tests.benchmarks.train_step --model llama`.

A step is forward, backward, clipping and AdamW, in float32 on all cores. The floor is the step's matrix
products alone, with the same shapes on the same threads, measured in the process of the step. PyTorch runs
eagerly; "fused AdamW" is its optimizer's faster form, "memory kept" a run with glibc's mmap and trimming off,
as ours sets it. The Transformer's sources and targets are padded, and its labels smoothed; it has that many
layers on either side, and the tokens that count are those of the targets. BERT's rows are padded too, and it
has both losses of pre-training.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tests.benchmarks import harness

#         layers, width, heads, context, batch, vocabulary, steps timed
SIZES = {
    "S": (4, 128, 4, 64, 12, 65, 60),
    "M": (6, 384, 6, 256, 8, 65, 6),
    "L": (6, 384, 6, 256, 4, 50257, 4),
    "T": (2, 128, 4, 32, 32, 1000, 60),  # of the Transformer alone
    "B": (4, 128, 4, 64, 32, 1000, 40),  # of BERT alone
}


def timed(step, count: int) -> float:
    """Median seconds of a step, the first two not counted."""
    seconds = []
    for i in range(count + 2):
        started = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def batch(model: str, size: str) -> tuple:
    """Inputs and targets. A Transformer's inputs are sources, their lengths, and what its decoder reads;
    BERT's are tokens, mask and segments, and its targets the masked tokens and what followed what."""
    _, _, _, T, B, V, _ = SIZES[size]
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T))
    if model == "bert":
        mask = (np.arange(T) < rng.integers(20, T + 1, (B, 1))).astype(np.int64)
        y[(mask == 0) | (rng.random((B, T)) > 0.15)] = -100
        return (x, mask, rng.integers(0, 2, (B, T))), (y, rng.integers(0, 2, B))
    if model != "transformer":
        return x, y
    lengths, target_lengths = rng.integers(T // 2, T + 1, (2, B))
    y[np.arange(T) >= target_lengths[:, None]] = -100
    return (x, lengths, rng.integers(0, V, (B, T))), y


def hidden(C: int) -> int:
    """The width of LLaMA's MLP: 2/3 of 4 C, so that three matrices weigh what two of 4 C do."""
    return round(8 * C / 3 / 16) * 16


def our_model(model: str, size: str):
    from tinyllm.models import (
        BERT,
        GPT2,
        BERTConfig,
        GPT2Config,
        LLaMA,
        LLaMAConfig,
        Transformer,
        TransformerConfig,
    )

    L, C, H, T, _, V, _ = SIZES[size]
    if model == "bert":
        return BERT(BERTConfig(V, C, L, H, 4 * C, 0.0, 0.0, max_position_embeddings=T))
    if model == "transformer":
        return Transformer(TransformerConfig(V, C, L, L, H, H, 4 * C, 4 * C, dropout=0.0))
    if model == "llama":
        return LLaMA(LLaMAConfig(V, C, hidden(C), L, H, max_position_embeddings=T))
    return GPT2(GPT2Config(V, T, C, L, H, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def torch_model(model: str, size: str):
    from tests.benchmarks.torch_bert import TorchBERT
    from tests.benchmarks.torch_gpt2 import TorchGPT2
    from tests.benchmarks.torch_llama import TorchLLaMA
    from tests.benchmarks.torch_transformer import TorchTransformer

    L, C, H, T, _, V, _ = SIZES[size]
    if model == "bert":
        return TorchBERT(V, T, C, L, H)
    if model == "transformer":
        return TorchTransformer(V, T, C, L, H, 4 * C)
    return TorchLLaMA(V, T, C, L, H, H, hidden(C)) if model == "llama" else TorchGPT2(V, T, C, L, H)


def ours(name: str, size: str, fused: bool) -> dict[str, float]:
    import autograd.functional as F
    from autograd import optim
    from tinyllm.parallel import DataParallel

    _, _, _, T, B, _, steps = SIZES[size]
    F.use_fused(fused)
    model = our_model(name, size)
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), 1e-3)
    x, y = batch(name, size)
    model.train()
    with DataParallel(model) as parallel:

        def step(i: int) -> None:
            optimizer.zero_grad()
            parallel.gradients(x, y, (0, i))
            optim.clip_grad_norm(parallel.parameters, 1.0, parallel.map)
            optimizer.step(parallel.map)

        seconds = timed(step, steps if fused else max(2, steps // 4))
        peak = harness.peak_megabytes()
        floor = timed(products(name, size, parallel.shards), steps)
    return {"tokens/s": B * T / seconds, "seconds": seconds, "floor": floor, "peak": peak}


def products(model: str, size: str, shards: int):
    """A function that computes the matrix products of one step, and nothing else."""
    L, C, H, T, B, V, _ = SIZES[size]
    rng = np.random.default_rng(0)

    def shard(sequences: int):
        array = lambda *shape: rng.standard_normal(shape, np.float32)
        N, d = sequences * T, C // H
        gpt2, inner = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)], hidden(C)
        llama = [(C, C)] * 4 + [(C, inner), (C, inner), (inner, C)]
        shapes = llama if model == "llama" else gpt2
        attentions = 1
        if model == "transformer":  # of an encoder's and a decoder's layer together
            shapes, attentions = [(C, C)] * 12 + [(C, 4 * C), (4 * C, C)] * 2, 3
        pairs = [(array(N, n), array(m, n), array(N, m)) for n, m in shapes]
        scored = N // 10 if model == "bert" else N  # the masked ones of what is no padding
        x, w, g = array(scored, C), array(V, C), array(scored, V)
        qkv, out = array(N, 3 * C), array(sequences, T, H, d).transpose(0, 2, 1, 3)
        q, k, v = qkv.reshape(sequences, T, 3, H, d).transpose(2, 0, 3, 1, 4)
        blocks = [
            (slice(i, i + 64), slice(0, i + 64), array(sequences, H, min(64, T), min(i + 64, T)))
            for i in range(0, T, 64)
        ]

        def compute() -> None:
            for _ in range(L):
                for a, weight, gradient in pairs:
                    a @ weight.T, gradient @ weight, gradient.T @ a
                for rows, columns, p in blocks * attentions:
                    q[:, :, rows] @ k[:, :, columns].swapaxes(-1, -2), p @ v[:, :, columns]
                    out[:, :, rows] @ v[:, :, columns].swapaxes(-1, -2), p @ k[:, :, columns]
                    p.swapaxes(-1, -2) @ out[:, :, rows], p.swapaxes(-1, -2) @ q[:, :, rows]
            x @ w.T, g @ w, g.T @ x

        return compute

    work = [shard(len(part)) for part in np.array_split(np.arange(B), shards)]
    pool = ThreadPoolExecutor(shards)
    return lambda i: list(pool.map(lambda compute: compute(), work))


def pytorch(name: str, size: str, fused_adamw: bool) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    _, _, _, T, B, V, steps = SIZES[size]
    model = torch_model(name, size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, fused=fused_adamw)
    x, y = batch(name, size)
    as_tuple = lambda some: some if isinstance(some, tuple) else (some,)
    x, y = (tuple(map(torch.from_numpy, as_tuple(some))) for some in (x, y))
    y = y if name == "bert" else y[0]
    smoothing = 0.1 if name == "transformer" else 0.0

    def step(i: int) -> None:
        optimizer.zero_grad()
        if name == "bert":
            model.loss(x, y).backward()
        else:
            F.cross_entropy(model(*x).view(-1, V), y.view(-1), label_smoothing=smoothing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seconds = timed(step, steps)
    return {"tokens/s": B * T / seconds, "seconds": seconds, "peak": harness.peak_megabytes()}


def table(model: str, size: str, count: int) -> None:
    arguments = {
        kind: [kind, size, "--model", model] for kind in ("ours", "pytorch", "pytorch-fused", "composed")
    }
    kinds = {
        "ours": (arguments["ours"], {}),
        "PyTorch": (arguments["pytorch"], {}),
        "PyTorch, fused AdamW": (arguments["pytorch-fused"], {}),
        "PyTorch, memory kept": (arguments["pytorch"], harness.KEEP_MEMORY),
        "  and fused AdamW": (arguments["pytorch-fused"], harness.KEEP_MEMORY),
        "ours, primitives only": (arguments["composed"], {}),
    }
    results = harness.rounds("tests.benchmarks.train_step", kinds, count)
    L, C, _, T, B, V, _ = SIZES[size]
    print(
        f"\n{model} {size}: {L} layers, width {C}, context {T}, batch {B}, vocabulary {V:,}; "
        f"{count} rounds, medians"
    )
    print(f"  {'':22} {'tokens/s':>9} {'ms a step':>10} {'peak MB':>8}  ours is")
    for kind, runs in results.items():
        speed, ms, peak = (harness.median(runs, key) for key in ("tokens/s", "seconds", "peak"))
        times = "" if kind == "ours" else f"{harness.ratio(results['ours'], runs, 'tokens/s'):5.2f}x"
        print(f"  {kind:22} {speed:9,.0f} {ms * 1e3:10.1f} {peak:8,.0f}  {times}")
    share = statistics.median(run["floor"] / run["seconds"] for run in results["ours"])
    floor = harness.median(results["ours"], "floor") * 1e3
    print(f"  the floor, matrix products alone: {floor:.1f} ms = {share:.2f} of ours")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", help="S M L; T for the Transformer, B for BERT (default: all)")
    parser.add_argument("--model", choices=["gpt2", "llama", "bert", "transformer"], default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, size = args.sizes
        if kind.startswith("pytorch"):
            result = pytorch(args.model, size, fused_adamw=kind == "pytorch-fused")
        else:
            result = ours(args.model, size, fused=kind == "ours")
        print(json.dumps(result))
        return
    print(f"{os.cpu_count()} cores, NumPy {np.__version__}")
    own = {"bert": ["B"], "transformer": ["T"]}
    for size in args.sizes or own.get(args.model, ["S", "M", "L"]):
        table(args.model, size, args.rounds)


if __name__ == "__main__":
    main()
