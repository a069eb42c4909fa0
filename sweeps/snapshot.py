"""The code as it is now: recorded with a plan, and copied, so that later edits reach no queued job.

Not for: what an attempt ran with (`experiments/environment.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from experiments.environment import ROOT, SNAPSHOT, code_hash, frozen, git
from relora_core import atomic, shared
from relora_core.config import ConfigError

PARTS = (
    "run.py",
    "pyproject.toml",
    "README.md",
    "conf",
    "relora_core",
    "experiments",
    "sweeps",
    "hydra_plugins/relora_sweeps",
    "relora_sweeps",
)
"""What is copied of the project if there is no git to say it."""
SECRETS = (
    *(".env", ".env.*", ".envrc", ".netrc", ".pgpass", ".my.cnf", ".pypirc", ".npmrc"),
    *(".git-credentials", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa", "id_dsa", "id_ecdsa"),
    *("id_ed25519", "credentials", "credentials.json", "secrets.json", "secrets.y*ml"),
)
"""Never copied and never in a patch, tracked or not: others may read the results."""
OTHER_RUN = re.compile(r"(.+)/runs/[^/]+/config\.json")
"""A name by which a folder among the code is an output folder, perhaps of another command."""
LIMIT_MB = 50.0
"""Of a copy, where no option says otherwise."""
MB = 1e6


@dataclass(kw_only=True, slots=True)
class CodeState:
    """Which code it is."""

    commit: str | None
    """None without git or a checkout, and in one of another owner."""
    dirty: bool | None
    """Whether anything differs from the commit, or is new and not ignored; None: unknown."""
    code_hash: str
    """Digest of relora_core, as attempts record it."""
    untracked: list[str]


@dataclass(kw_only=True, slots=True)
class Entry:
    """One file of a copy; `mode` as in git: 100644, 100755 (executable) or 120000 (link)."""

    name: str
    mode: str
    content: bytes
    """Of a link: where it points."""


# what the code is -------------------------------------------------------------------------------
def code_state(root: Path = ROOT, *, output_dir: Path | str | None = None) -> CodeState:
    """The code at `root` without `output_dir`; git's index is not refreshed."""
    if copy := frozen(root):
        return CodeState(**{f.name: copy[f.name] for f in dataclasses.fields(CodeState)})
    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        return CodeState(commit=None, dirty=None, code_hash=code_hash(root), untracked=[])
    new = _list(root, "ls-files", "--others", "--exclude-standard")
    edited = _list(root, "diff", "--name-only", "--relative", "HEAD")
    untracked, changed = (
        _outside(names or [], root=root, output_dir=output_dir) for names in (new, edited)
    )
    return CodeState(
        commit=commit.strip(),
        dirty=bool(changed or untracked) or (None if edited is None or new is None else False),
        code_hash=code_hash(root),
        untracked=untracked,
    )


def code_diff(root: Path = ROOT, *, untracked: list[str]) -> str:
    """The patch from the commit to the code at `root`, `untracked` files as added ones."""
    diff = ("-c", "core.quotePath=false", "diff", "--binary", "--no-ext-diff", "--no-color")
    diff = (*diff, "--src-prefix=a/", "--dst-prefix=b/")  # whatever the user's git prefers
    added = [
        git(root, *diff, "--no-index", "--", "/dev/null", name, ok=(0, 1)) or ""
        for name in untracked
    ]
    secrets = [f":(exclude,glob)**/{one}{end}" for one in SECRETS for end in ("", "/**")]
    changed = git(root, *diff, "--no-renames", "--relative", "HEAD", "--", ".", *secrets)
    return (changed or "") + "".join(added)


def record(folder: Path, *, root: Path = ROOT, output_dir: Path | str | None = None) -> CodeState:
    """Write code.json and code.diff (from the commit to the code) into `folder`."""
    code = code_state(root, output_dir=output_dir)
    diff = "" if frozen(root) or code.commit is None else code_diff(root, untracked=code.untracked)
    atomic.write_json(folder / "code.json", _facts(code))
    atomic.write_text(folder / "code.diff", _readable(diff))
    return code


def _facts(code: CodeState) -> dict[str, Any]:
    return dataclasses.asdict(code) | {"untracked": [_readable(n) for n in code.untracked]}


def _readable(text: str) -> str:
    """Valid UTF-8: other bytes become question marks."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _list(root: Path, command: str, *arguments: str) -> list[str] | None:
    """The names that a git command prints, without secrets; None if it fails."""
    text = git(root, command, "-z", *arguments)
    if text is None:
        return None
    return [name for name in text.split("\0") if name and not is_secret(name)]


def is_secret(name: str) -> bool:
    """Whether a part of this path is in SECRETS."""
    return any(fnmatch(part, one) for part in name.split("/") for one in SECRETS)


def _outside(names: list[str], *, root: Path, output_dir: Path | str | None) -> list[str]:
    """The names that are not below `output_dir`, directly or through links, nor below another
    folder that has runs."""
    if output_dir is None:
        return names
    bases = {os.path.abspath(root), os.path.realpath(root)}
    targets = {os.path.abspath(output_dir), os.path.realpath(output_dir)}
    out = {os.path.relpath(target, base) for target in targets for base in bases}
    others = (match[1] for name in names if (match := OTHER_RUN.fullmatch(name)))
    out |= {other for other in others if not _is_among_parts(other)}
    return [n for n in names if not any(n == o or n.startswith(f"{o}/") for o in out)]


# the copy ---------------------------------------------------------------------------------------
def check(*, output_dir: Path | str, root: Path = ROOT, limit_mb: float | None = None) -> None:
    """ConfigError if `freeze` would refuse the code at `root`; writes nothing."""
    _check_apart(root, output_dir=output_dir)
    names = _outside(_names(root), root=root, output_dir=output_dir)
    _check_size(root, names, limit_mb=limit_mb)


def freeze(
    folder: Path, *, output_dir: Path | str, root: Path = ROOT, limit_mb: float | None = None
) -> Path:
    """Copy the code at `root` to folder/<tree_hash>, unless it is there already; the copy's path.

    Copies tracked files and new files that git does not ignore, as they are now; without git the
    project's own (PARTS). A link to a file or folder of the copy stays a link; one to another file
    becomes that file; one to another folder becomes absolute. Submodules and other checkouts are
    left out. ConfigError if the files exceed `limit_mb`, an option of SLURM's launcher; None:
    LIMIT_MB.
    """
    _check_apart(root, output_dir=output_dir)
    names = _outside(_names(root), root=root, output_dir=output_dir)
    names = _outside(names, root=root, output_dir=folder)
    _check_size(root, names, limit_mb=limit_mb)
    code = code_state(root, output_dir=output_dir)
    entries = _entries(root, names)
    tree = tree_hash(entries)
    copy = folder / tree
    if copy.exists():
        with contextlib.suppress(PermissionError):  # another user's
            os.utime(copy)  # an old one may be removed (`retention.py`)
    else:
        _write(entries, copy, facts=_facts(code) | {"tree_hash": tree})
    return copy


def tree_hash(entries: list[Entry]) -> str:
    """Digest of names, modes and contents."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.name):
        name = os.fsencode(entry.name)
        digest.update(f"{entry.mode} {len(name)} {len(entry.content)}\0".encode())
        digest.update(name + entry.content)
    return digest.hexdigest()[:16]


def changed_files(one: Path, other: Path) -> list[str]:
    """Names of files that differ between two copies."""
    left, right = ({e.name: e for e in _entries(c, list(_walk(c, ["."])))} for c in (one, other))
    return sorted(n for n in left.keys() | right.keys() if left.get(n) != right.get(n))


def _names(root: Path) -> list[str]:
    """The names of the code at `root`; of git's, some are deleted files and submodules."""
    if frozen(root):
        return list(_walk(root, ["."]))
    names = _list(root, "ls-files", "--cached", "--others", "--exclude-standard")
    return sorted(set(names)) if names else list(_walk(root, PARTS))


def _walk(root: Path, parts: tuple[str, ...] | list[str]) -> Iterator[str]:
    """Files and links below the parts of `root`, without __pycache__, SNAPSHOT and secrets."""
    for part in parts:
        top = root / part
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            name = str(path.relative_to(root))
            generated = name == SNAPSHOT or "__pycache__" in name.split(os.sep)
            if (path.is_symlink() or path.is_file()) and not (generated or is_secret(name)):
                yield name


def _entries(root: Path, names: list[str]) -> list[Entry]:
    return [entry for name in names if (entry := _read(root, name, names=names))]


def _read(root: Path, name: str, *, names: list[str]) -> Entry | None:
    """The file as it is now; None for a deleted one, a submodule and another checkout."""
    path = root / name
    if (target := _link(root, name, names=names)) is not None:
        return Entry(name=name, mode="120000", content=os.fsencode(target))
    if not path.is_file():
        return None
    mode = "100755" if path.stat().st_mode & 0o100 else "100644"
    return Entry(name=name, mode=mode, content=path.read_bytes())


def _link(root: Path, name: str, *, names: list[str]) -> str | None:
    """Where the copied link points; None for a file, and for a link that becomes a file."""
    path = root / name
    if not path.is_symlink():
        return None
    target = os.path.realpath(path)
    if not os.path.exists(target):
        return os.readlink(path)
    inside = os.path.relpath(target, os.path.realpath(root))
    if any(n == inside or n.startswith(f"{inside}/") for n in names):
        return os.path.relpath(target, os.path.realpath(path.parent))
    return target if os.path.isdir(target) else None


def _write(entries: list[Entry], target: Path, *, facts: dict[str, Any]) -> None:
    """Write the copy under a temporary name, then rename it; a failure leaves nothing."""
    shared.make_folder(target.parent)
    copy = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        shared.open_up(copy)
        for entry in entries:
            _put(copy / entry.name, entry)
        atomic.write_json(copy / SNAPSHOT, facts)
        try:
            copy.rename(target)
        except OSError:
            if not (target / SNAPSHOT).exists():
                raise  # else another process has made the same copy
        atomic.sync_folder(target.parent)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # it fails unless the folder is empty


def _put(path: Path, entry: Entry) -> None:
    shared.make_folder(path.parent)
    if entry.mode == "120000":
        path.symlink_to(os.fsdecode(entry.content))
        return
    with shared.open_file(path, "wb") as file:
        file.write(entry.content)
        file.flush()
        os.fsync(file.fileno())  # later launches trust the copy by its name alone
    if entry.mode == "100755":
        path.chmod(0o777 & ~shared.UMASK)
        shared.share(path)


def _check_apart(root: Path, *, output_dir: Path | str) -> None:
    """ConfigError if results would lie among the code that is copied."""
    within = os.path.relpath(os.path.realpath(output_dir), os.path.realpath(root))
    if _is_among_parts(within):
        raise ConfigError(
            f"output_dir must be apart from the code that is to be frozen, got "
            f"{str(output_dir)!r}; nearest valid: 'outputs'"
        )


def _is_among_parts(name: str) -> bool:
    return name.split(os.sep)[0] in (".", *(part.split("/")[0] for part in PARTS))


def _check_size(root: Path, names: list[str], *, limit_mb: float | None) -> None:
    sizes = {
        name: (root / name).stat().st_size
        for name in names
        if (root / name).is_file() and _link(root, name, names=names) is None
    }
    total = sum(sizes.values()) / MB
    most = LIMIT_MB if limit_mb is None else limit_mb
    if total > most:
        largest = sorted(sizes, key=lambda n: -sizes[n])[:3]
        listed = ", ".join(f"{_readable(n)} ({sizes[n] / MB:.1f} MB)" for n in largest)
        wanted = (
            f"the code to freeze must be at most {most:g} MB, got {total:.1f} MB"
            if limit_mb is None
            else f"hydra.launcher.snapshot_limit_mb must be at least {math.ceil(total)}, the code "
            f"to freeze is {total:.1f} MB, got {limit_mb:g}"
        )
        raise ConfigError(f"{wanted}; largest files: {listed} (.gitignore leaves files out)")
