"""A copy of the code on which a recipe of docs/recipes.md is carried out, and commands there.

Commands are forks of a process that has imported what the project needs, and none of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests import forks
from tests.forks import Started

ROOT = Path(__file__).resolve().parents[1]
CODE = ("relora_core", "experiments", "sweeps", "hydra_plugins", "conf", "tests")
NANO = [
    *("model=nano", "relora.r=4", "train.steps=60", "train.batch_size=4", "data.seq_len=16"),
    *("relora.reset_frequency=15", "schedule.warmup_steps=5", "checkpoint.every_steps=10"),
    *("relora.restart_warmup_steps=2", "runtime.log_every_steps=1", "runtime.threads=1"),
    "runtime.device=cpu",
]
SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(
    [
        *("tests.forks", "torch._dynamo", "torch.distributed.tensor", "accelerate", "hydra"),
        *("safetensors.torch", "optuna", "matplotlib.backends.backend_svg", "scipy.stats"),
    ]  # not MLflow: with it comes pyarrow, which starts a thread
)


def carry_out(recipe: str, *, into: Path) -> list[Path]:
    """Copy the code into a folder and do there what the recipe says; the files it touches."""
    unfinished = shutil.ignore_patterns("*.pyc.*")  # that another process is just writing
    for name in CODE:  # with its bytecode
        shutil.copytree(ROOT / name, into / name, ignore=unfinished)
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, into / name)
    text = (ROOT / "docs" / "recipes.md").read_text()
    section = text.partition(f"\n## {recipe}\n")[2].partition("\n## ")[0]
    touched = []
    for kind, name, block in re.findall(r"^```(\w+) (\S+)\n(.*?)^```$", section, re.M | re.S):
        path = into / name
        touched.append(path)
        if kind != "diff":
            assert not path.exists(), path
            path.write_text(block)
            continue
        lines = [(line[:1].strip(), line[1:]) for line in block.splitlines(keepends=True)]
        old = "".join(line for sign, line in lines if sign != "+")
        assert path.read_text().count(old) == 1, f"{name} has no single place for:\n{block}"
        new = "".join(line for sign, line in lines if sign != "-")
        path.write_text(path.read_text().replace(old, new))
    assert touched, f"docs/recipes.md has no recipe {recipe!r}"
    return list(dict.fromkeys(touched))


def lint(touched: list[Path], root: Path) -> None:
    """Assert that ruff has nothing to say of the code that a recipe gives."""
    files = [str(path) for path in touched if path.suffix == ".py"]
    for check in (["check"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *check, *files]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def start(root: Path, *words: str | Path, figures: bool = True) -> Started:
    texts, output = [str(word) for word in words], Path(tempfile.mkdtemp())
    variables = {**os.environ, "PYTHONPATH": str(root)}
    todo = (texts, str(root), variables, output, figures, str(root))
    process = multiprocessing.get_context("forkserver").Process(target=forks.become, args=todo)
    with mock.patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
        process.start()
    return Started(words=texts, process=process, output=output)


def call(root: Path, *words: str | Path, figures: bool = True) -> str:
    """stdout of Python with these words in the copy; it must succeed."""
    done = start(root, *words, figures=figures).wait(timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passes(root: Path, file: str) -> None:
    """Assert that the copy's tests in this file pass: in a process that pytest begins."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    variables = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        words, cwd=root, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def killed_at(root: Path, *words: str | Path, out: Path, step: int) -> None:
    """Start a run and kill it once it has recorded this step."""
    started = start(root, *words, f"output_dir={out}")
    deadline = time.monotonic() + 120
    while not any(event["step"] >= step for event in events(out)):
        assert started.process.is_alive(), started.wait()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)
    started.process.kill()
    started.wait()


def events(out: Path) -> Iterator[dict[str, Any]]:
    """Those of the only run in a folder, as far as they are written."""
    for path in out.glob("runs/*/events.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def numbers(out: Path) -> dict[tuple[int, str], float]:
    """(step, metric) -> value of the only run in a folder, the newest of each; no timings."""
    return {
        (event["step"], name): value
        for event in events(out)
        for name, value in event.get("metrics", {}).items()
        if not name.startswith("perf/")
    }
