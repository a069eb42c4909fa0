"""Whether a run is to end early: signals, its job's time limit, the user's cancel, a lost lock.

A signal's handler only sets a flag, which the training loop reads between steps. Not for: what
happens then (`runner.py`, `sweeps/worker.py`).
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
"""How often the disk is read to see whether the user has cancelled the run."""
DEAF_S = 60.0
"""A rank that stays in one call for so long after it was asked to end waits for a dead one."""
TWICE_S = 1.0
"""Two SIGINTs closer than this are one Ctrl-C: the terminal and the launcher each send it."""
SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""What schedulers send; USR2, since NCCL uses USR1."""


class StopFlag:
    """Whether this process should end at the next step, and why. Callable: `train(stop=flag)`."""

    def __init__(self, *, deadline: float | None = None, says: bool = True) -> None:
        self.deadline = deadline
        """Seconds since the epoch by which everything must be on disk."""
        self._says = says
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
        """End the current run, unless there is a reason to end the process."""
        if not self():
            self.reason = Outcome.PRUNED

    def next_run(self) -> None:
        """Prepare for the next run: clear a reason that concerned only the last one."""
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
        """Handle a signal. In a forked child, which inherits the handler, the default applies."""
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
        """Let these signals set the flag inside the context."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {n: signal.signal(n, self.handle) for n in numbers or SIGNALS}
        # A parent that started us inside `shielded` has blocked the signals that it may send.
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

        Python runs handlers in the main thread, between two calls: never, if that thread waits in a
        collective for ranks that have ended. The files on disk are complete at any time.
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
        """End the process DEAF_S after a signal if the main thread has not handled it."""
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
    """Block the scheduler's signals, which go to a whole job, for processes started inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, and no more; outside the main thread nothing does."""
    stop = threading.Event()

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
