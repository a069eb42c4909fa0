"""A process's file says whether it lives, to those who see its mount."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from experiments.disk.presence import is_shown, shown
from experiments.disk.process import process_start


def test_a_file_tells_the_end_of_its_process_on_its_own_mount_alone(tmp_path: Path) -> None:
    birth = process_start(os.getpid())

    def ask() -> bool | None:
        return is_shown(tmp_path, host=socket.gethostname(), pid=os.getpid(), birth=birth)

    assert ask() is None, "no file yet"
    with shown(tmp_path) as path:
        assert ask() is True
    assert ask() is False
    path.rename(f"{path}1")  # as a mount with another number sees it
    assert ask() is None
