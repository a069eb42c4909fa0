"""One training step on a CPU: ours, a plain decoder's and Hugging Face's Llama's.

Each variant has a process of its own. They take steps in turns, so that other load disturbs all
alike, and the fastest step of each counts. Not for: data, evals, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.environment import cpu
from relora_core.config import DataConfig, ModelConfig, ReLoRAConfig, RunConfig, TrainConfig

WIDTHS = {"tiny": 96, "small": 384}
VOCAB, BATCH, LENGTH, RANK = 50304, 4, 512, 16
VARIANTS = {
    "plain fp32": "full logits, loss on the [B, V, T] view, additive mask: benchmarks/plain.py",
    "plain relora fp32": "the same with adapters of rank 16 and dropout 0.1",
    "full_rank fp32": "ours",
    "full_rank bf16": "ours, train.precision=bf16",
    "full_rank torch fp32": "runtime.kernels=torch, as where there is no compiler",
    "relora fp32": "ours, relora=corrected: rank 16, dropout 0.1",
    "relora bf16": "the same, train.precision=bf16",
    "relora p=0 fp32": "without dropout",
    "relora p=0 bf16": "without dropout, train.precision=bf16",
    "hf sdpa fp32": "LlamaForCausalLM of the same shape, fused AdamW",
    "hf eager fp32": "the same, attn_implementation='eager'",
    "hf sdpa bf16": "under autocast",
    "hf eager bf16": "under autocast, attn_implementation='eager'",
}
DEFAULT = tuple(name for name in VARIANTS if not name.startswith("plain relora"))
RATIOS = {  # name: (numerator, denominator), each the fastest variant that begins so
    "ratio_fp32": ("full_rank fp32", "plain fp32"),
    "ratio_bf16": ("full_rank bf16", "plain fp32"),
    "hf_ratio_fp32": ("full_rank fp32", "hf fp32"),
    "hf_ratio_bf16": ("full_rank bf16", "hf bf16"),
    "relora_ratio": ("relora fp32", "full_rank fp32"),
    "relora_ratio_bf16": ("relora bf16", "full_rank bf16"),
    "relora_p0_ratio": ("relora p=0 fp32", "full_rank fp32"),
    "relora_p0_ratio_bf16": ("relora p=0 bf16", "full_rank bf16"),
    "native_ratio": ("full_rank fp32", "full_rank torch fp32"),
    "plain_relora_ratio": ("relora fp32", "plain relora fp32"),
}


# one variant, in its own process ------------------------------------------------------------------
def build_ours(width: int, *, method: str, dropout: float) -> Any:
    """(model, optimizer) as a run builds them."""
    from relora_core.methods import build_method  # torch, not for the process that starts variants
    from relora_core.model import Decoder

    config = RunConfig(
        method=method,
        model=ModelConfig(d_model=width, d_ff=4 * width, vocab_size=VOCAB, max_seq_len=LENGTH),
        relora=ReLoRAConfig(r=RANK, alpha=32, dropout=dropout),
        train=TrainConfig(steps=1, batch_size=BATCH),
        data=DataConfig(seq_len=LENGTH),
    )
    model, chosen = Decoder(config.model), build_method(config)
    chosen.adapt(model)
    return model, chosen.build_optimizer(model)


def make_step(variant: str, *, width: int) -> Callable[[], float]:
    """A function that takes one training step and gives its loss."""
    import torch

    from relora_core import native  # torch

    torch.manual_seed(0)
    kind, rest = variant.split(" ", 1)
    native.choose("torch" if "torch" in rest else "auto")
    if kind == "plain":
        from plain import PlainDecoder  # torch

        sizes = ModelConfig(d_model=width, d_ff=4 * width, vocab_size=VOCAB)
        model = PlainDecoder(sizes, r=RANK if "relora" in rest else 0, dropout=0.1)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    elif kind == "hf":
        from llama import build_llama  # torch

        sizes = ModelConfig(d_model=width, d_ff=4 * width, vocab_size=VOCAB, max_seq_len=LENGTH)
        model = build_llama(sizes, attention=rest.split()[0])
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        dropout = 0.0 if "p=0" in rest else 0.1
        model, optimizer = build_ours(width, method=kind, dropout=dropout)
    model.train()
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled="bf16" in rest)

    def step() -> float:
        with autocast:
            if kind == "hf":
                loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
            else:
                loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def serve(variant: str, *, width: int, threads: int) -> None:
    """Take a step for each line on stdin; print its seconds and loss."""
    import torch

    torch.set_num_threads(threads)
    step = make_step(variant, width=width)
    step()  # the first one allocates
    print(torch.__version__, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(f"{time.perf_counter() - start} {loss}", flush=True)
    print(peak_mb(), flush=True)


def peak_mb() -> float:
    """Peak resident memory of this process alone: ru_maxrss would remember what forked it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


# all of them --------------------------------------------------------------------------------------
class Variant:
    """A process that takes a step at each call of `step`."""

    def __init__(self, name: str, *, model: str, threads: int) -> None:
        self.name, self.seconds, self.peak, self.loss = name, [], 0.0, 0.0
        command = [sys.executable, __file__, "--serve", name, "--model", model]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.torch = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: variant {self.name!r} ended (its message is above)")
        return line.strip()

    def step(self) -> None:
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        seconds, loss = self._answer().split()
        self.seconds.append(float(seconds))
        self.loss = float(loss)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.peak = float(self._answer())
        self._process.wait()


def measure(names: list[str], *, model: str, threads: int, rounds: int) -> list[Variant]:
    variants = [Variant(name, model=model, threads=threads) for name in names]
    for _ in range(rounds):
        for variant in variants:
            variant.step()
    for variant in variants:
        variant.close()
    return variants


def figures(variants: list[Variant]) -> dict[str, float]:
    """Ratios of tokens per second (and of peak memory) between the variants that were measured."""

    def fastest(name: str) -> Variant | None:
        kind, _, rest = name.rpartition(" ")
        candidates = [v for v in variants if v.name == name or kind == "hf" == v.name.split()[0]]
        candidates = [v for v in candidates if v.name.endswith(rest)]
        return min(candidates, key=lambda v: min(v.seconds), default=None)

    out = {}
    for name, pair in RATIOS.items():
        ours, theirs = map(fastest, pair)
        if ours and theirs:
            out[name] = min(theirs.seconds) / min(ours.seconds)
            if name in ("ratio_fp32", "ratio_bf16", "hf_ratio_fp32", "hf_ratio_bf16"):
                out[f"memory_{name}"] = ours.peak / theirs.peak
    return {name: round(value, 3) for name, value in out.items()}


def show(variants: list[Variant], *, about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = ", ".join(f"{k} {v}" for k, v in about.items())
    table = Table("variant", "best ms", "median ms", "tokens/s", "peak MB", "loss", title=title)
    for v in variants:
        ordered = sorted(v.seconds)
        best, middle = ordered[0], ordered[len(ordered) // 2]
        cells = (f"{1e3 * best:.0f}", f"{1e3 * middle:.0f}", f"{BATCH * LENGTH / best:.0f}")
        table.add_row(v.name, *cells, f"{v.peak:.0f}", f"{v.loss:.3f}")
    Console(width=100).print(table)


def main() -> None:
    listing = "\n".join(f"  {name:18} {text}" for name, text in VARIANTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nvariants:\n{listing}\n\nThe last line is JSON: ratios of "
        "tokens per second between the fastest steps, and of peak memory.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=WIDTHS, default="tiny", help="the paper's size")
    parser.add_argument("--rounds", type=int, default=6, help="steps of each variant (default 6)")
    parser.add_argument(
        "--variants",
        metavar="A,B",
        default=",".join(DEFAULT),
        help="names from the list above; by default all without 'plain relora'",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of every variant (default: all cores)"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, width=WIDTHS[args.model], threads=args.threads)
        return
    names = [name.strip() for name in args.variants.split(",")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or args.rounds < 1:
        parser.error(f"no such variant: {unknown[0]!r}" if unknown else "--rounds must be >= 1")
    variants = measure(names, model=args.model, threads=args.threads, rounds=args.rounds)
    about = {
        "model": args.model,
        "batch": f"{BATCH} x {LENGTH}",
        "threads": args.threads,
        "cores": os.cpu_count(),
        "cpu": cpu(),
        "torch": variants[0].torch,
    }
    show(variants, about=about)
    steps = {v.name: {"best_s": min(v.seconds), "peak_mb": round(v.peak)} for v in variants}
    print(json.dumps({**about, "rounds": args.rounds, **figures(variants), "variants": steps}))


if __name__ == "__main__":
    main()
