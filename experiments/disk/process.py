"""Whether a process of this host is still the one that a file names: pids are used again."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def process_start(pid: int) -> str | None:
    """Boot and clock tick at which a process began, or None if the system does not say.

    Unlike a time, it stays the same when the clock is set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return f"{_boot()}/{stat.rpartition(')')[2].split()[19]}"
    except OSError:
        return None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def is_of_this_boot(birth: str | None) -> bool:
    """Whether a process that began at `birth` is of this machine, or of a container on it, since
    the machine was started."""
    own = process_start(os.getpid())
    return bool(birth and own) and str(birth).partition("/")[0] == str(own).partition("/")[0]


def is_alive(pid: int, *, birth: str | None, started: float) -> bool:
    """Whether the process with this pid began at `birth`, or if that is None at `started`."""
    try:
        process = psutil.Process(pid)
        same = process_start(pid) == birth if birth else abs(process.create_time() - started) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE  # dead, not yet reaped
    except psutil.NoSuchProcess:
        return _hidden(pid, birth=birth)


def _hidden(pid: int, *, birth: str | None) -> bool:
    """Whether it exists though psutil does not see it, as with /proc mounted with hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return birth is None or birth.startswith(f"{_boot()}/")
    except OSError:
        return False
    return False
