"""Model FLOPs utilisation (MFU): a run's FLOP/s over the most that its GPUs can do.

Not for: FLOPs of a token (`costs.py`), peaks of GPUs (`devices.py`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from relora_core import costs, schedule
from relora_core.config import RunConfig, method_config
from relora_core.devices import find_device


class Mfu(NamedTuple):
    """Shares of the peak, in two conventions; equal up to the norms if every weight is trained."""

    executed: float
    """By the FLOPs of the method (`costs.flops_per_token`): none for gradients of frozen weights,
    some for adapters."""
    six_n: float
    """By those of the plain decoder (`costs.flops_per_token_6n`), as most others publish it."""


class Utilisation:
    """What the GPUs of a run can do, and the shares of it that training takes.

    MFU = tokens/s x FLOPs per token / peak, of all GPUs together (Chowdhery et al. 2022, appendix
    B): with equal GPUs the share of each. Activations that are computed again, restarts and the
    optimizer do not count as FLOPs, but take time.
    """

    def __init__(self, config: RunConfig, *, gpus: Sequence[str], sequences: int) -> None:
        """`gpus`: names, one per process; `sequences` of a forward pass of each."""
        self.gpus, self.precision = gpus, config.train.precision
        devices = [device for name in gpus if (device := find_device(name))]
        peaks = [peak for device in devices if (peak := getattr(device, self.precision))]
        self.peak: float | None = sum(peaks) if gpus and len(peaks) == len(gpus) else None
        """FLOP/s of all GPUs; None: not known."""
        train = dataclasses.replace(config.train, micro_batch_size=sequences)
        self._config = dataclasses.replace(config, train=train)

    @cached_property
    def _flops(self) -> dict[bool, int]:
        """Whether in a phase at full rank -> what a token takes."""
        has_phases = method_config(self._config).has_phases(self._config)
        return {
            full: costs.flops_per_token(self._config, full_rank=full and has_phases).train
            for full in (False, True)
        }

    def facts(self) -> dict[str, Any]:
        """What the start event says; empty without a GPU."""
        if not self.gpus:
            return {}
        peak = {"flops_per_s": self.peak or "unknown", "precision": self.precision}
        return {"peak": peak | {"gpus": dict(Counter(self.gpus))}}

    def mfu(self, tokens_per_s: float, *, steps: range) -> Mfu | None:
        """Of the run over the updates `steps` (0-based), by their phases; None: peak not known."""
        if self.peak is None or not steps:
            return None
        phases = Counter(schedule.is_full_rank(step, config=self._config) for step in steps)
        executed = sum(self._flops[full] * n for full, n in phases.items()) / len(steps)
        six_n = costs.flops_per_token_6n(self._config)
        return Mfu(tokens_per_s * executed / self.peak, tokens_per_s * six_n / self.peak)


def measure(accelerator: Accelerator, *, config: RunConfig, micro_batches: int) -> Utilisation:
    """Of the GPUs of all ranks: every rank must call it."""
    gpus, device = [], accelerator.device
    if device.type == "cuda":
        gpus = gather_object([torch.cuda.get_device_name(device)])
    share = config.train.batch_size // accelerator.num_processes
    return Utilisation(config, gpus=gpus, sequences=share // micro_batches)
