"""Share new files and folders with their folder's group, if that group may write there.

A lab's output folder is group-writable (`chmod g+ws`); the umask of whoever made a file would keep
the others out of it. Elsewhere the umask decides. Not for: what is in a file (`atomic.py`).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import stat
from pathlib import Path
from typing import IO, Any

UMASK = os.umask(0o022)  # can be read only by setting it: once, before there are threads
os.umask(UMASK)

FILE, FOLDER = 0o060, 0o070
"""What a group needs of what it shares."""
HINT = "`status`, `ui` and `report SWEEP --output DIR` look without writing"


def make_folder(path: Path) -> Path:
    """`path`, created if it is missing, with its parents."""
    if path.is_dir():
        return path
    if path.parent != path:
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    share(path)
    return path


def open_file(path: Path, mode: str, **options: Any) -> IO[Any]:
    """`open`, for files to write."""
    file = open(path, mode, **options)  # noqa: SIM115 (the caller's to close)
    share(path, descriptor=file.fileno())
    return file


def touch(path: Path) -> None:
    """`path`, created empty if it is missing."""
    open_file(path, "ab").close()


def write_text(path: Path, text: str) -> None:
    """For a file that is read only when it is complete; for any other `atomic.write_text`."""
    with open_file(path, "w", encoding="utf-8") as file:
        file.write(text)


def share(path: Path, *, descriptor: int | None = None) -> None:
    """Give what we own to the group that may write to its folder, if there is one.

    No link is followed: a member of the group could have put one there.
    """
    folder = path.parent.stat()
    if not folder.st_mode & stat.S_IWGRP:
        return
    with contextlib.suppress(OSError):  # a group that we are not in, a disk that knows no modes
        if descriptor is not None:
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                _share(descriptor, os.fstat(descriptor), folder)
            return
        # Closing a file that was opened in any other way would release SQLite's locks on it.
        handle = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK)
        own = os.open(path, handle | os.O_NOFOLLOW)
        try:
            _share(f"/dev/fd/{own}", os.fstat(own), folder)
        finally:
            os.close(own)


def _share(target: int | str, own: os.stat_result, folder: os.stat_result) -> None:
    is_folder = stat.S_ISDIR(own.st_mode)
    if own.st_uid != os.geteuid() or not (is_folder or stat.S_ISREG(own.st_mode)):
        return
    bits = FOLDER if is_folder or own.st_mode & stat.S_IXUSR else FILE
    if own.st_gid != folder.st_gid:
        os.chown(target, -1, folder.st_gid)
    if is_folder and (folder.st_mode & stat.S_ISGID or own.st_gid != folder.st_gid):
        bits |= stat.S_ISGID
    if own.st_mode | bits != own.st_mode or own.st_gid != folder.st_gid:
        os.chmod(target, stat.S_IMODE(own.st_mode) | bits)


def open_up(folder: Path) -> None:
    """A folder of `mkdtemp`, and what is in it, as `mkdir` would have made it."""
    inherited = folder.stat().st_mode & stat.S_ISGID
    folder.chmod(inherited | 0o777 & ~UMASK)
    share_all(folder)


def share_all(folder: Path) -> None:
    """`share` of a folder and everything below it, which another program has made."""
    share(folder)
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            share(Path(place) / name)


# what is closed -----------------------------------------------------------------------------------
def find_obstacle(path: Path | str) -> str | None:
    """One line on why nothing can be written at `path`, a file or a folder; None where it can."""
    path = Path(os.path.abspath(path))
    for place in (path, *path.parents):
        try:
            status = place.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            continue  # the folder that may not be entered is above it
        return _describe_obstacle(place, status)
    return None


def _describe_obstacle(place: Path, status: os.stat_result) -> str | None:
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return f"{place} is on a disk that is mounted read-only"
    is_folder = stat.S_ISDIR(status.st_mode)
    wanted = os.W_OK | os.X_OK if is_folder else os.W_OK
    if not os.access(place, wanted, effective_ids=os.access in os.supports_effective_ids):
        if status.st_uid == os.geteuid():
            return f"{place} is read-only, though it is yours (`chmod u+w` opens it)"
        bits = "g+wx" if is_folder and not status.st_mode & stat.S_IXGRP else "g+w"
        return (
            f"{place} is read-only for you (owner {_user(status.st_uid)}, whose `chmod {bits}` "
            f"opens it to group {_group(status.st_gid)})"
        )
    return None


def _find_sticky_bit(path: Path) -> str | None:
    """In a folder with the sticky bit only a file's owner may replace it, whatever its mode."""
    with contextlib.suppress(OSError):
        own, above = path.lstat(), path.parent.stat()
        if above.st_mode & stat.S_ISVTX and os.geteuid() not in (0, own.st_uid, above.st_uid):
            return (
                f"{path} cannot be replaced by you (owner {_user(own.st_uid)}, in a folder with "
                f"the sticky bit, which `chmod -t` by {_user(above.st_uid)} takes off)"
            )
    return None


def explain(error: OSError) -> str | None:
    """`find_obstacle` of the file that an error of permissions names, and a way out."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return None
    names = [n for n in (error.filename2, error.filename) if isinstance(n, str | Path)]
    checks = (_find_sticky_bit, find_obstacle) if error.errno == errno.EPERM else (find_obstacle,)
    lines = (check(Path(name)) for check in checks for name in names)
    line = next((line for line in lines if line), None)
    return line and f"{line}; {HINT}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return f"gid {number}"
