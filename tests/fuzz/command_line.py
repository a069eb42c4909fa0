"""`python run.py ...` in this process, up to where it would start to write."""

from __future__ import annotations

import contextlib
import io
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parents[2]
CPU_S = 20.0
"""More than any case may take; most take milliseconds."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What a command returned and printed."""

    code: int
    out: str
    err: str
    trace: str
    """The traceback of an exception that was not caught, or nothing."""
    started: bool
    """Whether it accepted everything and would have written next."""


class _Started(SystemExit):
    """Everything was accepted."""


def _start(output_dir: object) -> None:
    raise _Started(0)


def run_py(arguments: Sequence[str], *, cwd: Path) -> Answer:
    """The answer of `python run.py ARGUMENTS`; nothing is launched."""
    import experiments.run.single
    import sweeps.outlook

    patches = [
        mock.patch.object(experiments.run.single, "check_output_dir", _start),
        mock.patch.object(sweeps.outlook, "check_output_dir", _start),
        mock.patch.object(sys, "argv", ["run.py", *arguments]),
        contextlib.chdir(cwd),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        GlobalHydra.instance().clear()
        try:
            return answer(lambda: runpy.run_path(str(ROOT / "run.py"), run_name="__main__"))
        finally:
            GlobalHydra.instance().clear()


@contextlib.contextmanager
def timed(cpu_s: float = CPU_S) -> Iterator[None]:
    """A context in which conftest's alarm rings after so many seconds of CPU."""
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def answer(call: Callable[[], object]) -> Answer:
    """The answer of `call`, which exits, returns its exit code, or raises."""
    out, err = io.StringIO(), io.StringIO()
    code, trace, started = 0, "", False
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with timed():
                returned = call()
            code = returned if isinstance(returned, int) else 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            started = isinstance(end, _Started)
        except BaseException:
            code, trace = 1, traceback.format_exc()
    return Answer(code=code, out=out.getvalue(), err=err.getvalue(), trace=trace, started=started)


def faults(answer: Answer) -> list[str]:
    """Why an answer is neither a clean success nor one line of error; empty where it is."""
    if answer.trace:
        return ["traceback: " + answer.trace.strip().splitlines()[-1]]
    lines = answer.err.splitlines()
    if answer.code == 0:
        return [f"success, and on stderr: {answer.err!r}"] if lines else []
    reasons = []
    if len(lines) != 1:
        reasons.append(f"{len(lines)} lines on stderr")
    if answer.code not in (1, 2):
        reasons.append(f"exit code {answer.code}")
    return reasons
