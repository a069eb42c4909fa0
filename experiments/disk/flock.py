"""Locks of the kernel on open files, which end with their process however it ends.

Not for: who has a run (`run_dir.py`), which other machines must be able to read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO, Any

_held: set[IO[bytes]] = set()


def lock(file: IO[Any], *, wait: bool = True) -> None:
    """Lock an open file until it is closed; BlockingIOError if another process has it locked and
    `wait` is False."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        why = f"this disk has no file locks, which keep two commands apart ({error.strerror})"
        raise OSError(error.errno, why, file.name) from None


def hold(path: Path) -> IO[bytes] | None:
    """The file, held until it is closed or this process ends.

    None if the disk has no locks, or if nobody could read the file meanwhile: they are mandatory on
    CIFS since Linux 5.5 (flock(2)).
    """
    try:
        file = open(path, "rb+", buffering=0)  # noqa: SIM115 (the caller's to close)
    except OSError:
        return None
    _held.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.read_bytes()  # as others do: `file` itself may always be read
    except OSError:
        release(file)
        return None
    return file


def release(file: IO[bytes]) -> None:
    _held.discard(file)
    with contextlib.suppress(OSError):  # a network disk on which another has removed it
        file.close()


def is_held(path: Path) -> bool | None:
    """Whether a process of this machine, or of a container on it, holds the file; None in doubt."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _let_go() -> None:
    """Close a forked child's copies, which would hold the files when the process has ended."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)
