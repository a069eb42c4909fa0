"""Configs whose steps are timed, one after another, each in a process of its own.

Not for: which are worth it (`measure.py`), nor the steps (`experiments/run/timing.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.run.timing import Result, read_result, result_of, write_result
from relora_core import shared
from relora_core.config import RunConfig

COMMAND = (sys.executable, "-P", "-m", "experiments.run.timing")
EACH_S = 240.0
"""A config that takes longer is given up: imports, compiling and steps have a minute each."""
POLL_S = 0.2


@dataclass(kw_only=True, slots=True)
class Timings:
    """Configs to time, in files of a folder that is removed when all is done."""

    folder: Path
    names: list[str]
    """Of the runs, for the user."""
    configs: list[RunConfig]
    files: list[Path]
    runs: int
    """That the sweep would have to run."""
    report: Callable[[int, Result], None]
    """Gets the index and the result of each, once."""
    reported: set[int]

    def collect(self) -> None:
        """Report the results that have come since the last call."""
        for index, file in enumerate(self.files):
            if index not in self.reported and (result := read_result(file)):
                self.reported.add(index)
                self.report(index, result)

    @property
    def left(self) -> list[int]:
        return [index for index in range(len(self.files)) if index not in self.reported]


def time_each(
    files: Sequence[Path],
    *,
    environments: Callable[[int], Mapping[str, str]],
    stop: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Time the config of each file, until `stop`; then none is left at work.

    `environments` are those of each process, by index; `tick` is called every POLL_S.
    """
    for index, file in enumerate(files):
        if stop():
            return
        log = file.with_suffix(f".{os.environ.get('SLURM_PROCID', '0')}.log")
        with shared.open_file(log, "ab") as output:
            process = subprocess.Popen(
                [*COMMAND, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environments(index)),
            )
        try:
            deadline = time.monotonic() + EACH_S
            while process.poll() is None and time.monotonic() < deadline:
                if stop():
                    return
                tick()
                time.sleep(POLL_S)
            late = process.poll() is None
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if stop():  # Ctrl-C reaches the process, too
            return
        if not result_of(file).exists() and (late or process.returncode):
            why = (
                f"not done after {EACH_S:.0f} s" if late else _explain_end(process.returncode, log)
            )
            write_result(file, Result(error=why))
    tick()


def _explain_end(code: int, log: Path) -> str:
    if code < 0:
        hint = ", as a machine out of memory does" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return last_line(log) or f"exit code {code}"


def last_line(log: Path) -> str:
    """The last line with text that a process has printed; empty if there is none."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
