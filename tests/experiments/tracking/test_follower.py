"""A follower shows runs while they work, and no store can slow or harm them."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow_runs import Store, a_run, expected, train

from experiments.disk.run_dir import RunDir
from experiments.identity import config_to_json
from experiments.tracking import content, run_view
from experiments.tracking import store as mlflow_store
from experiments.tracking.follower import Follower
from experiments.tracking.runs import Syncer
from experiments.tracking.store import TrackingUnreachable, open_store
from relora_core.config import RunConfig
from relora_core.data.grammar import VOCAB_SIZE
from tests.ports import free_port
from tests.waiting import wait_for


def quick_follower(run: RunDir, warnings: list[str], *, uri: str, experiment: str) -> Follower:
    """It looks all the time; `said` gets its warnings."""
    options = {"output_dir": run.path.parents[1], "every_s": 0.05, "warn": warnings.append}
    return Follower([run], uri=uri, experiment=experiment, **options)


@pytest.mark.slow
def test_a_follower_shows_runs_while_they_work_and_after(store: Store, tmp_path: Path) -> None:
    run, warnings = a_run(tmp_path), []
    train(run, attempt=1, start=0, stop=20)
    experiment = store.client.get_experiment(store.experiment_id).name
    with quick_follower(run, warnings, uri=store.uri, experiment=experiment) as follower:
        assert follower.wait_ready(300) == store.experiment_id
        wait_for(lambda: store.status(run) == "RUNNING")
        train(run, attempt=2, start=20, stop=60, state="finished")
    assert warnings == []
    assert store.points(run) == expected(run)
    assert store.run(run).info.run_name == run_view.default_name(run.config())
    assert store.run(run).info.status == "FINISHED"


@pytest.mark.slow
def test_a_dead_server_costs_one_line_and_no_time_at_the_start(tmp_path: Path) -> None:
    run, warnings = a_run(tmp_path), []
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    with quick_follower(run, warnings, uri=uri, experiment="x") as follower:
        train(run, attempt=1, start=0, stop=20)
        assert follower.wait_ready(60) is None
    (line,) = warnings
    assert line.startswith(f"tracking: {uri.replace('secret', '***')} unreachable")
    assert "python -m sweeps sync" in line
    assert "secret" not in line + (tmp_path / "logs" / "mlflow-sync.log").read_text()


def test_a_last_sync_that_is_not_waited_for_is_not_blamed_on_the_store(
    store: Store, tmp_path: Path
) -> None:
    """Its process is given up while another sync holds the store."""
    run, warnings = a_run(tmp_path), []
    options = {"output_dir": tmp_path, "final_timeout_s": 0.5, "warn": warnings.append}
    with (
        mlflow_store.lock(store.uri, store.folder),
        Follower([run], uri=store.uri, experiment="x", **options),
    ):
        train(run, attempt=1, start=0, stop=20, state="finished")
    (line,) = warnings
    assert "unreachable" not in line
    assert "took longer than 0.5 s and was left; nothing is lost" in line
    assert "python -m sweeps sync" in line


@pytest.mark.slow
def test_a_follower_outlives_its_killed_parent_by_one_pass(store: Store, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    train(run, attempt=1, start=0, stop=20)
    script = """if True:
        import sys, time
        from experiments.tracking.follower import Follower
        from experiments.disk.run_dir import RunDir
        path, uri, experiment, output_dir = sys.argv[1:]
        with Follower([RunDir(path)], uri=uri, experiment=experiment, output_dir=output_dir,
                      every_s=3600) as follower:
            follower.wait_ready(300)
            print("ready", flush=True)
            time.sleep(600)
    """
    name = store.client.get_experiment(store.experiment_id).name
    arguments = [str(run.path), store.uri, name, str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        train(run, attempt=2, start=20, stop=60, state="finished")
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: store.status(run) == "FINISHED")
    assert store.points(run) == expected(run)


# a server that fails ----------------------------------------------------------------------------


class Proxy(ThreadingHTTPServer):
    """Between client and server: `up`, `down`, `deaf` (does as asked, but no answer comes back)."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.mode, self.delay_s = target, "up", 0.0
        self.healthy = 0
        """Requests that are answered before `mode` begins."""
        self.gate, self.inside, self.answered = threading.Lock(), set[Handler](), 0
        """No request passes the gate while a test holds it; `inside` are those that have passed."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass  # clients that go away are the point


class Handler(BaseHTTPRequestHandler):
    server: Proxy

    def forward(self) -> None:
        proxy = self.server
        with proxy.gate:
            proxy.inside.add(self)
        try:
            self.answer(proxy)
        finally:
            proxy.inside.discard(self)

    def answer(self, proxy: Proxy) -> None:
        time.sleep(proxy.delay_s)
        proxy.answered += 1
        self.close_connection = True
        proxy.healthy -= 1
        mode = "up" if proxy.healthy >= 0 else proxy.mode
        if mode == "down":
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        there = http.client.HTTPConnection(proxy.target, timeout=60)
        with contextlib.closing(there):
            there.request(self.command, self.path, body or None, dict(self.headers))
            answer = there.getresponse()
            content = answer.read()
        if mode == "deaf":
            return
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[str]:
    """host:port of a tracking server of two processes."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(migrated, folder / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    lean = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **lean}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: healthy(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(120)


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    proxy = Proxy(server)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def shown(proxy: Proxy, experiment: str, run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Points of the only MLflow run that shows `run`, over a proxy that is up."""
    from mlflow import MlflowClient

    proxy.mode, proxy.delay_s = "up", 0.0
    client = MlflowClient(tracking_uri=proxy.uri)
    stored = client.get_experiment_by_name(experiment)
    assert stored is not None
    (there,) = client.search_runs(
        [stored.experiment_id], filter_string=f"tags.run_id = '{run.run_id}'"
    )
    histories = {
        key: client.get_metric_history(there.info.run_id, key) for key in there.data.metrics
    }
    return {key: sorted((m.step, m.value) for m in h) for key, h in histories.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["down", "deaf"])
def test_a_server_that_dies_at_any_request_loses_and_doubles_nothing(
    proxy: Proxy, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "MAX_METRICS", 4)
    experiment = f"dies {mode}"
    store = open_store(proxy.uri, experiment=experiment, output_dir=tmp_path)
    failures, requests = 0, 0
    while failures == requests:  # until a pass needs no more requests than it is granted
        run = a_run(tmp_path / str(requests), r=requests + 1)
        train(run, attempt=1, start=0, stop=30)
        proxy.mode, proxy.healthy = mode, requests
        try:
            report = Syncer(store).sync([run])
            failures += bool(report.errors or report.files)
        except TrackingUnreachable:
            failures += 1
        requests += 1
        proxy.mode = "up"
        train(run, attempt=1, start=30, stop=50, state="finished")
        assert not Syncer(store).sync([run]).errors
        assert shown(proxy, experiment, run) == expected(run)
    assert requests > 8


@pytest.mark.slow
def test_a_follower_outlasts_a_server_that_is_down_at_the_start_and_again_later(
    proxy: Proxy, tmp_path: Path
) -> None:
    run, warnings, experiment = a_run(tmp_path), [], "comes and goes"
    train(run, attempt=1, start=0, stop=20)
    proxy.mode = "down"
    with quick_follower(run, warnings, uri=proxy.uri, experiment=experiment):
        log = tmp_path / "logs" / "mlflow-sync.log"
        wait_for(lambda: log.exists() and log.read_text().count("Traceback") > 1)
        proxy.mode = "up"
        wait_for(lambda: run.mlflow_path.exists())
        proxy.mode = "down"
        refused = log.read_text().count("Traceback")
        train(run, attempt=1, start=20, stop=60)
        wait_for(lambda: log.read_text().count("Traceback") > refused)
        proxy.mode = "up"
        train(run, attempt=1, start=60, stop=80, state="finished")
    assert warnings == []
    assert shown(proxy, experiment, run) == expected(run)


@pytest.mark.slow
def test_a_slow_server_delays_no_event_and_gets_them_all(proxy: Proxy, tmp_path: Path) -> None:
    run, warnings, experiment = a_run(tmp_path), [], "slow"
    proxy.delay_s = 0.5
    proxy.gate.acquire()
    with quick_follower(run, warnings, uri=proxy.uri, experiment=experiment) as follower:
        assert follower.wait_ready(60) is None
        train(run, attempt=1, start=0, stop=2000)
        assert proxy.answered == 0
        proxy.gate.release()
        wait_for(lambda: proxy.answered > 3)
        proxy.gate.acquire()
        wait_for(lambda: not proxy.inside)
        before = proxy.answered
        train(run, attempt=1, start=2000, stop=4000, state="finished")
        assert proxy.answered == before
        proxy.gate.release()
    assert warnings == []
    assert shown(proxy, experiment, run) == expected(run)


@pytest.mark.slow
def test_the_process_that_trains_opens_no_socket_and_loads_no_mlflow(
    nano: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Its server takes connections and never says a word."""
    script = """if True:
        import sys
        used = []
        sys.addaudithook(lambda event, args: used.append(event) if event in (
            "socket.__new__", "socket.connect", "socket.getaddrinfo") else None)
        from pathlib import Path
        from experiments.identity import config_from_json
        from experiments.run.single import run_here
        code = run_here(config_from_json(Path(sys.argv[1]).read_text()))
        print(code, sorted(set(used)), "mlflow" in sys.modules)
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = nano(
            model={"vocab_size": VOCAB_SIZE},
            tracking={"enabled": True, "uri": f"http://127.0.0.1:{silent.getsockname()[1]}"},
        )
        config.output_dir = str(tmp_path / "out")
        (tmp_path / "config.json").write_text(config_to_json(config))
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "config.json")],
            env={
                **os.environ,
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.stdout.splitlines()[-1] == "0 [] False", done.stderr
    assert "nothing is lost" in done.stderr
