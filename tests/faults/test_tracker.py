"""Whatever becomes of the tracking store, training has its numbers, and `sync` repairs the view.

A follower that is killed and a store that is locked, damaged, of another MLflow or on a full disk
cost one line at the end of the run; its exit code and its record are those of a run that is not
tracked. Servers that fail: `tests/experiments/tracking/test_follower.py`.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from experiments.addresses import default_uri
from experiments.disk.event_log import EventLog
from experiments.disk.output_dir import all_runs, runs_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import config_to_json, run_id
from experiments.tracking.follower import _follow
from relora_core.config import RunConfig
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.events import Event
from sweeps.__main__ import main
from tests import warm
from tests.waiting import wait_for

pytestmark = pytest.mark.slow

TRAIN = """if True:
    import sys, time
    from pathlib import Path
    from experiments.tracking import follower as mlflow_follow
    from experiments.identity import config_from_json
    from experiments.run import runner
    from experiments.run.single import run_here
    follow = mlflow_follow.Follower.__init__
    def quick(self, *args, **options):
        follow(self, *args, **{**options, "every_s": 0.05})
    def gated(*args, **options):
        while not Path(sys.argv[2]).exists():
            time.sleep(0.01)
        return make_result(*args, **options)
    mlflow_follow.Follower.__init__ = quick
    make_result, runner.make_result = runner.make_result, gated
    sys.exit(run_here(config_from_json(Path(sys.argv[1]).read_text())))
"""
LINE = "nothing is lost"


@pytest.fixture
def config(nano: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    made = nano(model={"vocab_size": VOCAB_SIZE}, train={"steps": 30}, tracking={"enabled": True})
    made.output_dir = str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    return made


def start(config: RunConfig, *, gate: Path | None = None) -> warm.Started:
    """`run.py` of this config in a process of its own; its end waits for the file `gate`."""
    file = Path(config.output_dir).parent / "config.json"
    file.write_text(config_to_json(config))
    return warm.start(["-c", TRAIN, file, gate or file], cwd=Path.cwd())


def finished(started: warm.Started) -> list[str]:
    """The lines on stderr of a run that has ended well."""
    done = started.wait(timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert "finished at step 30" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("tracking: ")]


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(e["step"], e["metrics"]["train/loss"]) for e in run.events() if e["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The losses of the run without tracking."""
    from tests.conftest import nano_config

    folder = tmp_path_factory.mktemp("plain")
    made = nano_config(model={"vocab_size": VOCAB_SIZE}, train={"steps": 30})
    made.tracking.enabled, made.output_dir = False, str(folder / "out")
    (folder / "out").mkdir()
    finished(start(made))
    (run,) = all_runs(made.output_dir)
    return losses(run)


def shown(database: Path) -> dict[str, dict[int, int]]:
    """Of all runs that are in the store: metric -> step -> how often it is there."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as there:
        rows = there.execute(
            "select metrics.key, step from metrics join tags on tags.run_uuid = metrics.run_uuid "
            "where tags.key = 'kind' and tags.value = 'run'"
        ).fetchall()
    found: dict[str, dict[int, int]] = {}
    for key, step in rows:
        steps = found.setdefault(key, {})
        steps[step] = steps.get(step, 0) + 1
    return found


def repaired(
    config: RunConfig, migrated: Path, capsys: pytest.CaptureFixture[str], *, fresh: bool = True
) -> None:
    """`sync`, twice, shows each point of the record once; in another store where it must."""
    database = Path(config.output_dir) / "mlflow.db"
    more = []
    if fresh:
        database = database.with_name("new.db")
        shutil.copy(migrated, database)
        more = ["--tracking-uri", f"sqlite:///{database}"]
    for _ in range(2):
        assert main(["sync", "--output-dir", config.output_dir, *more]) == 0, capsys.readouterr()
    runs = all_runs(config.output_dir)
    steps = [step for run in runs for step, _ in losses(run)]
    assert shown(database)["train/loss"] == dict.fromkeys(steps, 1)


# the follower -----------------------------------------------------------------------------------
def follower_of(started: warm.Started) -> psutil.Process | None:
    for child in psutil.Process(started.process.pid).children():
        with suppress(psutil.Error):  # others come and go while they are looked at
            if "experiments.tracking.follower" in child.cmdline():
                return child
    return None


@pytest.mark.parametrize("when", ["at its start", "in a pass"])
def test_a_killed_follower_costs_one_line(
    when: str,
    config: RunConfig,
    plain: list[tuple[int, float]],
    migrated: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    database = Path(config.output_dir) / "mlflow.db"
    shutil.copy(migrated, database)
    gate = database.with_name("gate")
    process = start(config, gate=gate)
    follower = wait_for(lambda: follower_of(process))
    if when == "in a pass":  # its batches are on their way
        wait_for(lambda: list(Path(config.output_dir).glob("runs/*/mlflow.json")))
    follower.send_signal(signal.SIGKILL)
    gate.touch()
    (line,) = finished(process)
    assert LINE in line
    assert "python -m sweeps sync" in line
    (run,) = all_runs(config.output_dir)
    assert losses(run) == plain
    repaired(config, migrated, capsys, fresh=False)


# the database -----------------------------------------------------------------------------------
def recorded(config: RunConfig) -> RunDir:
    """A run as the trainer writes it, in milliseconds."""
    run = RunDir(runs_folder(config.output_dir) / run_id(config))
    run.create(config)
    log = EventLog(run, 1)
    log.emit(Event(kind="start", step=0, data={"resumed": False}))
    for step in range(1, 31):
        log.emit(Event(kind="train", step=step, metrics={"train/loss": 1.0 / step}))
    log.close()
    run.write_result({"state": "finished", "metrics": {}, "step": 30})
    run.update_status(state="finished", step=30, attempts=1)
    return run


def last_pass(config: RunConfig) -> str:
    """What the follower has to say at the end of a run: its own code, in this process."""
    spec = {
        "runs": [str(run.path) for run in all_runs(config.output_dir)],
        "uri": default_uri(config.output_dir),
        "experiment": "demo",
        "output_dir": config.output_dir,
        "every_s": 0.01,
    }
    closed = threading.Event()
    closed.set()
    line = _follow(spec, closed=closed, say=lambda _: None)
    assert line is not None
    return line


def syncs_in_one_line(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """What `sync` says of a store that it cannot write to."""
    capsys.readouterr()
    assert main(["sync", "--output-dir", config.output_dir]) in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("\n") == 1, said
    return said


def test_a_database_that_another_process_locks_for_good(
    config: RunConfig,
    migrated: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = Path(config.output_dir) / "mlflow.db"
    shutil.copy(migrated, database)
    recorded(config)
    connect = sqlite3.dbapi2.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.1}))
    monkeypatch.setattr(sqlite3.dbapi2, "connect", sqlite3.connect)
    with closing(connect(database, isolation_level=None)) as holder:
        holder.execute("begin exclusive")
        assert LINE in last_pass(config)
        assert LINE in syncs_in_one_line(config, capsys)
        holder.execute("rollback")
    repaired(config, migrated, capsys, fresh=False)


def test_a_disk_that_is_full_for_the_database(
    config: RunConfig, migrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a limit on the size of files, which is the same to SQLite and needs no mount."""
    database = Path(config.output_dir) / "mlflow.db"
    shutil.copy(migrated, database)
    recorded(config)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    try:
        assert LINE in last_pass(config)
        assert LINE in syncs_in_one_line(config, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    repaired(config, migrated, capsys, fresh=False)


def garbage(database: Path) -> None:
    with open(database, "r+b") as file:
        for start in range(4096, database.stat().st_size, 4096):
            file.seek(start)
            file.write(b"garbage " * 256)


def header(database: Path) -> None:
    with open(database, "r+b") as file:
        file.write(b"not a database at all")


def truncated(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def schema_of_another(version: str) -> Callable[[Path], None]:
    def change(database: Path) -> None:
        with closing(sqlite3.connect(database)) as there:
            there.execute("update alembic_version set version_num = ?", [version])
            there.commit()

    return change


def table_gone(database: Path) -> None:
    with closing(sqlite3.connect(database)) as there:
        there.execute("drop table metrics")
        there.commit()


DAMAGE = {
    "garbage in the middle": garbage,
    "garbage at the beginning": header,
    "half of it": truncated,
    "an older MLflow's": schema_of_another("451aebb31d03"),
    "a newer MLflow's": schema_of_another("ffffffffffff"),
    "a table missing": table_gone,
}


@pytest.mark.filterwarnings("ignore")  # connections to a damaged file are not closed by MLflow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_database_costs_one_line_and_a_new_one_gets_everything(
    damage: str, config: RunConfig, migrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Path(config.output_dir) / "mlflow.db"
    shutil.copy(migrated, database)
    DAMAGE[damage](database)
    run = recorded(config)
    before = run.events_path.read_bytes()
    line = last_pass(config)
    assert "\n" not in line
    assert line.startswith("track")
    syncs_in_one_line(config, capsys)
    assert run.events_path.read_bytes() == before
    repaired(config, migrated, capsys)
