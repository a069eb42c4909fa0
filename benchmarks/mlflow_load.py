"""How long MLflow takes to show many runs: `python benchmarks/mlflow_load.py`.

Writes folders of finished runs, then syncs them all into a new SQLite database and into an `mlflow
server` on loopback, each from a process of its own. Not for: speed of training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import show
from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import all_runs, runs_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.tracking.runs import Syncer
from experiments.tracking.store import open_store
from relora_core.config import DataConfig, ModelConfig, ReLoRAConfig, RunConfig, TrainConfig
from relora_core.events import Event

SEEDS = 5
STEPS_PER_EVENT = 10
TRAIN = (
    *("train/loss", "train/lr", "train/tokens", "train/grad_norm"),
    *("perf/tokens_per_s", "perf/train_seconds"),
)
EVALS = {  # as many names and rows as the evals of a real run have
    "paloma_domains": [f"eval/paloma/source_{i}/perplexity" for i in range(12)],
    "blimp_paradigms": [f"eval/blimp/{way}/{i:02d}" for way in ("bos", "eos") for i in range(13)],
}
ROWS = 67
COLUMNS = ("store", "runs", "values", "sync_s", "cpu_s", "runs_per_s", "values_per_s")
COLUMNS += ("database_mb", "artifacts_mb", "again_s", "watch_s", "peak_rss_mb")


# records ------------------------------------------------------------------------------------------
def write_runs(output_dir: Path, *, runs: int, values: int, tables: bool) -> None:
    """`runs` finished runs with `values` metric values each, SEEDS of them per arm."""
    for i in range(runs):
        config = RunConfig(
            seed=i % SEEDS,
            method="relora",
            model=ModelConfig(name="tiny", d_model=96, d_ff=256, vocab_size=512),
            relora=ReLoRAConfig(r=8, reset_frequency=50 + i // SEEDS),
            train=TrainConfig(steps=STEPS_PER_EVENT * values, batch_size=8),
            data=DataConfig(seq_len=64),
        )
        run = RunDir(runs_folder(output_dir) / run_id(config))
        run.create(config)
        record = {"host": "node", "pid": 1, "commit": "0" * 40, "dirty": False, "job_id": f"1_{i}"}
        run.write_attempt(1, record)
        last = write_events(run, values=values, tables=tables)
        run.write_result({"state": "finished", "step": last, "metrics": {}})
        run.update_status(state="finished", attempts=1, step=last, host="node", job_id=f"1_{i}")


def write_events(run: RunDir, *, values: int, tables: bool) -> int:
    """One attempt's record: training to the last step, then the evals; returns that step."""
    names = [name for group in EVALS.values() for name in group][: values // 2]
    points = values - len(names)
    steps = [STEPS_PER_EVENT * (1 + i) for i in range(-(-points // len(TRAIN)))]
    clock = 1_700_000_000.0
    log = EventLog(run, 1)
    log.emit(Event(kind="start", step=0, data={"resumed": False, "world": 1}, time=clock))
    for i, step in enumerate(steps):
        keys = TRAIN[: points - i * len(TRAIN)]
        metrics = dict.fromkeys(keys, 6.0 / (1 + i))
        log.emit(Event(kind="train", step=step, metrics=metrics, time=clock + step))
    for name, group in EVALS.items():
        metrics = {key: 0.5 for key in group if key in names}
        log.emit(Event(kind="eval", step=steps[-1], metrics=metrics, time=clock + steps[-1]))
        if tables:
            rows = [{"uid": f"row_{i}", "pairs": 12, "no_bos": 0.5} for i in range(ROWS)]
            data = {"name": name, "rows": rows}
            log.emit(Event(kind="table", step=steps[-1], data=data, time=clock + steps[-1]))
    log.emit(Event(kind="end", step=steps[-1], data={"state": "finished"}, time=clock + steps[-1]))
    log.close()
    return steps[-1]


# measuring ----------------------------------------------------------------------------------------
def measure(uri: str, *, output_dir: Path) -> dict[str, float]:
    """Sync all runs into `uri`, again as `watch` does, and again with a new Syncer."""
    import mlflow

    assert mlflow.MlflowClient  # loads it, which takes seconds that are no part of a sync
    runs = all_runs(output_dir)
    store = open_store(uri, experiment="load", output_dir=output_dir)
    syncer = Syncer(store)
    cpu = time.process_time()  # hardly depends on other load
    sync_s, report = _timed(syncer, runs)
    cpu_s = time.process_time() - cpu
    watch_s, same = _timed(syncer, runs)
    fresh = Syncer(store)
    again_s, again = _timed(fresh, runs)
    if report.errors or report.created != len(runs) or again.points or same.points:
        raise RuntimeError(f"the sync is wrong: {report} {again} {same}")
    return {
        "runs": report.created,
        "values": report.points,
        "sync_s": sync_s,
        "cpu_s": cpu_s,
        "runs_per_s": len(runs) / sync_s,
        "values_per_s": report.points / sync_s,
        "again_s": again_s,
        "watch_s": watch_s,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _timed(syncer: Any, runs: Sequence[RunDir]) -> tuple[float, Any]:
    began = time.perf_counter()
    report = syncer.sync(runs, final=True)
    return time.perf_counter() - began, report


def in_own_process(uri: str, *, output_dir: Path) -> dict[str, float]:
    """`measure` in a process of its own, whose peak of memory is that of the sync."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, uri, output_dir=output_dir).result()


def size_mb(*paths: Path) -> float:
    """Size of files, and of all files in folders."""
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


# stores -------------------------------------------------------------------------------------------
def into_sqlite(output_dir: Path) -> dict[str, Any]:
    """Straight into a database file, as by default."""
    database = output_dir / "mlflow.db"
    figures = in_own_process(f"sqlite:///{database}", output_dir=output_dir)
    sizes = {"database_mb": size_mb(database), "artifacts_mb": size_mb(output_dir / "mlartifacts")}
    return {"store": "sqlite", **figures, **sizes}


def into_server(output_dir: Path) -> dict[str, Any]:
    """Through a lean `mlflow server` over a database and artifacts of its own."""
    folder = output_dir / "server"
    folder.mkdir()
    with server(folder) as uri:
        figures = in_own_process(uri, output_dir=output_dir)
    sizes = {"database_mb": size_mb(folder / "mlflow.db"), "artifacts_mb": size_mb(folder / "art")}
    return {"store": "server", **figures, **sizes}


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A tracking server of two processes on a free port of loopback; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--port", str(port)]
    command += ["--artifacts-destination", (folder / "art").as_uri()]
    lean = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, env=os.environ | lean, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _await_health(uri, child=child, log=folder / "server.log")
        yield uri
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(30)


def _await_health(uri: str, *, child: subprocess.Popen[bytes], log: Path) -> None:
    # A proxy in the environment is for other hosts.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with opener.open(f"{uri}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--values", type=int, default=300, help="metric values of each run")
    parser.add_argument("--no-tables", action="store_true", help="metrics alone, no artifacts")
    parser.add_argument("--store", choices=("sqlite", "server", "both"), default="both")
    parser.add_argument("--json", action="store_true", help="for scripts")
    args = parser.parse_args()
    if args.runs < 1 or args.values < 2:
        parser.error("--runs must be at least 1 and --values at least 2")
    stores = {"sqlite": into_sqlite, "server": into_server}
    chosen = stores.values() if args.store == "both" else [stores[args.store]]
    folder = Path(tempfile.mkdtemp(prefix="mlflow-load-"))
    try:
        write_runs(folder, runs=args.runs, values=args.values, tables=not args.no_tables)
        print(f"{args.runs} run directories, {size_mb(folder):,.0f} MB", file=sys.stderr)
        rows = [store(folder) for store in chosen]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show([{name: row[name] for name in COLUMNS} for row in rows], title="MLflow under load")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
