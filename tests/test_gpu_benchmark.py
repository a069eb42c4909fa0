"""`benchmarks/gpu.py`, which few machines can run: each of its paths at a shape of no interest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *words],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_is_one_line() -> None:
    done = call()
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no GPU" in done.stderr


@pytest.mark.slow
def test_every_path_of_it_runs_on_a_cpu() -> None:
    """Ours and the compiled Llama, the search for a batch, the roof, runs packed and in turn."""
    names = ["relora bf16", "hf sdpa bf16 compiled"]
    peaks = ["--peak-tflops", "1", "--bandwidth-gb", "100"]
    done = call("--device", "cpu", "--variants", ",".join(names), *peaks)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["variant"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert row["batch"] == 2  # as far as a CPU's search goes
        assert row["mfu"] == pytest.approx(_flops(row) / row["step_s"] / 1e12)
        assert row["roof_tokens_per_s"] > row["tokens_per_s"]
    assert found["packed"]["runs"] == 2


def _flops(row: dict) -> float:
    """Of a step of 2 x 16 tokens at width 24, counted by hand."""
    frozen = 12 * (24 * 24 * 2 + 8 * 24 * 2 + 3 * 24 * 96)
    head, attention = 24 * 50304, 4 * 16 * 24 * 12
    if "relora" not in row["variant"]:
        return 32 * (6 * (head + frozen) + 3 * attention)
    adapters = 12 * 16 * (2 * (24 + 24) + 2 * (8 + 24) + 3 * (24 + 96))
    return 32 * (6 * (head + adapters) + 4 * frozen + 3 * attention)
