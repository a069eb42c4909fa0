"""`pip install .` gives what a checkout does: command, options, frozen code. No network is used."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest

from experiments import __main__ as of_one_run
from relora_core.sources import code_hash
from relora_sweeps.__main__ import OF_ONE_RUN, main
from sweeps import __main__ as of_many_runs
from sweeps.__main__ import COMMANDS
from tests.recipes import NANO, ROOT
from tests.test_door import PROJECT, copied

TINY = [*NANO, "eval=none", "tracking=none"]


class Installed:
    """A virtual environment with the wheel, in a git checkout of somebody else's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.empty = folder, folder / "empty"
        self.empty.mkdir()
        subprocess.run(["git", "init", "-q", folder], check=True)
        git = ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
        source = folder / "source"
        leave = shutil.ignore_patterns("__pycache__")
        source.mkdir()
        for name in copied():  # into an image
            copy = partial(shutil.copytree, ignore=leave) if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.bin = folder / "venv" / "bin"
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        # What the project needs, without the checkout, which a .pth file there adds.
        (self.site / "needed.pth").write_text(sysconfig.get_path("purelib"))
        other = self.site / "hydra_plugins" / "other"
        other.mkdir(parents=True)
        (other / "__init__.py").write_text("")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        quick = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        subprocess.run([*pip, *quick, str(source)], check=True, env=outside(), timeout=300)
        shutil.rmtree(source)

    def answer(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What `relora-sweeps` says in an empty folder."""
        command = [str(self.bin / "relora-sweeps"), *words]
        return subprocess.run(
            command, cwd=self.empty, env=outside(), capture_output=True, text=True, timeout=300
        )

    def call(self, *words: str) -> str:
        """The same, which must succeed: stdout."""
        done = self.answer(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def outside() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_a_wheel_trains_what_a_checkout_does(installed):
    description = installed.call("describe", *TINY, "--json")
    words = [sys.executable, "-m", "experiments", "describe", *TINY, "--json"]
    here = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(description) == json.loads(here.stdout)

    installed.call("run", *TINY)
    (run,) = json.loads(installed.call("status", "--json"))["runs"]
    assert run["run_id"] == json.loads(description)["run_id"]
    assert run["state"] == "finished"
    shown = json.loads(installed.call("show", run["run_id"], "--json"))
    assert shown["attempt_records"][0]["code_hash"] == code_hash(ROOT)
    assert "commit" not in shown["attempt_records"][0]


@pytest.mark.slow
def test_a_wheel_s_sweep_runs_frozen_code_that_is_the_project_s_alone(installed):
    words = ["run", "-m", *TINY, "seed=1,2", "sweep.name=toy"]
    installed.call(*words)
    folder = installed.empty / "outputs" / "sweeps" / "toy"
    (command,) = json.loads((folder / "plan.json").read_text())["commands"]
    assert command == " ".join(("relora-sweeps", *words))
    runs = json.loads(installed.call("sweeps", "status", "toy", "--json"))["runs"]
    assert [run["state"] for run in runs] == ["finished"] * 2
    (copy,) = (path.parent for path in folder.glob("code/*/SNAPSHOT.json"))
    assert json.loads((copy / "SNAPSHOT.json").read_text())["commit"] is None
    assert code_hash(copy) == code_hash(ROOT)
    assert {p.name for p in (copy / "hydra_plugins").iterdir()} == {"relora_sweeps"}
    assert {p.name for p in copy.iterdir()} == {
        *("SNAPSHOT.json", "experiments", "hydra_plugins", "relora_core", "relora_sweeps"),
        "sweeps",
    }
    conf = {p.relative_to(ROOT) for p in (ROOT / "conf").rglob("*.yaml")}
    copied = copy / "relora_sweeps"
    assert {p.relative_to(copied) for p in copied.rglob("*.yaml")} == conf


@pytest.mark.slow
def test_a_mistake_is_one_line_as_in_a_checkout(installed):
    done = installed.answer("run", "model=tinny")
    assert done.returncode == 2
    assert done.stderr.startswith("error: model must be one of ")
    assert "'tinny'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_wheel_names_commands_that_its_user_has(installed):
    assert installed.call("published", "--help").startswith("usage: relora-sweeps published")
    page = installed.call("sweeps", "--help")
    assert "run.py" not in page + installed.call("experiments", "--help")
    assert "\n  relora-sweeps run -m model=tiny" in page
    version = installed.call("--version").split()
    assert version == ["relora-sweeps", PROJECT["version"]]


def call(monkeypatch, capsys, *words: str) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["relora-sweeps", *words])
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    out, error = capsys.readouterr()
    return code, out, error


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("evalute", "evaluate"), ("publish", "published"), ("statsu", "status"), ("rum", "run")],
)
def test_a_mistyped_command_names_the_nearest_of_all(monkeypatch, capsys, typed, meant):
    code, out, error = call(monkeypatch, capsys, typed, "gpt2")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.endswith(f"got {typed!r}. Did you mean '{meant}'?\n")


def test_the_version_is_the_packages(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--version")
    assert (code, out) == (0, f"relora-sweeps {importlib.metadata.version('relora-sweeps')}\n")


def test_help_of_each_command_names_what_starts_it(monkeypatch, capsys):
    for module in (of_one_run, of_many_runs):
        monkeypatch.setattr(module, "RUN", "relora-sweeps run")
        name = "EXPERIMENTS" if module is of_one_run else "SWEEPS"
        monkeypatch.setattr(module, name, "relora-sweeps")
    for command in (*OF_ONE_RUN, *COMMANDS):
        code, out, _ = call(monkeypatch, capsys, command, "--help")
        assert code == 0
        assert out.startswith(f"usage: relora-sweeps {command} ")


def test_every_command_has_one_owner():
    actions = of_one_run.build_parser()._actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    assert set(OF_ONE_RUN) == set(commands.choices)
    assert not {"run", "sweeps", "experiments", *OF_ONE_RUN} & set(COMMANDS)
