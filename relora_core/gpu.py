"""The GPU of a process: which one, what it cannot do, and how products and kernels round on it.

Not for: what is compiled for it (`graphs.py`), nor what a layer asks of it (`kernels.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from relora_core.config import ConfigError, RunConfig, lacks_gpu, needs_gpu
from relora_core.shell import Group

LOCAL_RANK = "LOCAL_RANK"
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Its values with which cuBLAS adds up in the same order in every run."""
_fixed: bool | None = None
"""Whether cuBLAS has one of them, which it reads once in a process; None: it has not been used."""


def wanted(config: RunConfig) -> bool:
    """Whether a run takes a GPU of CUDA or ROCm."""
    return config.runtime.device != "cpu" and torch.cuda.is_available()


def take(config: RunConfig, place: Group) -> str | None:
    """Make this process's GPU the current one; its name and UUID, None without a GPU.

    ConfigError where there is none to take, or it lacks what the run asks for.
    """
    if not wanted(config):
        if setting := needs_gpu(config):
            raise lacks_gpu(setting)
        return None
    if place.world > 1:
        torch.cuda.set_device(index(place, visible=torch.cuda.device_count()))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    precision = config.train.precision
    supported = {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "tf32": torch.cuda.is_tf32_supported(),
    }
    if not supported.get(precision, True):
        raise ConfigError(
            f"train.precision must be fp32 on this GPU ({properties.name} has no {precision}; "
            f"NVIDIA's from compute capability 8.0 on do), got {precision!r}; nearest valid: fp32"
        )
    return f"{properties.name} {getattr(properties, 'uuid', f'of rank {place.rank}')}"


def index(place: Group, *, visible: int) -> int:
    """Of the visible GPUs, that of this process: its own number on the node, or the only one there
    is, as where SLURM binds one to each task."""
    if visible > 1 and place.local_world > visible:
        raise ConfigError(
            f"processes on a node must be at most its {visible} visible GPUs, or see one GPU each, "
            f"got {place.local_world}; nearest valid: {visible} (torchrun --nproc-per-node, "
            "hydra.launcher.tasks_per_node)"
        )
    return place.local_rank % visible


@contextlib.contextmanager
def numbered(config: RunConfig, place: Group) -> Iterator[None]:
    """Inside the block LOCAL_RANK is the number of this process's GPU, for which accelerate takes
    it: to DDP and barriers, where a process that sees one GPU alone has no other."""
    if place.world == 1 or not wanted(config):
        yield
        return
    before = os.environ.get(LOCAL_RANK)
    os.environ[LOCAL_RANK] = str(index(place, visible=torch.cuda.device_count()))
    try:
        yield
    finally:
        os.environ.pop(LOCAL_RANK, None)
        if before is not None:
            os.environ[LOCAL_RANK] = before


@contextlib.contextmanager
def settings(config: RunConfig) -> Iterator[None]:
    """How torch computes during a run, whatever a shell or notebook says; set back after it.

    Products of float32 are float32's. With runtime.deterministic, which a CPU's kernels are anyway,
    a GPU's add up in one order, and an operation that cannot raises RuntimeError; torch then lets
    cuDNN compute no attention, and Inductor choose nothing by its time that rounds otherwise.
    """
    deterministic = config.runtime.deterministic
    with contextlib.ExitStack() as stack:
        stack.enter_context(products("highest"))
        if wanted(config):
            stack.enter_context(_workspace(deterministic))
            if deterministic:
                stack.enter_context(_deterministic())
        yield


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Inputs of float32 products have 23 bits (`highest`) or, on a GPU, the 10 of tf32 (`high`)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _workspace(deterministic: bool) -> Iterator[None]:
    global _fixed
    given = os.environ.get(WORKSPACE, "")
    if deterministic and given not in ("", *FIXED):
        raise ConfigError(
            f"{WORKSPACE} must be {' or '.join(FIXED)} with runtime.deterministic=true, got "
            f"{given!r}; or unset it"
        )
    if deterministic and _fixed is False:
        raise ConfigError(
            "runtime.deterministic must be false after a run without it in the same process "
            "(cuBLAS is set up once), got True; or start another process"
        )
    if _fixed is None:
        _fixed = deterministic or given in FIXED
    if not deterministic or given:
        yield
        return
    os.environ[WORKSPACE] = FIXED[0]
    try:
        yield
    finally:
        del os.environ[WORKSPACE]


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    fills: Any = torch.utils.deterministic
    before = fills.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # a help to find faults, at a pass over every tensor
    try:
        with _inductor():
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        fills.fill_uninitialized_memory = before


def _inductor() -> contextlib.AbstractContextManager[Any]:
    """Without, Inductor times sums of several sizes of block against each other all the same, and
    matrices with and without padding. Nothing where it has no triton to compile with."""
    if importlib.util.find_spec("triton") is None:
        return contextlib.nullcontext()
    config: Any = importlib.import_module("torch._inductor.config")  # takes seconds
    known = hasattr(config, "deterministic")
    return config.patch(deterministic=True) if known else contextlib.nullcontext()
