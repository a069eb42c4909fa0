"""Atomic checkpoints: weights, moments, method state, data position, every RNG, step. And back.

A checkpoint is a folder step-<n>/ that appears by one rename, so it is either whole or not there.
Loading executes nothing: safetensors for weights, `weights_only` for the rest.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core import atomic


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a run is: everything of a checkpoint that is small and JSON."""

    step: int = 0
    """Optimizer steps completed."""
    loss_sum: float = 0.0
    """Sum of the losses since the newest train event."""
    loss_count: int = 0
    """Steps in that sum."""
    seconds: float = 0.0
    """Training time of all attempts up to here."""
    threads: int = 0
    """CPU threads: another number would round differently, so a resumed run keeps it."""
    stream: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)


def rng_state() -> dict[str, Any]:
    """State of every generator of this process, in types that load without executing anything."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def save(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    rng: list[dict[str, Any]],
    keep_last: int,
    reference: dict[str, Tensor] | None = None,
) -> Path:
    """Write step-<n>/ and remove all but the newest `keep_last`. `rng` holds one state per rank.

    `reference` weights are those that dynamics compare with.
    """
    target = folder / f"step-{progress.step:08d}"
    temporary = folder / f".tmp-{target.name}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
        weights = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        record = {name: getattr(progress, name) for name in Progress.__slots__}
        _write(temporary / "model.safetensors", safetensors.torch.save(weights))
        _write(temporary / "optimizer.pt", _packed(optimizer.state_dict()))
        _write(temporary / "rng.pt", _packed(rng))
        if reference:
            _write(temporary / "reference.safetensors", safetensors.torch.save(reference))
        _write(temporary / "progress.json", json.dumps(record).encode())
        if target.exists():  # left by an attempt that died after the rename
            shutil.rmtree(target)
        temporary.rename(target)
        atomic.sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in complete(folder)[:-keep_last]:
        shutil.rmtree(old)
    return target


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _write(file: Path, content: bytes) -> None:
    """To the disk itself. Python writes, so that a full disk is an OSError that says so."""
    with open(file, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def is_evaluated(folder: Path, *, step: int) -> bool:
    """Whether the evals of this step are in the record; step 0 has no checkpoint to say so."""
    return (folder / f"step-{step:08d}" / "evaluated").exists()


def mark_evaluated(folder: Path, *, step: int, rank: int) -> None:
    """The evals of this step's checkpoint are in the record: a resumed run need not repeat them."""
    target = folder / f"step-{step:08d}"
    if rank == 0 and target.exists():
        (target / "evaluated").touch()


def discard_torn(folder: Path) -> None:
    """Remove what a kill in mid-write left behind."""
    for torn in folder.glob(".tmp-step-*"):
        shutil.rmtree(torn, ignore_errors=True)


def load(path: Path, *, model: nn.Module, optimizer: Optimizer, rank: int = 0) -> Progress:
    """Restore a checkpoint in place, this rank's generators included."""
    device = next(model.parameters()).device
    model.load_state_dict(load_file(path / "model.safetensors", device=str(device)))
    moments = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
    optimizer.load_state_dict(moments)
    states = torch.load(path / "rng.pt", map_location="cpu", weights_only=True)
    if rank < len(states):  # more ranks than before: the others keep their fresh generators
        set_rng_state(states[rank])
    return Progress(**json.loads((path / "progress.json").read_text()))


def load_reference(path: Path) -> dict[str, Tensor]:
    """The reference weights saved with a checkpoint; none where nothing compares with them."""
    file = path / "reference.safetensors"
    return load_file(file) if file.exists() else {}
