"""Waiting for what other processes and threads do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(what: Callable[[], T], *, within_s: float = 300) -> T:
    """What it gives as soon as that is true; AssertionError if it never is."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if value := what():
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {within_s:.0f} s in vain")
