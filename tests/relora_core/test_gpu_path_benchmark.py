"""`benchmarks/gpu.py` on fake CUDA tensors: what a process of it does on a GPU, from its start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_table import DEVICE

pytestmark = pytest.mark.slow

CASES = [(part, name) for part, names in gpu.NAMES.items() for name in names]
CASES.remove(("head", "head, cce"))  # a package that is not installed
CASES += [("device", name) for name in DEVICE]
# What another case goes through as well, with other options: seconds each.
for again in ("full rank, eager", "llama, eager", "relora, blocks"):
    CASES.remove(("train", again))
for again in ("full rank, blocks", "full rank, cudagraphs", "relora, blocks"):
    CASES.remove(("small batches", again))
CASES.remove(("eval", "eval, fp32"))


@pytest.mark.parametrize(("part", "name"), CASES)
def test_a_variant_is_made_and_takes_its_turn(
    fake_run: Callable[[Any], Any], part: str, name: str
) -> None:
    """All of it on the device; nothing waits between the calls of a turn, of which there are four:
    one before the clock starts, after which its loss is read, and three that are timed."""
    run = fake_run(f"work;{part};{name};nano")
    assert run["turn"]["calls"] == 3
    assert run["make"]["peak_mb"] == 1024
    has_loss = part not in ("eval", "device")
    assert run["make"]["loss"] == (1.0 if has_loss else None)
    if part != "eval":  # whose result the host needs
        assert sum(run["waits"].values()) == (2 if has_loss else 0)
    ours = name in ("full rank, blocks", "relora, blocks", "head, ours") or "cudagraphs" in name
    assert ("relora.head_loss.default" in run["operations"]) is ours
