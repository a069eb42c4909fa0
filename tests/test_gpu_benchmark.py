"""`benchmarks/gpu.py`, which few machines can run: each of its paths at a shape of no interest."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
PLACE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_without_a_gpu_it_is_one_line() -> None:
    command = [sys.executable, "benchmarks/gpu.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | PLACE, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no GPU" in done.stderr


@pytest.mark.slow
def test_every_path_of_it_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours and the compiled Llama, the search for a batch, the roof, runs packed and in turn."""
    names = ["relora bf16", "hf sdpa bf16 compiled"]
    peaks = ["--peak-tflops", "1", "--bandwidth-gb", "100"]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("benchmarks.gpu")
    words = ["--device", "cpu", "--variants", ",".join(names), *peaks]
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *words])
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=in_a_fork, PIPE=subprocess.PIPE))
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    assert gpu.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["variant"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert row["batch"] == 2  # as far as a CPU's search goes
        assert row["mfu"] == pytest.approx(_flops(row) / row["step_s"] / 1e12)
        assert row["roof_tokens_per_s"] > row["tokens_per_s"]
    assert found["packed"]["runs"] == 2


def in_a_fork(
    words: list[str], *, env: dict[str, str], **_: Any
) -> subprocess.CompletedProcess[str]:
    """A variant's own process, which need not import torch."""
    assert words[0] == sys.executable
    done = warm.run(words[1:], cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done


def _flops(row: dict) -> float:
    """Of a step of 2 x 16 tokens at width 24, counted by hand."""
    frozen = 12 * (24 * 24 * 2 + 8 * 24 * 2 + 3 * 24 * 96)
    head, attention = 24 * 50304, 4 * 16 * 24 * 12
    if "relora" not in row["variant"]:
        return 32 * (6 * (head + frozen) + 3 * attention)
    adapters = 12 * 16 * (2 * (24 + 24) + 2 * (8 + 24) + 3 * (24 + 96))
    return 32 * (6 * (head + adapters) + 4 * frozen + 3 * attention)
