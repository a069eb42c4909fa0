"""The code as it is when a sweep is planned: commit, digest of the science, and the diff.

Works without git (then there is the digest alone). Not for: copying the tree for queued jobs.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from experiments.runner import code_hash
from relora_core import atomic

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True, slots=True)
class CodeState:
    """What the code was; `diff` restores it from `commit`."""

    commit: str | None
    """None outside a git checkout."""
    dirty: bool
    """Whether anything tracked differs from the commit, or is new and not ignored."""
    code_hash: str
    """Digest of relora_core, the same that each attempt records."""
    untracked: list[str]
    diff: str


def code_state(root: Path = ROOT) -> CodeState:
    """Look at the checkout at `root`; changes nothing there, not even git's index."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return CodeState(commit=None, dirty=False, code_hash=code_hash(), untracked=[], diff="")
    new = (_git(root, "ls-files", "-z", "--others", "--exclude-standard") or "").split("\0")
    untracked = [name for name in new if name]
    diff = _git(root, "diff", "--binary", "HEAD") or ""
    diff += "".join(_as_added(root, name) for name in untracked)
    return CodeState(
        commit=commit.strip(),
        dirty=bool(diff or untracked),
        code_hash=code_hash(),
        untracked=untracked,
        diff=diff,
    )


def _as_added(root: Path, name: str) -> str:
    """The diff that creates an untracked file."""
    added = _git(root, "diff", "--binary", "--no-index", "--", "/dev/null", name, ok=(0, 1))
    return added or ""


def _git(root: Path, *arguments: str, ok: tuple[int, ...] = (0,)) -> str | None:
    """git's output, or None where there is no git or `root` is in no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            timeout=60,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode("utf-8", "surrogateescape")
    return text if done.returncode in ok else None


def record(folder: Path, *, root: Path = ROOT) -> CodeState:
    """Write code.json and code.diff into `folder`."""
    code = code_state(root)
    facts = dataclasses.asdict(code)
    diff = facts.pop("diff").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    atomic.write_json(folder / "code.json", facts)
    atomic.write_text(folder / "code.diff", diff)
    return code
