"""Training on one GPU at the paper's shapes, and short runs packed on it: `benchmarks/gpu.py`.

Steps of `train_step.py` in bf16, with the largest micro-batch that fits; each variant in a process
of its own, its first steps timed apart. MFU is model FLOPs (`relora_core/costs.py`) over the peak.
The roof is the speed of a step that takes only the longer of two times: its FLOPs at the peak, and
at the memory's bandwidth the bytes that every step moves:

    8 per weight               read as float32 in the forward and in the backward pass
    32 per trainable weight    gradient written and read, weight and both moments read and written
    2 x what is saved          activations (costs.memory_bytes) written, and read in the backward

Not counted are logits, which a fused head keeps on the chip. Not for: CPUs (`train_step.py`);
`--device cpu` only tries every path.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_step
from rich.console import Console
from rich.table import Table

from experiments import schema
from experiments.disk.output_dir import all_runs
from experiments.run.complete import complete
from relora_core import costs
from relora_core.config import DataConfig, ModelConfig, ReLoRAConfig, RunConfig, TrainConfig
from relora_core.devices import find_device
from sweeps.local.launcher import launch_local
from sweeps.local.slots import visible_gpus
from sweeps.planning.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {**train_step.WIDTHS, "nano": 24}
VARIANTS = {
    "full_rank bf16": "ours",
    "relora bf16": "ours, relora=corrected: rank 16, dropout 0.1",
    "hf sdpa bf16": "LlamaForCausalLM of the same shape, fused AdamW, eager",
    "hf sdpa bf16 compiled": "the same under torch.compile",
}
LARGEST = 1024
"""Largest micro-batch that is tried: the paper's batch."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """One variant."""

    model: str
    variant: str
    batch: int
    tokens_per_s: float
    """Of the median step."""
    step_s: float
    warm_up_s: float
    """Of the first steps, compilation included."""
    peak_mb: float
    loss: float
    mfu: float | None = None
    roof_tokens_per_s: float | None = None
    roof_by: str | None = None


# one variant, in its own process ------------------------------------------------------------------
def measure(variant: str, *, model: str, args: argparse.Namespace) -> Measured:
    """Find the micro-batch of a variant, then time its steps."""
    made = _fitting if args.batch is None else _made
    step, batch, warm_up = made(variant, model=model, args=args)
    _forget_peak(args.device)
    seconds, loss = [], 0.0
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = step()  # ends when the device has done it: the loss comes back to the host
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds)
    return Measured(
        model=model,
        variant=variant,
        batch=batch,
        tokens_per_s=batch * args.length / middle,
        step_s=middle,
        warm_up_s=warm_up,
        peak_mb=_peak_mb(args.device),
        loss=loss,
    )


Made = tuple[Callable[[], float], int, float]
"""A warmed-up step, its micro-batch, and the seconds of warming up."""


def _made(variant: str, *, model: str, args: argparse.Namespace) -> Made:
    begun = time.perf_counter()
    step = train_step.make_step(
        variant,
        width=WIDTHS[model],
        batch=args.batch,
        length=args.length,
        device=args.device,
        compiler=_compiler(args.device) if "compiled" in variant else None,
    )
    for _ in range(args.warm_up):
        step()
    return step, args.batch, time.perf_counter() - begun


def _compiler(device: str) -> str:
    """Generating code for a smoke test on a CPU would take minutes."""
    return "inductor" if device == "cuda" else "eager"


def _fitting(variant: str, *, model: str, args: argparse.Namespace) -> Made:
    """At the largest power of two that fits. Sizes are tried without compiling, a minute each."""
    import torch

    plain, batch = variant.removesuffix(" compiled"), 1
    while 2 * batch <= args.largest and _fits(plain, model=model, batch=2 * batch, args=args):
        batch *= 2
    while True:
        try:
            return _made(variant, model=model, args=_with(args, batch=batch))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise SystemExit(f"error: {variant}: not even one sequence fits") from None
            batch //= 2
        _empty(args.device)


def _fits(variant: str, *, model: str, batch: int, args: argparse.Namespace) -> bool:
    """Two steps: the optimizer's state is there from the second on."""
    try:
        _made(variant, model=model, args=_with(args, batch=batch, warm_up=2))
        fits = True
    except RuntimeError as error:  # out of memory, or out of a kernel's range of indices
        print(f"{variant}, batch {batch}: {str(error).splitlines()[0]}", file=sys.stderr)
        fits = False
    _empty(args.device)  # only now: the exception had a reference to the model
    return fits


def _with(args: argparse.Namespace, **changes: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


def _empty(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _forget_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_mb(device: str) -> float:
    """Peak memory of tensors on the GPU, or of the process on a CPU."""
    if device != "cuda":
        return train_step.peak_mb()
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


# roof ---------------------------------------------------------------------------------------------
def config_of(model: str, variant: str, *, batch: int, length: int) -> RunConfig:
    """What `costs` counts for a variant; the Llama is our full rank."""
    width, ours = WIDTHS[model], variant.split()[0]
    return RunConfig(
        method="relora" if ours == "relora" else "full_rank",
        model=ModelConfig(d_model=width, d_ff=4 * width, vocab_size=train_step.VOCAB),
        relora=ReLoRAConfig(r=train_step.RANK),
        train=TrainConfig(steps=1, batch_size=batch, precision="bf16"),
        data=DataConfig(seq_len=length),
    )


def add_roof(row: Measured, *, length: int, peaks: tuple[float, float]) -> None:
    """Add MFU, the roof and what sets it; see the module's docstring."""
    config = config_of(row.model, row.variant, batch=row.batch, length=length)
    tokens, counted = row.batch * length, costs.parameters(config)
    flops = costs.flops_per_token(config).train * tokens
    saved = costs.memory_bytes(config)["activations"]
    moved = 8 * counted.total + 32 * counted.trainable + 2 * saved
    floors = {"FLOPs": flops / peaks[0], "bytes": moved / peaks[1]}
    row.roof_by = max(floors, key=lambda name: floors[name])
    row.roof_tokens_per_s = tokens / floors[row.roof_by]
    row.mfu = flops / row.step_s / peaks[0]


def peaks_of(name: str, args: argparse.Namespace) -> tuple[float, float] | None:
    """(FLOPs/s, bytes/s); None if neither the table nor the command line gives them."""
    if args.peak_tflops and args.bandwidth_gb:
        return args.peak_tflops * 1e12, args.bandwidth_gb * 1e9
    device = find_device(name)
    return None if device is None else (device.bf16, device.memory)


# packed runs --------------------------------------------------------------------------------------
def packed(runs: int, *, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of short runs by the local launcher, all at once and one after another: from the
    first start to the last end in their records."""
    seconds = {
        name: round(_launched(runs, parallel=parallel, device=args.device), 2)
        for name, parallel in (("packed_s", runs), ("in_turn_s", 1))
    }
    return {"runs": runs, **seconds, "ratio": round(seconds["in_turn_s"] / seconds["packed_s"], 3)}


def _launched(runs: int, *, parallel: int, device: str) -> float:
    smoke = device == "cpu"
    words = [f"model={'nano' if smoke else 'tiny'}", f"train.steps={2 if smoke else 500}"]
    words += ["schedule.warmup_steps=1", "train.precision=bf16", f"runtime.device={device}"]
    words += ["eval=none", "tracking=none", "sweep.name=packed"]
    with tempfile.TemporaryDirectory(prefix="packed-") as folder:
        config = complete(schema.compose([*words, f"output_dir={folder}"]))
        plan = make_plan([({}, replace(config, seed=seed)) for seed in range(runs)])
        console = Console(quiet=True)
        done = launch_local(plan, output_dir=folder, max_parallel=parallel, console=console)
        if done.exit_code:
            lines = [state.reason or state.state for state in done.states.values()]
            raise SystemExit(f"error: the packed runs ended so: {lines}")
        records = [run.attempt_records()[0] for run in all_runs(folder)]
        ends = [run.events()[-1]["time"] for run in all_runs(folder)]
    return max(ends) - min(record["started"] for record in records)


# all of them --------------------------------------------------------------------------------------
def gpu_name() -> str | None:
    """Name of the first GPU; asked in another process, so that this one takes no GPU memory."""
    gpus = visible_gpus()
    if not gpus:
        return None
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]  # one, for all that follows
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def collect(args: argparse.Namespace) -> list[Measured]:
    rows = []
    for model in args.models:
        for variant in args.variants:
            words = [sys.executable, __file__, *sys.argv[1:], "--serve", f"{model}/{variant}"]
            done = subprocess.run(
                words, stdout=subprocess.PIPE, text=True, env=_environment(), check=False
            )
            if done.returncode:
                raise SystemExit(f"error: {model}, {variant} ended (its message is above)")
            rows.append(Measured(**json.loads(done.stdout.splitlines()[-1])))
            print(f"{model}, {variant}: {rows[-1].tokens_per_s:,.0f} tokens/s", file=sys.stderr)
    return rows


def _environment() -> dict[str, str]:
    return {**os.environ, "TRANSFORMERS_OFFLINE": "1"}


def show(rows: Sequence[Measured], *, pack: dict[str, float] | None, title: str) -> None:
    names = ("model", "variant", "batch", "tokens/s", "MFU", "roof tokens/s", "of roof")
    names += ("peak MB", "warm-up s", "loss")
    table = Table(*names, title=title)
    for row in rows:
        roof = row.roof_tokens_per_s
        cells = [row.model, row.variant, str(row.batch), f"{row.tokens_per_s:,.0f}"]
        cells += ["-" if row.mfu is None else f"{row.mfu:.1%}"]
        cells += ["-" if roof is None else f"{roof:,.0f} ({row.roof_by})"]
        cells += ["-" if roof is None else f"{row.tokens_per_s / roof:.1%}"]
        cells += [f"{row.peak_mb:,.0f}", f"{row.warm_up_s:.1f}", f"{row.loss:.3f}"]
        table.add_row(*cells)
    console = Console(width=140)
    console.print(table)
    if pack:
        runs, packed_s, in_turn_s, ratio = pack.values()
        console.print(f"{runs} runs: {packed_s} s packed, {in_turn_s} s in turn ({ratio}x)")


def ratios(rows: Sequence[Measured]) -> dict[str, float]:
    """Ratios of tokens per second: ours to the Llama's, ReLoRA to full rank."""
    speed = {(row.model, row.variant): row.tokens_per_s for row in rows}
    values = {}
    for model in dict.fromkeys(row.model for row in rows):
        for name, pair in {
            "hf_ratio": ("full_rank bf16", "hf sdpa bf16"),
            "hf_compiled_ratio": ("full_rank bf16", "hf sdpa bf16 compiled"),
            "relora_ratio": ("relora bf16", "full_rank bf16"),
        }.items():
            ours, theirs = (speed.get((model, variant)) for variant in pair)
            if ours and theirs:
                values[f"{model}_{name}"] = round(ours / theirs, 3)
    return values


def parse() -> argparse.Namespace:
    listing = "\n".join(f"  {name:22} {text}" for name, text in VARIANTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nvariants:\n{listing}\n\nThe last line is JSON.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", type=_some(WIDTHS), help="default: tiny,small; on a CPU nano")
    parser.add_argument("--variants", type=_some(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--batch", type=int, help="micro-batch (default: the largest that fits)")
    parser.add_argument("--largest", type=int, help=f"that is tried (default: {LARGEST})")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--steps", type=int, help="that are timed (default: 20)")
    parser.add_argument("--warm-up", type=int, help="steps before them (default: 5)")
    parser.add_argument("--packed", type=int, help="short runs on one GPU, 0 for none (default: 8)")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not in the table")
    parser.add_argument("--bandwidth-gb", type=float, help="likewise, GB/s")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    smoke = args.device == "cpu"
    defaults = {
        "models": ["nano"] if smoke else ["tiny", "small"],
        "largest": 2 if smoke else LARGEST,
        "length": 16 if smoke else 2048,
        "steps": 2 if smoke else 20,
        "warm_up": 1 if smoke else 5,
        "packed": 2 if smoke else 8,
    }
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def _some(choices: dict[str, Any]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := [name for name in chosen if name not in choices]:
            raise argparse.ArgumentTypeError(f"one of {', '.join(choices)}, got {unknown[0]!r}")
        return chosen

    return names


def main() -> int:
    args = parse()
    if args.serve:
        model, _, variant = args.serve.partition("/")
        print(json.dumps(asdict(measure(variant, model=model, args=args))))
        return 0
    name = "CPU" if args.device == "cpu" else gpu_name()
    if name is None:
        print("error: no GPU is visible to torch; --device cpu tries the paths", file=sys.stderr)
        return 2
    rows, peaks = collect(args), peaks_of(name, args)
    if peaks:
        for row in rows:
            add_roof(row, length=args.length, peaks=peaks)
    pack = packed(args.packed, args=args) if args.packed else None
    show(rows, pack=pack, title=f"{name}, sequences of {args.length}, bf16")
    about = {"device": name, "length": args.length, "peaks": peaks, **ratios(rows)}
    print(json.dumps({**about, "packed": pack, "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
