from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Undisturbed

from experiments.identity import config_to_json
from relora_core import native
from relora_core.config import RunConfig

HERE = Path(__file__).parent


@pytest.fixture(params=["native", "torch"])
def kernels(request):
    """Both implementations of what `relora_core.kernels` computes on a CPU."""
    with native.restore_choice():
        if native.choose(request.param) != request.param:
            pytest.skip(f"no native kernels here: {native.problem()}")
        yield request.param


@pytest.fixture
def compiler():
    """Native kernels can be built; what the test chooses is forgotten after it."""
    with native.restore_choice():
        if native.choose("native") != "native":
            pytest.skip(f"no native kernels here: {native.problem()}")
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Config -> (record, folder) of a run that nobody ended."""
    return Undisturbed(lambda: tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fake_guard.cpp as a library."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to build a guard for fake CUDA tensors")
    library, home = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    include = home / "include"
    words = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{include}"]
    words += [f"-I{include}/torch/csrc/api/include", str(HERE / "fake_guard.cpp"), "-o"]
    words += [str(library), f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"]
    subprocess.run(words, check=True)
    return library


@pytest.fixture(scope="session")
def fake_run(
    guard: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[RunConfig], Any]]:
    """Config, or sizes of a head -> what `fake_cuda.py` prints, in one process; each once."""
    words = [sys.executable, HERE / "fake_cuda.py", guard, tmp_path_factory.mktemp("fake")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done: dict[str, Any] = {}
    with subprocess.Popen(words, env=environment, text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(config: RunConfig | str) -> Any:
            sizes = isinstance(config, str)
            text = config if sizes else json.dumps(json.loads(config_to_json(config)))
            if text not in done:
                process.stdin.write(f"{text}\n")
                process.stdin.flush()
                done[text] = json.loads(process.stdout.readline())
            return done[text]

        yield run
        process.stdin.close()
