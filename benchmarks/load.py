"""A sweep of many very short runs, from start to report: `python benchmarks/load.py`.

Runs the commands that a user would, with MLflow and `sweeps watch` beside them, and measures their
memory every few seconds. Ends with an error if a run is unfinished, or missing or twice in MLflow.
Not for: speed of training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ARMS = 10
SHORT = (
    *("model=nano", "method=relora", "eval=none", "dynamics=none", "runtime.device=cpu"),
    *("data.seq_len=16", "train.batch_size=2", "checkpoint.every_steps=4"),
    *("schedule.warmup_steps=1", "relora.reset_frequency=4", "relora.restart_warmup_steps=1"),
)
ROLES = {  # part of a command line -> what the process is; the first that fits counts
    "sweeps.local.warm": "workers",
    "sweeps.worker": "workers",
    " watch": "watch",
    "run.py": "orchestrator",
}
SAMPLE_S = 2.0


def commands(
    output_dir: Path, *, runs: int, steps: int, parallel: int | None
) -> dict[str, list[str]]:
    """Name -> command line, in the order in which they are run."""
    seeds = -(-runs // ARMS)
    grid = [
        f"relora.r=range(1,{ARMS + 1})",
        f"seed=range(0,{seeds})",
        "sweep.name=load",
        f"train.steps={steps}",
    ]
    width = [f"hydra.launcher.max_parallel={parallel}"] if parallel else []
    own = [f"output_dir={output_dir}", *SHORT, *grid, *width]
    look = [sys.executable, "-m", "sweeps", "--output-dir", str(output_dir)]
    return {
        "sweep": [sys.executable, "run.py", "-m", *own],
        "again": [sys.executable, "run.py", "-m", *own],
        "sync": [*look, "sync"],
        "status": [*look, "status", "load"],
        "report": [*look, "report", "load"],
    }


@contextmanager
def watching(output_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m sweeps watch` inside the context; SystemExit if it fails."""
    command = [sys.executable, "-m", "sweeps", "--output-dir", str(output_dir), "watch"]
    log = output_dir / "watch.log"
    with open(log, "w", encoding="utf-8") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        yield child
        if child.wait(600):  # it ends with the last run
            raise SystemExit(f"error: watch ended with {child.returncode}; see {log}")
    finally:
        child.kill()
        child.wait()


def role(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    return next((name for part, name in ROLES.items() if part in words), "other")


def memory(pids: Sequence[int]) -> dict[str, float]:
    """Role -> proportional set size in MB of these processes and their children, and how many."""
    sizes: dict[str, float] = {}
    for pid in pids:
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in family:
            try:
                size, name = process.memory_full_info().pss / 2**20, role(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            sizes[name] = sizes.get(name, 0.0) + size
            sizes[f"{name} n"] = sizes.get(f"{name} n", 0) + 1
    return sizes


def done(output_dir: Path) -> int:
    return len(list((output_dir / "runs").glob("*/result.json")))


def sweep(command: Sequence[str], *, output_dir: Path, runs: int) -> list[dict[str, float]]:
    """Run the sweep to its end; samples of seconds, runs done and memory."""
    samples, begin = [], time.monotonic()
    main = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while main.poll() is None and not (output_dir / "sweeps" / "load" / "plan.json").exists():
        time.sleep(0.1)
    with watching(output_dir) as watch:
        while main.poll() is None:
            sample = {"seconds": time.monotonic() - begin, "done": done(output_dir)}
            samples.append(sample | memory([main.pid, watch.pid]))
            print(f"\r{sample['done']:.0f} of {runs} runs", end="", file=sys.stderr, flush=True)
            time.sleep(SAMPLE_S)
    print(file=sys.stderr)
    if main.returncode:
        raise SystemExit(f"error: the sweep ended with {main.returncode}")
    return samples


def timed(command: Sequence[str]) -> float:
    begin = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{ended.stdout}{ended.stderr}")
    return time.monotonic() - begin


def check(output_dir: Path, *, runs: int) -> None:
    """SystemExit unless each run has finished and is in MLflow once."""
    import mlflow

    states = [
        json.loads(path.read_text())["state"]
        for path in (output_dir / "runs").glob("*/result.json")
    ]
    if states != ["finished"] * runs:
        raise SystemExit(f"error: {states.count('finished')} of {runs} runs are finished")
    client = mlflow.MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    shown, token = [], None
    while token != "":
        page = client.search_runs(experiments, max_results=1000, page_token=token)
        shown, token = shown + list(page), page.token or ""
    ids = [run.data.tags.get("run_id") for run in shown]
    ids = [name for name in ids if name]
    ended = {run.info.status for run in shown}
    if len(ids) != runs or len(set(ids)) != runs or ended != {"FINISHED"}:
        raise SystemExit(f"error: MLflow has {len(ids)} runs of {runs}, {len(set(ids))} different")


def show(samples: Sequence[dict[str, float]], *, runs: int, title: str) -> None:
    """Print the memory of each role when a tenth of the runs is done, a quarter, and so on."""
    from rich.console import Console
    from rich.table import Table

    names = ("orchestrator", "watch", "workers")  # MLflow is kept up to date by the orchestrator
    table = Table("runs done", "seconds", *(f"{name} MB" for name in names), title=title)
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        past = [sample for sample in samples if sample["done"] >= share * runs]
        sample = past[0] if past else samples[-1]
        cells = (f"{sample['done']:.0f}", f"{sample['seconds']:.0f}")
        table.add_row(*cells, *(f"{sample.get(name, 0):.0f}" for name in names))
    Console(width=100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=2000, help="a multiple of 10 (default 2000)")
    parser.add_argument("--steps", type=int, default=8, help="of each run (default 8)")
    parser.add_argument("--parallel", type=int, help="at once (default: as many as cores)")
    parser.add_argument("--output-dir", type=Path, help="keep everything there")
    args = parser.parse_args()
    if args.runs < ARMS or args.runs % ARMS:
        parser.error(f"--runs must be a multiple of {ARMS}, got {args.runs}")
    folder = args.output_dir or Path(tempfile.mkdtemp(prefix="load-"))
    try:
        todo = commands(folder.absolute(), runs=args.runs, steps=args.steps, parallel=args.parallel)
        samples = sweep(todo.pop("sweep"), output_dir=folder, runs=args.runs)
        seconds = {name: round(timed(command), 1) for name, command in todo.items()}
        check(folder, runs=args.runs)
    finally:
        if args.output_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    most = max(sample.get("workers n", 0) for sample in samples)
    show(samples, runs=args.runs, title=f"{args.runs} runs, up to {most:.0f} worker processes")
    print(json.dumps({"runs": args.runs, "sweep_s": samples[-1]["seconds"], **seconds}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
