"""Where data lie: a local path, a name on the hub, or one clear line about what is missing.

Not for: reading what lies there.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from relora_core.config import ConfigError

_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?")


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def nearest_sibling(path: Path) -> str:
    """` Did you mean '...'?` with what lies beside the first missing part of `path`, or nothing."""
    missing = path.absolute()
    while not missing.parent.exists():
        missing = missing.parent
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(missing.parent))
    close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    return f" Did you mean '{missing.parent / close[0]}'?" if close else ""


def hub_name(source: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) where `source` could be `owner/name[@revision]`, else None."""
    match = _HUB_NAME.fullmatch(source)
    return (match["name"], match["revision"]) if match else None


def hub_commit(source: str, *, repo_type: str) -> str:
    """Commit that a hub name stands for now. Raises LookupError, one line, where there is none.

    Asked before anything is downloaded: the download helpers retry for half a minute when the hub
    cannot be reached, this answers at once.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    parts = hub_name(source)
    if parts is None:
        raise LookupError("it is no hub name (owner/name) either")
    name, revision = parts
    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise LookupError("the hub has none of that name") from None
    except Exception as error:  # whatever the HTTP client of the day raises
        raise LookupError(f"the hub could not be reached ({type(error).__name__})") from None
    if not info.sha:
        raise LookupError("the hub tells no revision of it")
    return info.sha


Look = tuple[str, int, int, int, int]
"""Path, size, times of the newest change of content and of the file itself (ns), inode."""


def looks(files: Iterable[Path]) -> tuple[Look, ...]:
    """How files look from outside: while that stays, their contents are taken to stay.

    What escapes is a change that keeps size, inode and both times. No command sets the second time
    (ctime): it takes a clock that was set back, or a file system that keeps no such time.
    """
    return tuple(
        (str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
        for f in files
        for s in (f.stat(),)
    )


def missing(key: str, *, source: str, expected: str, why: str = "") -> ConfigError:
    """The one line for a path that is not there."""
    reason = f"no such local path, and {why}" if why else "no such path"
    sibling = nearest_sibling(Path(source).expanduser())
    return ConfigError(f"{key} must be {expected}, got {source!r}: {reason}.{sibling}")
