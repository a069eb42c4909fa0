"""MLflow's server over a store, with few processes.

Not for: links into its pages (`links.py`), nor the choice of the store (`sweeps/commands/ui.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from experiments.addresses import with_password
from relora_core import shared, shell
from relora_core.config import ConfigError

STOP_S = 3.0
"""Time for pending requests; by itself the server would wait for an open browser forever."""


class ServerFailed(RuntimeError):
    """MLflow's server ended, or did not answer in time; the message is one line."""


def free_port(host: str, *, wanted: int, tries: int = 20) -> int:
    """`wanted`, or the next free one; ConfigError if `host` is no address of this machine."""
    port = wanted
    for port in range(wanted, min(wanted + tries, 65536)):
        try:
            family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return port
        except OSError as error:
            if error.errno == errno.EACCES:
                raise ConfigError(
                    f"--port must be open to you, got {port}; nearest valid: 5000"
                ) from None
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"--host must be an address of this machine, got {host!r}; "
                    "nearest valid: 127.0.0.1"
                ) from None
    raise ConfigError(f"--port must have a free port in {wanted}..{port}, got {wanted}")


class Server:
    """`mlflow server` for the body of a `with` block, as 2 processes instead of 15."""

    def __init__(self, uri: str, *, host: str, port: int, log: Path) -> None:
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.base = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        self.log = log
        self._uri = uri
        self._listen = ["--host", host, "--port", str(port)]

    def __enter__(self) -> Server:
        shared.make_folder(self.log.parent)
        environment = shell.strip_group(os.environ) | {
            # Not as an argument: everyone can read command lines, and it may hold a password.
            "MLFLOW_BACKEND_STORE_URI": with_password(self._uri),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *self._listen]
        with shared.open_file(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*command, "--no-serve-artifacts"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGTERM)
        until = time.monotonic() + STOP_S
        while self._alive() and time.monotonic() < until:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _alive(self) -> bool:
        """Whether the server or a process that it started is still there."""
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait_ready(self, *, timeout: float = 120.0) -> None:
        """Wait until pages can be opened; raises ServerFailed."""
        # A proxy in the environment is for other hosts.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise ServerFailed(self._why_ended())
            with contextlib.suppress(OSError), opener.open(f"{self.base}/health", timeout=5):
                return
            time.sleep(0.1)
        raise ServerFailed(f"MLflow's server did not answer within {timeout:.0f} s, see {self.log}")

    def wait(self) -> None:
        """Wait forever; raises ServerFailed when the server ends by itself."""
        self._process.wait()
        raise ServerFailed(self._why_ended())

    def _why_ended(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].strip() if lines else "without a message"
        return f"MLflow's server ended: {reason[:200]} (see {self.log})"
