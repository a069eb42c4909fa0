"""The load of the machine is recorded with the run, apart from what the run came to."""

from __future__ import annotations

import time
from pathlib import Path

from experiments.disk.event_log import EventLog
from experiments.disk.run_dir import RunDir
from experiments.run import sinks
from experiments.run.runner import make_result
from experiments.run.sinks import SystemSink, gpu_load
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


def test_without_gpus_nothing_is_said_of_them(monkeypatch) -> None:
    monkeypatch.setattr(sinks.shutil, "which", lambda name: None)
    assert gpu_load() == {}
