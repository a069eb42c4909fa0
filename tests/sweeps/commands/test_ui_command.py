"""`python -m sweeps ui`: which store, which port, and one line for each mistake. No browser."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.addresses import default_uri
from experiments.disk.output_dir import runs_folder
from experiments.disk.run_dir import RunDir
from experiments.tracking.links import without_user
from experiments.tracking.server import Server, ServerFailed, free_port
from relora_core.config import ConfigError, RunConfig, SweepConfig, TrackingConfig
from sweeps.__main__ import main
from sweeps.commands import ui
from sweeps.planning.plan import make_plan, store

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., RunConfig]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another server has."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def plan(make: Make, *, name: str, uri: str | None) -> Path:
    """A planned sweep with a run's folder; its output folder."""
    tracking = TrackingConfig(enabled=True, uri=uri)
    config = make(tracking=tracking, sweep=SweepConfig(name=name), seed=len(name))
    made = make_plan([({"seed": "0"}, config)])
    out = Path(config.output_dir)
    store(made, output_dir=out)
    for cell in made.cells:
        RunDir(runs_folder(out) / cell.run_id).create(dataclasses.replace(cell.config))
    return out


def chosen(out: Path, **given: object) -> str:
    return ui._store(
        argparse.Namespace(output_dir=str(out), **{"sweep": None, "uri": None} | given)
    )


def test_the_default_port_gives_way_to_a_server_that_is_there(taken: int) -> None:
    assert taken < free_port("127.0.0.1", wanted=taken) < taken + 20


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_this_machine_is_refused_in_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^--host .* got .*nearest valid: 127\.0\.0\.1$"):
        free_port(host, wanted=5000)


def test_each_sweep_is_shown_from_its_own_store(
    make: Make, migrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "http://127.0.0.1:9"
    plan(make, name="at-a-server", uri=own)
    out = plan(make, name="here", uri=None)
    shutil.copy(migrated, out / "mlflow.db")
    assert chosen(out, sweep="at-a-server") == own
    assert chosen(out, sweep="here") == default_uri(out)
    assert capsys.readouterr().out == ""
    assert chosen(out) == default_uri(out)
    assert own in capsys.readouterr().out  # no sweep is forgotten in silence


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "mlflow.db does not exist"),
        (["--uri", "mlruns"], "nearest valid: sqlite:///mlruns/mlflow.db"),
        (["--port", "70000"], "--port must be in 1..65535"),
        (["no-such-sweep"], "SWEEP must be one of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["ui", "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_answer_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = "http://me:secret@127.0.0.1:9"
    assert main(["ui", "--output-dir", str(tmp_path), "--uri", away]) == 1
    said = capsys.readouterr()
    assert "unreachable" in said.err
    assert "secret" not in said.out + said.err


def test_links_do_not_show_a_password() -> None:
    assert without_user("https://me:secret@host:1/x/") == "https://host:1/x"


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_and_leaves_no_process(
    tmp_path: Path, migrated: Path, taken: int
) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    uri = default_uri(tmp_path)
    log = tmp_path / "log"
    with (
        Server(uri, host="127.0.0.1", port=taken, log=log) as server,
        pytest.raises(ServerFailed, match=r"server ended: .* \(see .*log\)"),
    ):
        # Whoever has the port says nothing to /health.
        server.wait_ready()
    with pytest.raises(ProcessLookupError):
        os.killpg(server._process.pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_process_outlives_the_command(tmp_path: Path, migrated: Path, number: int) -> None:
    """However the terminal ends it, even before the server stands."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    command = [sys.executable, "-u", "-m", "sweeps", "ui", "--output-dir", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        until = "Ctrl-C ends it" if number == signal.SIGINT else "starting"
        while until not in (line := process.stdout.readline()):
            assert line
        import psutil

        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.stdout.read()
        assert process.wait(120) == 0
        _, alive = psutil.wait_procs(family, timeout=60)
        assert alive == []
