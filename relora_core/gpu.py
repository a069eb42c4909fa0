"""The GPU of a process: which one, and what it cannot do.

Not for: what is compiled for it (`graphs.py`), nor what a layer asks of it (`kernels.py`).
"""

from __future__ import annotations

import torch

from relora_core.config import ConfigError, RunConfig
from relora_core.shell import Group


def wanted(config: RunConfig) -> bool:
    """Whether a run takes a GPU of CUDA or ROCm."""
    return config.runtime.device != "cpu" and torch.cuda.is_available()


def take(config: RunConfig, place: Group) -> str | None:
    """Make this process's GPU the current one; its name and UUID, None without a GPU.

    ConfigError where there is none to take, or it lacks what the run asks for.
    """
    if not wanted(config):
        if config.runtime.device == "cuda":
            raise ConfigError("runtime.device must be auto or cpu here (no GPU found), got 'cuda'")
        return None
    if place.world > 1:
        torch.cuda.set_device(index(place, visible=torch.cuda.device_count()))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    precision = config.train.precision
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
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
