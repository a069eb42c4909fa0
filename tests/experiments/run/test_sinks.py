"""The load of the machine is recorded with the run, apart from what the run came to."""

from __future__ import annotations

import math
import time
from pathlib import Path

from experiments.disk.event_log import EventLog
from experiments.disk.run_dir import RunDir
from experiments.run import sinks
from experiments.run.runner import make_result
from experiments.run.sinks import ConsoleSink, StatusSink, SystemSink, gpu_load
from relora_core.events import Event


def test_load_is_recorded_with_training_and_is_no_result(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = EventLog(run, 1)
    load = SystemSink(log, every_s=0.2)
    begin, step = time.monotonic(), 0
    while time.monotonic() - begin < 1.0:
        step += 1
        event = Event(kind="train", step=step, metrics={"train/loss": 1.0})
        log.emit(event)
        load.emit(event)
        time.sleep(0.01)
    load.close()
    log.close()
    recorded = [event for event in run.events() if event["kind"] == "system"]
    assert 2 <= len(recorded) <= 5  # not with every step
    assert all(event["metrics"]["system/cpu_percent"] >= 0 for event in recorded)
    assert all(0.001 < event["metrics"]["system/rss_gb"] < 100 for event in recorded)
    result = make_result(run, state="finished", attempt=1, seconds=1.0)
    assert set(result["metrics"]) == {"train/loss"}


PACE = {"train/loss": 1.0, "train/tokens": 64.0, "perf/tokens_per_s": 1e6}
MFUS = {"perf/mfu": 0.123, "perf/mfu_6n": 0.14}


def test_status_and_terminal_have_the_mfu_of_the_newest_event(tmp_path: Path, capsys) -> None:
    """None where it has none: after a run has moved to a GPU whose peak is not known."""
    status, console = StatusSink(RunDir(tmp_path), steps=1), ConsoleSink("run", steps=1)
    seen = []
    for more in (MFUS, {}):
        event = Event(kind="train", step=1, metrics=PACE | more)
        status.emit(event)
        console.emit(event)
        now = RunDir(tmp_path).status()
        seen.append((now.mfu, now.mfu_6n))
    assert seen == [(0.123, 0.14), (None, None)]
    assert capsys.readouterr().err.splitlines() == [
        "run  1/1  loss 1.000  1,000,000 tokens/s  MFU 12.3 % (by 6N 14 %)  0:00 left",
        "run  1/1  loss 1.000  1,000,000 tokens/s  0:00 left",
    ]


def test_a_result_has_the_mfu_of_its_last_speed_or_none(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number, more in enumerate((MFUS, {}), start=1):
        log = EventLog(run, number)
        log.emit(Event(kind="start", step=number - 1, data={"resumed": number > 1}))
        log.emit(Event(kind="train", step=number, metrics=PACE | more))
        log.emit(Event(kind="eval", step=number, metrics={"eval/x": 1.0}))
        log.close()
        result = make_result(run, state="finished", attempt=number, seconds=1.0)
        assert result["metrics"] == PACE | more | {"eval/x": 1.0}


def test_a_diverged_run_ends_with_what_its_last_step_measured(tmp_path: Path) -> None:
    run, bad = RunDir(tmp_path), {"train/loss": math.inf, "train/tokens": 128.0}
    log = EventLog(run, 1)
    for event in (
        Event(kind="start", step=0),
        Event(kind="train", step=1, metrics=PACE | MFUS, data={"loss_steps": 10}),
        Event(kind="eval", step=1, metrics={"eval/x": 1.0}),
        Event(kind="restart", step=2, metrics={"restart/x": 2.0}),
        Event(kind="train", step=2, metrics=bad, data={"loss_steps": 5}),
        Event(kind="checkpoint", step=1),
        Event(kind="diverged", step=2, data={"loss": "inf"}),
    ):
        log.emit(event)
    log.close()
    result = make_result(run, state="diverged", attempt=1, seconds=1.0)
    assert result["metrics"] == {"restart/x": 2.0} | bad
    assert (result["step"], result["loss_steps"]) == (2, 5)
    finished = make_result(run, state="finished", attempt=1, seconds=1.0)
    assert finished["metrics"] == PACE | {"eval/x": 1.0} | result["metrics"]
    assert finished | {"state": "diverged", "metrics": result["metrics"]} == result


def test_the_load_of_each_visible_gpu_is_read(tmp_path: Path, monkeypatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$*" >&2\nprintf "93, 2048, 310.5\\n7, 512, [N/A]\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu_load() == {
        "system/gpu0_percent": 93.0,
        "system/gpu0_memory_gb": 2.0,
        "system/gpu0_power_w": 310.5,
        "system/gpu1_percent": 7.0,
        "system/gpu1_memory_gb": 0.5,
    }


def test_gpus_that_a_run_cannot_see_have_no_load(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sinks.shutil, "which", lambda name: name)
    monkeypatch.setattr(sinks.subprocess, "run", None)  # asking would be an error
    assert gpu_load() == {}


def test_without_gpus_nothing_is_said_of_them(monkeypatch) -> None:
    monkeypatch.setattr(sinks.shutil, "which", lambda name: None)
    assert gpu_load() == {}
