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

SPLITS = ("train", "validation", "val", "valid", "dev", "test")
"""Usual names of splits."""
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?")


def expand(path: str | Path) -> Path:
    """The path with its `~` or `~user` written out, where there is such a user."""
    return Path(os.path.expanduser(path))  # `Path.expanduser` raises for an unknown one


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


def shorten(names: Iterable[str]) -> str:
    """The first three of the names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def walk(root: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """(name relative to `root`, file) of the files below it, by name; a line for each kind of
    skipped files.

    Links to folders are followed. A folder with two paths to it is read once, under its own name
    if that is below `root`; so is a circle of links. Names that begin with a dot are hidden.
    """
    files: list[tuple[str, Path]] = []
    skips: dict[str, list[str]] = {}
    above = {_identity(parent) for parent in root.resolve().parents}
    visited: set[tuple[int, int]] = set()
    folders, links = [(root, "")], []
    while folders or links:  # links last: a folder below `root` keeps its own name
        folder, prefix = folders.pop() if folders else links.pop(0)
        try:
            if (own := _identity(folder)) in visited | above:
                why = "links to folders that are read already, or that hold this one, not followed"
                skips.setdefault(why, []).append(prefix.rstrip("/"))
                continue
            visited.add(own)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skips.setdefault(f"not readable ({error.strerror})", []).append(prefix.rstrip("/"))
            continue
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                if entry.is_file():
                    skips.setdefault("hidden files, not read", []).append(name)
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append((Path(entry.path), f"{name}/"))
            elif entry.is_file():
                files.append((name, Path(entry.path)))
            elif entry.is_symlink():
                skips.setdefault("links that lead nowhere", []).append(name)
    return sorted(files), [f"{why}: {shorten(names)}" for why, names in skips.items()]


def split_of(name: str) -> str | None:
    """The split of a hub data set that a parquet file's relative name stands for, if any.

    `train-00000-of-00004.parquet`, `train.parquet`, `default/train/0000.parquet`,
    `split=train/0.parquet`.
    """
    *folders, file = name.split("/")
    if split := _split_of_file(file):
        return split
    for folder in reversed(folders):
        split = folder.removeprefix("split=")
        if split != folder or split in SPLITS:
            return split
    return None


def _split_of_file(name: str) -> str | None:
    """None where the name has none."""
    stem = name.removesuffix(".parquet")
    split, *rest = stem.split("-")
    numbered = len(rest) == 3 and rest[0].isdigit() and rest[1] == "of" and rest[2].isdigit()
    return split if numbered or (split in SPLITS and len(rest) <= 1) else None


def _identity(path: Path) -> tuple[int, int]:
    at = path.stat()
    return at.st_dev, at.st_ino


def hub_name(source: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) where `source` could be `owner/name[@revision]`, else None."""
    match = _HUB_NAME.fullmatch(source)
    return (match["name"], match["revision"]) if match else None


def hub_commit(source: str, *, repo_type: str) -> str:
    """Commit that a hub name stands for now. Raises LookupError, one line, where there is none."""
    parts = hub_name(source)
    if parts is None:
        raise LookupError("it is no hub name (owner/name) either")
    return commit_of(*parts, repo_type=repo_type)


def commit_of(name: str, revision: str | None, *, repo_type: str) -> str:
    """`hub_commit` of a name and a revision; old names of models have no owner.

    Asked before anything is downloaded: the download helpers retry for half a minute when the hub
    cannot be reached, this answers at once.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise LookupError("the hub has none of that name") from None
    except Exception as error:  # whatever the HTTP client of the day raises
        raise LookupError(f"the hub could not be reached ({type(error).__name__})") from None
    if not info.sha:
        raise LookupError("the hub tells no revision of it")
    return info.sha


Stamp = tuple[str, int, int, int, int]
"""Path, size, times of the newest change of content and of the file itself (ns), inode."""


def read_stamps(files: Iterable[Path]) -> tuple[Stamp, ...]:
    """Size, times and inode of files: while these stay, contents count as unchanged.

    What escapes is a change that keeps size, inode and both times. No command sets the second time
    (ctime): it takes a clock that was set back, or a file system that keeps no such time.
    """
    return tuple(
        (str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
        for f in files
        for s in (f.stat(),)
    )


def path_error(key: str, *, source: str, expected: str, why: str = "") -> ConfigError:
    """The one line for a path that is not there."""
    reason = f"no such local path, and {why}" if why else "no such path"
    sibling = nearest_sibling(expand(source))
    return ConfigError(f"{key} must be {expected}, got {source!r}: {reason}.{sibling}")
