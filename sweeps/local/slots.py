"""How many workers this machine runs at once, and the threads and GPUs of each."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.environment import ROOT, cores, python_path
from experiments.scheduler import JOB
from relora_core import shell

GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
"""Of GPUs in /dev: NVIDIA's, AMD's, Windows' under WSL."""


@dataclass(kw_only=True, slots=True)
class Slots:
    """How many workers run at once, and what each may use."""

    parallel: int
    threads: int
    """CPU threads of each worker."""
    gpus: list[str]
    """Device ids, given to slots in turn; empty: the CPU."""
    code: Path = ROOT
    """What workers import the project from."""

    @classmethod
    def of(
        cls,
        max_parallel: int | None,
        *,
        runs: int,
        devices: Collection[str],
        code: Path = ROOT,
    ) -> Slots:
        """As many as there are GPUs, if any of the runs' `runtime.device` may be one, else cores;
        never more than there are runs."""
        gpus = visible_gpus() if {*devices} - {"cpu"} else []
        there = cores()
        parallel = min(max_parallel or len(gpus) or there, runs)
        threads = max(1, there // parallel)
        return cls(parallel=parallel, threads=threads, gpus=gpus, code=code)

    def environment(self, slot: int) -> dict[str, str]:
        """Of the worker in this slot: ours, without the variables of a process group around us, and
        with the worker's share of the machine."""
        if not self.gpus:
            return self.shared()
        return self.shared() | {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]}

    def shared(self) -> dict[str, str]:
        """Environment that the workers of all slots have in common."""
        share = {"PYTHONPATH": python_path(self.code), "PYTHONUNBUFFERED": "1"}
        share["GOMP_SPINCOUNT"] = "5000"  # else threads that wait would spin on shared cores
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            share[name] = str(min(self.threads, _parse_count(os.environ.get(name), self.threads)))
        inherited = {name: value for name, value in os.environ.items() if name != JOB}
        return {**shell.strip_group(inherited), **share}


def _parse_count(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() and int(text) else default


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, found without torch.

    As CUDA reads CUDA_VISIBLE_DEVICES: the list ends before the first invalid id (SLURM's
    `NoDevFiles`, -1, an index beyond the last), and an id given twice hides all.
    """
    installed = _installed_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [name for name in installed or [] if name.isdigit()]
    ids = [part.strip() for part in chosen.split(",")]
    ids = list(itertools.takewhile(lambda name: _is_gpu(name, installed), ids))
    return ids if len(set(ids)) == len(ids) else []


def _is_gpu(name: str, installed: Sequence[str] | None) -> bool:
    """Whether it is an index, or the UUID, perhaps cut short, of a GPU or a slice of one."""
    if name.isdigit():
        return installed is None or name in installed
    if not name.startswith(("GPU-", "MIG-")):
        return False
    if installed is None:
        return True
    gpu = name.removeprefix("MIG-").partition("/")[0]  # MIG-GPU-.../1/0, as older drivers name it
    return any(one.startswith((name, gpu)) for one in installed)


def gpu_names() -> tuple[str, ...]:
    """What the visible GPUs are called, each name once; none where no tool says."""
    names = _names(_listed() or "")
    return tuple(sorted({name for id_ in visible_gpus() if (name := _name_of(id_, names))}))


def _names(listed: str) -> dict[str, str]:
    """Index, and UUID of each GPU and slice -> its name, as torch gives it."""
    names: dict[str, str] = {}
    gpu = ""
    for line in listed.splitlines():
        uuid = re.search(r"\(UUID: ([^)]+)\)", line)
        if whole := re.match(r"GPU (\d+): (.*?) \(UUID", line):
            gpu = names[whole[1]] = whole[2]
        slice_ = re.match(r"\s+MIG (\S+)", line)
        if uuid:
            names[uuid[1]] = f"{gpu} MIG {slice_[1]}" if slice_ else gpu
    return names


def _name_of(id_: str, names: Mapping[str, str]) -> str | None:
    """Of a GPU by its index or its UUID, which may be cut short."""
    if id_.isdigit():
        return names.get(id_)
    return next((name for one, name in names.items() if one.startswith(id_)), None)


def _installed_gpus() -> list[str] | None:
    """Indices, and UUIDs of GPUs and their slices; None if there are GPUs but no nvidia-smi."""
    listed = _listed()
    if listed is not None:
        return re.findall(r"(?<=^GPU )\d+(?=:)|(?<=UUID: )[^)]+", listed, re.MULTILINE)
    return None if any(Path("/dev").glob(pattern) for pattern in GPU_FILES) else []


@cache  # asked for every run of a plan
def _listed() -> str | None:
    """What `nvidia-smi -L` prints; None if there is none, or it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "-L"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout
    return None
