"""Forks that become Python commands, and the parents of these commands' workers.

Imports nothing of the project, so that a fork can import a copy of it. Not for: which process is
forked (`warm.py`, `recipes.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any


@dataclass(kw_only=True, slots=True)
class Started:
    words: Sequence[str]
    process: ForkServerProcess
    output: Path

    def wait(self, *, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout_s)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(list(self.words), timeout_s)
        said = [(self.output / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.words, code, *said)


def become(
    words: list[str],
    cwd: str,
    variables: Mapping[str, str],
    output: Path,
    figures: bool,
    code: str | None = None,
) -> None:
    """Make this fork `python WORDS`, with the project of the folder `code` if it has none yet."""
    os.chdir(cwd)
    if code is not None:
        sys.path.insert(0, code)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(variables)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(output / name, os.O_RDWR | os.O_CREAT), number)
    if not figures:
        _draw_nothing()
    if "-m" in words[1:]:  # a sweep
        nurse(f"{output}/nurse")
        use_nurse(f"{output}/nurse")
    kind, *sys.argv = words if words[0] in ("-c", "-m") else ["", *words]
    try:
        if kind == "-c":
            exec(compile(sys.argv[0], "-c", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without


def _draw_nothing() -> None:
    """Reports and searches have no pictures: a sweep's take seconds."""
    from experiments.report import page
    from sweeps.search import plots

    page.draw = lambda *_: []
    plots.draw = lambda *_, **__: ([], [])


# parents of workers -------------------------------------------------------------------------------
RELAY_CODE = """
import json, os, socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
socket.send_fds(peer, [json.dumps([sys.argv[2], dict(os.environ)]).encode()], [0, 1])
peer.shutdown(socket.SHUT_WR)
peer.recv(1)
"""
RELAY = (sys.executable, "-I", "-S", "-c", RELAY_CODE)
"""Stands for a warm parent: it hands its pipes to the nurse, and ends when the parent does."""


def use_nurse(address: str) -> None:
    """Launchers of this process have their workers' parents of this nurse, for one worker, too."""
    from sweeps.local import launcher, processes
    from sweeps.local import warm as parents
    from sweeps.search import processes as searches

    opened, begun = parents.open_parent, processes.open_processes

    def open_parent(command: Sequence[str], *, environment: Mapping[str, str]) -> Any:
        return opened((*RELAY, address, command[-1]), environment=environment)

    def open_processes(workers: Any, **options: Any) -> Any:
        return begun(workers, **options | {"runs": 2})

    parents.open_parent = open_parent
    launcher.open_processes = searches.open_processes = open_processes


def nurse(address: str) -> None:
    """A process that forks a warm parent for each relay, and ends with this one."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    owner = os.getpid()
    if os.fork():
        server.close()
        return
    try:
        server.settimeout(1.0)
        while os.getppid() == owner:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            with contextlib.suppress(TimeoutError):
                peer, _ = server.accept()
                told, fds, _, _ = socket.recv_fds(peer, 1 << 16, 2)
                while more := peer.recv(1 << 16):
                    told += more
                if os.fork() == 0:
                    server.close()
                    _be_parent(peer, told, fds)
                for file in (peer.detach(), *fds):
                    os.close(file)
    finally:
        os._exit(0)


def _be_parent(peer: socket.socket, told: bytes, fds: Sequence[int]) -> None:
    """What `python -m sweeps.local.warm MODULE` does once it has imported everything."""
    code = 1
    try:
        os.setsid()
        name, variables = json.loads(told)
        os.environ.clear()
        os.environ.update(variables)
        from sweeps.local import warm as parents

        module = importlib.import_module(name)
        for needed in module.PRELOAD:
            importlib.import_module(needed)
        request = parents.serve(*fds)
        if request is None:
            os._exit(0)
        peer.close()
        parents._become(request)
        code = module.main([request["run_dir"]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
