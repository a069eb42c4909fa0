"""Compiled training passes: one graph for all blocks of equal shapes, on a GPU by default.

Evals, probes and steps with measured gradients run without. Nothing that changes from step to step
is part of a graph: numbers of a pass are tensors (`Method.prepare_graphs`). Not for: a CPU's native
kernels, which are twice as fast as what torch compiles for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relora_core.config import ConfigError

MOST_GRAPHS = 256
"""Of blocks whose adapters have ranks of their own; torch refuses more than 8."""
SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
"""Variables by which torch compiles nothing: in silence by the first, with an error by the
second."""


def choose(asked: str, *, device: torch.device, resumed: bool = False) -> str:
    """`off`, `blocks` or `cudagraphs`: what is asked for; `auto` is `blocks` on a GPU, if possible.

    ConfigError where it is impossible; a resumed run goes on without, as a line on stderr says.
    """
    if asked == "off" or (asked == "auto" and device.type != "cuda"):
        return "off"
    problem = _problem(device, cuda_graphs=asked == "cudagraphs")
    if problem is None:
        return "blocks" if asked == "auto" else asked
    if asked != "auto" and not resumed:
        raise ConfigError(f"runtime.compile must be auto or off here ({problem}), got {asked!r}")
    print(f"warning: no compiled graphs, training is slower: {problem}", file=sys.stderr)
    return "off"


def _problem(device: torch.device, *, cuda_graphs: bool) -> str | None:
    """Why nothing can be compiled for this device; None: it can."""
    if switch := next((name for name in SWITCHES if os.environ.get(name) == "1"), None):
        return f"{switch}=1"
    compilers = [os.environ.get("CC"), "gcc", "cc", "clang"]
    if not any(shutil.which(name) for name in compilers if name):
        return "no C compiler"
    if not _has_header():
        return "no Python.h, as of the package python3-dev"
    if device.type != "cuda":
        return f"CUDA graphs are a GPU's, not of {device.type}" if cuda_graphs else None
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "triton needs a GPU of compute capability 7.0"
    return None


def _has_header() -> bool:
    """Whether Python.h is there: what launches a kernel is compiled against it, by Triton for a GPU
    and by Inductor for a CPU. It lies where Python says, as Triton asks it, or in a folder that a
    variable names to the compiler.
    """
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # the latter is Debian's own
    told = ":".join(os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    folders = [sysconfig.get_paths(scheme)["include"], *filter(None, told.split(":"))]
    return any(Path(folder, "Python.h").is_file() for folder in folders)


class Graphs:
    """Runs a decoder's blocks as compiled graphs. They are compiled in the first pass, and again
    only in the first one after a parameter's shape or `requires_grad` has changed."""

    def __init__(self, mode: str, *, backend: Any = "inductor") -> None:
        import torch._dynamo.config

        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        torch._dynamo.config.optimize_ddp = False  # a block is small enough to be one piece
        # Until torch 2.12 a changed `requires_grad` could go unseen (pytorch #139476).
        torch._dynamo.config.use_recursive_dict_tags_for_guards = False
        self.cuda_graphs = mode == "cudagraphs"
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if self.cuda_graphs else None
        self._run = torch.compile(
            _run_block, fullgraph=True, dynamic=False, backend=backend, options=options
        )
        self._shapes: list[Any] = []

    def run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """x (B, T, C) through all blocks, in training."""
        shapes = [(p.shape, p.requires_grad) for p in blocks.parameters()]
        if shapes != self._shapes:
            if self._shapes:
                _drop_all()  # whatever guards would have noticed
            self._shapes = shapes
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        for block in blocks:
            x = self._run(block, x)
        return x


def _run_block(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def keep_gradients_(model: Any) -> None:
    """After a step's first pass, before its second: CUDA graphs write their gradients to the same
    place again. A model wrapped for DDP is looked through; without such graphs nothing is copied.
    """
    model = getattr(model, "module", model)
    made = getattr(model, "graphs", None)
    if made is None or not made.cuda_graphs:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


@contextlib.contextmanager
def without(model: Any) -> Iterator[None]:
    """No graphs: they call no hooks of modules inside a block."""
    graphs: Any = getattr(model, "graphs", None)
    model.graphs = None
    try:
        yield
    finally:
        model.graphs = graphs


_dropped_seconds = 0.0
"""Spent on compiling what was dropped since, which torch forgets."""


def _drop_all() -> None:
    global _dropped_seconds
    before = seconds()
    torch.compiler.reset()
    _dropped_seconds += before - seconds()


def seconds() -> float:
    """What this process has spent on compiling so far."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return _dropped_seconds + float(calculate_time_spent().get("total_wall_time", 0.0))
