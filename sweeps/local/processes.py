"""What worker processes of this machine share: a warm parent, Ctrl-C, waiting times."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from sweeps.local import warm
from sweeps.local.slots import Slots
from sweeps.local.warm import Warm

POLL_S = 0.2
GRACE_S = 60.0
"""When the sweep is stopped: from terminate, on which a worker saves, to kill."""


@contextlib.contextmanager
def warmed(parent: Sequence[str] | None, *, slots: Slots, runs: int) -> Iterator[Warm | None]:
    """A warm parent that has begun to import; None where it saves nothing or is not safe."""
    if parent is None or runs < 2 or not warm.available():
        yield None
        return
    with warm.open_parent(parent, environment=slots.shared()) as forks:
        yield forks


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the handlers do nothing else."""
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
