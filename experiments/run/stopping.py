"""When a run is to end early: signals, its job's time limit, the user's cancel, a lost lock.

A handler sets a flag and does nothing else; the training loop reads it between steps, saves, and
leaves. Not for: what happens then (`runner.py`, `sweeps/worker.py`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from experiments.disk.run_dir import RunDir
from experiments.disk.states import Outcome
from experiments.errors import RunLocked

LOOK_EVERY_S = 2.0
"""How often the disk is asked whether the user has cancelled the run."""
DEAF_S = 60.0
"""How long a process of a group may stay in one call after it was asked to end. After that it
is taken to wait for a process that has ended."""
TWICE_S = 1.0
"""A launcher passes on what the terminal has sent to its processes, too: that is one Ctrl-C."""
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""What schedulers send. submitit's choice; USR1 is NCCL's."""


class StopFlag:
    """Whether this process should end at the next step, and why. Callable: `train(stop=flag)`."""

    def __init__(self, *, deadline: float | None = None, says: bool = True) -> None:
        self.deadline, self._says = deadline, says
        """Seconds since the epoch by which everything must be on disk."""
        self.run_dir: RunDir | None = None
        """The run that this process has locked; None on ranks above 0."""
        self.reason: str | None = None
        self._owner = os.getpid()
        self._signal: int | None = None
        self._looked = self._heard = 0.0
        self._shared = False

    def __call__(self) -> bool:
        if self.reason is None:
            self.reason = self._why()
        return self.reason is not None

    def prune(self) -> None:
        """End the current run; a reason to end the whole process comes first."""
        if not self():
            self.reason = Outcome.PRUNED

    def next_run(self) -> None:
        """Prepare for the next run: a reason that concerned one run is cleared."""
        if self.reason in (Outcome.PRUNED, Outcome.CANCELLED):
            self.reason = None
        self.run_dir = None

    def _why(self) -> str | None:
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self.deadline is not None and time.time() >= self.deadline:
            return "time limit"
        if self.run_dir is not None and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            if not self.run_dir.is_mine():
                raise RunLocked(f"{self.run_dir.run_id} has been given to another process")
            if self.run_dir.cancel_path.exists():
                return Outcome.CANCELLED
        return None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A forked child inherits it: there the default action applies."""
        if os.getpid() != self._owner:
            if number != signal.SIGUSR2:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        pause, self._heard = time.monotonic() - self._heard, time.monotonic()
        if number == signal.SIGINT and self._signal is None and self._says:
            print("stopping after this step (Ctrl-C again: at once)", file=sys.stderr)
        elif number == signal.SIGINT and self._signal and (pause > TWICE_S or not self._shared):
            raise KeyboardInterrupt
        self._signal = self._signal or number

    @contextlib.contextmanager
    def installed(self, *numbers: int) -> Iterator[StopFlag]:
        """Let the signals set the flag, and put the handlers back at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {n: signal.signal(n, self.handle) for n in numbers or SIGNALS}
        # A parent that started us inside `shielded` had blocked these signals, which it will send.
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
        try:
            yield self
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Inside, a signal also ends a process that waits for others forever.

        Python's handlers run between two calls of the main thread: in a collective that the
        other ranks have left they would never run, and only kill -9 would end the process. The
        files on disk are complete at any time.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._shared = True
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reads,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._shared = False
            signal.set_wakeup_fd(before)
            os.close(writes)
            thread.join()
            os.close(reads)

    def _watch(self, reads: int) -> None:
        """Ends the process DEAF_S after a signal that the main thread has not handled."""
        main, asked, came = threading.main_thread().ident, 0, 0.0
        assert main is not None
        while True:
            pause = DEAF_S / 4 if asked else None
            if select.select([reads], [], [], pause)[0]:
                numbers = os.read(reads, 4096)
                if not numbers:
                    return
                ours = [n for n in numbers if signal.getsignal(n) == self.handle]
                if ours and not asked:
                    asked, came = ours[0], time.monotonic()
                continue
            if time.monotonic() - max(came, self._heard) > DEAF_S:
                name = signal.Signals(asked).name
                print(f"{name}: ended while waiting for the others", file=sys.stderr, flush=True)
                os._exit(128 + asked)
            if signal.getsignal(signal.SIGTERM) == self.handle:
                signal.pthread_kill(main, signal.SIGTERM)  # works wherever Python code runs


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside never get the scheduler's signals, which go to a whole job."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
