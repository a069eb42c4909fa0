"""Processes that share one run: they meet, compare what they are about to do, and stay equal.

Not for: which process is in a group (`shell.py`), nor what they compute (`train.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from relora_core.config import ConfigError, RunConfig
from relora_core.shell import Group
from relora_core.sources import code_hash

distributed: Any = torch.distributed  # its stubs leave out the stores
Facts = dict[str, Any]
"""What all ranks must agree on: key -> value."""
LONGEST_S = 1800.0
"""Wait for all ranks: rank 0 may have to tokenise text first."""
CONNECT_S = 60.0
"""To a store that is there already."""
SAY_AFTER_S = 20.0
LOOK_EVERY_S = 0.1
LEAVE_S = 5.0
"""Time for the others to read why they are refused, if this process serves the store."""
_meetings = itertools.count()
_store: Any = None
_turns: Any = None
"""Keys of the run under way, in the same store."""


class RanksDisagree(RuntimeError):
    """Processes of one run have different weights, and none can be trusted."""


def facts(config: RunConfig, *, run: str) -> Facts:
    """What a rank is about to do: the run's name, every knob, the code."""
    own = {"run": run, "code of relora_core": code_hash(), "torch": torch.__version__}
    own |= dict(_flatten(dataclasses.asdict(config)))
    if config.data.fingerprint:  # it identifies the tokenizer, wherever the file is
        del own["data.tokenizer"]
    return own


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def form_group(
    place: Group, own: Facts, *, backend: str, stop: Callable[[], bool], gpu: str | None = None
) -> bool:
    """Wait for all ranks and begin their process group; False if `stop` is true meanwhile.

    Raises ConfigError on every rank present if two of them differ in their facts, or have the
    same `gpu` (as of `gpu.take`), with which NCCL would fail or hang.
    """
    global _store, _turns
    if place.world == 1:
        return True
    wait = _Wait(place, stop=stop)
    if _store is None:
        _store = _open_store(place, wait)
        if _store is None:
            return False
    store = distributed.PrefixStore(f"relora/{place.start}/{next(_meetings)}", _store)
    _turns = distributed.PrefixStore("turns", store)
    try:
        if not _compare(store, place, own, wait, gpu=gpu):
            return False
        if not distributed.is_initialized():
            distributed.init_process_group(
                backend,
                store=distributed.PrefixStore("group", store),
                rank=place.rank,
                world_size=place.world,
            )
    except distributed.DistError as error:
        raise ConfigError(f"{place} cannot speak with the others: {_first_line(error)}") from None
    return True


class _Wait:
    """Waits for the other ranks, until asked to stop or for too long."""

    def __init__(self, place: Group, *, stop: Callable[[], bool]) -> None:
        self.place, self.stop = place, stop
        self.start, self.announced = time.monotonic(), False

    def pause(self, missing: str) -> bool:
        """Sleep a moment; False if asked to stop. ConfigError after too long a wait."""
        if self.stop():
            return False
        waited = time.monotonic() - self.start
        if waited > LONGEST_S:
            raise ConfigError(
                f"{self.place.world} processes must share this run, got none of {missing} within "
                f"{LONGEST_S:.0f} s ({self.place})"
            )
        if waited > SAY_AFTER_S and not self.announced:
            print(f"waiting for {missing}: this is {self.place}", file=sys.stderr, flush=True)
            self.announced = True
        time.sleep(LOOK_EVERY_S)
        return True


def _open_store(place: Group, wait: _Wait) -> Any:
    """The store at rank 0's address, served by rank 0 where torchrun's agent does not."""
    host, _, port = place.address.rpartition(":")
    is_server = place.rank == 0 and not place.served
    while not is_server and not _listens(host, int(port)):
        if not wait.pause(f"rank 0 at {place.address}"):
            return None
    try:
        store = distributed.TCPStore(
            host,
            int(port),
            is_master=is_server,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=LONGEST_S if is_server else CONNECT_S),
        )
    except distributed.DistError as error:
        raise ConfigError(
            f"MASTER_ADDR and MASTER_PORT must be free for this run's processes, got "
            f"{place.address}: {_first_line(error)}"
        ) from None
    # NCCL starts with the first tensor sent, and asks the store for what rank 0 may be late with.
    store.set_timeout(timedelta(seconds=LONGEST_S))
    return store


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _compare(store: Any, place: Group, own: Facts, wait: _Wait, *, gpu: str | None = None) -> bool:
    own = json.loads(json.dumps({"number of processes": place.world, **own}, default=str))
    if store.add(f"came/{place.rank}", 1) > 1:
        raise ConfigError(f"each process must have its own RANK, got two of {place}")
    store.set(f"facts/{place.rank}", json.dumps([own, gpu]))
    missing = set(range(place.world)) - {place.rank}
    while missing:
        for rank in sorted(missing):
            if store.check([f"facts/{rank}"]):
                missing.remove(rank)
                other, its_gpu = json.loads(store.get(f"facts/{rank}"))
                if problem := _difference(place.rank, own, rank, other):
                    raise _refusal(store, place, problem)
                if gpu is not None and gpu == its_gpu:
                    one, two = sorted((place.rank, rank))
                    problem = f"each process must have a GPU of its own, got {gpu} on rank {one} "
                    problem += f"and on rank {two}; nearest valid: as many processes as GPUs"
                    raise _refusal(store, place, problem)
        if missing and not wait.pause(f"rank {', '.join(map(str, sorted(missing)))}"):
            return False
    return True


def _difference(rank: int, own: Facts, other_rank: int, other: Facts) -> str | None:
    different = [key for key in own | other if own.get(key) != other.get(key)]
    if not different:
        return None
    key, more = different[0], len(different) - 1
    (one, a), (two, b) = sorted(((rank, own), (other_rank, other)), key=lambda pair: pair[0])
    return (
        f"all processes of a run must have the same {key}, got {a.get(key)!r} on rank {one} and "
        f"{b.get(key)!r} on rank {two}{f' (and {more} more that differ)' if more else ''}"
    )


def _refusal(store: Any, place: Group, problem: str) -> ConfigError:
    """The error, once the others had time to see why."""
    store.add("refused", 1)
    deadline = time.monotonic() + LEAVE_S
    while place.rank == 0 and store.add("refused", 0) < 2 and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S)
    return ConfigError(problem)


def take_from_rank_0_(*tensors: torch.Tensor) -> None:
    """Set tensors to those of rank 0, where there is a group of processes.

    All compute them from the same values, but an SVD, say, may round differently on each.
    """
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def wait_for_rank_0(turn: str) -> None:
    """Wait until rank 0 calls `end_turn`, for as long as it takes.

    A collective operation would fail after its timeout, which is there to notice a rank that hangs.
    """
    while not _turns.check([turn]):  # raises where rank 0, which serves the store, has ended
        time.sleep(LOOK_EVERY_S)


def end_turn(turn: str) -> None:
    """On rank 0: let the others go on."""
    _turns.set(turn, "")


def spread(accelerator: Accelerator, model: nn.Module) -> float:
    """Largest difference between ranks of the sum of all parameters; 0 where they agree."""
    total = sum(p.detach().double().sum() for p in model.parameters())
    sums = accelerator.gather(torch.as_tensor(total, device=accelerator.device).reshape(1))
    assert isinstance(sums, torch.Tensor)
    if sums.isnan().all() or (sums == sums[0]).all():  # a run that diverges does so on all ranks
        return 0.0
    return (sums.max() - sums.min()).item()


def require_equal(accelerator: Accelerator, model: nn.Module, *, step: int) -> float:
    """`spread`, which is 0; RanksDisagree, on every rank, where it is not.

    DDP gives all ranks the same gradient, bit for bit, so equal weights stay equal.
    """
    if accelerator.num_processes == 1:
        return 0.0
    if value := spread(accelerator, model):  # NaN, too
        raise RanksDisagree(
            f"the processes of this run have different weights after step {step} (their sums "
            f"differ by {value:.3g}): nothing of this step is kept, and the same command goes on "
            "from the newest checkpoint"
        )
    return value
