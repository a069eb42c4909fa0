"""Files that are either the old or the new content after a crash, never half of one."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relora_core import shared

TORN_AFTER_S = 600.0
"""No write of a small file takes so long, whatever the disk."""


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it, flushed to disk, then renamed."""
    with _beside(path, text) as temporary:
        temporary.replace(path)
    sync_folder(path.parent)


def create_text(path: Path, text: str) -> None:
    """A new file with its content from the start; FileExistsError where there is one."""
    with _beside(path, text) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # no links on this file system: a kill may leave it empty
            with shared.open_file(path, "x", encoding="utf-8") as file:
                file.write(text)
        temporary.unlink()
    sync_folder(path.parent)


@contextlib.contextmanager
def _beside(path: Path, text: str) -> Iterator[Path]:
    """A temporary file with `text`, flushed to disk; removed on an error."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        os.fchmod(descriptor, 0o666 & ~shared.UMASK)  # as `open` does, not mkstemp's 0600
        shared.share(temporary, descriptor=descriptor)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def torn(folder: Path) -> list[Path]:
    """Temporary files too old for any process to be still writing them."""
    leftover = []
    for path in sorted(folder.glob(".*.tmp")):
        with contextlib.suppress(FileNotFoundError):
            # If the clock was set back, files seem to come from the future.
            if abs(time.time() - path.stat().st_mtime) > TORN_AFTER_S:
                leftover.append(path)
    return leftover


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_folder(path: Path) -> None:
    """Make a rename or creation in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
