"""Work of host and GPU at the same time: batches ahead, values read together, answers a step late.

On a CPU each of these does its work at once, when it is asked to. Not for: what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from relora_core.events import LOSS_STEPS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from relora_core.checkpoint import Progress
    from relora_core.data.base import TokenStream


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; to a GPU from pinned memory, so that the host goes on meanwhile."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def read(*scalars: Tensor) -> list[float]:
    """The values of tensors with one element each, exact up to 2^53, in one read of their device.

    Several would each wait until a GPU has done all that it was asked to do before.
    """
    if not scalars:
        return []
    return torch.stack([scalar.detach().reshape(()).double() for scalar in scalars]).tolist()


def read_arrays(arrays: list[Tensor]) -> list[Tensor]:
    """float64 tensors of any shapes in host memory, in one read of a GPU."""
    if all(array.device.type == "cpu" for array in arrays):
        return arrays
    flat = torch.cat([array.double().flatten() for array in arrays]).cpu()
    parts = flat.split([array.numel() for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class Batches:
    """A stream's batches of `rows` rows on a device, in a GPU's case made one ahead by a thread.

    `state_dict` is the stream's position after the batches handed out, without the one ahead.
    """

    def __init__(self, stream: TokenStream, *, rows: int, steps: int, device: torch.device) -> None:
        """`steps` batches at most are made: data may end with the run's last."""
        self.stream, self.rows, self.steps, self.device = stream, rows, steps, device
        self._ahead: Future[tuple[Tensor, dict[str, Any]]] | None = None
        self._pool = ThreadPoolExecutor(1, "batches") if device.type == "cuda" else None
        self._position: dict[str, Any] | None = None

    def next(self) -> Tensor:
        """(rows, seq_len + 1) int64. Raises DataError."""
        self.steps -= 1
        if self._pool is None:
            return torch.from_numpy(self.stream.next_rows(self.rows)).to(self.device)
        ahead = self._ahead or self._pool.submit(self._make)
        ids, self._position = ahead.result()
        self._ahead = self._pool.submit(self._make) if self.steps > 0 else None
        return ids.to(self.device, non_blocking=True)

    def _make(self) -> tuple[Tensor, dict[str, Any]]:
        ids = torch.from_numpy(self.stream.next_rows(self.rows)).pin_memory()
        return ids, self.stream.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable, as the stream's own."""
        return self._position or self.stream.state_dict()


class Losses:
    """The losses of a run's steps, entered in its progress: a GPU's when `read` asks for them."""

    def __init__(self, progress: Progress, *, accelerator: Accelerator) -> None:
        self.progress, self.accelerator = progress, accelerator
        self.finite = True
        """Whether all that were read are."""
        self._late = accelerator.device.type == "cuda"
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """The mean loss of a step on this rank, a scalar."""
        self._unread.append(loss)
        if not self._late:
            self.read()

    def read(self) -> None:
        """Enter the mean over ranks of every step not read yet: all ranks must call it."""
        if not self._unread:
            return
        means: Any = self.accelerator.reduce(torch.stack(self._unread), reduction="mean")
        self._unread = []
        progress = self.progress
        for loss in means.tolist():
            progress.loss_sum += loss
            progress.loss_count += 1
            progress.losses = [*progress.losses, loss][-LOSS_STEPS:]
            self.finite &= math.isfinite(loss)


class Votes:
    """Of each flag, whether any rank has it: the same answer on every rank, at the same step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._alone = accelerator.num_processes == 1
        self._late = accelerator.device.type == "cuda"
        self._last: Callable[[], list[bool]] | None = None

    def count(self, *flags: bool) -> list[bool]:
        """With several GPUs the answer to the last call, or False: one step is under way then, and
        the host does not wait for it."""
        if self._alone:
            return list(flags)
        device = self.accelerator.device
        votes = upload(torch.tensor(flags, dtype=torch.float32), device)
        sums: Any = self.accelerator.reduce(votes, reduction="sum")
        if not self._late:
            return [bool(vote) for vote in sums]
        last, self._last = self._last, _reading(sums)
        return last() if last else [False] * len(flags)

    def forget(self) -> None:
        """Drop the answer that is under way: what it asks for has been done."""
        self._last = None


def _reading(sums: Tensor) -> Callable[[], list[bool]]:
    """Begin to copy to the host; the function waits until that is done."""
    copy = torch.empty(sums.shape, dtype=sums.dtype).pin_memory().copy_(sums, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def finish() -> list[bool]:
        done.synchronize()
        return [bool(vote) for vote in copy]

    return finish
