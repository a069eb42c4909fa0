"""How long commands take over many runs: `python benchmarks/orchestration.py`.

Writes the output folders of sweeps of 100, 1,000 and 10,000 finished runs, without training, and
times commands on them, each in a process of its own. Not for: speed of training, nor of MLflow
(`mlflow_load.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from experiments import schema
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir, Status
from experiments.environment import cores, cpu
from experiments.identity import config_to_json
from experiments.run.complete import complete_all
from relora_core.config import RunConfig
from relora_core.data import grammar
from relora_core.events import Event
from sweeps.planning.plan import make_plan, store

ROOT = Path(__file__).resolve().parents[1]
SWEEP = "bench"
SIZES = (100, 1000, 10_000)
AXES = 20
"""Points of the grid for each learning rate."""
LIMITS = {
    "help": dict.fromkeys(SIZES, 1.0),
    "start": dict.fromkeys(SIZES, 1.0),
    "plan": {1000: 10.0, 10_000: 60.0},
    "again": {1000: 15.0},
    "status": {1000: 2.0, 10_000: 10.0},
    "report": {1000: 30.0},
}
"""Command -> number of runs -> most wall seconds."""
WHAT = {
    "help": "python run.py --help",
    "start": "python -m sweeps status, in an empty folder",
    "plan": "python run.py --plan GRID: plan and validate",
    "again": "python run.py -m GRID, all of it finished",
    "status": "python -m sweeps status",
    "report": "python -m sweeps report SWEEP",
}
SIZELESS = ("help", "start")


# a grid, and the files of its runs ---------------------------------------------------------
def grid(size: int) -> list[str]:
    """Overrides of a grid of `size` points: options of a group, values, five seeds."""
    rates = ",".join(f"{lr:.6g}" for lr in rates_of(size))
    axes = ["model=nano,tiny", "relora.r=4,8", f"train.lr={rates}", "seed=0,1,2,3,4"]
    return [*axes, f"sweep.name={SWEEP}"]


def rates_of(size: int) -> list[float]:
    return [float(f"{1e-3 * (1 + i / 100):.6g}") for i in range(size // AXES)]


def configs(size: int, *, output_dir: Path) -> Iterator[RunConfig]:
    """The configs of `grid(size)`, in its order."""
    for model in ("nano", "tiny"):
        base = schema.compose([f"model={model}", f"sweep.name={SWEEP}", f"output_dir={output_dir}"])
        for r in (4, 8):
            for lr in rates_of(size):
                for seed in range(5):
                    yield replace(
                        base,
                        seed=seed,
                        relora=replace(base.relora, r=r),
                        train=replace(base.train, lr=lr),
                    )


def write_sweep(output_dir: Path, *, size: int) -> None:
    """The plan of `grid(size)` and a finished run for each of its cells."""
    made = complete_all(list(configs(size, output_dir=output_dir)))
    plan = make_plan([({}, config) for config in made])
    store(plan, output_dir=output_dir)
    for cell in plan.cells:
        write_run(RunDir(runs_folder(output_dir) / cell.run_id), cell.config)


def write_run(run: RunDir, config: RunConfig) -> None:
    """Write a finished run with a record like the demo's.

    Not with RunDir, which flushes each file to disk: that takes 50 ms for a run.
    """
    run.attempts.mkdir(parents=True)
    record = {"host": "node", "pid": 1, "python": "3.11.7", "code_hash": "0" * 16}
    record |= {"commit": "0" * 40, "dirty": False, "packages": {"torch": "2.13.0"}, "gpus": []}
    recorded = list(events(config))
    names = [f.name for f in fields(Event)]  # asdict would copy every row of every table
    lines = [{"attempt": 1} | {n: getattr(event, n) for n in names} for event in recorded]
    metrics = {key: value for event in recorded for key, value in event.metrics.items()}
    steps = config.train.steps
    result = {"run_id": run.run_id, "state": "finished", "step": steps, "metrics": metrics}
    status = Status(state="finished", attempts=1, step=steps, steps=steps, host="node")
    status.loss, status.heartbeat = metrics["train/loss"], recorded[-1].time
    run.config_path.write_text(config_to_json(config))
    run.events_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.result_path.write_text(json.dumps(result, indent=2))
    run.status_path.write_text(json.dumps(asdict(status), indent=2))
    (run.attempts / "001.json").write_text(json.dumps(record, indent=2))


def events(config: RunConfig) -> Iterator[Event]:
    """One attempt: training, restarts, checkpoints, and evals with tables at three steps."""
    noise = random.Random(repr((config.seed, config.relora.r, config.train.lr)))
    steps, clock = config.train.steps, 1_700_000_000.0
    tokens = config.train.batch_size * config.data.seq_len
    yield Event(kind="start", step=0, data={"resumed": False, "world": 1}, time=clock)
    yield from evals(0, noise=noise, time=clock)
    for step in range(10, steps + 1, 10):
        now = clock + step / 10
        loss = 1.9 + 4 * math.exp(-step / 60) + noise.gauss(0, 0.02)
        metrics = {"train/loss": loss, "train/lr": config.train.lr, "train/tokens": step * tokens}
        metrics |= {"perf/tokens_per_s": 1e4 + 500 * noise.random()}
        metrics |= {"perf/train_seconds": step / 10, "train/grad_norm": 0.5 + noise.random()}
        yield Event(kind="train", step=step, metrics=metrics, time=now)
        if step % config.relora.reset_frequency == 0:
            names = ("count", "merged_norm", "state_zeroed", "logit_change_max")
            names = (*names, "loss_before", "loss_after")
            restart = {f"restart/{name}": 1 + noise.random() for name in names}
            yield Event(kind="restart", step=step, metrics=restart, time=now)
        if step % 50 == 0:
            yield Event(kind="checkpoint", step=step, time=now)
        if step % 100 == 0:
            yield from evals(step, noise=noise, time=now)
    yield Event(kind="end", step=steps, data={"state": "finished"}, time=clock + steps / 10)


def evals(step: int, *, noise: random.Random, time: float) -> Iterator[Event]:
    """Perplexity by source and minimal pairs by paradigm, as the embedded data has them."""
    sources = ("interview", "lecture", "letter", "news", "recipe", "story")
    rows: list[dict[str, Any]] = [
        {"source": s, "domain": s, "documents": 8, "tokens": 500, "perplexity": 40 + noise.random()}
        for s in sources
    ]
    metrics = {f"eval/paloma/{row['source']}/perplexity": row["perplexity"] for row in rows}
    metrics |= {f"eval/paloma/{s}/bits_per_byte": 1 + noise.random() for s in sources}
    names = ("perplexity", "bits_per_byte", "macro_perplexity", "paper_perplexity")
    metrics |= {f"eval/paloma/{name}": 30 + noise.random() for name in names}
    yield Event(kind="eval", step=step, metrics=metrics, time=time)
    yield Event(kind="table", step=step, data={"name": "paloma_domains", "rows": rows}, time=time)
    rows = [
        {**paradigm, "pairs": 12, "ties": 0}
        | {way: noise.randint(4, 12) / 12 for way in ("no_bos", "eos_prefix")}
        for paradigm in paradigms()
    ]
    metrics = {}
    for way in ("no_bos", "eos_prefix"):
        groups: dict[str, list[float]] = {}
        for row in rows:
            for name in ("accuracy", row["phenomenon"]):
                groups.setdefault(name, []).append(row[way])
        metrics |= {f"eval/blimp/{way}/{k}": sum(v) / len(v) for k, v in groups.items()}
    yield Event(kind="eval", step=step, metrics=metrics, time=time)
    yield Event(kind="table", step=step, data={"name": "blimp_paradigms", "rows": rows}, time=time)


@cache
def paradigms() -> list[dict[str, Any]]:
    return [
        {"uid": pair["UID"], "phenomenon": pair["linguistics_term"], "field": pair["field"]}
        for pair in grammar.minimal_pairs(pairs_per_paradigm=1)
    ]


# measuring ----------------------------------------------------------------------------------------
def commands(folder: Path, *, size: int) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments of `python`, text that its output must have)."""
    full, empty = folder / "full", folder / "empty"
    axes = grid(size)
    return {
        "help": (["run.py", "--help"], "relora"),
        "start": (["-m", "sweeps", "status", "--output-dir", str(empty)], "no runs in"),
        "plan": (["run.py", "--plan", *axes, f"output_dir={empty}"], f"{size}"),
        "again": (["run.py", "-m", *axes, f"output_dir={full}"], f"all {size} runs are done"),
        "status": (["-m", "sweeps", "status", "--output-dir", str(full)], f"{size} finished"),
        "report": (["-m", "sweeps", "report", SWEEP, "--output-dir", str(full)], "report.html"),
    }  # fmt: skip


def timed(words: Sequence[str], *, expected: str) -> tuple[float, float]:
    """(wall seconds, CPU seconds with those of its children) of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or expected not in done.stdout:
        raise RuntimeError(
            f"{words}: {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
        )
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def measure(size: int, *, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """The best of `repeats` of each command, over a folder of `size` runs."""
    folder = Path(tempfile.mkdtemp(prefix="orchestration-"))
    try:
        if set(names) & {"again", "status", "report"}:
            began = time.perf_counter()
            write_sweep(folder / "full", size=size)
            print(f"{size} runs written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        made = {k: v for k, v in commands(folder, size=size).items() if k in names}
        best = dict.fromkeys(made, (math.inf, math.inf))
        for _ in range(repeats):
            for name, (words, expected) in made.items():
                best[name] = min(best[name], timed(words, expected=expected))
                print(f"{size} runs: {name} {best[name][0]:.2f} s", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        {"command": name, "runs": size, "wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}
        | {"limit_s": LIMITS[name].get(size)}
        for name, (wall, cpu) in best.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row per command, a column per size: wall (CPU) seconds, and the limit."""
    sizes = sorted({row["runs"] for row in rows})
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("command")
    for size in sizes:
        shown.add_column(f"{size:,} runs", justify="right")
    for name in dict.fromkeys(row["command"] for row in rows):
        by_size = {row["runs"]: row for row in rows if row["command"] == name}
        shown.add_row(WHAT[name], *(_cell(by_size.get(size)) for size in sizes))
    return shown


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    limit = row["limit_s"]
    verdict = (
        "" if limit is None else f" <= {limit:g}" if row["wall_s"] <= limit else f" > {limit:g}!"
    )
    return f"{row['wall_s']:.2f} s ({row['cpu_s']:.2f}){verdict}"


def machine() -> dict[str, Any]:
    return {"cpu": cpu(), "cores": cores(), "python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time the commands that look after many runs, over folders of synthetic runs.",
        epilog="examples:\n"
        "  python benchmarks/orchestration.py --sizes 100,1000\n"
        "  python benchmarks/orchestration.py --sizes 1000 --only report,status --repeats 3\n\n"
        "Wall seconds, in brackets CPU seconds with those of child processes, then the limit. The\n"
        "last line is JSON. 10,000 runs take 600 MB of disk and minutes, mostly to write.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes_help = "numbers of runs, multiples of 20 (default: 100,1000,10000)"
    parser.add_argument("--sizes", type=_sizes, default=list(SIZES), help=sizes_help)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(WHAT),
        help=f"some of {','.join(WHAT)}",
    )
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many counts")
    args = parser.parse_args()
    if unknown := set(args.only) - set(WHAT):
        parser.error(f"--only must name some of {', '.join(WHAT)}, got {', '.join(unknown)}")
    rows = []
    for size in args.sizes:
        names = [n for n in args.only if n not in SIZELESS or size == args.sizes[0]]
        rows += measure(size, names=names, repeats=args.repeats)
    Console(width=140).print(table(rows))
    print(json.dumps({"machine": machine(), "rows": rows}))
    return 0


def _sizes(text: str) -> list[int]:
    sizes = [int(word.replace("_", "")) for word in text.split(",")]
    if any(size < AXES or size % AXES for size in sizes):
        raise argparse.ArgumentTypeError(f"sizes must be multiples of {AXES}, got {text}")
    return sizes


if __name__ == "__main__":
    raise SystemExit(main())
