"""An alarm for tests that would never end (`command_line.timed` sets it)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest


class Hang(BaseException):
    """Not an Exception: no handler may take it for a failure of a run."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that uses too much CPU fails where it stands; see `command_line.timed`."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang("a case took too long")

    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
