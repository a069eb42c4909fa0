"""The training loop: one flat function, its phases as short named steps below it.

Not for: files of a run (`experiments/run/runner.py`) or anything a method decides (`methods/`).
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn

from relora_core import (
    checkpoint,
    costs,
    gpu,
    graphs,
    head,
    kernels,
    native,
    ranks,
    shell,
    utilisation,
)
from relora_core.checkpoint import Progress
from relora_core.config import ConfigError, RunConfig, divisors
from relora_core.data import load_tokenizer, open_stream
from relora_core.dynamics import Recorder
from relora_core.evals import prepare as prepare_evals
from relora_core.events import Event, NullSink, Sink
from relora_core.measures import Measures, RestartProbe, Stop, never
from relora_core.methods import build_method
from relora_core.model import Decoder
from relora_core.optim import clip, set_lr_
from relora_core.overlap import Batches, Losses, Votes


def train(
    config: RunConfig, *, checkpoints: Path, cache_dir: Path, sink: Sink, stop: Stop = never
) -> str:
    """Train, or go on from the newest complete checkpoint: `finished`, `diverged`, `interrupted`.

    All events go to `sink` on rank 0. `interrupted` means that `stop` was true on some rank, and
    that a checkpoint on disk holds every update done. Bad settings raise ConfigError before the
    first step, bad data DataError.
    """
    with (
        gpu.settings(config),
        checkpoint.Writer(checkpoints, keep_last=config.checkpoint.keep_last) as writer,
    ):
        return _train(
            config,
            checkpoints=checkpoints,
            writer=writer,
            cache_dir=cache_dir,
            sink=sink,
            stop=stop,
        )


def _train(
    config: RunConfig,
    *,
    checkpoints: Path,
    writer: checkpoint.Writer,
    cache_dir: Path,
    sink: Sink,
    stop: Stop,
) -> str:
    place = shell.take_group()
    own = ranks.facts(config, run=checkpoints.absolute().parent.name)
    taken = gpu.take(config, place)
    if not ranks.form_group(place, own, backend=backend(config), stop=stop, gpu=taken):
        return "interrupted"
    accelerator = make_accelerator(config)
    rank, world = accelerator.process_index, accelerator.num_processes
    sink = sink if accelerator.is_main_process else NullSink()
    micro_batches = split_batch(config, world=world)
    attention = kernels.attention_names(config, device=accelerator.device)

    torch.manual_seed(config.seed)  # the weights: the same on every rank and for every method
    model = Decoder(config.model)
    method = build_method(config)
    method.adapt(model)
    model.to(accelerator.device)
    recorder = Recorder(config, model=model, method=method)  # before a resume: initial weights
    optimizer = method.build_optimizer(model)
    stream = open_stream(
        config.data,
        seed=config.seed,
        vocab_size=model.embedding_proj.num_embeddings,
        rank=rank,
        world=world,
        cache_dir=cache_dir,
    )
    probe = RestartProbe(model, config=config, cache_dir=cache_dir)
    evals = prepare_evals(config, load_tokenizer(config.data))

    newest, damaged = newest_intact(accelerator, checkpoints)
    progress = resume(newest, model=model, optimizer=optimizer, rank=rank, config=config)
    resumed = newest is not None
    choose_kernels(progress, config=config, device=accelerator.device, resumed=resumed)
    compiling = (progress.compile or "off") if resumed else config.runtime.compile
    progress.compile = graphs.choose(compiling, device=accelerator.device, resumed=resumed)
    asked = (progress.head or "chunked") if resumed else config.runtime.head
    progress.head = head.choose(asked, device=accelerator.device, resumed=resumed)
    model.cce = progress.head == "cce"
    if progress.compile != "off":
        method.prepare_graphs(model)
        model.graphs = graphs.Graphs(progress.compile)
    if costs.chooses_micro_batch(config):
        micro_batches = choose_micro_batch(progress, config=config, accelerator=accelerator)
    if resumed:
        stream.load_state_dict(progress.stream)
        method.load_state_dict(progress.method)
        recorder.load_state_dict(checkpoint.load_reference(newest))
    method.set_phase(progress.step, model)
    wrapped = accelerator.prepare(model)
    begun = {"resumed": resumed, "world": world, "kernels": progress.kernels, **damaged}
    if progress.kernels == "native":
        begun["kernels_build"] = native.build()
    if attention:
        begun["attention"] = attention
    if progress.compile != "off":
        begun["compile"] = progress.compile
    if model.cce:
        begun["head"] = progress.head
    if taken and config.runtime.deterministic:
        begun["deterministic"] = True
    if progress.micro_batch_size:
        begun["micro_batch_size"] = progress.micro_batch_size
    use = utilisation.measure(accelerator, config=config, micro_batches=micro_batches)
    begun |= use.facts()
    if stream.notes:
        begun["notes"] = stream.notes
    sink.emit(Event(kind="start", step=progress.step, data=begun))
    measure = Measures(
        config,
        accelerator=accelerator,
        model=model,
        evals=evals,
        recorder=recorder,
        sink=sink,
        stop=stop,
    )
    losses, votes = Losses(progress, accelerator=accelerator), Votes(accelerator)
    if not resumed:
        measure.dynamics(0)
    if not checkpoint.is_evaluated(checkpoints, step=progress.step):
        if not measure.evaluate(progress.step):
            return "interrupted"
        checkpoint.mark_evaluated(checkpoints, step=progress.step, rank=rank)

    batches = Batches(
        stream,
        rows=config.train.batch_size // world,
        steps=config.train.steps - progress.step,
        device=accelerator.device,
    )
    clock = Clock(progress.seconds, step=progress.step)
    timer = Timer(config.checkpoint.every_minutes)
    for step in range(progress.step, config.train.steps):
        set_lr_(optimizer, config.train.lr * method.lr_multiplier(step))
        with recorder.gradients(step + 1):
            loss = accumulate_gradients(
                accelerator,
                wrapped,
                before_pass=partial(method.before_pass, step),
                ids=batches.next(),
                micro_batches=micro_batches,
                precision=config.train.precision,
            )
        losses.add(loss)
        last = step + 1 == config.train.steps
        log = (step + 1) % config.runtime.log_every_steps == 0 or last
        regular = last or (step + 1) % config.checkpoint.every_steps == 0
        if log or regular or measure.evals_due(step + 1):
            losses.read()
        log |= not losses.finite  # so that it ends there, however seldom it logs
        grad_norm = clip(model, limit=config.train.grad_clip, measured=log)
        method.before_update(step, model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        progress.step = step + 1
        if recorder.due(step + 1) and accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # or the time of training so far would count as measuring
        with clock.paused():
            measure.dynamics(step + 1)  # before a restart, which may end what is to be measured
        kind = "restart" if method.restarts(step + 1) else "method"
        before = probe.look() if kind == "restart" else None
        changes = method.after_step(step + 1, model, optimizer)
        if method.redraws(step + 1):
            recorder.after_restart()
        if before is not None:
            changes |= probe.compare(before)
            if world > 1:
                spread = ranks.require_equal(accelerator, model, step=step + 1)
                changes["restart/rank_spread"] = spread
        if method.restarts(step):
            changes["restart/loss_next"] = probe.look()[1].item()
        if changes:
            sink.emit(Event(kind=kind, step=step + 1, metrics=changes))
        if method.set_phase(step + 1, model):
            wrapped = accelerator.prepare(
                accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            )
        if log:
            lr = optimizer.param_groups[0]["lr"]
            mean = log_train(
                sink, progress, config=config, clock=clock, use=use, lr=lr, norm=grad_norm
            )
            if not math.isfinite(mean):
                finish_save(accelerator, writer, sink)
                sink.emit(Event(kind="diverged", step=step + 1, data={"loss": str(mean)}))
                return "diverged"
        stopping, overdue = votes.count(stop(), timer.due())
        if regular or overdue or stopping or measure.evals_due(step + 1):
            # Before the evals, which may take longer than a grace period lasts.
            progress.seconds = clock.seconds
            losses.read()
            votes.forget()
            progress.stream, progress.method = batches.state_dict(), method.state_dict()
            reference = recorder.state_dict()
            save(accelerator, writer, sink, model, optimizer, progress, reference=reference)
            timer.restart()
        if stopping or measure.evals_due(step + 1):
            finish_save(accelerator, writer, sink)
        if stopping:
            return "interrupted"
        if measure.evals_due(step + 1):
            with clock.paused():
                if not measure.evaluate(step + 1):
                    return "interrupted"
            checkpoint.mark_evaluated(checkpoints, step=step + 1, rank=rank)
    finish_save(accelerator, writer, sink)
    return "finished"


def make_accelerator(config: RunConfig) -> Accelerator:
    """Device, processes and precision; sharded optimizers are refused: a restart edits state."""
    AcceleratorState._reset_state()  # a second run in this process may want another precision
    place, cpu = shell.take_group(), backend(config) == "gloo"
    shell.check_options(config, gpu=not cpu)
    # bf16 is our own autocast: see `accumulate_gradients`.
    with shell.hide_options(), gpu.numbered(config, place):
        # Buffers are drawn and changed alike on every rank: no need to send them at every pass.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[ddp])
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise ConfigError(
            "distributed type must be DDP or a single process, "
            f"got {accelerator.distributed_type}: "
            "a restart edits weights and optimizer state that sharding keeps elsewhere"
        )
    if accelerator.num_processes != place.world:
        raise RuntimeError(f"{place} was started, {accelerator.num_processes} processes share it")
    return accelerator


def backend(config: RunConfig) -> str:
    """Backend of torch.distributed. By default accelerate starts no group without a GPU: every rank
    would train alone, on the full batch. Apple's GPU counts as none: it has no float64."""
    return "nccl" if gpu.wanted(config) else "gloo"


def split_batch(config: RunConfig, *, world: int) -> int:
    """Forward passes per optimizer step on each process."""
    batch = config.train.batch_size
    if batch % world:
        raise ConfigError(
            f"train.batch_size must be divisible by the {world} processes, got {batch}; nearest "
            f"valid: {max(world, round(batch / world) * world)}"
        )
    share, micro = batch // world, costs.micro_batch(config, processes=world)
    if share % micro:
        good = max(n for n in divisors(share) if n <= micro)
        raise ConfigError(
            f"train.micro_batch_size must divide the {share} sequences of each of {world} "
            f"processes, got {micro}; nearest valid: {good}"
        )
    return share // micro


def choose_micro_batch(progress: Progress, *, config: RunConfig, accelerator: Accelerator) -> int:
    """Forward passes per optimizer step by train.micro_batch_tokens, the same on all ranks.

    A resumed run goes on with the sequences of a pass that it began with, as another number would
    round differently, unless another number of processes leaves no such share.
    """
    world, kept = accelerator.num_processes, progress.micro_batch_size
    share = config.train.batch_size // world
    if kept is None or share % kept:
        sizes: list[int | None] = gather_object([memory_of(accelerator.device)])
        memory = min((size for size in sizes if size is not None), default=None)
        compiled = progress.compile not in (None, "off")
        kept = costs.micro_batch(config, processes=world, memory=memory, compiled=compiled)
    progress.micro_batch_size = kept
    return share // kept


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU, which is not limited here."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


class Timer:
    """When the next checkpoint is due by the clock; never, without an interval."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic()

    def due(self) -> bool:
        return self.minutes is not None and time.monotonic() - self._start >= 60 * self.minutes


def newest_intact(
    accelerator: Accelerator, checkpoints: Path
) -> tuple[Path | None, dict[str, list[str]]]:
    """(checkpoint to resume from, as rank 0 sees it; the damaged ones, which are moved aside)."""
    choice: list[Any] = [None, []]
    if accelerator.is_main_process:
        checkpoint.discard_torn(checkpoints)
        choice[1] = checkpoint.set_aside_damaged(checkpoints)
        choice[0] = max(checkpoint.complete(checkpoints), default=None)
        then = "going on from the one before" if choice[0] else "none is left, so it begins anew"
        for line in choice[1]:
            print(f"warning: {line}: {then}", file=sys.stderr)
    newest, damaged = broadcast_object_list(choice)
    return newest, {"damaged": damaged} if damaged else {}


def resume(
    newest: Path | None, *, model: nn.Module, optimizer: Any, rank: int, config: RunConfig
) -> Progress:
    """A checkpoint restored in place; a fresh Progress where there is none."""
    threads = config.runtime.threads or torch.get_num_threads()
    if newest:
        progress = checkpoint.load(newest, model=model, optimizer=optimizer, rank=rank)
    else:
        progress = Progress(threads=threads)
    torch.set_num_threads(progress.threads)
    return progress


def choose_kernels(
    progress: Progress, *, config: RunConfig, device: torch.device, resumed: bool
) -> None:
    """What a CPU computes with: a resumed run goes on with what it began with."""
    if device.type != "cpu":
        return
    asked = progress.kernels or config.runtime.kernels
    progress.kernels = native.choose(asked)
    if asked != "torch" and (line := native.describe_ignored()):
        print(f"warning: {line}", file=sys.stderr)
    if asked == "torch" or progress.kernels == "native":
        return
    if asked == "native" and not resumed:
        expected = f"must be auto or torch here ({native.problem()})"
        raise ConfigError(f"runtime.kernels {expected}, got 'native'")
    then = "the last digits will differ" if asked == "native" else "training is slower"
    print(f"warning: no native kernels, {then}: {native.problem()}", file=sys.stderr)


def accumulate_gradients(
    accelerator: Accelerator,
    wrapped: nn.Module,
    *,
    before_pass: Callable[..., None],
    ids: Tensor,
    micro_batches: int,
    precision: str,
) -> Tensor:
    """Forward and backward over this rank's ids (n, T + 1); returns its mean loss, a scalar.

    Autocast is opened here: accelerate's, which it puts into the model, does not come back when a
    model is unwrapped and prepared again, as it is after a change of phase or rank.
    """
    half, products = precision == "bf16", contextlib.nullcontext()
    if precision == "tf32":
        products = gpu.products("high")
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    rank, world = accelerator.process_index, accelerator.num_processes
    with products:  # of both directions
        for index, chunk in enumerate(ids.chunk(micro_batches)):
            last, first = index == micro_batches - 1, rank + world * index * len(chunk)
            before_pass(first=first, stride=world)  # as a stream deals them
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=half):
                    loss: Tensor = wrapped(chunk[:, :-1], chunk[:, 1:], micro_batches)
                accelerator.backward(loss)
            if index == 0 and not last:
                graphs.keep_gradients_(wrapped)
            total += loss.detach()
    return total


class Clock:
    """Training seconds of all attempts, without those of evals, dynamics and compiling."""

    def __init__(self, seconds: float, *, step: int) -> None:
        self._before, self._start = seconds, time.perf_counter()
        self._compiled = graphs.seconds()
        self._logged_seconds, self.logged_step = seconds, step

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Any:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def leave_out_compiling(self) -> float:
        """Seconds of it since the last call, which are taken off."""
        total = graphs.seconds()
        self._compiled, seconds = total, total - self._compiled
        self._start += seconds
        return seconds

    def lap(self, step: int) -> float:
        """Steps per second since the last lap."""
        seconds = self.seconds
        rate = (step - self.logged_step) / max(seconds - self._logged_seconds, 1e-9)
        self._logged_seconds, self.logged_step = seconds, step
        return rate


def log_train(
    sink: Sink,
    progress: Progress,
    *,
    config: RunConfig,
    clock: Clock,
    use: utilisation.Utilisation,
    lr: float,
    norm: float | Tensor | None,
) -> float:
    """Emit the train event since the last one and return its mean loss, nats per token.

    The last event's mean is over the last LOSS_STEPS updates: a run's result must not depend on
    how often it logs.
    """
    mean, count = progress.loss_sum / progress.loss_count, progress.loss_count
    if progress.step == config.train.steps:
        mean, count = sum(progress.losses) / len(progress.losses), len(progress.losses)
    progress.loss_sum, progress.loss_count = 0.0, 0
    compiled = clock.leave_out_compiling()
    tokens_per_step = config.train.batch_size * config.data.seq_len
    steps = range(clock.logged_step, progress.step)
    rate = clock.lap(progress.step) * tokens_per_step
    metrics = {
        "train/loss": mean,
        "train/lr": lr,
        "train/tokens": float(progress.step * tokens_per_step),
        "perf/tokens_per_s": rate,
        "perf/train_seconds": clock.seconds,
    }
    if mfu := use.mfu(rate, steps=steps):
        metrics |= {"perf/mfu": mfu.executed, "perf/mfu_6n": mfu.six_n}
    if compiled:
        metrics["perf/compile_seconds"] = compiled
    if norm is not None:
        metrics["train/grad_norm"] = float(norm)
    data = {"loss_steps": count}
    sink.emit(Event(kind="train", step=progress.step, metrics=metrics, data=data))
    return mean


def save(
    accelerator: Accelerator,
    writer: checkpoint.Writer,
    sink: Sink,
    model: nn.Module,
    optimizer: Any,
    progress: Progress,
    *,
    reference: dict[str, Tensor],
) -> None:
    """Begin a checkpoint on rank 0 with every rank's generators; `finish_save` waits for it."""
    ranks.require_equal(accelerator, model, step=progress.step)
    states = gather_object([checkpoint.rng_state()])
    announce(writer, sink)
    if accelerator.is_main_process:
        writer.save(
            model=model, optimizer=optimizer, progress=progress, rng=states, reference=reference
        )


def announce(writer: checkpoint.Writer, sink: Sink) -> None:
    """Wait until the checkpoint begun is on disk, then emit its event.

    Only here, so that the order of events does not depend on the speed of the disk.
    """
    if written := writer.wait():
        step, moment = written
        sink.emit(Event(kind="checkpoint", step=step, time=moment))


def finish_save(accelerator: Accelerator, writer: checkpoint.Writer, sink: Sink) -> None:
    """On every rank: wait until the checkpoint begun is on disk and its event sent."""
    announce(writer, sink)
    accelerator.wait_for_everyone()
