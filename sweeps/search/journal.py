"""Optuna's journal in a file that survives kill -9: no stale lock, no torn line, damage noticed.

Optuna's own lock files outlive their process by 30 s; a flock ends with it. Half a line, left by a
killed process, has had no effect: the next writer cuts it off.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock  # exported under no other name

from experiments.disk import flock
from relora_core import shared


class _Flock(BaseJournalFileLock):
    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._file = shared.open_file(Path(f"{self.journal}.lock"), "wb")  # until release
        flock.lock(self._file)
        _cut_torn_line(self.journal)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()


def _cut_torn_line(journal: Path) -> None:
    with open(journal, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - 65536, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def journal_storage(journal: Path) -> JournalStorage:
    """The storage. With a damaged file it raises whatever Optuna does."""
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=_Flock(journal)))


def damage(journal: Path) -> str | None:
    """What is wrong with the file, if anything; a torn last line is not."""
    try:
        with open(journal, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") and not _is_entry(line):
                    return f"line {number} is no entry"
    except FileNotFoundError:
        return "it is not there"
    return None


def _is_entry(line: bytes) -> bool:
    try:
        return "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False


@contextlib.contextmanager
def unchanged(journal: Path) -> Iterator[None]:
    """A context in which no other process appends to the file."""
    with only_one(Path(f"{journal}.lock")):
        yield


def set_aside(journal: Path) -> None:
    """Rename a damaged journal, to make place for a new one."""
    if journal.exists():
        journal.rename(journal.with_name(f"{journal.name}.damaged-{time.time_ns()}"))


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """A context that one process has at a time, on all machines; its death releases the lock.

    Without write access there is no lock: reading is safe, as a journal grows by whole lines.
    """
    if shared.find_obstacle(path):
        yield
        return
    with shared.open_file(path, "w") as file:
        flock.lock(file)
        yield
