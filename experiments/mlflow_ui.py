"""MLflow's pages over a store: its server, lean, and links that open right in a fresh browser.

Not for: what the pages show (`mlflow_sweep.py`), nor the choice of the store (`sweeps/commands`).
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from experiments.mlflow_store import connect, reachable, redacted, ui_link, with_password
from experiments.mlflow_views import TAG, TITLES, compare_link, links, slug
from relora_core import shared, shell
from relora_core.config import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

MAX_COMPARED = 20
"""Columns of a compare page; above that nobody reads it, and the arms table says the same."""
STOP_S = 3.0
"""For requests at work; the server would wait for an open browser forever."""


@dataclass(kw_only=True, slots=True)
class Page:
    """A page of the UI."""

    title: str
    url: str


@dataclass(kw_only=True, slots=True)
class Section:
    """The pages of one sweep, or of an MLflow experiment's runs that are in none."""

    name: str
    sweep: bool
    pages: list[Page]


# links ------------------------------------------------------------------------------------------
def sections(uri: str, *, base: str) -> list[Section]:
    """What `uri` has to show, newest sweep first, as links below `base`.

    Raises TrackingUnreachable where the store does not answer, ServerFailed where it is of another
    MLflow version.
    """
    from mlflow.exceptions import MlflowException

    try:
        with reachable(uri):
            client = connect(uri)
            return [
                section
                for experiment in client.search_experiments(order_by=["last_update_time DESC"])
                for section in _of_experiment(client, experiment, base=base)
            ]
    except MlflowException as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ServerFailed(f"{redacted(uri)}: {line}") from None


def _of_experiment(client: MlflowClient, experiment: Experiment, *, base: str) -> Iterator[Section]:
    id_ = experiment.experiment_id
    parents = _summaries(client, id_, kind="sweep")
    arms = _summaries(client, id_, kind="arm") if parents else []
    for parent in reversed(parents):
        sweep = parent.data.tags.get("sweep", experiment.name)
        own = [arm for arm in arms if arm.data.tags.get("sweep", sweep) == sweep]
        pages = _sweep_pages(experiment, base=base, sweep=sweep, parent=parent, arms=own)
        yield Section(name=sweep, sweep=True, pages=pages)
    if not parents and client.search_runs([id_], max_results=1):
        page = Page(title="all runs", url=ui_link(base, id_))
        yield Section(name=experiment.name, sweep=False, pages=[page])


def _summaries(client: MlflowClient, experiment_id: str, *, kind: str) -> list[Run]:
    """The runs that stand for sweeps or arms, oldest first."""
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.kind = '{kind}'",
        order_by=["attributes.start_time ASC"],
        max_results=1000,
    )
    return list(found)


def _sweep_pages(
    experiment: Experiment, *, base: str, sweep: str, parent: Run, arms: list[Run]
) -> list[Page]:
    id_ = experiment.experiment_id
    addresses = {
        title: address
        for view, (title, address) in zip(TITLES, links(id_, sweep=sweep).items(), strict=True)
        if TAG + slug(sweep, view) in experiment.tags
    }
    if "curves" in addresses:  # its columns are those of a table of runs, too
        addresses["runs"] = addresses["curves"].replace("&compareRunsMode=CHART", "")
    if 1 < len(arms) <= MAX_COMPARED:
        named = sorted(arms, key=lambda arm: arm.info.run_name or "")
        addresses["arms side by side"] = compare_link(id_, runs=[a.info.run_id for a in named])
    addresses["note"] = f"#/experiments/{id_}/runs/{parent.info.run_id}?{ML_WORKFLOW}"
    return [Page(title=title, url=f"{base}/{address}") for title, address in addresses.items()]


ML_WORKFLOW = "workflowType=machine_learning"
"""Without it a fresh browser takes every experiment for one of traces."""


def without_user(uri: str) -> str:
    """A server's address without user and password, which a link must not show."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


# server -----------------------------------------------------------------------------------------
class ServerFailed(RuntimeError):
    """MLflow's server ended, or did not answer in time; one line."""


def free_port(host: str, *, wanted: int, tries: int = 20) -> int:
    """`wanted`, or the next free one; ConfigError where `host` is no address of this machine."""
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
    """`mlflow server` with one worker, in a session of its own, for the body of a `with` block.

    By default it would be 15 processes; this is 2, which serve a whole lab's eyes.
    """

    def __init__(self, uri: str, *, host: str, port: int, log: Path) -> None:
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.base = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        self.log = log
        self._uri = uri
        self._listen = ["--host", host, "--port", str(port)]

    def __enter__(self) -> Server:
        shared.make_folder(self.log.parent)
        environment = shell.outside(os.environ) | {
            "MLFLOW_BACKEND_STORE_URI": with_password(
                self._uri
            ),  # a command line shows passwords to everyone
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *self._listen]
        with shared.opened(self.log, "wb") as log:
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
        """Returns once pages can be opened; raises ServerFailed."""
        # A proxy that the environment names is for other hosts.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise ServerFailed(self._last_word())
            with contextlib.suppress(OSError), opener.open(f"{self.base}/health", timeout=5):
                return
            time.sleep(0.1)
        raise ServerFailed(f"MLflow's server did not answer within {timeout:.0f} s, see {self.log}")

    def wait(self) -> None:
        """Returns never, or raises ServerFailed when the server ends by itself."""
        self._process.wait()
        raise ServerFailed(self._last_word())

    def _last_word(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1].strip() if lines else "without a word"
        return f"MLflow's server ended: {said[:200]} (see {self.log})"
