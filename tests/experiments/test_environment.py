"""An attempt's record tells the truth about code, packages and machine, also from a frozen copy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest

from experiments import environment, scheduler
from experiments.environment import ROOT, SNAPSHOT, attempt_record, git_state


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM"):
            monkeypatch.delenv(name)


@pytest.fixture
def repository(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "a.py").write_text("one\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(folder), *who, *command], check=True)
    yield folder
    git_state.cache_clear()


def test_the_record_can_be_written_and_takes_more():
    record = attempt_record(start_step=7, world=2)
    assert json.loads(json.dumps(record)) == record
    assert (record["start_step"], record["world"]) == (7, 2)
    assert record["pid"] == os.getpid()
    assert record["packages"]["torch"] == importlib.metadata.version("torch")
    assert {"transformers", "cut-cross-entropy"} <= set(environment.PACKAGES)  # if installed
    assert 1 <= record["cores"] <= (os.cpu_count() or 1)
    assert record["cpu"]
    assert (record["job_id"], record["slurm"]) == (None, {})


def test_a_package_that_is_not_there_is_left_out(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package-anywhere"))
    environment.packages.cache_clear()
    assert set(environment.packages()) == {"numpy"}
    environment.packages.cache_clear()


def test_looking_does_not_load_torch():
    code = (
        "import sys; from experiments.environment import attempt_record; r = attempt_record(); "
        "sys.exit('torch' in sys.modules or r['gpus'] != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_gpus_are_those_torch_sees(monkeypatch):
    class Cuda:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 2)
        get_device_name = staticmethod("card {}".format)

    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": Cuda}))
    assert environment.gpus() == ["card 0", "card 1"]


def test_git_state_of_a_checkout(repository):
    clean = git_state(repository)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    git_state.cache_clear()
    (repository / "a.py").write_text("two\n")
    assert git_state(repository) == clean | {"dirty": True}


@pytest.fixture
def of_another(repository, monkeypatch):
    """A checkout that git refuses to look at."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    return repository


def test_of_a_checkout_of_another_owner_nothing_is_known_and_it_is_said(of_another):
    assert git_state(of_another) == {}
    (line,) = environment.notes(of_another)
    assert line.startswith("code: no commit is recorded: detected dubious ownership in repository")
    assert line.endswith(f"(git config --global --add safe.directory {of_another})")


def test_where_git_speaks_or_there_is_no_checkout_there_is_nothing_to_say(repository, tmp_path):
    assert environment.notes(repository) == ()
    (tmp_path / "alone").mkdir()
    assert environment.notes(tmp_path / "alone") == ()


def test_a_checkout_without_git_or_without_a_commit_is_said(tmp_path, repository, monkeypatch):
    new = tmp_path / "new"
    new.mkdir()
    subprocess.run(["git", "init", "-q", str(new)], check=True)
    assert environment.notes(new)[0].startswith("code: no commit is recorded: ambiguous argument")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.notes(repository)[0].startswith(
        "code: no commit is recorded, git cannot be run"
    )


def test_a_copy_of_what_nobody_knows_says_nothing_of_it(tmp_path):
    facts = {"commit": None, "dirty": None, "tree_hash": "t" * 16, "code_hash": "x"}
    (tmp_path / SNAPSHOT).write_text(json.dumps(facts))
    assert git_state(tmp_path) == {"tree_hash": "t" * 16}


def test_a_copy_below_a_checkout_reports_what_it_is_a_copy_of(repository):
    copy = repository / "outputs" / "code"
    copy.mkdir(parents=True)
    facts = {"commit": "c" * 40, "dirty": True, "tree_hash": "t" * 16, "code_hash": "x"}
    (copy / SNAPSHOT).write_text(json.dumps(facts))
    assert git_state(copy) == {k: facts[k] for k in ("commit", "dirty", "tree_hash")}


def test_without_git_nothing_is_claimed(tmp_path):
    assert git_state(tmp_path) == {}


def test_slurms_facts(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(scheduler, "_job", "s.0123abcd/12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    record = attempt_record()
    assert record["job_id"] == "12"
    assert record["slurm"] == {"node": "n1", "partition": None, "restarts": 2}
