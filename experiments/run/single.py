"""`python run.py`: one run in this process, tracked, with a progress bar."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Mapping

from experiments import addresses, environment, notices
from experiments.disk import frozen, inputs
from experiments.disk.evaluations import final_metrics
from experiments.disk.output_dir import cache_dir, check_output_dir, runs_folder, same_runs
from experiments.disk.run_dir import RunDir
from experiments.disk.states import Outcome, State
from experiments.errors import RunLocked, fail, one_line
from experiments.identity import run_id
from experiments.run.complete import complete, prepared_notes
from experiments.run.runner import Work, run_experiment
from experiments.run.stopping import SIGNALS, StopFlag
from experiments.tracking import follower as mlflow_follower
from experiments.tracking import store
from relora_core import data, shell
from relora_core.config import ConfigError, RunConfig
from relora_core.data.base import DataError


def run_here(config: RunConfig, *, given: Mapping[str, str] | None = None) -> int:
    """Run, or resume, the run of this config; the exit code.

    `given`: key -> value of what the user set.
    """
    place = shell.take_group()
    asked, notes = config, list[str]()
    config = complete(config, notes=notes)
    notes += notices.of_one(given or {}, asked)  # which is valid
    store.check(config)
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
        return 0 if ended is State.FINISHED else 1
    if not run_dir.path.exists():
        [other] = same_runs(
            [config], output_dir=config.output_dir, among=lambda run: run.ended() is State.FINISHED
        )
        if other:
            notes.append(f"it computes what run {other.run_id} did, which is finished")
    for note in notes:
        _say(f"note: {note}")
    opened = inputs.open_for_training(run_dir, config)
    data.prepare(opened.data, cache_dir=cache_dir(config.output_dir), progress=_say)
    for note in prepared_notes(opened):
        if note not in notes:
            _say(f"note: {note}")
    return carry_out(config, run_dir, typed=typed)


def carry_out(config: RunConfig, run_dir: RunDir, *, typed: str, work: Work | None = None) -> int:
    """Run, or resume, a checked run with MLflow beside it; the exit code.

    `typed` is its output_dir as the user wrote it; `work` as of `run_experiment`.
    """
    run_dir.create(config)
    with contextlib.ExitStack() as stack:
        if config.tracking.enabled:
            follower = stack.enter_context(mlflow_follower.follow(run_dir, config=config))
            follower.wait_ready(60)
        stop = StopFlag()
        stack.enter_context(stop.installed(signal.SIGINT, *SIGNALS))
        if run_dir.lock_holder() is None:  # else the request is for the process at work
            run_dir.cancel_path.unlink(missing_ok=True)
        try:
            outcome = run_experiment(config, run_dir, console=True, stop=stop, work=work)
        except (ConfigError, DataError, RunLocked, OSError):
            raise
        except Exception as error:
            fail(f"{one_line(error)} (traceback: {run_dir.error_path})", code=1)
    if outcome in (Outcome.INTERRUPTED, Outcome.CANCELLED):
        fail(f"{run_dir.run_id} {run_dir.status().error or outcome}", code=130)
    print_result(run_dir)
    if config.tracking.enabled:
        print(f"compare: {addresses.ui_command(typed)}")
    return 0 if outcome is Outcome.FINISHED else 1


def _rank(config: RunConfig, run_dir: RunDir) -> int:
    """Run a rank above 0, which prints only failures; the exit code."""
    stop = StopFlag(says=False)
    try:
        with stop.installed(signal.SIGINT, *SIGNALS):
            outcome = run_experiment(config, run_dir, stop=stop)
    except (ConfigError, DataError, RunLocked, OSError):
        raise
    except Exception as error:
        fail(one_line(error), code=1)
    return {Outcome.FINISHED: 0, Outcome.INTERRUPTED: 130}.get(outcome, 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_result(run_dir: RunDir) -> None:
    """Print the final metrics of a run and its folder."""
    result = run_dir.result()
    if result is None:
        return
    print(f"\n{run_dir.run_id}: {result['state']} at step {result['step']}")
    for name, value in sorted(final_metrics(run_dir).items()):
        if not name.startswith("perf/"):
            print(f"  {name:<58} {value:>12.5g}")
    print(f"record: {run_dir.path}")
