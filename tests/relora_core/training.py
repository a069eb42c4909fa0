"""Updates by hand, and runs of seconds: what they said, and the state that they left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from experiments.identity import config_to_json
from relora_core import checkpoint
from relora_core.config import RunConfig
from relora_core.events import Event
from relora_core.methods import build_method
from relora_core.model import Decoder
from relora_core.train import train
from tests import warm


def build(config: RunConfig):
    """Model, method and optimizer as a run of this config begins."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model)
    method = build_method(config)
    method.adapt(model)
    return model, method, method.build_optimizer(model)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (4, 16) of the nano model's vocabulary."""
    ids = torch.randint(0, 97, (4, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def one_step(model, optimizer, seed: int = 0) -> None:
    """One update, on the batch of this seed."""
    model(*batch(seed)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Record:
    """Keeps events; hands each to `seen`, and may end the run at one, as a kill would."""

    def __init__(self, *, seen=lambda event: None, die_at: tuple[str, int] | None = None) -> None:
        self.events: list[Event] = []
        self.seen, self.die_at = seen, die_at
        self.state = "killed"

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.seen(event)
        if (event.kind, event.step) == self.die_at:
            raise KeyboardInterrupt

    def of(self, kind: str) -> list[int]:
        return [event.step for event in self.events if event.kind == kind]

    def metrics(self, *, after: int = -1) -> dict[tuple[int, str], float]:
        """(step, name) -> value, timings apart."""
        return {
            (event.step, name): value
            for event in self.events
            for name, value in event.metrics.items()
            if not name.startswith("perf/") and event.step > after
        }


def run(config, folder: Path, *, stop=lambda: False, seen=lambda event: None, die_at=None):
    """Train; the record, whose `state` is what training returned, or `killed` at `die_at`."""
    record = Record(seen=seen, die_at=die_at)
    folders = {"checkpoints": folder / "checkpoints", "cache_dir": folder / "cache"}
    try:
        record.state = train(config, **folders, sink=record, stop=stop)
    except KeyboardInterrupt:
        if die_at is None:
            raise
    return record


def resumed(config, folder: Path, *, source: Path, at: int) -> Record:
    """Go on from what a kill right after the checkpoint of step `at` leaves."""
    name = f"checkpoints/step-{at:08d}"
    shutil.copytree(source / name, folder / name)
    return run(config, folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the newest checkpoint."""
    return checkpoint.load_weights(checkpoint.complete(folder / "checkpoints")[-1])


def assert_same_state(folder: Path, other: Path) -> None:
    """Weights and the optimizer's state, bit for bit."""
    one, two = _state(folder), _state(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def _state(folder: Path) -> dict[str, torch.Tensor]:
    file = checkpoint.complete(folder / "checkpoints")[-1] / "optimizer.pt"
    state = weights(folder)
    for index, values in torch.load(file, weights_only=True)["state"].items():
        state |= {f"{index}/{key}": torch.as_tensor(value) for key, value in values.items()}
    return state


class Undisturbed:
    """Config -> (record, folder) of a run that nobody ended, made once."""

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self.new_folder = new_folder
        self.runs: dict[str, tuple[Record, Path]] = {}

    def __call__(self, config: RunConfig) -> tuple[Record, Path]:
        key = config_to_json(config)
        if key not in self.runs:
            folder = self.new_folder()
            self.runs[key] = (run(config, folder), folder)
        return self.runs[key]


def resumes_exactly(
    config, folder: Path, *, die_at: tuple[str, int], undisturbed: Undisturbed
) -> bool:
    """Assert that a run killed at an event equals an undisturbed one: metrics, weights, optimizer.

    False where no checkpoint had been written, so that it began anew.
    """
    full, expected = undisturbed(config)
    first = run(config, folder, die_at=die_at)
    second = run(config, folder)
    start = second.events[0]
    before = {key: value for key, value in first.metrics().items() if key[0] <= start.step}
    assert before | second.metrics() == full.metrics()
    assert_same_state(folder, expected)
    return start.data["resumed"]


RANK = """
import json, sys
from pathlib import Path
from experiments.identity import config_from_json
from relora_core.train import train

class Say:
    def emit(self, event):
        print(json.dumps([event.kind, event.step, event.metrics]))

folder = Path(sys.argv[1])
config = config_from_json((folder / "config.json").read_text())
train(config, checkpoints=folder / "checkpoints", cache_dir=folder, sink=Say())
"""


def run_in_processes(config, folder: Path, *, processes: int, prelude: str = "") -> list[list]:
    """Train in a group of processes; [kind, step, metrics] of the events, which rank 0 alone has.

    `prelude` is Python that each process runs first.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config_to_json(config))
    done = warm.ranks(processes, ["-c", prelude + RANK, folder], cwd=folder)
    assert [rank.returncode for rank in done] == [0] * processes, done
    assert all(rank.stdout == "" for rank in done[1:]), done
    return [json.loads(line) for line in done[0].stdout.splitlines()]


def assert_processes_equal_one(config, folder: Path, *, processes: int, atol: float) -> list[list]:
    """Losses at every step and weights at the end, up to the order of sums; rank 0's events."""
    one = run(config, folder / "one").metrics()
    events = run_in_processes(config, folder / "several", processes=processes)
    losses = {step: metrics["train/loss"] for kind, step, metrics in events if kind == "train"}
    assert set(losses) == set(range(1, config.train.steps + 1))
    for step, loss in losses.items():
        assert abs(loss / one[step, "train/loss"] - 1) < 1e-4, step
    alone = weights(folder / "one")
    for name, weight in weights(folder / "several").items():
        torch.testing.assert_close(weight, alone[name], atol=atol, rtol=0)
    return events
