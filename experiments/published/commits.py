"""The checkpoints of a published run by step: on the hub, in a git repository, or in folders.

pico-train pushes each checkpoint as commits of a branch named as the run, one commit a kind; the
one with the model is titled "Saving HF Model -- Step N". Not for: what the files say
(`adapters.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from relora_core.config import ConfigError
from relora_core.data.base import DataError
from relora_core.data.places import expand

TITLE = "Saving HF Model -- Step N"
_TITLE = re.compile(r"Saving HF Model -- Step (\d{1,12})\s*")
_FOLDER = re.compile(r"(?:Saving HF Model -- Step |step[-_])(\d{1,12})")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Repository(Protocol):
    """Branches of commits, and the files at a commit."""

    name: str

    def branches(self) -> list[str]: ...

    def commits(self, branch: str) -> Iterable[tuple[str, str]]:
        """(id, title), newest first."""
        ...

    def file(self, commit: str, name: str) -> bytes:
        """DataError where the commit has no such file."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoints:
    """The commits of one branch that hold a model."""

    repository: Repository
    branch: str
    commits: dict[int, str]
    """Step -> commit, in the order of steps."""
    notes: list[str]

    def file(self, step: int, name: str) -> bytes:
        return self.repository.file(self.commits[step], name)


def find(source: str, *, revision: str | None = None) -> Checkpoints:
    """The checkpoints of OWNER/NAME on the hub, or of a local folder or git repository.

    ConfigError where there are none, or where several branches have some and none is named.
    """
    return choose(_open(source), revision=revision)


def _open(source: str) -> Repository:
    path = expand(source)
    if path.is_dir():
        bare = (path / "HEAD").is_file() and (path / "objects").is_dir()
        return Git(path) if bare or (path / ".git").exists() else Folders(path)
    if path.exists() or not _HUB_NAME.fullmatch(source):
        raise ConfigError(f"REPO must be OWNER/NAME on the hub or a local folder, got {source!r}")
    from huggingface_hub import HfApi

    return Hub(source, api=HfApi())


def choose(repository: Repository, *, revision: str | None) -> Checkpoints:
    """Those of `revision`; without one, of the branch named as the repository, or the only one."""
    if revision is not None:
        taken = {revision: _by_step(repository, revision)}
    else:
        branches = repository.branches()
        own = repository.name.rpartition("/")[2]
        taken = {own: _by_step(repository, own)} if own in branches else {}
        if not taken.get(own, ({}, []))[0]:
            taken = {branch: _by_step(repository, branch) for branch in branches}
    taken = {branch: by_step for branch, by_step in taken.items() if by_step[0]}
    where = f"{repository.name} at {revision}" if revision is not None else repository.name
    if not taken:
        raise ConfigError(f"REPO must have checkpoints titled {TITLE!r}, got {where} without one")
    if len(taken) > 1:
        raise ConfigError(
            f"--revision must name one of the branches with checkpoints: {', '.join(taken)}"
        )
    [(branch, (commits, notes))] = taken.items()
    return Checkpoints(
        repository=repository, branch=branch, commits=dict(sorted(commits.items())), notes=notes
    )


def _by_step(repository: Repository, branch: str) -> tuple[dict[int, str], list[str]]:
    """Step -> commit. A resumed run pushes steps again: the newest is what it went on from."""
    commits: dict[int, str] = {}
    again: set[int] = set()
    for commit, title in repository.commits(branch):
        if match := _TITLE.fullmatch(title):
            step = int(match[1])
            if step in commits:
                again.add(step)
            commits.setdefault(step, commit)
    steps = ", ".join(map(str, sorted(again)[:5]))
    notes = [f"several commits of one step, of which the newest is read: {steps}"]
    return commits, notes if again else []


class Folders:
    """A folder of folders, one a commit, named by its title or `step_N`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def branches(self) -> list[str]:
        return [""]

    def commits(self, branch: str) -> Iterable[tuple[str, str]]:
        if branch:
            raise ConfigError(f"--revision must be left out for a folder of folders, got {branch}")
        steps: dict[int, str] = {}
        for folder in sorted(p.name for p in self.path.iterdir() if p.is_dir()):
            if match := _FOLDER.fullmatch(folder):
                step = int(match[1])
                if step in steps:
                    raise DataError(f"{self.path}: {steps[step]!r} and {folder!r} are one step")
                steps[step] = folder
        return [(folder, f"Saving HF Model -- Step {step}") for step, folder in steps.items()]

    def file(self, commit: str, name: str) -> bytes:
        try:
            return (self.path / commit / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{self.path / commit} has no {name}") from None


class Git:
    """A clone. Only commands that run nothing which the clone's own settings name."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def branches(self) -> list[str]:
        names = self._git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes")
        short = [re.sub(r"^refs/(heads|remotes/[^/]+)/", "", n) for n in names.decode().split()]
        return [name for name in dict.fromkeys(short) if name != "HEAD"]

    def commits(self, branch: str) -> Iterable[tuple[str, str]]:
        lines: list[str] = []
        for name in (branch, f"origin/{branch}"):  # a clone has one local branch
            try:
                listed = self._git("rev-list", "--format=%s", "--end-of-options", name, "--")
            except DataError:
                if name != branch:
                    raise
            else:
                lines = listed.decode(errors="replace").splitlines()
                break
        return [
            (a.removeprefix("commit "), b) for a, b in zip(lines[::2], lines[1::2], strict=True)
        ]

    def file(self, commit: str, name: str) -> bytes:
        content = self._git("cat-file", "blob", f"{commit}:{name}")
        if not content.startswith(b"version https://git-lfs"):
            return content
        oid = re.search(rb"^oid sha256:([0-9a-f]{64})$", content, flags=re.M)
        digest = oid[1].decode() if oid else ""
        folder = Path(self._git("rev-parse", "--git-common-dir").decode().strip())
        file = self.path / folder / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
        if not digest or not file.is_file():
            raise DataError(
                f"{self.path}: {name} of {commit[:12]} is not here: `git lfs fetch --all` brings it"
            )
        return file.read_bytes()

    def _git(self, *words: str) -> bytes:
        # A partial clone would call its remote's helper for what it lacks.
        environment = os.environ | {"GIT_ALLOW_PROTOCOL": "none", "LC_ALL": "C"}
        command = ["git", "-C", str(self.path), *words]
        try:
            done = subprocess.run(command, capture_output=True, env=environment, check=False)
        except FileNotFoundError:
            raise ConfigError("REPO is a git repository, which needs git on the PATH") from None
        if done.returncode:
            why = " ".join(done.stderr.decode(errors="replace").split())[:200]
            raise DataError(f"{self.path}: git {words[0]}: {why}")
        return done.stdout


class Hub:
    """A model repository on the hub, through huggingface_hub's `HfApi`."""

    def __init__(self, name: str, *, api: Any) -> None:
        self.name, self.api = name, api

    def branches(self) -> list[str]:
        refs = self._ask(self.api.list_repo_refs, self.name)
        return [branch.name for branch in refs.branches]

    def commits(self, branch: str) -> Iterable[tuple[str, str]]:
        listed = self._ask(self.api.list_repo_commits, self.name, revision=branch)
        return [(commit.commit_id, commit.title) for commit in listed]

    def file(self, commit: str, name: str) -> bytes:
        path = self._ask(self.api.hf_hub_download, self.name, name, revision=commit)
        return Path(path).read_bytes()

    def _ask(self, call: Any, *words: str, **options: str) -> Any:
        try:
            return call(*words, **options)
        except Exception as error:  # whatever the HTTP client of the day raises
            at = "".join(f" at {value}" for value in options.values())
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            what = " ".join(words)
            raise DataError(f"the hub's {what}{at} cannot be read ({why})") from None
