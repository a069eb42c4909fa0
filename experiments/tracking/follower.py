"""A child process that keeps MLflow up to date while this process trains a run.

A thread would take turns with the training, and end with it if it is killed. Processes that only
look after others use one (`sweeps/tracking.py`). Not for: what is shown of a run (`runs.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.addresses import experiment_name, redacted, store_uri
from experiments.disk.run_dir import RunDir
from experiments.environment import python_path
from experiments.tracking import store
from experiments.tracking.runs import Syncer, SyncReport
from experiments.tracking.store import open_store
from relora_core import shared, shell
from relora_core.config import RunConfig


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Follower:
    """Keeps MLflow up to date from a child process while the body of its `with` block runs.

    The child makes a last pass when the block ends or this process dies. Failures of MLflow raise
    nothing here: `warn` gets one line at most, and `python -m sweeps sync` repairs all of it later.
    The child's output is in <output_dir>/logs/mlflow-sync.log.
    """

    def __init__(
        self,
        runs: Sequence[RunDir],
        *,
        uri: str,
        experiment: str,
        output_dir: Path | str,
        every_s: float = 3.0,
        final_timeout_s: float = 120.0,
        warn: Callable[[str], None] = _to_stderr,
    ) -> None:
        self._uri = uri
        self._output_dir = Path(output_dir).absolute()
        self._spec = {
            "runs": [str(run.path.absolute()) for run in runs],
            "uri": uri,
            "experiment": experiment,
            "output_dir": str(self._output_dir),
            "every_s": every_s,
        }
        self._final_timeout_s = final_timeout_s
        self._warn = warn
        self._child: subprocess.Popen[str] | None = None
        self._settled = threading.Event()
        self._experiment_id: str | None = None
        self._problem: str | None = None

    def __enter__(self) -> Follower:
        logs = self._output_dir / "logs"
        try:
            shared.make_folder(logs)
            with shared.open_file(logs / "mlflow-sync.log", "a", encoding="utf-8") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "experiments.tracking.follower"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=_child_environment(),
                    start_new_session=True,  # Ctrl-C is for the runs; a last pass follows
                )
        except OSError as error:
            self._problem = f"tracking: the sync could not start ({error})"
            self._settled.set()
            return self
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        with contextlib.suppress(BrokenPipeError):
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(self._spec) + "\n")
            self._child.stdin.flush()
        return self

    def wait_ready(self, timeout: float) -> str | None:
        """Wait until the store is ready; the MLflow experiment's id.

        None if the child's first try failed, or took longer than `timeout` seconds; it tries on. A
        server is not waited for: it makes its own database, and may be slow.
        """
        if self._uri.startswith(("http://", "https://")):
            timeout = 0
        self._settled.wait(timeout)
        return self._experiment_id

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._finish(self._child)
        if self._problem:
            self._warn(self._problem)

    def _finish(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        try:
            code = child.wait(self._final_timeout_s)
            self._listener.join(5)
            if code and not self._problem:
                log = self._output_dir / "logs" / "mlflow-sync.log"
                self._problem = (
                    f"tracking: the sync ended with code {code} (see {log}); nothing is lost, "
                    "run `python -m sweeps sync` later"
                )
        except subprocess.TimeoutExpired:
            self._problem = (  # a long sync of others may hold the store, which is well
                f"tracking: the last sync to {redacted(self._uri)} took longer than "
                f"{self._final_timeout_s:g} s and was left; nothing is lost, "
                "run `python -m sweeps sync` later"
            )
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            self._listener.join(5)
            child.stdout.close()

    def _listen(self) -> None:
        """Read the child's messages: `ready ID` or `waiting`, and at its end `problem LINE`."""
        assert self._child is not None
        assert self._child.stdout is not None
        for line in self._child.stdout:
            kind, _, rest = line.rstrip("\n").partition(" ")
            if kind == "ready":
                self._experiment_id = rest
            elif kind == "problem":
                self._problem = rest
            self._settled.set()
        self._settled.set()


def follow(run: RunDir, *, config: RunConfig) -> Follower:
    """A Follower of a run that is tracked as `config` says."""
    return Follower(
        [run],
        uri=store_uri(config),
        experiment=experiment_name(config),
        output_dir=config.output_dir,
    )


def _child_environment() -> dict[str, str]:
    """Our environment, with this checkout first on the path, so that the child runs our code."""
    return {**shell.strip_group(os.environ), "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}


def main() -> int:
    """The Follower's child: a spec on stdin's first line, then passes until stdin is closed."""
    spec = json.loads(sys.stdin.readline())
    os.nice(10)
    messages, sys.stdout = sys.stdout, sys.stderr  # libraries print to stdout too
    closed = threading.Event()

    def until_eof() -> None:
        sys.stdin.read()
        closed.set()

    def say(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is dead; the last pass still counts
            print(line, file=messages, flush=True)

    threading.Thread(target=until_eof, daemon=True).start()
    problem = _follow(spec, closed=closed, say=say)
    if problem:
        say(f"problem {problem}")
    return 1 if problem else 0


def _follow(
    spec: dict[str, Any], *, closed: threading.Event, say: Callable[[str], None]
) -> str | None:
    """Pass after pass until `closed`, then a last one, tried twice; the problem that is left."""
    runs = [RunDir(path) for path in spec["runs"]]
    syncer: Syncer | None = None
    pause, tries = spec["every_s"], 0
    while True:
        final = closed.is_set()
        tries += final
        try:
            if syncer is None:
                syncer = _start(spec, say)
            report = syncer.sync(runs, final=final)
            problem = _complaint(report, total=len(runs))
            pause = spec["every_s"]
        except Exception as error:  # whatever it is: the runs go on, and the next pass may succeed
            print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)
            problem = store.problem(spec["uri"], error)
            pause = min(60.0, 2 * pause)
            if syncer is None:
                say("waiting")
        if final and (problem is None or tries == 2):
            return problem
        if final:
            time.sleep(1.0)
        closed.wait(pause)


def _start(spec: dict[str, Any], say: Callable[[str], None]) -> Syncer:
    store = open_store(spec["uri"], experiment=spec["experiment"], output_dir=spec["output_dir"])
    say(f"ready {store.experiment_id}")
    return Syncer(store)


def _complaint(report: SyncReport, *, total: int) -> str | None:
    if report.busy:
        return "tracking: another sync holds the store, run `python -m sweeps sync` later"
    if not report.errors:
        return report.files
    for name, line in report.errors.items():
        print(f"{name}: {line}", file=sys.stderr)
    name, line = next(iter(report.errors.items()))
    return f"tracking: {len(report.errors)} of {total} runs not synced ({name}: {line})"


if __name__ == "__main__":
    raise SystemExit(main())
