"""A Chromium for the tests: the distribution's, installed where this process may."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
ARGS = [
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", NOWHERE),
]


def program() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def install() -> str | None:
    """Makes a browser and Playwright available; the reason where they cannot be."""
    if os.environ.get("RELORA_BROWSER") == "off":
        return "RELORA_BROWSER=off"
    if importlib.util.find_spec("playwright") is None:
        return "the Python package playwright is not installed"
    if program():
        return None
    if os.geteuid() or not shutil.which("apt-get"):
        return f"no {NAMES[0]} on PATH, and no root with apt-get to install it"
    with (Path(tempfile.gettempdir()) / "relora-chromium-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other test worker may be at it
        return None if program() else _apt()


def _apt() -> str | None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    package = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"]
    for command in (["apt-get", "update", "-qq"], package):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if program() is None:
        last = (done.stderr.strip().splitlines() or ["apt-get said nothing"])[-1]
        return f"apt-get could not install chromium: {last}"
    return None
