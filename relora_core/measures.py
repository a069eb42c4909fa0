"""What a run measures beside its losses: evals, dynamics, and what a restart does to the function.

Not for: what is measured (`evals/`, `dynamics.py`), nor in which order (`train.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from relora_core import ranks
from relora_core.config import RunConfig
from relora_core.data import open_stream
from relora_core.dynamics import Recorder
from relora_core.evals import Eval
from relora_core.evals.base import LanguageModel
from relora_core.events import Event, Sink
from relora_core.model import Decoder
from relora_core.overlap import read, upload

Stop = Callable[[], bool]
"""Read between steps: whether this process has been asked to end. May raise, to end at once."""


def never() -> bool:
    return False


class Interrupted(Exception):
    """The process was asked to end during an eval."""


class Measures:
    """Evals (at the end, too) and dynamics, each at its cadence; they leave model and RNG alone."""

    def __init__(
        self,
        config: RunConfig,
        *,
        accelerator: Accelerator,
        model: LanguageModel,
        evals: list[Eval],
        recorder: Recorder,
        sink: Sink,
        stop: Stop,
    ) -> None:
        self.config, self.accelerator, self.model = config, accelerator, model
        self.evals, self.recorder, self.sink, self.stop = evals, recorder, sink, stop

    def _due(self, step: int) -> list[Eval]:
        """The evals that are due when `step` updates are complete."""
        end = step == self.config.train.steps
        return [e for e in self.evals if end or (e.every_steps and step % e.every_steps == 0)]

    def evals_due(self, step: int) -> bool:
        return bool(self._due(step))

    def evaluate(self, step: int) -> bool:
        """Run what is due; False where it was asked to end instead.

        A rank may leave alone, without the others' agreement: the checkpoint is on disk, and a
        resumed run begins with these evals.
        """
        try:
            for evaluation in self._due(step):
                self._evaluate(evaluation, step)
        except Interrupted:
            return False
        return True

    def dynamics(self, step: int) -> None:
        """Singular-value measures, where due after the update that completes `step`: on rank 0."""
        if not self.recorder.due(step):
            return
        start = time.perf_counter()
        self.recorder.average_gradients_(lambda g: self.accelerator.reduce(g, reduction="mean"))  # type: ignore[arg-type,return-value]
        turn = f"dynamics/{step}"
        if not self.accelerator.is_main_process:
            ranks.wait_for_rank_0(turn)
            return
        metrics, rows = self.recorder.measure()
        if self.accelerator.num_processes > 1:
            ranks.end_turn(turn)
        metrics["perf/dynamics_seconds"] = time.perf_counter() - start
        self.sink.emit(Event(kind="dynamics", step=step, metrics=metrics))
        self.sink.emit(Event(kind="table", step=step, data={"name": "dynamics", "rows": rows}))

    def _evaluate(self, evaluation: Eval, step: int) -> None:
        def progress(done: int, total: int) -> None:
            data = {"phase": f"{evaluation.name} {done}/{total}"}
            self.sink.emit(Event(kind="phase", step=step, data=data))
            if self.stop():
                raise Interrupted

        def summed(tensor: Tensor) -> Tensor:
            return self.accelerator.reduce(tensor, reduction="sum")  # type: ignore[return-value]

        result = evaluation.run(
            self.model,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            reduce=summed,
            progress=progress,
        )
        self.sink.emit(Event(kind="eval", step=step, metrics=result.metrics))
        for name, rows in result.tables.items():
            self.sink.emit(Event(kind="table", step=step, data={"name": name, "rows": rows}))


class RestartProbe:
    """The model's function on one fixed batch: the run's first row, at most 64 tokens of it."""

    TOKENS = 64

    def __init__(self, model: Decoder, *, config: RunConfig, cache_dir: Path) -> None:
        self.model, self.config, self.cache_dir = model, config, cache_dir

    @cached_property
    def ids(self) -> Tensor:
        """(1, T + 1) on the model's device, read at the first restart: most methods have none."""
        stream = open_stream(
            self.config.data,
            seed=self.config.seed,
            vocab_size=self.model.embedding_proj.num_embeddings,
            cache_dir=self.cache_dir,
        )
        rows = torch.from_numpy(stream.next_rows(1))[:, : self.TOKENS + 1].contiguous()
        return upload(rows, self.model.embedding_proj.weight.device)

    @torch.no_grad()
    def look(self) -> tuple[Tensor, Tensor]:
        """Logits (1, T, V) without dropout in float32, and the loss in nats per token, a scalar."""
        training = self.model.training
        self.model.eval()
        ids = self.ids
        with torch.autocast(ids.device.type, enabled=False):
            logits = self.model.logits(ids[:, :-1])
        self.model.train(training)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return logits, loss

    def compare(self, before: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Changes by a restart since `before`: 0 up to rounding if the merge is right."""
        logits, loss = self.look()
        names = ("logit_change_max", "loss_before", "loss_after")
        values = read((logits - before[0]).abs().max(), before[1], loss)
        return {f"restart/{name}": value for name, value in zip(names, values, strict=True)}
