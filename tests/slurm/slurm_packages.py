"""SLURM's programs, from the distribution's packages where this process may install them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = [
    *("slurmctld", "slurmd", "slurm-client", "munge"),
    *("slurmdbd", "mariadb-server-core", "mariadb-client-core"),
]
PROGRAMS = [
    *("slurmctld", "slurmd", "sbatch", "srun", "munged", "munge"),
    *("slurmdbd", "sacctmgr", "mariadbd", "mariadb"),
]
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
POLICY = Path("/usr/sbin/policy-rc.d")


def install() -> str | None:
    """Makes SLURM's programs available; the reason where they cannot be."""
    if os.environ.get("RELORA_SLURM") == "off":
        return "RELORA_SLURM=off"
    if not _missing():
        return None
    if os.geteuid() or not shutil.which("apt-get"):
        return f"{', '.join(_missing())} not on PATH, and no root with apt-get to install them"
    with (Path(tempfile.gettempdir()) / "relora-slurm-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other test worker may be at it
        return _apt() if _missing() else None


def _missing() -> list[str]:
    return [program for program in PROGRAMS if not shutil.which(program, path=PATH)]


def _apt() -> str | None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    with _no_service_starts():
        for command in (["apt-get", "update", "-qq"], install):
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if missing := _missing():
        last = (done.stderr.strip().splitlines() or ["apt-get said nothing"])[-1]
        return f"apt-get could not install {', '.join(missing)}: {last}"
    return None


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Packages install without starting their daemons with the system's own configuration."""
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink()
