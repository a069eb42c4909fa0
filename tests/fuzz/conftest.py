"""An alarm for what never ends (`command_line.timed` sets it)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest


class Hang(BaseException):
    """No Exception, so that no handler takes it for a failure."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that uses more CPU than any should is told where it was; see `command_line.timed`."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang("a case took too long")

    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
