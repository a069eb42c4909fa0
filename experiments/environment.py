"""What an attempt runs with: code, packages, machine, the scheduler's job.

Not for: copying the code (`sweeps/snapshot.py`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from experiments.scheduler import current_job, gpus_asked
from relora_core.config import ConfigError, RunConfig, lacks_gpu, needs_gpu
from relora_core.sources import code_hash

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "relora_sweeps"
"""The folder that a wheel has run.py and conf/ in."""


def is_installed(root: Path = ROOT) -> bool:
    """Whether pip has put a wheel's files at `root`, among those of other projects.

    True of a frozen copy of them, too, and False of a checkout.
    """
    return (root / PACKAGE / "conf").is_dir()


CONF = (ROOT / PACKAGE if is_installed() else ROOT) / "conf"
RUN = "relora-sweeps run" if is_installed() else "python run.py"
"""What a user types."""
EXPERIMENTS = "relora-sweeps" if is_installed() else "python -m experiments"
SWEEPS = "relora-sweeps" if is_installed() else "python -m sweeps"
"""Likewise before a command of either package."""
SNAPSHOT = "SNAPSHOT.json"
"""Marks a frozen copy of the code and says what it is a copy of."""
PACKAGES = (
    "torch",
    "accelerate",
    "numpy",
    "hydra-core",
    "omegaconf",
    "mlflow",
    "submitit",
    "datasets",
    "tokenizers",
    "safetensors",
    "transformers",
    "cut-cross-entropy",
)
_REDIRECTS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a git hook sets them for its own tree


def python_path(code: Path = ROOT) -> str:
    """PYTHONPATH of a process that is to import the project from `code`."""
    return os.pathsep.join(filter(None, (str(code.absolute()), os.environ.get("PYTHONPATH"))))


def attempt_record(**extra: Any) -> dict[str, Any]:
    """Host, process, code and packages of an attempt, for comparing and debugging."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        "python": platform.python_version(),
        "code_hash": code_hash(),
        **git_state(),
        "packages": dict(packages()),
        "cpu": cpu(),
        "cores": cores(),
        "gpus": gpus(),
        "job_id": current_job(),
        "slurm": slurm(),
        **extra,
    }


# code -------------------------------------------------------------------------------------------
def frozen(root: Path = ROOT) -> dict[str, Any] | None:
    """What `root` is a frozen copy of; None for a checkout."""
    try:
        return json.loads((root / SNAPSHOT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


@cache
def git_state(root: Path = ROOT) -> dict[str, Any]:
    """{"commit", "dirty"}, and "tree_hash" of a frozen copy; empty if git gives none."""
    copy = frozen(root)
    if copy is not None:  # git would report the checkout around the copy
        facts = {key: copy[key] for key in ("commit", "dirty", "tree_hash")}
        return {key: value for key, value in facts.items() if value is not None}
    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = git(root, "status", "--porcelain", ".")
    dirty = {} if changes is None else {"dirty": changes != ""}
    return {"commit": commit.strip(), **dirty}


@cache
def notes(root: Path = ROOT) -> tuple[str, ...]:
    """A line if the code is in a git checkout, but its commit cannot be read.

    Git may be missing, or the checkout may be another user's and no `safe.directory`.
    """
    around = any((folder / ".git").exists() for folder in (root, *root.parents))
    if frozen(root) or is_installed(root) or not around:
        return ()
    try:
        done = _run(root, "rev-parse", "HEAD")
    except (OSError, subprocess.TimeoutExpired) as error:
        return (f"code: no commit is recorded, git cannot be run: {error}",)
    if not done.returncode:
        return ()
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    why = next((line.removeprefix("fatal: ") for line in lines if line), "git gives no reason")
    way = f" (git config --global --add safe.directory {root})" if "ownership" in why else ""
    return (f"code: no commit is recorded: {why}{way}",)


def git(root: Path, *arguments: str, ok: tuple[int, ...] = (0,)) -> str | None:
    """git's output at `root`, None if it fails. Git takes no locks and leaves its index alone.

    None, too, where a wheel is installed: a checkout around it is another project's.
    """
    if is_installed(root):
        return None
    try:
        done = _run(root, *arguments)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode("utf-8", "surrogateescape")
    return text if done.returncode in ok else None


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {k: v for k, v in os.environ.items() if k not in _REDIRECTS}
    return subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        timeout=60,
        env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
        check=False,
    )


# machine ----------------------------------------------------------------------------------------
@cache
def packages() -> Mapping[str, str]:
    """Versions of the packages that numbers depend on; those not installed are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu() -> str:
    """The processor's name as the kernel gives it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use, fewer than the machine's inside a job."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the visible GPUs, once torch has been imported; [] before."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def gpu_asked(config: RunConfig) -> str | None:
    """The setting that asks for a GPU for this run; None if none does, or a CPU is wanted."""
    if config.runtime.device == "cpu":
        return None
    if setting := needs_gpu(config):
        return setting
    if asked := gpus_asked():
        return f"a job of {asked} GPUs on each node (hydra.launcher.gpus_per_node or resources)"
    asked = config.resources.gpus_per_node
    return f"resources.gpus_per_node={asked}" if asked else None


def check_gpu(config: RunConfig) -> None:
    """ConfigError if a GPU is asked for and this process finds none."""
    asked = gpu_asked(config)
    if asked is None:
        return
    import torch  # a second, which a run on a CPU need not wait for here

    if not torch.cuda.is_available():
        raise no_gpu(config, asked)


def no_gpu(config: RunConfig, asked: str) -> ConfigError:
    """The error if there is no GPU, and `asked` (as of `gpu_asked`) asks for one."""
    if asked == needs_gpu(config):
        return lacks_gpu(asked)
    device = config.runtime.device
    return ConfigError(
        f"runtime.device must be cpu here (no GPU found), got {device!r} with {asked}"
    )


# scheduler --------------------------------------------------------------------------------------
def slurm() -> dict[str, Any]:
    """{"node", "partition", "restarts"} of this process's SLURM job; empty outside."""
    if current_job() is None:
        return {}
    return {
        "node": os.environ.get("SLURMD_NODENAME"),
        "partition": os.environ.get("SLURM_JOB_PARTITION"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
