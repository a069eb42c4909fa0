"""Atomic checkpoints: weights, moments, method state, data position, every RNG, step. And back.

A checkpoint is a folder step-<n>/ that appears by one rename, so it is complete or absent;
checksums.json shows later damage. Untrained weights are in a separate file, which is written only
when they have changed. Loading executes nothing: safetensors for weights,
`weights_only` for the rest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from relora_core import atomic, shared
from relora_core.data.base import DataError

MODEL, FROZEN = "model.safetensors", "frozen.safetensors"
"""Trained weights, with buffers; and untrained ones, if there are any."""
CHECKSUMS = "checksums.json"
"""sha256 of every other file. Older checkpoints without it are not checked."""
NEEDED = (MODEL, "optimizer.pt", "rng.pt", "progress.json")
"""Files of every checkpoint."""
REFERENCE = "reference.safetensors"
"""Weights that dynamics compare with, if there are any."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """A run's position: all small values of a checkpoint, stored as JSON."""

    step: int = 0
    """Optimizer steps completed."""
    loss_sum: float = 0.0
    """Sum of the losses since the newest train event."""
    loss_count: int = 0
    """Steps in that sum."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps, for the run's final loss. Older checkpoints have none."""
    seconds: float = 0.0
    """Training time of all attempts up to here."""
    threads: int = 0
    """CPU threads: another number would round differently, so a resumed run keeps it."""
    kernels: str | None = None
    """Those of `runtime.kernels` in use: kept for the same reason. None: an older checkpoint."""
    compile: str | None = None
    """What of `runtime.compile` is in use, which is kept, too. None: an older checkpoint."""
    head: str | None = None
    """Likewise, of `runtime.head`."""
    micro_batch_size: int | None = None
    """What followed from train.micro_batch_tokens at the start: kept, too. None: nothing did."""
    stream: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)


def rng_state() -> dict[str, Any]:
    """State of every generator of this process, in types that load without executing anything."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`, on this process's GPU, whatever its index and that of the one before.

    Older checkpoints have a generator for every GPU that was visible.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        index = min(torch.cuda.current_device(), len(state["cuda"]) - 1)
        torch.cuda.set_rng_state(state["cuda"][index])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@dataclass(kw_only=True, slots=True)
class Snapshot:
    """A run's state in host memory, which training no longer changes."""

    step: int
    record: bytes
    """progress.json."""
    weights: dict[str, Tensor]
    frozen: dict[str, Tensor]
    moments: dict[str, Any]
    rng: list[dict[str, Any]]
    reference: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        optimizer: Optimizer,
        progress: Progress,
        rng: list[dict[str, Any]],
        reference: dict[str, Tensor] | None = None,
        with_frozen: bool,
    ) -> Snapshot:
        """A copy, so that training may go on.

        `rng` holds one state per rank; `reference` weights are those that dynamics compare with.
        """
        record = {name: getattr(progress, name) for name in Progress.__slots__}
        still = {name for name, _ in _frozen(model)}
        state = model.state_dict()
        return cls(
            step=progress.step,
            record=json.dumps(record).encode(),
            weights=_copied({k: v for k, v in state.items() if k not in still}),
            frozen=_copied({k: v for k, v in state.items() if k in still and with_frozen}),
            moments=_copied(optimizer.state_dict()),
            rng=rng,
            reference=_copied(reference or {}),
        )

    def files(self) -> Iterator[tuple[str, bytes]]:
        """(name, content), one in memory at a time."""
        yield MODEL, _tensors(self.weights)
        if self.frozen:
            yield FROZEN, _tensors(self.frozen)
        yield "optimizer.pt", _packed(self.moments)
        yield "rng.pt", _packed(self.rng)
        if self.reference:
            yield REFERENCE, _tensors(self.reference)
        yield "progress.json", self.record


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if not p.requires_grad)


def _copied(value: Any) -> Any:
    """The same structure with a copy of every tensor in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _tensors(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})


@dataclass(kw_only=True, slots=True)
class Kept:
    """The file of frozen weights in a checkpoint of this process."""

    file: Path
    digest: str
    versions: dict[str, tuple[int, int]]
    """Identity of the weights: address and number of writes."""


def _store(
    folder: Path, *, snapshot: Snapshot, keep_last: int, same: Kept | None
) -> tuple[Path, dict[str, str]]:
    """Write step-<n>/ and remove all but the newest `keep_last`: (checkpoint, sha256 by file).

    `same` holds the frozen weights, where they did not change.
    """
    target = folder / f"step-{snapshot.step:08d}"
    temporary = folder / f".tmp-{target.name}-{os.getpid()}"
    shared.make_folder(folder)
    digests = {FROZEN: same.digest} if same else {}
    try:
        temporary.mkdir()
        shared.share(temporary)
        if same:
            _link(same.file, temporary / FROZEN)
        for name, content in snapshot.files():
            _write(temporary / name, content)
            digests[name] = hashlib.sha256(content).hexdigest()
        _write(temporary / CHECKSUMS, json.dumps(digests, indent=2).encode())
        atomic.sync_folder(temporary)
        if target.exists():  # left by an attempt that died after the rename
            _discard(target)
        temporary.rename(target)
        atomic.sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in complete(folder)[:-keep_last]:
        _discard(old)
    return target, digests


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, so that either folder may be removed; copy it if links are impossible."""
    try:
        os.link(source, target)
    except OSError:
        _write(target, source.read_bytes())


def _discard(path: Path) -> None:
    """Remove a folder. A kill at any moment leaves it complete or under another name."""
    aside = path.with_name(f".tmp-{path.name}-old-{os.getpid()}")
    path.rename(aside)
    shutil.rmtree(aside)


class Writer:
    """Writes checkpoints in the background, one at a time: training waits for the copy alone.

    Leaving a `with` block waits for the checkpoint begun, also after an error.
    """

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last
        self._thread: threading.Thread | None = None
        self._written: tuple[int, float] | None = None
        self._error: BaseException | None = None
        self._frozen_files: list[Kept | None] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as trouble:
            if error is None:
                raise
            error.add_note(f"and the newest checkpoint could not be written: {trouble}")

    def save(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        rng: list[dict[str, Any]],
        reference: dict[str, Tensor] | None = None,
    ) -> None:
        """Copy the state and begin to write it; call `wait` first. See `Snapshot.of`."""
        assert self._thread is None
        versions = {name: (p.data_ptr(), p._version) for name, p in _frozen(model)}
        same = self._same(versions)
        snapshot = Snapshot.of(
            model,
            optimizer=optimizer,
            progress=progress,
            rng=rng,
            reference=reference,
            with_frozen=same is None,
        )
        # Not a daemon: the interpreter waits for it at exit.
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, versions, same), name="checkpoint"
        )
        self._thread.start()

    def _same(self, versions: dict[str, tuple[int, int]]) -> Kept | None:
        """A file with exactly these weights, from the last but one checkpoint.

        The last checkpoint's file would save as much disk, but then one damaged file would spoil
        both checkpoints that a run can resume from.
        """
        frozen = self._frozen_files[0] if len(self._frozen_files) == 2 else None
        return frozen if frozen and frozen.versions == versions and frozen.file.exists() else None

    def _run(
        self, snapshot: Snapshot, versions: dict[str, tuple[int, int]], same: Kept | None
    ) -> None:
        try:
            path, digests = _store(
                self.folder, snapshot=snapshot, keep_last=self.keep_last, same=same
            )
        except BaseException as error:
            self._error = error
            return
        self._written = snapshot.step, time.time()
        frozen = (
            Kept(file=path / FROZEN, digest=digests[FROZEN], versions=versions)
            if versions
            else None
        )
        self._frozen_files = [*self._frozen_files[-1:], frozen]

    def wait(self) -> tuple[int, float] | None:
        """Wait until the checkpoint begun is on disk: (step, time). Raises the write's error."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        written, self._written = self._written, None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return written


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _write(file: Path, content: bytes) -> None:
    """Write and flush to disk. Python writes, so that a full disk raises a clear OSError."""
    with shared.open_file(file, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name[5:].isdecimal())


def is_evaluated(folder: Path, *, step: int) -> bool:
    """Whether the evals of this step are recorded; step 0 has no checkpoint to mark it."""
    return (folder / f"step-{step:08d}" / "evaluated").exists()


def mark_evaluated(folder: Path, *, step: int, rank: int) -> None:
    """Mark this step's evals as recorded: a resumed run need not repeat them."""
    target = folder / f"step-{step:08d}"
    if rank == 0 and target.exists():
        shared.touch(target / "evaluated")


def damage(path: Path) -> str | None:
    """The first file of a checkpoint that differs from what was written; None: all are intact.

    Files that loading does not read, such as a user's own beside them, are none of these.
    """
    try:
        digests = json.loads((path / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return next((name for name in NEEDED if not (path / name).exists()), None)
    except (ValueError, RecursionError):
        return CHECKSUMS
    except OSError as error:
        return _unreadable(error, CHECKSUMS)
    read = {name for name in (*NEEDED, FROZEN, REFERENCE) if (path / name).exists()}
    if not isinstance(digests, dict) or read - digests.keys():
        return CHECKSUMS
    for name, expected in digests.items():
        try:
            with open(path / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, ValueError):
            return name
        except OSError as error:
            return _unreadable(error, name)
        if digest != expected:
            return name
    return None


def _unreadable(error: OSError, name: str) -> str:
    """`name` if the disk has lost the file. Other errors may pass: no reason to train again."""
    if error.errno != errno.EIO:
        raise error
    return name


def set_aside_damaged(folder: Path) -> list[str]:
    """Leave an intact checkpoint, or none, as the newest; a line for each that was damaged.

    Those go with what is torn, at the next resume.
    """
    lines: list[str] = []
    for path in reversed(complete(folder)):
        wrong = damage(path)
        if wrong is None:
            break
        path.rename(folder / f".tmp-{path.name}-damaged")
        lines.append(f"{path.name} is damaged ({wrong} is not as it was written)")
    return lines


def discard_torn(folder: Path) -> None:
    """Remove what a kill in mid-write left behind."""
    for torn in folder.glob(".tmp-step-*"):
        shutil.rmtree(torn, ignore_errors=True)


def load(path: Path, *, model: nn.Module, optimizer: Optimizer, rank: int = 0) -> Progress:
    """Restore a checkpoint in place, this rank's generators included."""
    device = next(model.parameters()).device
    with _naming(path):
        model.load_state_dict(load_weights(path, device=str(device)))
        moments = _unpacked(path / "optimizer.pt", device=device)
        optimizer.load_state_dict(moments)
        states = _unpacked(path / "rng.pt", device=torch.device("cpu"))
        if rank < len(states):  # more ranks than before: the others keep their fresh generators
            set_rng_state(states[rank])
    return read_progress(path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn any error of torch on a damaged file into a DataError that names the checkpoint."""
    try:
        yield
    except (OSError, DataError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path} cannot be read ({reason})") from None


def read_progress(path: Path) -> Progress:
    """The run's position; DataError if the file is wrong."""
    with _naming(path):
        progress = Progress(**json.loads((path / "progress.json").read_bytes()))
        for name, kind in (("step", int), ("threads", int), ("stream", dict), ("method", dict)):
            if type(getattr(progress, name)) is not kind:
                raise TypeError(f"progress.json holds {getattr(progress, name)!r:.60} as {name}")
        if progress.kernels not in (None, "native", "torch"):
            raise ValueError(f"progress.json holds {progress.kernels!r:.60} as kernels")
        if progress.compile not in (None, "off", "blocks", "cudagraphs"):
            raise ValueError(f"progress.json holds {progress.compile!r:.60} as compile")
        for name in ("loss_sum", "loss_count", "seconds"):
            if type(getattr(progress, name)) not in (int, float):
                raise TypeError(f"progress.json holds {getattr(progress, name)!r:.60} as {name}")
        losses = progress.losses
        if type(losses) is not list or any(type(loss) not in (int, float) for loss in losses):
            raise TypeError(f"progress.json holds {losses!r:.60} as losses")
    return progress


def load_weights(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """The model's state as saved, from one file or several."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            weights |= load_file(file, device=device)
        except SafetensorError as error:
            raise DataError(f"{file} must be safetensors: {' '.join(str(error).split())}") from None
    return weights


def _unpacked(file: Path, *, device: torch.device) -> Any:
    """Tensors and plain values; a pickle that would call anything is refused."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any error of its parser
        why = re.split(r"[.\n]\s", str(error))[0]
        raise DataError(f"{file} must hold tensors and plain values alone: {why}") from None


def weight_files(path: Path) -> list[Path]:
    """The files that together hold the model's state."""
    return [path / MODEL, *path.glob(FROZEN)]


def load_reference(path: Path) -> dict[str, Tensor]:
    """The reference weights saved with a checkpoint; empty if no measure needs them."""
    file = path / REFERENCE
    return load_file(file) if file.exists() else {}
