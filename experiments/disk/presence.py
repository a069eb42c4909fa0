"""Files that are held as long as their process lives, for containers of its machine: in each of
them pids mean other processes, and most have a name of their own.

    output_dir/.processes/<host>-<pid>-<birth>-<device>     empty

`device` is the mount, of which containers may have one each (FUSE) that shows no flock of others.

Not for: processes of other machines, of which nobody here can know.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from experiments.disk import flock
from experiments.disk.process import is_of_this_boot, process_start
from relora_core import shared


@contextlib.contextmanager
def shown(output_dir: Path | str) -> Iterator[Path]:
    """Hold this process's file while the body runs.

    The body removes it at its end if it leaves nothing that names this process. After a kill it
    stays: one that is not held says for certain that the process has ended, none says nothing.
    """
    birth = process_start(os.getpid())
    shared.make_folder(Path(output_dir) / ".processes")
    path = _path(output_dir, host=socket.gethostname(), pid=os.getpid(), birth=birth)
    shared.touch(path)
    held = flock.hold(path)
    if held is None:  # the file must not say that this process has ended
        path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        if held is not None:
            flock.release(held)


def is_shown(output_dir: Path | str, *, host: str, pid: int, birth: str | None) -> bool | None:
    """Whether the process lives; None in doubt: it is of another machine or an earlier boot, or
    it has no file on this mount."""
    if not is_of_this_boot(birth):
        return None
    return flock.is_held(_path(output_dir, host=host, pid=pid, birth=birth))


def _path(output_dir: Path | str, *, host: str, pid: int, birth: str | None) -> Path:
    folder = Path(output_dir) / ".processes"
    device = folder.stat().st_dev if folder.exists() else 0
    return folder / f"{host}-{pid}-{birth}-{device}".replace("/", "_")
