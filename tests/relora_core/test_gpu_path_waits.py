"""What makes the host wait for a GPU, counted in the loop itself on fake CUDA tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from relora_core import overlap, ranks
from relora_core.checkpoint import Progress
from relora_core.config import RunConfig
from relora_core.overlap import Batches, Losses, Votes
from tests.conftest import nano_config

pytestmark = pytest.mark.slow

Fake = Callable[[RunConfig], Any]


def counts(run: Any) -> dict[str, int]:
    """Step -> times that the host waited for the device."""
    assert run["ended"] == "finished"
    return {step: sum(places.values()) for step, places in run["waits"].items() if step != "start"}


def short(**changes: Any) -> RunConfig:
    """8 updates with a limit on the gradients, which log 3 and 6, and the last."""
    sections: dict[str, Any] = {
        "model": {"vocab_size": 301},
        "train": {"steps": 8, "precision": "bf16", "grad_clip": 1.0},
        "runtime": {"log_every_steps": 3},
    }
    for name, values in changes.items():
        sections[name] = sections[name] | values if name in sections else values
    return nano_config(**sections)


LOGS = {"3": 2, "6": 2, "8": 2}
"""Of each, the losses and the norm of the gradients."""


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full_rank"},
        {"method": "full_rank", "train": {"optimizer": "muon", "micro_batch_size": 2}},
        {"method": "galore", "galore": {"r": 4, "update_gap": 3}},
        {"method": "fira", "fira": {"r": 4, "update_gap": 3}},
        {"method": "apollo", "apollo": {"r": 4, "update_gap": 3}},
        {"method": "switchlora"},
        {"method": "sparse"},
        {"method": "sparse", "sparse": {"keep": "support", "bias_correction": "entry"}},
        {"method": "sltrain"},
        {"method": "lora"},
    ],
    ids=lambda changes: "-".join(key for key in (changes["method"], *changes) if key != "method"),
)
def test_a_step_waits_for_the_gpu_where_it_logs_and_nowhere_else(
    fake_run: Fake, changes: dict[str, Any]
) -> None:
    assert counts(fake_run(short(model={"n_layers": 1}, **changes))) == LOGS


@pytest.mark.parametrize(
    "relora",
    [
        {},
        {"optimizer_state": "random", "prune_ratio": 0.9, "joint_mask": False},
        {"optimizer_state": "magnitude", "prune_ratio": 0.9},
        {"after_merge": "restore", "base_dtype": "bfloat16", "scaling": "trainable"},
        {"adaptive_rank_energy": 0.9},
        {"nested_rank": True, "dropout": 0.1, "restart_groups": 2},
    ],
    ids=["reset", "random", "magnitude", "restore", "adaptive", "nested"],
)
def test_a_restart_reads_a_gpu_a_fixed_few_times(fake_run: Fake, relora: dict[str, Any]) -> None:
    """However many adapters there are, of which one layer has 7: the probe, the norm of what was
    merged, and the entries that were zeroed or, here where each changes, the new ranks. After one
    more update the probe alone."""
    relora = {"reset_frequency": 4, "restart_warmup_steps": 1, **relora}
    expected = LOGS | {"4": 3, "5": 1}
    for layers in (1, 3):
        assert counts(fake_run(short(relora=relora, model={"n_layers": layers}))) == expected


def test_frozen_weights_are_cast_once_per_restart(fake_run: Fake) -> None:
    """Two passes a step: autocast would cast the 14 matrices in each."""
    relora = {"reset_frequency": 4, "restart_warmup_steps": 1}
    run = fake_run(short(relora=relora, train={"micro_batch_size": 2}, data={"seq_len": 20}))
    frozen = [[32, 32], [16, 32], [48, 32], [32, 48]]
    casts = {step: sum(s in frozen for s in shapes) for step, shapes in run["casts"].items()}
    assert {step: n for step, n in casts.items() if n} == {"1": 14, "5": 14}


def test_dynamics_move_singular_values_once(fake_run: Fake) -> None:
    what = ["weight", "base", "gradient", "update_proxy", "update_restart", "update_total"]
    dynamics = {"every_steps": 4, "what": what, "kinds": ["q_proj", "ov"]}
    assert counts(fake_run(short(dynamics=dynamics, method="lora"))) == LOGS | {"4": 1, "8": 3}


# batches -----------------------------------------------------------------------------------------
class Stream:
    """Rows that are their own number; ends after `rows`."""

    def __init__(self, rows: int) -> None:
        self.rows, self.row = rows, 0
        self.made = threading.Event()

    def next_rows(self, n: int) -> np.ndarray:
        if self.row + n > self.rows:
            raise ValueError("no more rows")
        self.row += n
        self.made.set()
        return np.arange(self.row - n, self.row).reshape(n, 1)

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Batches]:
    """Batches as a GPU gets them, which stay in host memory."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, **_: to(self, "cpu") if device else self
    )

    def make(stream: Any, *, steps: int) -> Batches:
        return Batches(stream, rows=2, steps=steps, device=torch.device("cuda"))

    return make


def test_a_batch_is_made_ahead_and_not_counted_before_it_is_used(
    ahead: Callable[..., Batches],
) -> None:
    stream = Stream(6)
    batches = ahead(stream, steps=3)
    for step in range(3):
        stream.made.clear()
        assert batches.next().flatten().tolist() == [2 * step, 2 * step + 1]
        if step < 2:
            assert stream.made.wait(30)  # nobody has asked for it
        assert batches.state_dict() == {"row": 2 * step + 2}
    assert stream.row == 6  # none beyond the last step's, where the data ended


def test_bad_data_end_a_run_at_the_step_that_needs_them(ahead: Callable[..., Batches]) -> None:
    batches = ahead(Stream(4), steps=3)
    batches.next()
    batches.next()
    with pytest.raises(ValueError, match="no more rows"):
        batches.next()


# losses and votes --------------------------------------------------------------------------------
def processes(device: str, *, world: int = 2) -> Any:
    """An accelerator of ranks that all say the same."""
    factor = {"sum": world, "mean": 1}
    return SimpleNamespace(
        device=torch.device(device),
        num_processes=world,
        reduce=lambda tensor, reduction: tensor * factor[reduction],
    )


def test_losses_of_a_gpu_are_entered_late_in_the_same_order() -> None:
    late, early = Progress(), Progress()
    on_gpu = Losses(late, accelerator=processes("cuda"))
    on_cpu = Losses(early, accelerator=processes("cpu"))
    values = [1 / 3, 1e9, 0.1, 7.0]
    for value in values:
        on_gpu.add(torch.tensor(value, dtype=torch.float64))
        on_cpu.add(torch.tensor(value, dtype=torch.float64))
    assert late.losses == []
    on_gpu.read()
    assert late == early
    assert late.losses == values
    on_gpu.add(torch.tensor(float("nan")))
    assert on_gpu.finite
    on_gpu.read()
    assert not on_gpu.finite


def test_votes_of_several_gpus_are_answered_a_step_late_and_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited = []
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(overlap, "upload", lambda values, _: values)
    votes = Votes(processes("cuda"))
    assert votes.count(True, False) == [False, False]
    assert waited == []
    assert votes.count(False, False) == [True, False]
    assert votes.count(False, True) == [False, False]
    votes.forget()
    assert votes.count(False, False) == [False, False]
    assert Votes(processes("cpu")).count(True, False) == [True, False]
    assert Votes(processes("cuda", world=1)).count(True, False) == [True, False]


def test_other_ranks_wait_for_rank_0_as_long_as_it_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "_turns", HashStore())
    monkeypatch.setattr(ranks, "LOOK_EVERY_S", 0.01)
    waiting = threading.Thread(target=ranks.wait_for_rank_0, args=("dynamics/4",))
    waiting.start()
    ranks.end_turn("dynamics/2")
    waiting.join(0.2)
    assert waiting.is_alive()
    ranks.end_turn("dynamics/4")
    waiting.join(30)
    assert not waiting.is_alive()
