"""What tests share: small configs, a migrated database, real data where it is there."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from relora_core.config import (
    DataConfig,
    ModelConfig,
    ReLoRAConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers share two cores
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):  # a tester's own
    os.environ.pop(name, None)

# A shell starts its background jobs deaf to Ctrl-C, which their children inherit; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real BLiMP, tokenizer, text and rows; not part of a clone."""
    if not SHARED.is_dir():
        pytest.skip("real data is not here: no ../shared/data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database, empty, to be copied: making one takes seconds. One for all workers."""
    from experiments.addresses import default_uri
    from experiments.tracking.store import open_store

    here = tmp_path_factory.getbasetemp()
    folder = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "migrated"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready.db").exists():
            open_store(default_uri(folder), experiment="other", output_dir=folder)
            shutil.copy(folder / "mlflow.db", folder / "ready.db")
    return folder / "ready.db"


MEMORY, ROOM = Path("/dev/shm"), 6 << 30


def _use_memory(config: pytest.Config) -> None:
    """Temporary folders in memory, where there is plenty: to bring a file to a disk takes
    milliseconds, which runs and databases do all the time. pytest removes those of tests that pass.
    """
    chosen = config.option.basetemp or os.environ.get("PYTEST_DEBUG_TEMPROOT")
    if chosen or not os.access(MEMORY, os.W_OK) or psutil.virtual_memory().available < 2 * ROOM:
        return
    if shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


def pytest_configure(config: pytest.Config) -> None:
    _use_memory(config)
    gc.disable()  # what is imported stays
    config.option.loadscopereorder = False  # xdist's order is by number of tests, ours is `LONG`'s
    settings.register_profile("fast", max_examples=25, deadline=None)
    settings.register_profile("whole", max_examples=100, deadline=None)
    settings.load_profile("fast" if "not slow" in config.getoption("markexpr") else "whole")


def pytest_collection_finish() -> None:
    """Half a million objects of libraries need no looking at: a full pass took 0.3 s."""
    gc.freeze()
    gc.enable()


LONG = (
    *("slurm/test_life.py", "slurm/test_search.py", "slurm/test_sweep_on_slurm.py", "slurm/"),
    *("faults/", "browser/", "security/", "fuzz/"),
)
"""Begun first, so that no worker is at them long after the others have ended; then the files with
the most slow tests, so that those of the end take seconds. Each file is one worker's, and SLURM's
files are all one worker's."""


FAKES = ("test_gpu.py", "test_gpu_path.py", "test_gpu_path_benchmark.py", "test_gpu_path_head.py")
FAKES += ("test_gpu_path_waits.py",)
TOGETHER = {
    "slurm": ("slurm/",),
    "fake GPUs": tuple(f"relora_core/{name}" for name in FAKES),
    "recipes": ("test_toy_method.py", "test_toy_eval.py", "test_renamed_metric.py"),
}
"""Scope -> its files: one worker's, as they share what takes seconds to make."""


class OneWaits(LoadScopeScheduling):
    """Tests of SLURM mostly wait: they share one worker, while the others keep the cores at work,
    and its clusters. Others share what they use, too (`TOGETHER`)."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.removeprefix("tests/")
        matches = (scope for scope, parts in TOGETHER.items() if path.startswith(parts))
        return next(matches, super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    return OneWaits(config, log) if config.getvalue("dist") == "loadscope" else None


OF_THE_MACHINE = ("slurm/", "faults/", "browser/")
"""Run once more where they fail, which the summary says (R). They share the clock with schedulers,
browsers and processes that are killed, whose time limits no test can set. Everywhere else a second
try would hide a fault of ours: no other folder may be added."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))

    def rank(item: pytest.Item) -> tuple[int, int]:
        matches = (i for i, one in enumerate(LONG) if f"tests/{one}" in item.nodeid)
        return next(matches, len(LONG)), -slow[item.path]

    items.sort(key=rank)
    for item in items:
        if any(f"tests/{one}" in item.nodeid for one in OF_THE_MACHINE):
            item.add_marker(pytest.mark.flaky(reruns=1))


def nano_config(**changes: object) -> RunConfig:
    """A run of seconds; `relora={...}` and the like replace fields of a section."""
    sections = {
        "model": ModelConfig(
            name="nano", d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97
        ),
        "relora": ReLoRAConfig(r=4, alpha=8.0, reset_frequency=4, restart_warmup_steps=1),
        "schedule": ScheduleConfig(warmup_steps=2, min_ratio=0.1),
        "train": TrainConfig(steps=12, batch_size=4, lr=1e-2),
        "data": DataConfig(seq_len=16),
        "runtime": RuntimeConfig(device="cpu", log_every_steps=1, threads=1),
    }
    for name, fields in list(changes.items()):
        if isinstance(fields, dict):
            section = sections.get(name) or RunConfig.__dataclass_fields__[name].default_factory()
            for key, value in fields.items():
                setattr(section, key, value)
            sections[name] = section
            del changes[name]
    return RunConfig(**{"method": "relora", **sections, **changes})  # type: ignore[arg-type]


@pytest.fixture
def nano() -> Callable[..., RunConfig]:
    return nano_config
