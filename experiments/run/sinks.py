"""What a run does with its events besides recording them: heartbeat, console, load of the machine.

Not for: the record (`disk/event_log.py`), nor MLflow, which follows it (`tracking/follower.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from experiments.disk.run_dir import RunDir
from experiments.metrics import LOSS, MFU, MFU_6N, percent
from relora_core.events import Event, Sink

HEARTBEAT_S = 0.5
"""Shortest time between two writes of status.json: a tiny model logs far more often."""


class Fanout:
    """A sink that hands events to several."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def emit(self, event: Event) -> None:
        for sink in self.sinks:
            sink.emit(event)


def seconds_left(event: Event, *, steps: int) -> float | None:
    """Training time left at the rate of a train event."""
    tokens, rate = event.metrics["train/tokens"], event.metrics["perf/tokens_per_s"]
    if not event.step or rate <= 0:
        return None
    return (steps - event.step) * tokens / event.step / rate


class StatusSink:
    """Keeps RUN_DIR/status.json: step, loss, rate, time left and a heartbeat."""

    def __init__(self, run_dir: RunDir, *, steps: int) -> None:
        self.run_dir, self.steps, self._written = run_dir, steps, 0.0

    def emit(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind == "train":
            if now - self._written < HEARTBEAT_S and event.step < self.steps:
                return
            self.run_dir.update_status(
                step=event.step,
                loss=event.metrics[LOSS.key],
                tokens_per_s=event.metrics["perf/tokens_per_s"],
                mfu=event.metrics.get(MFU),
                mfu_6n=event.metrics.get(MFU_6N),
                eta_s=seconds_left(event, steps=self.steps),
                phase="train",
            )
            self._written = now
        elif event.kind == "phase" and now - self._written >= HEARTBEAT_S:
            self.run_dir.update_status(step=event.step, phase=event.data["phase"])
            self._written = now
        elif event.kind == "start":
            self.run_dir.update_status(step=event.step, phase="train")


class SystemSink:
    """Adds the load of CPU and GPUs to the record, at most every `every_s` with a train event.

    A thread measures, since `nvidia-smi` takes up to a second; the training loop never waits.
    """

    def __init__(self, log: Sink, *, every_s: float = 10.0) -> None:
        self._log, self._every_s = log, every_s
        self._newest: dict[str, float] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._measure, daemon=True).start()

    def emit(self, event: Event) -> None:
        if event.kind == "train" and self._newest:
            metrics, self._newest = self._newest, {}
            self._log.emit(Event(kind="system", step=event.step, metrics=metrics))

    def close(self) -> None:
        self._closed.set()

    def _measure(self) -> None:
        process = psutil.Process()
        process.cpu_percent()  # the next call measures from here
        wait = min(1.0, self._every_s)  # so that a short run has a value, too
        while not self._closed.wait(wait):
            wait = self._every_s
            own = {
                "system/cpu_percent": process.cpu_percent(),
                "system/rss_gb": process.memory_info().rss / 1e9,
            }
            self._newest = own | gpu_load()


def gpu_load() -> dict[str, float]:
    """Use, memory and power of the visible GPUs, from nvidia-smi; empty if there is none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen == "" or shutil.which("nvidia-smi") is None:
        return {}
    names = {"utilization.gpu": "percent", "memory.used": "memory_gb", "power.draw": "power_w"}
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    if chosen:
        command.append(f"--id={chosen}")
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return _gpu_metrics(listed.stdout, names=list(names.values()))


def _gpu_metrics(listed: str, *, names: list[str]) -> dict[str, float]:
    """A line of numbers for each GPU, as metrics; what a GPU does not measure is left out."""
    metrics = {}
    for gpu, line in enumerate(listed.splitlines()):
        for name, cell in zip(names, line.split(","), strict=False):
            try:
                value = float(cell)
            except ValueError:
                continue
            metrics[f"system/gpu{gpu}_{name}"] = value / 1024 if name == "memory_gb" else value
    return metrics


def clock(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `-`."""
    if seconds is None:
        return "-"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _mfu(event: Event) -> str:
    """`MFU 12.3 % (by 6N 14.1 %)  `; empty where the peak is not known."""
    if MFU not in event.metrics:
        return ""
    return f"MFU {percent(event.metrics[MFU])} (by 6N {percent(event.metrics[MFU_6N])})  "


class ConsoleSink:
    """A progress bar on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, name: str, *, steps: int, plain_every_s: float = 5.0) -> None:
        self.name, self.steps, self.plain_every_s = name, steps, plain_every_s
        self._printed = 0.0
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[info]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=steps, info="starting")
            self._bar.start()

    def emit(self, event: Event) -> None:
        if event.kind == "train":
            info = (
                f"loss {event.metrics[LOSS.key]:.3f}  "
                f"{event.metrics['perf/tokens_per_s']:,.0f} tokens/s  {_mfu(event)}"
                f"{clock(seconds_left(event, steps=self.steps))} left"
            )
            self._show(event.step, info, urgent=event.step == self.steps)
        elif event.kind == "restart":
            norm = event.metrics["restart/merged_norm"]
            number = event.metrics["restart/count"]
            self._show(event.step, f"restart {number:.0f}: merged norm {norm:.2f}", urgent=True)
        elif event.kind == "phase":
            self._show(event.step, event.data["phase"])
        elif event.kind == "start" and event.data["resumed"]:
            self._show(event.step, f"resumed at step {event.step}", urgent=True)

    def _show(self, step: int, info: str, *, urgent: bool = False) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, info=info)
            return
        now = time.monotonic()
        if urgent or now - self._printed >= self.plain_every_s:
            self._printed = now
            print(f"{self.name}  {step}/{self.steps}  {info}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
