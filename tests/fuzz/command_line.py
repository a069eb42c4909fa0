"""`python run.py ...` in this process, up to where it would begin to write."""

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
"""What no case may take; most take milliseconds."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str
    trace: str
    """Of an exception that nobody caught; empty where all were."""
    begun: bool
    """Whether it accepted everything and would have written next."""


class _Begun(SystemExit):
    """Everything was accepted."""


def _begin(output_dir: object) -> None:
    raise _Begun(0)


def run_py(words: Sequence[str], *, cwd: Path) -> Answer:
    """What `python run.py WORDS` answers; nothing is launched."""
    import experiments.runner
    import sweeps.search.launch

    patches = [
        mock.patch.object(experiments.runner, "check_output_dir", _begin),
        mock.patch.object(sweeps.search.launch, "check_output_dir", _begin),
        mock.patch.object(sys, "argv", ["run.py", *words]),
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
    """Conftest's alarm rings where what is inside uses more CPU."""
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def answer(call: Callable[[], object]) -> Answer:
    """Code, words and traceback of `call`, which exits, returns its exit code, or raises."""
    out, err = io.StringIO(), io.StringIO()
    code, trace, begun = 0, "", False
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with timed():
                got = call()
            code = got if isinstance(got, int) else 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            begun = isinstance(ended, _Begun)
        except BaseException:
            code, trace = 1, traceback.format_exc()
    return Answer(code=code, out=out.getvalue(), err=err.getvalue(), trace=trace, begun=begun)


def faults(told: Answer) -> list[str]:
    """Why an answer is neither a clean success nor one clear line; empty where it is one."""
    if told.trace:
        return ["traceback: " + told.trace.strip().splitlines()[-1]]
    lines = told.err.splitlines()
    if told.code == 0:
        return [f"success, and on stderr: {told.err!r}"] if lines else []
    found = []
    if len(lines) != 1:
        found.append(f"{len(lines)} lines on stderr")
    if told.code not in (1, 2):
        found.append(f"exit code {told.code}")
    return found
