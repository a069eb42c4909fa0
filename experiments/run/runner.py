"""One attempt of a run: RunConfig + RunDir -> sinks -> train() -> result.json.

Imports torch only when a run starts. Not for: many runs (`sweeps/`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from experiments import environment
from experiments.disk import inputs
from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import cache_dir
from experiments.disk.run_dir import RunDir
from experiments.disk.states import Outcome, State
from experiments.environment import attempt_record
from experiments.errors import RunLocked, one_line
from experiments.metrics import MFU, MFU_6N
from experiments.run.sinks import ConsoleSink, Fanout, StatusSink, SystemSink
from experiments.run.stopping import StopFlag
from experiments.scheduler import current_job
from relora_core import atomic, costs, shell
from relora_core.config import ConfigError, RunConfig
from relora_core.events import Event, NullSink, Sink
from relora_core.sources import code_hash, comparable

Work = Callable[..., str]
"""What a run does instead of training, as a function of (*, sink, stop); it returns as `train`."""


def run_experiment(
    config: RunConfig,
    run_dir: RunDir,
    *,
    console: bool = False,
    stop: StopFlag | None = None,
    is_dead: Callable[[dict[str, Any]], bool] = lambda holder: False,
    extra_sinks: Sequence[Sink] = (),
    work: Work | None = None,
) -> Outcome:
    """Run, or resume, one run in this process: begin an attempt, train, record how it ended.

    `stop` asks it to end early; then everything is on disk when this returns. `is_dead` is that of
    `RunDir.lock`. `extra_sinks` get events after the record; `work` takes the place of training.
    Raises RunLocked while another process is at work on the run. Any other failure is recorded in
    its folder (status.json, error.txt) and raised.
    """
    stop, place = stop or StopFlag(), shell.take_group()
    if place.rank:
        return _join(config, run_dir, stop)
    run_dir.create(config)
    config = _with_begun_batch(config, run_dir)
    with run_dir.lock(is_dead=is_dead):
        if ended := _ended_before(run_dir):
            return ended
        stop.run_dir = run_dir
        _check_code(run_dir, refuse=config.checkpoint.on_code_change == "refuse")
        try:
            attempt = _begin(config, run_dir, world=place.world)
            outcome = _train(
                inputs.open_for_training(run_dir, config),
                run_dir,
                attempt=attempt,
                console=console,
                stop=stop,
                extra_sinks=extra_sinks,
                world=place.world,
                work=work,
            )
        except RunLocked:  # another process has the lock now, and alone may write the run's files
            raise
        except BaseException as error:
            _record_failure(run_dir, error)
            raise
        return _settle(run_dir, outcome, reason=stop.reason or "asked to end")


def _with_begun_batch(config: RunConfig, run_dir: RunDir) -> RunConfig:
    """With the micro-batch of the run's own config where tokens decide: the experiment may have
    named one when the run began, and another one would round differently."""
    if not costs.chooses_micro_batch(config) or not run_dir.config_path.exists():
        return config
    begun, names = run_dir.config().train, ("micro_batch_size", "micro_batch_tokens")
    return replace(config, train=replace(config.train, **{n: getattr(begun, n) for n in names}))


def _ended_before(run_dir: RunDir) -> Outcome | None:
    """How the run has ended already, or CANCELLED if it is not to begin; None if it is to go on."""
    if ended := run_dir.ended():
        if run_dir.status().state is not ended:  # killed between its result and its last status
            run_dir.update_status(state=ended, phase="", eta_s=0.0)
        return Outcome(ended)
    if run_dir.cancel_path.exists():
        run_dir.update_status(state=State.CANCELLED, phase="", error=None)
        return Outcome.CANCELLED
    return None


def _begin(config: RunConfig, run_dir: RunDir, *, world: int) -> int:
    """Record that an attempt has begun, and with what; its number."""
    attempt = run_dir.next_attempt()
    for path in run_dir.torn():
        path.unlink(missing_ok=True)
    run_dir.update_status(
        state=State.RUNNING,
        attempts=attempt,
        steps=config.train.steps,
        phase="start",
        host=socket.gethostname(),
        pid=os.getpid(),
        job_id=current_job(),
        error=None,
    )
    # torch, which the record's GPUs need. It takes seconds, so the status is written first.
    from relora_core import native

    start_step = run_dir.newest_step()
    record = attempt_record(start_step=start_step, world=world, kernels_key=native.key())
    if accepted := inputs.accepted(run_dir, by=inputs.TRAINING):
        record["changes"] = accepted
    run_dir.write_attempt(attempt, record)
    environment.check_gpu(config)
    return attempt


def _train(
    config: RunConfig,
    run_dir: RunDir,
    *,
    attempt: int,
    console: bool,
    stop: StopFlag,
    extra_sinks: Sequence[Sink],
    world: int,
    work: Work | None,
) -> Outcome:
    """Train to the last step or an earlier end; write the result unless it was interrupted."""
    from relora_core.train import train  # torch

    started, steps = time.time(), config.train.steps
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(EventLog(run_dir, attempt)))
        sinks: list[Sink] = [log, StatusSink(run_dir, steps=steps)]
        if console:
            bar = ConsoleSink(run_dir.run_id, steps=steps)
            sinks.append(stack.enter_context(contextlib.closing(bar)))
        if config.tracking.system_metrics:
            sinks.append(stack.enter_context(contextlib.closing(SystemSink(log))))
        with stop.ending() if world > 1 else contextlib.nullcontext():
            sink = Fanout([*sinks, *extra_sinks])
            if work is not None:
                ending = work(sink=sink, stop=stop)
            else:
                ending = train(
                    config,
                    checkpoints=run_dir.checkpoints,
                    cache_dir=cache_dir(config.output_dir),
                    sink=sink,
                    stop=stop,
                )
        outcome = Outcome(ending)
        if outcome is not Outcome.INTERRUPTED:
            seconds = time.time() - started
            result = make_result(run_dir, state=outcome, attempt=attempt, seconds=seconds)
            log.emit(Event(kind="end", step=result["step"], data={"state": outcome}))
            run_dir.write_result(result)
    return outcome


def _settle(run_dir: RunDir, outcome: Outcome, *, reason: str) -> Outcome:
    """Record how the attempt ended, and return that: an interrupted one may have been cancelled or
    pruned."""
    if outcome is not Outcome.INTERRUPTED:
        run_dir.update_status(state=outcome, phase="", eta_s=0.0)
        return outcome
    if reason == Outcome.CANCELLED or run_dir.cancel_path.exists():
        outcome = Outcome.CANCELLED
    elif reason == Outcome.PRUNED:
        outcome = Outcome.PRUNED
    early: dict[str, Any] = {"state": outcome, "error": None}
    if outcome is Outcome.INTERRUPTED:
        line = f"stopped ({reason}); the same command resumes it"
        early = {"state": State.FAILED, "error": line}
    if outcome is Outcome.PRUNED:
        early["eta_s"] = None
    run_dir.update_status(**early, step=run_dir.newest_step(), phase="")
    return outcome


def _check_code(run_dir: RunDir, *, refuse: bool) -> None:
    """Warn, or raise ConfigError, if a run goes on with other code than its newest attempt had."""
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


def _join(config: RunConfig, run_dir: RunDir, stop: StopFlag) -> Outcome:
    """Train as a rank above 0: lock, record and status are rank 0's."""
    if ended := run_dir.ended():
        return Outcome(ended)
    from relora_core.train import train  # torch

    config = inputs.open_for_training(run_dir, _with_begun_batch(config, run_dir))
    folder = cache_dir(config.output_dir)
    with stop.ending():
        ending = train(
            config, checkpoints=run_dir.checkpoints, cache_dir=folder, sink=NullSink(), stop=stop
        )
    return Outcome(ending)


def make_result(run_dir: RunDir, *, state: str, attempt: int, seconds: float) -> dict[str, Any]:
    """The result of a run: the newest value of every metric in its record.

    A diverged run ends between two evals: what it measured before is no number of its end.
    """
    metrics: dict[str, float] = {}
    events, loss_steps = run_dir.events(), None
    step = max((event["step"] for event in events), default=0)
    if state == State.DIVERGED:
        events = [event for event in events if event["step"] == step]
    for event in events:
        if event["kind"] == "train":
            loss_steps = event["data"].get("loss_steps")
            for share in (MFU, MFU_6N):  # of another GPU, if this one's peak is not known
                metrics.pop(share, None)
        if event["kind"] != "system":
            metrics.update(event["metrics"])
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
    line = one_line(error, resumes=True)
    try:
        atomic.write_text(run_dir.error_path, "".join(traceback.format_exception(error)))
        run_dir.update_status(state=State.FAILED, phase="", error=line)
    except OSError as trouble:
        print(f"{run_dir.path}: could not record the failure: {trouble}", file=sys.stderr)
