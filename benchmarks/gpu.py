"""Training on one GPU against others' decoders and what the GPU can do: `benchmarks/gpu.py`.

Every variant has a process of its own. They work by turns (A B C, A B C, ...), so that clocks and
neighbours hit all alike; medians over the turns count, and ratios are those of the same turn. A
variant that does not fit is tried with half the batch, and its row says so. The table is written to
`--into` as Markdown and JSON after each part, so that a run which is ended keeps what it has.

MFU is FLOPs over the peak of data sheets (`relora_core/devices.py`): *executed*, what
`relora_core/costs.py` counts for the method; *6N*, 6 N + 12 L d T whatever the method. The roof
of a training step is the longer of two times, its FLOPs at the peak and at the memory's bandwidth

    8 per weight               read as float32 in the forward and in the backward pass
    32 per trainable weight    gradient written and read, weight and both moments read and written
    2 x what is saved          activations (costs.memory_bytes) written, and read in the backward

bytes. The roof of the head likewise: three products, 12 bytes per logit (`relora_core/head.py`).
Where no data sheet is known both peaks are measured, by a product and a copy that take turns, too.

Not for: CPUs (`train_step.py`); `--device cpu` only tries every path.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks.gpu_table import DEVICE, Row, add_roof, find_peaks, write
from benchmarks.gpu_work import Variant, serve
from experiments import schema
from experiments.disk.output_dir import all_runs
from experiments.environment import cpu
from experiments.run.complete import complete
from relora_core.config import (
    DataConfig,
    ModelConfig,
    ReLoRAConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
)
from sweeps.local.launcher import launch_local
from sweeps.local.slots import visible_gpus
from sweeps.planning.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 50304
MODELS = {
    "tiny": ModelConfig(name="tiny", d_model=96, d_ff=384, vocab_size=VOCAB),
    "small": ModelConfig(name="small", d_model=384, d_ff=1536, vocab_size=VOCAB),
    "medium": ModelConfig(name="medium", d_model=768, d_ff=3072, vocab_size=VOCAB),
    "nano": ModelConfig(
        name="nano", d_model=32, d_ff=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=304
    ),
}
BATCHES = {"tiny": 32, "small": 16, "medium": 8, "nano": 2}
"""Sequences of a step: at 2,048 tokens what `experiment=paper` would take, or half of that."""
PARTS = {
    "train": "a training step",
    "small batches": "the same with 2 sequences, where launching kernels is what takes time",
    "head": "the vocabulary head's loss and gradients alone",
    "eval": "scoring windows as Paloma does",
    "packed": "whole runs of tiny on one GPU at once: 1, 2, 4, 8",
}
FULL = ("full rank, eager", "full rank, blocks", "relora, eager", "relora, blocks")
OTHERS = ("llama, eager", "llama, compiled", "simple, compiled")
NAMES = {
    "train": (*FULL, *OTHERS),
    "small batches": (
        *("full rank, blocks", "full rank, cudagraphs"),
        *("relora, blocks", "relora, cudagraphs"),
    ),
    "head": ("head, ours", "head, compiled", "head, cce"),
    "eval": ("eval, fp32", "eval, bf16 head"),
}
QUICK = ("full rank, blocks", "relora, blocks", "llama, compiled", "simple, compiled")
SMALL_BATCH = 2
WINDOWS = 64
"""Of an eval."""
RUNS = (1, 2, 4, 8)
PACK_TURNS = 2
ANSWER_S = 900
"""Longest wait for a process: compiling takes a minute or two."""
START = "spawn"
"""Of processes: a fork of one that has asked for its GPUs cannot use them."""


# what is asked for --------------------------------------------------------------------------------
def make_variant(part: str, name: str, *, model: str, args: argparse.Namespace) -> Variant:
    kind, _, how = name.partition(", ")
    batch = args.batch or BATCHES[model]
    batch = SMALL_BATCH if part == "small batches" else args.windows if part == "eval" else batch
    config = RunConfig(
        method="relora" if kind == "relora" else "full_rank",
        model=replace(MODELS[model], max_seq_len=args.length),
        relora=ReLoRAConfig(r=16, alpha=32, dropout=0.1),  # of conf/relora/corrected.yaml
        train=TrainConfig(
            steps=1, batch_size=batch, precision="fp32" if name == "eval, fp32" else "bf16"
        ),
        data=DataConfig(seq_len=args.length),
        runtime=RuntimeConfig(
            device=args.device,
            compile={"eager": "off", "cudagraphs": "cudagraphs"}.get(how, "blocks"),
        ),
    )
    return Variant(part=part, name=name, model=model, config=config)


def groups(args: argparse.Namespace) -> Iterator[list[Variant]]:
    """What takes turns with each other: a part at one model, with the GPU itself beside it."""
    for part, names in NAMES.items():
        for model in args.models:
            if part == "small batches" and model == "medium":
                continue  # a step is long enough there
            chosen = [name for name in names if is_chosen(part, name, args=args)]
            if chosen:
                beside = () if part == "eval" else DEVICE
                yield [make_variant(part, n, model=model, args=args) for n in chosen] + [
                    make_variant("device", n, model=model, args=args) for n in beside
                ]


def is_chosen(part: str, name: str, *, args: argparse.Namespace) -> bool:
    if name == "head, cce" and importlib.util.find_spec("cut_cross_entropy") is None:
        return False  # its licence is not an open one: who wants it installs it
    if args.only:
        return any(word == part or name.startswith(word) for word in args.only)
    if args.quick:
        return part in ("head", "eval") or (part == "train" and name in QUICK)
    return True


# by turns -----------------------------------------------------------------------------------------
class Process:
    """A variant in its process, and what became of it in `row`."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.batch = variant, variant.config.train.batch_size
        self.row = Row(
            part=variant.part, model=variant.model, variant=variant.name, batch=self.batch
        )
        context: Any = multiprocessing.get_context(START)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, variant), daemon=True)
        self.process.start()
        theirs.close()
        self.made = False
        self.too_large: list[int] = []

    def ask(self, *question: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended, as `hear` will notice
            self.pipe.send(question)

    def hear(self) -> dict[str, Any]:
        try:
            if self.pipe.poll(ANSWER_S):
                return self.pipe.recv()
            self.process.kill()
            error = f"no answer in {ANSWER_S} s"
        except (EOFError, OSError):
            self.process.join(10)
            error = f"its process ended with {self.process.exitcode}"
        return {"ok": False, "memory": False, "error": error}

    def hear_made(self) -> bool:
        """Whether it can take turns; False also where it should be tried with a smaller batch."""
        answer = self.hear()
        self.made = answer["ok"]
        if self.made:
            self.row.batch = self.batch
            self.row.loss, self.row.peak_mb = answer["loss"], answer["peak_mb"]
            self.row.compile_s = answer["compile_s"]
            self.row.note = self._too_large()
        elif not answer["memory"]:
            self._fail(answer["error"])
        return self.made

    def fit(self) -> None:
        """Alone on the GPU, with half of what did not fit, and again."""
        while not self.made and not self.row.note:
            self.ask("make", self.batch)
            if self.hear_made() or self.row.note:
                break
            self.too_large.append(self.batch)
            self.batch //= 2
            if not self.batch:
                self._fail(self._too_large())

    def _too_large(self) -> str:
        return f"out of memory at batch {', '.join(map(str, self.too_large))}" * bool(
            self.too_large
        )

    def _fail(self, note: str) -> None:
        self.row.note, self.made = note, False
        print(f"{self.variant.model}, {self.variant.name}: {note}", file=sys.stderr)

    def turn(self, seconds: float) -> None:
        if not self.made:
            return
        self.ask("turn", seconds)
        answer = self.hear()
        if answer["ok"]:
            self.row.rates.append(answer["rate"])
        else:
            self._fail("out of memory beside the others" if answer["memory"] else answer["error"])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()


def compare(variants: Sequence[Variant], *, turns: int, seconds: float, gpu: str) -> list[Row]:
    """Make all, those that compile at the same time, then let them take turns."""
    processes = [Process(variant) for variant in variants]
    try:
        quick = [p for p in processes if p.variant.config.runtime.compile == "off"]
        slow = [p for p in processes if p not in quick]
        for process in quick:
            process.fit()
        for process in slow:
            process.ask("make", process.batch)
        for process in slow:
            process.hear_made()
        for process in slow:
            process.fit()
        for _ in range(turns):
            for process in processes:
                process.turn(seconds)
    finally:
        for process in processes:
            process.close()
    rows = [process.row for process in processes]
    if peaks := find_peaks(gpu, rows):
        for variant, row in zip(variants, rows, strict=True):
            variant.config.train.batch_size = row.batch
            if row.part in ("train", "small batches", "head"):
                add_roof(row, config=variant.config, peaks=peaks)
    return rows


# packed runs --------------------------------------------------------------------------------------
def pack(args: argparse.Namespace) -> list[Row]:
    """Short runs by the local launcher, as with `hydra.launcher.max_parallel`."""
    rows = [
        Row(part="packed", model=args.packed_model, variant=f"{runs} runs", batch=args.packed_batch)
        for runs in args.runs
    ]
    seconds: dict[int, list[float]] = {runs: [] for runs in args.runs}
    try:
        if args.device == "cuda":
            launch(1, args=args)  # compiles, for all that follow
        for _ in range(min(PACK_TURNS, args.turns)):
            for runs, row in zip(args.runs, rows, strict=True):
                taken, rate = launch(runs, args=args)
                seconds[runs].append(taken)
                row.rates.append(rate)
    except RuntimeError as error:
        for row in rows:
            row.note = str(error)
        return rows
    one = statistics.median(seconds[1])
    for runs, row in zip(args.runs, rows, strict=True):
        packed = statistics.median(seconds[runs])
        row.note = f"{packed:.1f} s, one after another {runs * one:.1f} s: "
        row.note += f"{runs * one / packed:.2f}x"
    return rows


def launch(runs: int, *, args: argparse.Namespace) -> tuple[float, float]:
    """(seconds from the first one's first step to the last one's end, tokens/s of all in training).

    What comes before is left out: several runs are forks of a process that has imported torch, a
    single one imports it itself.
    """
    words = [f"model={args.packed_model}", f"train.steps={args.packed_steps}"]
    words += [f"train.batch_size={args.packed_batch}", f"data.seq_len={args.packed_length}"]
    words += ["schedule.warmup_steps=1", "train.precision=bf16", f"runtime.device={args.device}"]
    words += ["relora.dropout=0.1", "checkpoint.every_steps=100000", "runtime.log_every_steps=50"]
    words += ["eval=none", "tracking=none", "sweep.name=packed"]
    with tempfile.TemporaryDirectory(prefix="packed-") as folder:
        config = complete(schema.compose([*words, f"output_dir={folder}"]))
        plan = make_plan([({}, replace(config, seed=seed)) for seed in range(runs)])
        console = Console(quiet=True)
        done = launch_local(plan, output_dir=folder, max_parallel=runs, console=console)
        if done.exit_code:
            lines = [state.reason or state.state for state in done.states.values()]
            raise RuntimeError(f"they ended so: {lines}")
        events = [run.events() for run in all_runs(folder)]
    starts = [next(e["time"] for e in own if e["kind"] == "start") for own in events]
    taken = max(own[-1]["time"] for own in events) - min(starts)
    last = [[e["metrics"] for e in own if e["kind"] == "train"][-1] for own in events]
    return taken, sum(m["train/tokens"] / m["perf/train_seconds"] for m in last)


# all of it ----------------------------------------------------------------------------------------
GPU = """
import json, torch
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    about = {"gpu": gpu.name, "memory GB": round(gpu.total_memory / 2**30, 1)}
    print(json.dumps({**about, "torch": torch.__version__, "CUDA": torch.version.cuda}))
"""
SMI = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]


def describe(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the table is headed with; None without a GPU. torch is asked in another process, so
    that this one takes no GPU memory."""
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    about: dict[str, Any] = {"command": command, "date": time.strftime("%Y-%m-%d")}
    if args.device == "cpu":
        return {"gpu": "no GPU: these figures say nothing", "CPU": cpu(), **about}
    gpus = visible_gpus()
    if not gpus:
        return None
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]  # one, for all that follows
    done = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        print(done.stderr, file=sys.stderr, end="")
        return None
    answer = json.loads(done.stdout.splitlines()[-1])
    about = {**_versions("triton", "transformers"), **about}
    return {**answer, "driver, power limit": _driver(gpus[0]), **about}


def _driver(gpu: str) -> str:
    try:
        done = subprocess.run([*SMI, f"--id={gpu}"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _versions(*packages: str) -> dict[str, str]:
    present = (name for name in packages if importlib.util.find_spec(name))
    return {name: importlib.metadata.version(name) for name in present}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    listing = "\n".join(
        f"  {part:14} {text}" + (f": {'; '.join(NAMES[part])}" if part in NAMES else "")
        for part, text in PARTS.items()
    )
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts and their variants:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", help="default: tiny,small,medium; nano on a CPU")
    parser.add_argument("--only", help="parts, or how names of variants begin; separated by ;")
    parser.add_argument("--quick", action="store_true", help="minutes: tiny, without packed runs")
    parser.add_argument("--turns", type=int, help="of each variant (default: 5; quick 3)")
    parser.add_argument("--seconds", type=float, help="of a turn (default: 1)")
    parser.add_argument("--batch", type=int, help=f"sequences of a step (default: {BATCHES})")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--into", type=Path, default=ROOT / "outputs" / "gpu-benchmark")
    parser.add_argument("--add", type=Path, help="a gpu.json of this GPU whose rows are kept")
    args = parser.parse_args(words)
    smoke = args.device == "cpu"
    defaults = {
        "models": "nano" if smoke else "tiny" if args.quick else "tiny,small,medium",
        "turns": 2 if smoke else 3 if args.quick else 5,
        "seconds": 0.0 if smoke else 1.0,
        "length": 16 if smoke else 2048,
    }
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.models = [name.strip() for name in args.models.split(",")]
    args.only = [word.strip() for word in args.only.split(";")] if args.only else []
    args.windows, args.runs = (2, RUNS[:2]) if smoke else (WINDOWS, RUNS)
    args.packed_model, args.packed_steps = ("nano", 2) if smoke else ("tiny", 1000)
    args.packed_batch, args.packed_length = (2, 16) if smoke else (8, 512)
    _check(args, parser)
    return args


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name in args.models:
        if name not in MODELS:
            parser.error(f"--models must be of {', '.join(MODELS)}, got {name!r}")
    names = [name for part in NAMES.values() for name in part]
    for word in args.only:
        if word not in PARTS and not any(name.startswith(word) for name in names):
            parser.error(f"--only must be of {', '.join(PARTS)} or a variant's name, got {word!r}")
    if args.turns < 1:
        parser.error("--turns must be >= 1")


def main() -> int:
    args = parse()
    about = describe(args)
    if about is None:
        print("error: no GPU is visible to torch; --device cpu tries the paths", file=sys.stderr)
        return 2
    earlier: list[Row] = []
    if args.add:
        content = json.loads(args.add.read_text())
        if content["about"]["gpu"] != about["gpu"]:
            print(f"error: {args.add} is of {content['about']['gpu']}", file=sys.stderr)
            return 2
        earlier = [Row(**row) for row in content["rows"]]
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    rows: list[Row] = []
    text = "nothing is chosen"
    with tempfile.TemporaryDirectory(prefix="compiled-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that compiling takes what it takes
        for made in measure(args, gpu=about["gpu"]):
            rows += made
            again = {(row.part, row.model, row.variant) for row in rows}
            others = [r for r in earlier if (r.part, r.model, r.variant) not in again]
            about["peaks"] = str(find_peaks(about["gpu"], rows))
            text = write([*others, *rows], about=about, folder=args.into)
    print(text)
    return 0


def measure(args: argparse.Namespace, *, gpu: str) -> Iterator[list[Row]]:
    """Rows of one group after the other."""
    for variants in groups(args):
        print(f"{variants[0].part}: {variants[0].model}", file=sys.stderr)
        yield compare(variants, turns=args.turns, seconds=args.seconds, gpu=gpu)
    if "packed" in args.only or not (args.only or args.quick):
        print("packed runs", file=sys.stderr)
        yield pack(args)


if __name__ == "__main__":
    raise SystemExit(main())
