"""A launcher that submits to the fake SLURM, and what may befall it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shlex

import pytest
from rich.console import Console
from submitit import SlurmExecutor
from submitting import CPU

from relora_core.config import ResourcesConfig
from sweeps import snapshot
from sweeps.launch import run_sweep
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A project of one file, so that freezing it takes no time."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "run.py").write_text("print('code')\n")
    for name in ("check", "freeze", "record"):
        monkeypatch.setattr(snapshot, name, functools.partial(getattr(snapshot, name), root=root))
    return root


@pytest.fixture
def submit(make, code):
    """run_sweep over seeds, or (seed, resources), as sweep `s`; (exit code, printed text)."""

    def sweep(runs, *, plan_only=False, changes=None, **options):
        points = []
        for run in runs:
            seed, resources = run if isinstance(run, tuple) else (run, ResourcesConfig())
            config = make(seed=seed, resources=resources, **(changes or {}))
            config.model.vocab_size, config.sweep.name = None, "s"
            points.append(({"seed": str(seed)}, config))
        sweep.console = console = Console(file=io.StringIO(), width=400)
        launcher = SlurmLauncher(options=SlurmOptions(**{**CPU, **options}))
        done = run_sweep(points, launcher=launcher, plan_only=plan_only, console=console)
        return done, console.file.getvalue()  # type: ignore[attr-defined]

    return sweep


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def python(tmp_path):
    """Stands for Python on the node: writes down its words, and ends as the test wants it to."""
    path, log = tmp_path / "a python", tmp_path / "words.jsonl"
    path.write_text(
        "#!/bin/sh\n"
        f'exec /usr/bin/env -u PYTHONPATH SEEN="$PYTHONPATH" python3 -S -c \''
        "import json, os, sys; "
        f'print(json.dumps([os.environ["SEEN"], *sys.argv[1:]]), file=open(sys.argv[1], "a")); '
        'sys.exit(int(os.environ.get("CODE", 0)) if "--after" not in sys.argv else '
        "int(sys.argv[5]))' "
        f'{shlex.quote(str(log))} "$@"\n'
    )
    path.chmod(0o755)
    log.touch()
    return path, lambda: [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def interrupt(monkeypatch):
    """sbatch of the `number`-th array raises `error`, after SLURM took the job, or before."""

    @contextlib.contextmanager
    def interrupting(error=KeyboardInterrupt, *, number=1, taken=True):
        real, left = SlurmExecutor._submit_command, [number]

        def submit_command(self, command):
            left[0] -= 1
            job = None if left[0] == 0 and not taken else real(self, command)
            if left[0]:
                return job
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(SlurmExecutor, "_submit_command", submit_command)
            with pytest.raises(error):
                yield

    return interrupting
