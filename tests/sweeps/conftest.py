"""Small configs, and a worker that takes milliseconds in place of one that trains."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra

from experiments import schema
from relora_core.config import (
    DataConfig,
    ModelConfig,
    ReLoRAConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from sweeps.planning.plan import Plan, make_plan
from sweeps.slurm import cluster

FAKE = '''
"""Behaves as a worker does towards its run directory; the seed says how it ends."""
import os, signal, sys, time, traceback
from experiments.disk.run_dir import RunDir; from experiments.errors import RunLocked

run = RunDir(sys.argv[1])
seed = run.config().seed
first = not (run.path / "tried").exists()
if seed == 9 and first:  # killed before its first word
    (run.path / "tried").touch()
    os.kill(os.getpid(), signal.SIGKILL)
try:
    with run.lock():
        if run.result() is not None:
            sys.exit(0)
        attempts = run.status().attempts + 1
        host = os.uname().nodename
        run.update_status(state="running", attempts=attempts, host=host, pid=os.getpid())
        executed = run.path.parent / "executed"
        with open(executed, "a") as log:
            print(run.run_id, "start", time.time(), file=log, flush=True)
            time.sleep(float(os.environ.get("FAKE_S", "0.03")))
            waited = time.monotonic() + 120  # for company, where a test wants workers to overlap
            company = int(os.environ.get("FAKE_COMPANY", "1"))
            while executed.read_text().count("start") < company and time.monotonic() < waited:
                time.sleep(0.02)
            gate = os.environ.get("FAKE_GATE")
            while gate and not os.path.exists(gate) and time.monotonic() < waited:
                time.sleep(0.02)
            print(run.run_id, "end", time.time(), file=log, flush=True)
        if seed == 7 and first:
            (run.path / "tried").touch()
            run.error_path.write_text("Traceback: boom")
            run.update_status(state="failed", error="RuntimeError: boom")
            sys.exit(1)
        state = "diverged" if seed == 5 else "finished"
        run.write_result({"state": state, "metrics": {"train/loss": 1.5}, "step": 4})
        run.update_status(state=state, step=4, loss=1.5)
        print("threads", os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"))
        sys.exit(3 if state == "diverged" else 0)
except RunLocked as error:
    print(error)
    sys.exit(4)
'''


def planned(make: Callable[..., RunConfig], seeds: Iterable[int], **changes: object) -> Plan:
    """A plan of these seeds."""
    return make_plan([({"seed": str(s)}, make(seed=s, **changes)) for s in seeds], name="s")


@pytest.fixture(scope="module")
def loader() -> Iterator[ConfigLoader]:
    """Hydra's loader of the options of conf/."""
    with schema.initialized():
        yield GlobalHydra.instance().config_loader()


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    """The command of a fake worker: seed 5 diverges, 7 first fails, 9 is first killed."""
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


@pytest.fixture
def calls() -> Callable[..., int]:
    """How many functions, files' included, a call enters: unlike time, the same on each machine."""

    def calls(function: Callable[..., object], *args: object) -> int:
        count = 0

        def enters(frame: object, event: str, arg: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        before = sys.getprofile()
        gc.collect()
        gc.disable()  # what earlier tests left must not be put away meanwhile
        sys.setprofile(enters)
        try:
            function(*args)
        finally:
            sys.setprofile(before)
            gc.enable()
        return count

    return calls


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., RunConfig]:
    """A small valid config below tmp_path; `r`, `method`, `seed`, ... change it."""

    def build(
        *, r: int = 4, method: str = "relora", seed: int = 0, steps: int = 4, **changes: object
    ) -> RunConfig:
        config = RunConfig(
            experiment="test",
            output_dir=str(tmp_path / "out"),
            seed=seed,
            method=method,
            model=ModelConfig(name="nano", d_model=24, d_ff=48, vocab_size=64),
            relora=ReLoRAConfig(r=r),
            train=TrainConfig(steps=steps, batch_size=2),
            data=DataConfig(seq_len=8),
            tracking=TrackingConfig(enabled=False),
        )
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]

    return build


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A cluster that takes milliseconds, whose tools are asked again without a pause."""
    monkeypatch.setattr(cluster, "PAUSE_S", 0.0)
    return FakeSlurm.install(tmp_path / "it's a slurm", monkeypatch)


@pytest.fixture
def spec(make):
    """`studies.spec_of` with this test's configs."""
    from studies import spec_of

    return partial(spec_of, make)


@pytest.fixture
def folder(tmp_path):
    """Of the study of a search called s."""
    from experiments.disk.output_dir import study_folder

    return study_folder(tmp_path / "out", name="s")
