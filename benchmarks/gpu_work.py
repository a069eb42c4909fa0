"""What `gpu.py` times, each piece in a process of its own, which works only when it is its turn.

Between turns a process gives back all GPU memory but weights, moments and CUDA graphs. Not for:
what is compared with what (`gpu.py`).
"""

from __future__ import annotations

import gc
import itertools
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.llama import SimpleDecoder, build_llama
from relora_core import graphs, native, train
from relora_core.config import RunConfig
from relora_core.evals.base import Window
from relora_core.evals.scoring import score
from relora_core.head import cce_loss, fused_head_loss
from relora_core.methods import build_method
from relora_core.model import Decoder

WARM_UP = 4
"""Calls before anything is timed: the first compiles, the next two record CUDA graphs."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "32-bit")
"""In what torch says where a batch is too large, for the GPU or for a kernel's indices."""
MATRIX, COPIED = 8192, 1 << 30
"""Order of the product, and bytes of the copy, that measure the GPU itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One thing that is timed."""

    part: str
    """`train`, `small batches`, `head`, `eval` or `device`."""
    name: str
    """`full rank, blocks` and the like; a word before the comma says what is built."""
    model: str
    config: RunConfig
    """Shape, method, batch, precision, device and what is compiled."""


class Work(NamedTuple):
    """`call` does a fixed amount, on a GPU without waiting for it; a loss, where it has one."""

    call: Callable[[], Tensor | None]
    units: float
    """Of a call: tokens, or FLOPs or bytes of part `device`."""


# what is built ------------------------------------------------------------------------------------
def build(variant: Variant) -> Work:
    """Model, optimizer and data on the device; nothing has run yet."""
    config = variant.config
    torch.manual_seed(0)
    kind = variant.name.partition(",")[0]
    device = torch.device(config.runtime.device)
    if device.type == "cpu":  # a smoke test: compiling would take minutes, and says nothing
        torch.compiler.set_stance("force_eager")
        native.choose("torch")
    makers: dict[str, Callable[..., Work]] = {
        "full rank": build_ours,
        "relora": build_ours,
        "llama": build_other,
        "simple": build_other,
        "head": build_head,
        "eval": build_eval,
        "product": build_product,
        "copy": build_copy,
    }
    return makers[kind](variant, device=device)


def build_ours(variant: Variant, *, device: torch.device) -> Work:
    """A run's own step, without its data: `train.accumulate_gradients` and what follows it."""
    config = variant.config
    accelerator = train.make_accelerator(config)
    model, method = Decoder(config.model), build_method(config)
    method.adapt(model)
    model.to(device)
    optimizer = method.build_optimizer(model)
    mode = config.runtime.compile
    if device.type == "cuda":
        mode = graphs.choose(mode, device=device)  # says why, where it cannot
    if mode != "off":
        method.prepare_graphs(model)
        model.graphs = graphs.Graphs(mode)
    method.set_phase(0, model)
    wrapped = accelerator.prepare(model)
    ids, steps = draw_ids(config, device=device), itertools.count()

    def step() -> Tensor:
        done = next(steps)
        loss = train.accumulate_gradients(
            accelerator,
            wrapped,
            before_pass=partial(method.before_pass, done),
            ids=ids,
            micro_batches=1,
            precision=config.train.precision,
        )
        method.before_update(done, model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return Work(step, _tokens(config))


def build_other(variant: Variant, *, device: torch.device) -> Work:
    """The same step of a Llama or the simple decoder: float32 weights, autocast, fused AdamW."""
    config, llama = variant.config, variant.name.startswith("llama")
    plain: Any = build_llama(config.model, attention="sdpa") if llama else None
    plain = (plain or SimpleDecoder(config.model)).to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=config.train.lr, fused=True)
    plain.train()
    model = plain if config.runtime.compile == "off" else torch.compile(plain, dynamic=False)
    ids = draw_ids(config, device=device)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    half = config.train.precision == "bf16"

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            # A Llama shifts labels itself.
            loss = model(inputs, labels=inputs).loss if llama else model(inputs, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Work(step, _tokens(config))


def build_head(variant: Variant, *, device: torch.device) -> Work:
    """Loss and both gradients from hidden states: by our operator, torch's compiled, or CCE."""
    config = variant.config
    model, tokens = config.model, _tokens(config)
    assert model.vocab_size is not None
    hidden = torch.randn(tokens, model.d_model, device=device, requires_grad=True)
    weight = torch.randn(model.vocab_size, model.d_model, device=device) * 0.02
    weight.requires_grad_()
    targets = draw_ids(config, device=device)[:, 1:].flatten()
    half = config.train.precision == "bf16"

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets)

    kinds: dict[str, Callable[..., Tensor]] = {
        "head, ours": fused_head_loss,
        "head, compiled": torch.compile(plain, dynamic=False),
        "head, cce": cce_loss,
    }
    loss_of = kinds[variant.name]

    def call() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = loss_of(hidden, weight, targets)
        torch.autograd.grad(loss, (hidden, weight))
        return loss.detach()

    return Work(call, tokens)


def build_eval(variant: Variant, *, device: torch.device) -> Work:
    """Windows as Paloma's of long documents: every token scored, as many before it as fit."""
    config = variant.config
    model = Decoder(config.model).to(device)
    draws = np.random.default_rng(0)
    length, size = config.data.seq_len, (config.train.batch_size, config.data.seq_len + 1)
    rows = draws.integers(0, config.model.vocab_size, size, dtype=np.int32)
    windows = [Window(row, length) for row in rows]
    precision = config.train.precision

    def call() -> None:
        score(model, windows, precision=precision)

    return Work(call, _tokens(config))


def build_product(variant: Variant, *, device: torch.device) -> Work:
    """A large product in bf16: what arithmetic this GPU does now, at its clocks of now."""
    order = MATRIX if device.type == "cuda" else 64
    a, b = (torch.randn(order, order, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)

    def call() -> None:
        torch.mm(a, b, out=out)

    return Work(call, 2 * order**3)


def build_copy(variant: Variant, *, device: torch.device) -> Work:
    """A large copy, of which bytes read and bytes written count."""
    size = COPIED if device.type == "cuda" else 1 << 16
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def call() -> None:
        target.copy_(source)

    return Work(call, 2 * size)


def draw_ids(config: RunConfig, *, device: torch.device) -> Tensor:
    """(B, T + 1), drawn on the host, so alike on every device."""
    assert config.model.vocab_size is not None
    size = (config.train.batch_size, config.data.seq_len + 1)
    return torch.randint(0, config.model.vocab_size, size).to(device)


def _tokens(config: RunConfig) -> int:
    return config.train.batch_size * config.data.seq_len


# in a process of its own --------------------------------------------------------------------------
def serve(pipe: Connection, variant: Variant) -> None:
    """Answer `make`, and then `turn` as often as it is asked; an answer is a dict with `ok`."""
    worker = Worker(variant)
    while (question := pipe.recv()) is not None:
        name, *values = question
        try:
            answer = {"ok": True, **getattr(worker, name)(*values)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, **explain(error)}
        try:
            if not answer["ok"]:
                worker.drop()  # here, where no exception refers to the model any more
        finally:  # after some errors a GPU answers nothing any more
            pipe.send(answer)
    pipe.close()
    os._exit(0)  # compilers' own processes and threads have nothing left to do


def explain(error: Exception) -> dict[str, Any]:
    """Whether memory was too small, and the error in one line."""
    text = str(error)
    memory = isinstance(error, torch.OutOfMemoryError) or any(part in text for part in NO_MEMORY)
    lines = text.splitlines() or [""]
    return {"memory": memory, "error": f"{type(error).__name__}: {lines[0]}"}


class Worker:
    """Makes one variant and times it."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.work = variant, None
        self.cuda = variant.config.runtime.device == "cuda"
        self.dropped_s = 0.0
        """Spent on compiling what did not fit."""

    def make(self, batch: int) -> dict[str, Any]:
        """Build it with this many sequences, compile it, and learn how long a call takes."""
        self.variant.config.train.batch_size = batch
        self.work = build(self.variant)
        losses = [self.work.call() for _ in range(WARM_UP if self.cuda else 1)]
        self.wait()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._time(1)  # takes back the memory
        self.seconds = self._time(2) / 2
        peak = torch.cuda.max_memory_reserved() / 2**20 if self.cuda else None
        self.rest()
        return {
            "compile_s": self.dropped_s + graphs.seconds(),
            "peak_mb": peak,
            "loss": None if losses[0] is None else float(losses[0]),
        }

    def turn(self, seconds: float) -> dict[str, Any]:
        """Units per second over calls of `seconds` in all, which are begun without waiting."""
        assert self.work is not None
        self._time(1)  # takes back the memory
        calls = max(1, round(seconds / self.seconds))
        rate = self.work.units * calls / self._time(calls)
        self.rest()
        return {"rate": rate, "calls": calls}

    def _time(self, calls: int) -> float:
        assert self.work is not None
        self.wait()
        begun, result = time.perf_counter(), None
        for _ in range(calls):
            result = self.work.call()
        self.wait()
        taken = time.perf_counter() - begun
        if result is not None and not torch.isfinite(result):
            raise ArithmeticError(f"the loss became {float(result)}")
        return taken

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def rest(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()

    def drop(self) -> None:
        """Give back everything."""
        self.work, before = None, graphs.seconds()
        torch.compiler.reset()  # which forgets how long it took
        self.dropped_s += before - graphs.seconds()
        gc.collect()
        self.rest()
