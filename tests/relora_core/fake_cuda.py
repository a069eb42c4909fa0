"""The training loop on a GPU that is not there: shapes without values, on a CPU build of torch.

As a program (`python fake_cuda.py GUARD FOLDER`, configs on stdin, one a line) it trains each and
prints a line of JSON: what made the host wait for the device, by step and place, and more. A read
answers 1. Other lines ask for a head, or a piece of benchmarks/gpu.py. Not for: what is computed,
and how fast.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":  # before torch asks for the first time which devices there are
    GUARD = ctypes.CDLL(sys.argv[1])

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.identity import config_from_json
from relora_core import graphs, head, kernels, train
from relora_core.config import RunConfig

aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts what waits for a device, by the step that the loop is at; `step` is set from there."""

    def __init__(self) -> None:
        super().__init__()
        self.step = "start"
        self.places: dict[str, collections.Counter[str]] = {}
        self.launches: collections.Counter[str] = collections.Counter()
        self.operations: collections.Counter[str] = collections.Counter()
        self.pinned: set[int] = set()
        self.factors: set[str] = set()
        """Types of scalars on the device by which lists of tensors were multiplied."""
        self.casts: dict[str, list[list[int]]] = {}
        """Shapes of what was cast to bf16 on the device, by step."""

    def add(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/relora_core/" in f.filename]
        own = [f for f in frames if "/tests/" not in f.filename]
        at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        self.places.setdefault(self.step, collections.Counter())[f"{what} {at}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.launches[self.step] += 1
        self.operations[str(func)] += 1
        where = _device(args)
        if func is aten._local_scalar_dense.default:
            if where == "cuda":
                self.add("read")
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.isin.Tensor_Tensor and where == "cuda":
            self.add("read")  # how many entries differ
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], [one for i in args[1] for one in self._plain(i)], *args[2:])
        if func is aten._foreach_mul_.Tensor and args[1].device.type == "cuda":
            self.factors.add(f"{args[0][0].dtype} by {args[1].dtype}")
        if func is aten._to_copy.default and "device" in kwargs:
            self._moved(args[0], str(torch.device(kwargs["device"]).type), kwargs)
        cast = func is aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16
        cast |= func is aten.copy_.default and args[0].dtype == torch.bfloat16
        if cast and where == "cuda":
            self.casts.setdefault(self.step, []).append(list(args[0].shape))
        if func is aten.copy_.default:
            self._moved(args[1], args[0].device.type, {"non_blocking": (*args, False)[2]} | kwargs)
        return func(*args, **kwargs)

    def _moved(self, source: Tensor, target: str, kwargs: Any) -> None:
        if {source.device.type, target} != {"cpu", "cuda"} or not source.numel():
            return
        if target == "cpu" or not kwargs.get("non_blocking") or id(source) not in self.pinned:
            self.add("read" if target == "cpu" else "upload")

    def _plain(self, index: Any) -> list[Any]:
        """How many entries of a mask are true a device would have to say: take all."""
        if not isinstance(index, Tensor) or index.dtype != torch.bool:
            return [index]
        if index.device.type == "cuda":
            self.add("read")
        zeros = torch.zeros(index.numel(), dtype=torch.int64, device=index.device)
        return [zeros] * index.ndim


def _device(args: Any) -> str:
    return next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")


def _accelerator() -> Any:
    """One process on a GPU, as accelerate would hand it out."""
    return SimpleNamespace(
        device=torch.device("cuda", 0),
        process_index=0,
        num_processes=1,
        is_main_process=True,
        prepare=lambda model: model,
        unwrap_model=lambda model, **_: model,
        no_sync=lambda _: contextlib.nullcontext(),
        backward=lambda loss: loss.backward(),
        reduce=lambda tensor, **_: tensor,
        wait_for_everyone=lambda: None,
    )


@contextlib.contextmanager
def fake_gpu(waits: Waits) -> Any:
    """torch's own questions about a GPU answered as one with bf16 would."""
    GUARD.install()
    numpy = Tensor.numpy

    def as_list(self: FakeTensor) -> Any:
        if self.device.type == "cuda":
            waits.add("read")
        kind = float if self.dtype.is_floating_point else int
        return np.ones(tuple(self.shape), dtype=kind).tolist()

    def as_numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        fake = isinstance(self, FakeTensor)
        return np.ones(tuple(self.shape)) if fake else numpy(self, *args, **kwargs)

    def pinned(self: Tensor) -> Tensor:
        waits.pinned.add(id(self))
        waits.__dict__.setdefault("alive", []).append(self)
        return self

    def moved(self: torch.nn.Module, device: Any) -> torch.nn.Module:
        """`Module.to` swaps the contents of parameters, which fake ones do not allow."""
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    there = parameter.detach().to(device)
                    new = torch.nn.Parameter(there, requires_grad=parameter.requires_grad)
                    module._parameters[name] = new
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        return self

    common = torch.cuda.amp.common
    with (
        mock.patch.object(FakeTensor, "tolist", as_list),
        mock.patch.object(Tensor, "numpy", as_numpy),
        mock.patch.object(Tensor, "pin_memory", pinned),
        mock.patch.object(common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA A100-SXM4-40GB"),
        mock.patch.object(torch.cuda, "synchronize", return_value=None),
        mock.patch.object(torch.nn.Module, "to", moved),
    ):
        yield


def measure(config: RunConfig, folder: str) -> dict[str, Any]:
    """One run, to its end."""
    waits, calls = Waits(), []
    events: list[Any] = []

    def attention(*args: Tensor, **kwargs: Any) -> Tensor:
        q, k = args[:2]
        mask = kwargs.get("attn_mask") is not None
        calls.append([str(q.dtype), q.shape[1] != k.shape[1], mask, {x.dtype for x in args}])
        return scores(*args, **kwargs)

    def counted(step: int) -> float:
        waits.step = str(step + 1)
        return rate(step)

    scores = F.scaled_dot_product_attention
    build = train.build_method

    def build_method(config: Any) -> Any:
        nonlocal rate
        method = build(config)
        rate, method.lr_multiplier = method.lr_multiplier, counted
        return method

    rate = float
    patches = {
        "make_accelerator": lambda _: _accelerator(),
        "build_method": build_method,
        "newest_intact": lambda *_: (None, {}),
        "save": lambda *_, **__: None,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_gpu(waits))
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(train, name, value))
        fused = mock.patch.object(kernels, "attention_names", return_value={"fp32": "efficient"})
        stack.enter_context(fused)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))
        stack.enter_context(waits)
        ended = train.train(
            config,
            checkpoints=Path(folder) / "checkpoints",
            cache_dir=Path(folder),
            sink=SimpleNamespace(emit=events.append),
        )
    return {
        "ended": ended,
        "events": [[event.kind, event.step] for event in events],
        "peak": events[0].data["peak"],
        "logged": [sorted(event.metrics) for event in events if event.kind == "train"],
        "waits": waits.places,
        "launches": waits.launches,
        "casts": waits.casts,
        "factors": sorted(waits.factors),
        "operations": waits.operations,
        "attention": [[*call[:3], len(call[3])] for call in calls],
    }


def measure_head(tokens: int, width: int, vocabulary: int) -> dict[str, Any]:
    """The operator's own steps in bf16 at any size, as eager as they are here; and its autograd."""
    waits = Waits()
    with (
        fake_gpu(waits),
        mock.patch.object(head, "_compiled", return_value=head.exponentials_),
        FakeTensorMode(),
        waits,
    ):
        hidden = torch.empty(tokens, width, device="cuda", requires_grad=True)
        weight = torch.empty(vocabulary, width, device="cuda", requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        waits.step = "head"
        with torch.no_grad():
            made = head.head_loss._init_fn(hidden, weight, targets, 4, True, True, True)
        head.fused_head_loss(hidden, weight, targets, parts=4).backward()
    gradients = [g for g in (*made[1:], hidden.grad, weight.grad) if g is not None]
    return {
        "gradients": [[str(g.device), str(g.dtype), list(g.shape)] for g in gradients],
        "waits": waits.places,
        "operations": waits.operations,
    }


def measure_work(part: str, name: str, model: str) -> dict[str, Any]:
    """A variant of benchmarks/gpu.py: made, and a turn of three calls."""
    from benchmarks import gpu  # Hydra and more, for these alone
    from benchmarks.gpu_work import Worker

    waits, answers = Waits(), {}
    variant = gpu.make_variant(part, name, model=model, args=gpu.parse([]))
    worker = Worker(variant)
    with (
        fake_gpu(waits),
        mock.patch.object(train, "make_accelerator", return_value=_accelerator()),
        mock.patch.object(graphs, "choose", lambda asked, **_: asked),
        mock.patch.object(torch.cuda, "reset_peak_memory_stats", return_value=None),
        mock.patch.object(torch.cuda, "max_memory_reserved", return_value=1 << 30),
        FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()),
        waits,
    ):
        torch.compiler.set_stance("force_eager")
        answers["make"] = worker.make(variant.config.train.batch_size)
        waits.step, worker.seconds = "turn", 1.0
        answers["turn"] = worker.turn(3.0)
    return {**answers, "waits": waits.places.get("turn", {}), "operations": waits.operations}


if __name__ == "__main__":
    for line in sys.stdin:
        sizes = line.split()
        if line.startswith("work;"):
            answer = measure_work(*line.strip().split(";")[1:])
        elif len(sizes) == 3 and line[0] != "{":
            answer = measure_head(*map(int, sizes))
        else:
            answer = measure(config_from_json(line), sys.argv[2])
        print(json.dumps(answer), flush=True)
