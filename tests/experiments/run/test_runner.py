import json

import pytest

from experiments.disk.run_dir import RunDir
from experiments.disk.states import Outcome
from experiments.errors import one_line
from experiments.run import runner
from experiments.run.runner import run_experiment
from relora_core.config import ConfigError
from relora_core.data.grammar import VOCAB_SIZE


@pytest.fixture
def begun(nano, tmp_path):
    """A run that was interrupted after its first checkpoint, by code that is no longer here."""

    def make(*, code="d1:0123", **checkpoint):
        config = nano(model={"vocab_size": VOCAB_SIZE}, checkpoint={"every_steps": 6, **checkpoint})
        config.output_dir = str(tmp_path)
        run_dir = RunDir(tmp_path / "runs" / "a")
        run_experiment(config, run_dir)
        run_dir.result_path.unlink()
        run_dir.update_status(state="failed")
        path = run_dir.attempts / "001.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"code_hash": code}))
        return config, run_dir

    return make


def test_a_finished_run_is_left_alone(nano, tmp_path):
    config = nano(model={"vocab_size": VOCAB_SIZE})
    run_dir = RunDir(tmp_path / "runs" / "a")
    assert run_experiment(config, run_dir) == "finished"
    before = run_dir.events_path.read_text()
    assert run_experiment(config, run_dir) == "finished"
    assert run_dir.events_path.read_text() == before
    assert run_dir.status().attempts == 1


def test_a_result_counts_where_a_kill_came_before_the_last_word(nano, tmp_path):
    """Every rank must judge by the same file, or one waits for the other for ever."""
    config = nano(model={"vocab_size": VOCAB_SIZE})
    run_dir = RunDir(tmp_path / "runs" / "a")
    run_experiment(config, run_dir)
    run_dir.update_status(state="running")
    assert run_experiment(config, run_dir) == "finished"
    status = run_dir.status()
    assert (status.state, status.attempts) == ("finished", 1)


def test_going_on_with_other_code_is_said(begun, capsys):
    config, run_dir = begun()
    assert run_experiment(config, run_dir) == "finished"
    assert "began with other code of relora_core (d1:0123, now d1:" in capsys.readouterr().err


def test_a_hash_of_an_older_kind_proves_no_change(begun, capsys):
    config, run_dir = begun(code="0123")
    assert run_experiment(config, run_dir) == "finished"
    printed = capsys.readouterr().err
    line = "may have begun with other code of relora_core: its hash 0123 is of an older kind"
    assert line in printed


def test_going_on_with_other_code_can_be_refused(begun):
    config, run_dir = begun(on_code_change="refuse")
    with pytest.raises(ConfigError, match=r"checkpoint\.on_code_change must be warn to go on"):
        run_experiment(config, run_dir)
    assert run_dir.status().attempts == 1


def test_a_failure_is_recorded_with_its_traceback(nano, tmp_path):
    config = nano(train={"batch_size": 5, "micro_batch_size": 2}, model={"vocab_size": VOCAB_SIZE})
    run_dir = RunDir(tmp_path / "runs" / "a")
    with pytest.raises(ConfigError):
        run_experiment(config, run_dir)
    status = run_dir.status()
    assert status.state == "failed"
    assert "train.micro_batch_size" in (status.error or "")
    assert "Traceback" in run_dir.error_path.read_text()
    assert run_dir.lock_holder() is None


def test_errors_are_one_line():
    assert one_line(OSError(28, "No space left on device", "x")) == "No space left on device (x)"
    assert "\n" not in one_line(RuntimeError("a\nb"))


@pytest.mark.parametrize(
    ("outcome", "reason", "cancel", "ends", "state", "error"),
    [
        ("finished", "SIGTERM", True, "finished", "finished", None),
        ("diverged", "asked to end", False, "diverged", "diverged", None),
        ("interrupted", "cancelled", False, "cancelled", "cancelled", None),
        ("interrupted", "SIGTERM", True, "cancelled", "cancelled", None),
        ("interrupted", "pruned", True, "cancelled", "cancelled", None),
        ("interrupted", "pruned", False, "pruned", "pruned", None),
        (
            "interrupted",
            "SIGTERM",
            False,
            "interrupted",
            "failed",
            "stopped (SIGTERM); the same command resumes it",
        ),
    ],
)
def test_what_an_attempt_ended_for_decides_what_the_run_says(
    nano, tmp_path, outcome, reason, cancel, ends, state, error
):
    run_dir = RunDir(tmp_path / "runs" / "a")
    run_dir.create(nano())
    if cancel:
        run_dir.cancel_path.touch()
    assert runner._settle(run_dir, Outcome(outcome), reason=reason) == ends
    status = run_dir.status()
    assert (status.state, status.error) == (state, error)


def test_the_record_is_closed_even_where_another_sink_cannot_be(nano, tmp_path, monkeypatch):
    closed = []

    def fail(self):
        raise OSError("no such sensor")

    monkeypatch.setattr(runner.SystemSink, "close", fail)
    monkeypatch.setattr(runner.EventLog, "close", lambda self: closed.append(self))
    config = nano(model={"vocab_size": VOCAB_SIZE}, tracking={"system_metrics": True})
    with pytest.raises(OSError, match="no such sensor"):
        run_experiment(config, RunDir(tmp_path / "runs" / "a"))
    assert len(closed) == 1
