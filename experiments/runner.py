"""RunConfig + RunDir -> sinks -> train() -> result.json. And what planning must know first.

Not for: many runs (`sweeps/`). Imports torch only when a run starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from experiments import environment, frozen, inputs
from experiments.environment import attempt_record, code_hash
from experiments.identity import run_id
from experiments.run_dir import EventLog, RunDir, RunLocked, runs_folder, same_runs
from experiments.scheduler import current_job
from experiments.sinks import ConsoleSink, Fanout, StatusSink, SystemSink
from experiments.stopping import PRUNED, SIGNALS, StopFlag
from relora_core import atomic, shared, shell
from relora_core.config import EVALS, ConfigError, RunConfig, validate
from relora_core.data.base import DataError, DataInfo
from relora_core.events import Event, NullSink, Sink
from relora_core.schedule import notices
from relora_core.sources import comparable


def cache_dir(output_dir: str | Path) -> Path:
    """Where tokenised text is kept, shared by all runs."""
    return Path(output_dir) / "cache"


def complete(config: RunConfig, *, notes: list[str] | None = None) -> RunConfig:
    """The config with the data's vocabulary and fingerprints filled in, and validated.

    Reads what planning may read (footers, tokenizers, eval files), trains nothing, writes nothing.
    What the user should know of data and settings is appended to `notes`, once each.
    """
    return complete_all([config], notes=notes)[0]


def complete_all(
    configs: Sequence[RunConfig], *, notes: list[str] | None = None
) -> list[RunConfig]:
    """`complete` of each; data and evals that several share are inspected once."""
    from experiments import mlflow_store
    from relora_core import data, evals

    for config in configs:
        if config.output_dir.startswith("~"):  # a folder of that name would be made here
            raise ConfigError(
                f"output_dir must be a path from the root, or from here, got "
                f"{config.output_dir!r}; nearest valid: {os.path.expanduser(config.output_dir)}"
            )
    configs = [mlflow_store.settle(config, notes=notes) for config in configs]
    for config in configs:
        validate(config)
        shell.check_asked(config, gpu=False)
    inspected: dict[str, DataInfo] = {}
    prints: dict[str, dict[str, str | None]] = {}
    filled = []
    for config in configs:
        key = repr((config.data, config.output_dir))
        if key not in inspected:
            inspected[key] = data.inspect(config.data, cache_dir=cache_dir(config.output_dir))
        if notes is not None:
            of_this = [*_data_notes(config, inspected[key]), *notices(config)]
            notes += [n for n in of_this if n not in notes]
        config = _with_data(config, inspected[key])
        key = repr((config.data, config.eval, config.model.vocab_size, config.model.max_seq_len))
        if key not in prints:
            prints[key] = evals.inspect(config)
            if notes is not None:
                notes += [n for n in evals.notes(config) if n not in notes]
        config = _with_evals(config, prints[key])
        validate(config)
        filled.append(config)
    if notes is not None:
        notes += environment.notes()
    return filled


def _data_notes(config: RunConfig, info: DataInfo) -> list[str]:
    """One line each; of several data sets each names its own."""
    notes = [note if str(config.data.path) in note else f"data: {note}" for note in info.notes]
    return notes + _passes(config, info.rows)


def _passes(config: RunConfig, rows: int | None) -> list[str]:
    read = config.train.steps * config.train.batch_size
    if not rows or read <= rows:
        return []
    passes = f"{read / rows:.3g} passes over the {rows:,} sequences of data.path"
    return [f"data: {read:,} sequences are trained on: {passes}={config.data.path}"]


def prepared_notes(config: RunConfig) -> list[str]:
    """What is known of a large text only when it is tokenised."""
    from relora_core import data

    rows = data.prepared_rows(config.data, cache_dir=cache_dir(config.output_dir))
    return _passes(config, rows)


def _with_data(config: RunConfig, info: DataInfo) -> RunConfig:
    vocabulary = config.model.vocab_size or info.vocab_size
    if vocabulary < info.vocab_size:
        raise ConfigError(
            f"model.vocab_size must be >= {info.vocab_size} (the ids of data={config.data.kind}), "
            f"got {vocabulary}; nearest valid: {info.vocab_size}"
        )
    return replace(
        config,
        model=replace(config.model, vocab_size=vocabulary),
        data=replace(config.data, fingerprint=info.fingerprint),
    )


def _with_evals(config: RunConfig, prints: dict[str, str | None]) -> RunConfig:
    sections = {
        name: replace(getattr(config.eval, name), fingerprint=prints.get(name)) for name in EVALS
    }
    return replace(config, eval=replace(config.eval, **sections))


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


def one_line(error: BaseException) -> str:
    """An error as one line for tables and terminals."""
    if isinstance(error, (ConfigError, DataError)):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command resumes it"
    if isinstance(error, OSError) and (line := shared.explained(error)):
        return line
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def fail(line: str, *, code: int) -> NoReturn:
    """Print one line and exit: 2 for the user's mistake, 1 for anything else."""
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code)


def check_output_dir(output_dir: str | Path) -> None:
    """ConfigError unless files can be made in `output_dir`; leaves nothing behind."""
    folder = Path(output_dir)
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        shared.make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 65536)
            probe.flush()
    except OSError as error:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()
        raise ConfigError(
            f"output_dir must be a folder that can be written to, got {str(output_dir)!r} "
            f"({shared.explained(error) or error.strerror})"
        ) from None


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """What goes wrong inside ends the process with one line: no traceback for a user's mistake."""
    try:
        yield
    except ConfigError as error:
        fail(str(error), code=2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (DataError, RunLocked, OSError) as error:
        fail(one_line(error), code=1)
    except KeyboardInterrupt as error:
        fail(one_line(error), code=130)


def run_here(config: RunConfig) -> int:
    """`python run.py`: one run in this process, tracked, with a progress bar; the exit code."""
    from experiments import mlflow_follow, mlflow_store
    from relora_core import data

    place = shell.settle()
    notes: list[str] = []
    config = complete(config, notes=notes)
    mlflow_store.check(config)
    run_dir, typed = RunDir(runs_folder(config.output_dir) / run_id(config)), config.output_dir
    if not run_dir.ended():
        environment.check_gpu(config)
    check_output_dir(config.output_dir)
    config = frozen.absolute(config)
    if place.rank:
        return _rank(config, run_dir)
    if ended := run_dir.ended():
        print(f"{run_dir.run_id} is {ended} already: nothing to do")
        print_result(run_dir)
        return 0 if ended == "finished" else 1
    if not run_dir.path.exists():
        [other] = same_runs(
            [config], output_dir=config.output_dir, among=lambda run: run.ended() == "finished"
        )
        if other:
            notes.append(f"it computes what run {other.run_id} did, which is finished")
    for note in notes:
        _say(f"note: {note}")
    found = inputs.opened(run_dir, config)
    data.prepare(found.data, cache_dir=cache_dir(config.output_dir), progress=_say)
    for note in prepared_notes(found):
        if note not in notes:
            _say(f"note: {note}")
    run_dir.create(config)
    with contextlib.ExitStack() as stack:
        if config.tracking.enabled:
            follower = stack.enter_context(mlflow_follow.follow([run_dir], config=config))
            follower.wait_ready(60)
        stop = StopFlag()
        stack.enter_context(stop.installed(signal.SIGINT, *SIGNALS))
        run_dir.cancel_path.unlink(missing_ok=True)
        try:
            state = run_experiment(config, run_dir, console=True, stop=stop)
        except (ConfigError, DataError, RunLocked, OSError):
            raise
        except Exception as error:
            fail(f"{one_line(error)} (traceback: {run_dir.error_path})", code=1)
    if state in ("interrupted", "cancelled"):
        fail(f"{run_dir.run_id} {run_dir.status().error or state}", code=130)
    print_result(run_dir)
    if config.tracking.enabled:
        print(f"compare: {mlflow_store.ui_command(typed)}")
    return 0 if state == "finished" else 1


def _rank(config: RunConfig, run_dir: RunDir) -> int:
    """Rank 0 has the voice: what goes right is its to say."""
    stop = StopFlag(says=False)
    try:
        with stop.installed(signal.SIGINT, *SIGNALS):
            state = run_experiment(config, run_dir, stop=stop)
    except (ConfigError, DataError, RunLocked, OSError):
        raise
    except Exception as error:
        fail(one_line(error), code=1)
    return {"finished": 0, "interrupted": 130}.get(state, 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_result(run_dir: RunDir) -> None:
    """The final metrics of a run as a small table, and where the rest is."""
    result = run_dir.result()
    if result is None:
        return
    print(f"\n{run_dir.run_id}: {result['state']} at step {result['step']}")
    for name in sorted(result["metrics"]):
        if not name.startswith("perf/"):
            print(f"  {name:<58} {result['metrics'][name]:>12.5g}")
    print(f"record: {run_dir.path}")
