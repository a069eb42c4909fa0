import json
import os
import subprocess
import sys

import pytest

from experiments.disk.event_log import EventLog
from experiments.disk.run_dir import RunDir
from experiments.errors import RunLocked
from relora_core.events import Event


@pytest.fixture
def run(nano, tmp_path):
    run_dir = RunDir(tmp_path / "runs" / "a b'c")
    run_dir.create(nano())
    return run_dir


def log(run, attempt, *events):
    writer = EventLog(run, attempt)
    for kind, step, data in events:
        writer.emit(Event(kind=kind, step=step, metrics={"x": float(step)}, data=data))
    writer.close()


def test_the_config_is_frozen_once(run, nano, tmp_path):
    run.create(nano(seed=7))
    assert run.config() == nano(output_dir=str(tmp_path))


def test_the_newest_attempt_counts_from_its_first_step_on(run):
    log(run, 1, ("start", 0, {"resumed": False}), *(("train", s, {}) for s in range(1, 6)))
    log(run, 2, ("start", 3, {"resumed": True}), *(("train", s, {}) for s in range(4, 7)))
    counted = [(e["attempt"], e["step"]) for e in run.events() if e["kind"] == "train"]
    assert counted == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]


def test_an_attempt_that_starts_afresh_counts_alone(run):
    log(run, 1, ("start", 0, {"resumed": False}), ("eval", 0, {}), ("train", 1, {}))
    log(run, 2, ("start", 0, {"resumed": False}), ("eval", 0, {}))
    assert [(e["attempt"], e["kind"]) for e in run.events()] == [(2, "start"), (2, "eval")]


def test_a_torn_line_is_left_out_and_spoils_no_other(run):
    log(run, 1, ("train", 1, {}))
    with open(run.events_path, "a") as file:
        file.write('{"attempt": 1, "kind": "tra')
    assert [e["step"] for e in run.raw_events()] == [1]
    log(run, 2, ("train", 2, {}))
    assert [e["step"] for e in run.raw_events()] == [1, 2]


def test_one_process_at_a_time(run):
    with run.lock():
        with pytest.raises(RunLocked, match=f"process {os.getpid()}"), run.lock():
            pass
        assert run.lock_holder() is not None
    assert run.lock_holder() is None


def test_the_lock_of_a_dead_process_does_not_count(run):
    code = (
        "import os, sys; from experiments.disk.run_dir import RunDir\n"
        "with RunDir(sys.argv[1]).lock(): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert (run.path / "lock").exists()
    assert run.lock_holder() is None
    with run.lock():
        assert run.lock_holder() is not None


def test_the_lock_of_another_host_counts(run):
    (run.path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    with pytest.raises(RunLocked, match="on elsewhere"), run.lock():
        pass


def test_status_survives_fields_of_other_versions(run):
    raw = json.loads(run.status_path.read_text()) | {"later": 1}
    run.status_path.write_text(json.dumps(raw))
    assert run.update_status(state="running").state == "running"


def test_files_can_be_read_by_the_group(run):
    assert run.status_path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
