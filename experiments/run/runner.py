"""RunConfig + RunDir -> sinks -> train() -> result.json. And what planning must know first.

Not for: many runs (`sweeps/`). Imports torch only when a run starts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from experiments import environment
from experiments.disk import inputs
from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import cache_dir
from experiments.disk.run_dir import RunDir
from experiments.environment import attempt_record, code_hash
from experiments.errors import RunLocked, one_line
from experiments.run.sinks import ConsoleSink, Fanout, StatusSink, SystemSink
from experiments.run.stopping import PRUNED, StopFlag
from experiments.scheduler import current_job
from relora_core import atomic, shell
from relora_core.config import ConfigError, RunConfig
from relora_core.events import Event, NullSink, Sink
from relora_core.sources import comparable


def run_experiment(
    config: RunConfig,
    run_dir: RunDir,
    *,
    console: bool = False,
    stop: StopFlag | None = None,
    gone: Callable[[dict[str, Any]], bool] = lambda holder: False,
    extra_sinks: Sequence[Sink] = (),
) -> str:
    """Run, or resume, one run in this process: `finished`, `diverged`, `pruned`, `interrupted`,
    `cancelled`.

    `stop` asks it to end early; then everything is on disk when this returns. `gone` judges who
    holds the run's lock on another host. `extra_sinks` hear the events after the record has them.
    Raises RunLocked while another process is at work on it. Any other failure is recorded in the
    run directory (status.json, error.txt) and raised.
    """
    stop, place = stop or StopFlag(), shell.settle()
    if place.rank:
        return _join(config, run_dir, stop)
    run_dir.create(config)
    with run_dir.lock(gone=gone):
        status = run_dir.status()
        if ended := run_dir.ended():
            if status.state != ended:  # killed between its result and its last word
                run_dir.update_status(state=ended, phase="", eta_s=0.0)
            return ended
        if run_dir.cancel_path.exists():
            run_dir.update_status(state="cancelled", phase="", error=None)
            return "cancelled"
        attempt = run_dir.next_attempt()
        for path in run_dir.torn():
            path.unlink(missing_ok=True)
        stop.run_dir = run_dir
        _check_code(run_dir, refuse=config.checkpoint.on_code_change == "refuse")
        try:
            run_dir.update_status(
                state="running",
                attempts=attempt,
                steps=config.train.steps,
                phase="start",
                host=socket.gethostname(),
                pid=os.getpid(),
                job_id=current_job(),
                error=None,
            )
            from relora_core import native  # and torch: the record names the GPUs then

            record = attempt_record(
                start_step=run_dir.newest_step(), world=place.world, kernels_key=native.key()
            )
            if taken := inputs.accepted(run_dir, by=inputs.TRAINING):
                record["changes"] = taken
            run_dir.write_attempt(attempt, record)
            environment.check_gpu(config)
            config = inputs.opened(run_dir, config)
            state = _attempt(
                config,
                run_dir,
                attempt=attempt,
                console=console,
                stop=stop,
                extra=extra_sinks,
                world=place.world,
            )
        except RunLocked:  # given to another process: the run's files are its from now on
            raise
        except BaseException as error:
            _record_failure(run_dir, error)
            raise
        if state == "interrupted":
            return _interrupted(run_dir, reason=stop.reason or "asked to end")
        run_dir.update_status(state=state, phase="", eta_s=0.0)
        return state


def _interrupted(run_dir: RunDir, *, reason: str) -> str:
    """Write down an early end. Who started this process may have it go on, and says so then."""
    if reason == "cancelled" or run_dir.cancel_path.exists():
        run_dir.update_status(state="cancelled", step=run_dir.newest_step(), phase="", error=None)
        return "cancelled"
    if reason == PRUNED:
        run_dir.update_status(
            state=PRUNED, step=run_dir.newest_step(), phase="", eta_s=None, error=None
        )
        return PRUNED
    line = f"stopped ({reason}); the same command resumes it"
    run_dir.update_status(state="failed", step=run_dir.newest_step(), phase="", error=line)
    return "interrupted"


def _check_code(run_dir: RunDir, *, refuse: bool) -> None:
    """Say, or refuse, that a run goes on with other code than its newest attempt had."""
    records = run_dir.attempt_records()
    before = records[-1].get("code_hash") if records else None
    if before in (None, code_hash()) or not any(run_dir.checkpoints.glob("step-*")):
        return
    line = f"{run_dir.run_id} began with other code of relora_core ({before}, now {code_hash()})"
    if not comparable(before, code_hash()):
        line = (
            f"{run_dir.run_id} may have begun with other code of relora_core: its hash {before} "
            f"is of an older kind than today's {code_hash()}"
        )
    if refuse:
        raise ConfigError(
            f"checkpoint.on_code_change must be warn to go on, got 'refuse': {line}; or move "
            f"{run_dir.path} away to begin anew"
        )
    print(f"warning: {line}: its numbers may change where it resumes", file=sys.stderr)


def _join(config: RunConfig, run_dir: RunDir, stop: StopFlag) -> str:
    """Ranks above 0 compute; the lock, the record and the status are rank 0's."""
    if ended := run_dir.ended():
        return ended
    from relora_core.train import train

    config = inputs.opened(run_dir, config)
    folder = cache_dir(config.output_dir)
    with stop.ending():
        return train(
            config, checkpoints=run_dir.checkpoints, cache_dir=folder, sink=NullSink(), stop=stop
        )


def _attempt(
    config: RunConfig,
    run_dir: RunDir,
    *,
    attempt: int,
    console: bool,
    stop: StopFlag,
    extra: Sequence[Sink],
    world: int,
) -> str:
    from relora_core.train import train

    log = EventLog(run_dir, attempt)
    sinks: list[Sink] = [log, StatusSink(run_dir, steps=config.train.steps)]
    bar = ConsoleSink(run_dir.run_id, steps=config.train.steps) if console else None
    if bar:
        sinks.append(bar)
    load = SystemSink(log) if config.tracking.system_metrics else None
    if load:
        sinks.append(load)
    sinks += extra
    started = time.time()
    try:
        with stop.ending() if world > 1 else contextlib.nullcontext():
            state = train(
                config,
                checkpoints=run_dir.checkpoints,
                cache_dir=cache_dir(config.output_dir),
                sink=Fanout(sinks),
                stop=stop,
            )
        if state == "interrupted":
            return state
        result = make_result(run_dir, state=state, attempt=attempt, seconds=time.time() - started)
        log.emit(Event(kind="end", step=result["step"], data={"state": state}))
        run_dir.write_result(result)
    finally:
        log.close()
        for sink in (bar, load):
            if sink:
                sink.close()
    return state


def make_result(run_dir: RunDir, *, state: str, attempt: int, seconds: float) -> dict[str, Any]:
    """What the run came to, from its record: the newest value of every metric."""
    metrics: dict[str, float] = {}
    step, loss_steps = 0, None
    for event in run_dir.events():
        if event["kind"] == "train":
            loss_steps = event["data"].get("loss_steps")
        if event["kind"] != "system":
            metrics.update(event["metrics"])
        step = max(step, event["step"])
    return {
        "run_id": run_dir.run_id,
        "state": state,
        "step": step,
        "attempts": attempt,
        "attempt_seconds": round(seconds, 3),
        "loss_steps": loss_steps,  # updates that train/loss is a mean over
        "metrics": metrics,
    }


def _record_failure(run_dir: RunDir, error: BaseException) -> None:
    """status.json and error.txt, as far as the disk allows; the caller raises the error itself."""
    line = one_line(error)
    try:
        atomic.write_text(run_dir.error_path, "".join(traceback.format_exception(error)))
        run_dir.update_status(state="failed", phase="", error=line)
    except OSError as trouble:
        print(f"{run_dir.path}: could not record the failure: {trouble}", file=sys.stderr)
