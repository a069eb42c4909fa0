"""How long training waits for a checkpoint, and its size: `python benchmarks/checkpoints.py`.

For the paper's shapes, in turns: written while training waits, and in the background, as training
does (`checkpoint.Writer`). `still` is how long the training thread waits; `total` adds by
how much the steps meanwhile are slower than others. Not for: reading checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.tables import show
from experiments.environment import cpu
from relora_core import checkpoint, costs
from relora_core.checkpoint import Progress, Writer
from relora_core.config import DataConfig, ModelConfig, ReLoRAConfig, RunConfig, TrainConfig
from relora_core.methods import build_method
from relora_core.model import Decoder

SIZES = {"tiny": (96, 384), "small": (384, 1536)}
VOCABULARY = 50304


class Trainer:
    """Steps of one model, nothing logged."""

    def __init__(self, name: str, *, method: str, tokens: int) -> None:
        d_model, d_ff = SIZES[name]
        shape = ModelConfig(name=name, d_model=d_model, d_ff=d_ff, vocab_size=VOCABULARY)
        self.config = RunConfig(
            method=method,
            model=shape,
            relora=ReLoRAConfig(r=16, reset_frequency=1000),
            train=TrainConfig(steps=1000, batch_size=4),
            data=DataConfig(seq_len=tokens // 4),
        )
        torch.manual_seed(0)
        self.model = Decoder(shape)
        method_ = build_method(self.config)
        method_.adapt(self.model)
        self.optimizer = method_.build_optimizer(self.model)
        self.ids = torch.randint(0, VOCABULARY, (4, tokens // 4 + 1))
        self.progress = Progress()
        for _ in range(3):
            self.step()

    def step(self) -> float:
        began = time.perf_counter()
        self.model(self.ids[:, :-1], self.ids[:, 1:]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "progress": self.progress,
            "rng": [checkpoint.rng_state()],
        }


def waiting(trainer: Trainer, folder: Path) -> tuple[float, float]:
    """(`still`, `total`) in seconds, of a checkpoint that training waits for."""
    trainer.step()
    began = time.perf_counter()
    with Writer(folder, keep_last=2) as writer:
        writer.save(**trainer.state())
    seconds = time.perf_counter() - began
    return seconds, seconds


def behind(trainer: Trainer, writer: Writer, *, plain: float) -> tuple[float, float]:
    """(`still`, `total`) in seconds, of a checkpoint that is written while steps go on."""
    trainer.step()
    began = time.perf_counter()
    writer.save(**trainer.state())
    still = time.perf_counter() - began
    extra = 0.0
    while writer._thread is not None and writer._thread.is_alive():
        extra += trainer.step() - plain
    writer.wait()
    return still, still + max(0.0, extra)


def measure(name: str, *, method: str, tokens: int, rounds: int, folder: Path) -> dict[str, Any]:
    trainer = Trainer(name, method=method, tokens=tokens)
    plain = statistics.median(trainer.step() for _ in range(5))
    before, after, linked = [], [], set()
    size = written = 0
    with Writer(folder / "behind", keep_last=2) as writer:
        for _ in range(rounds):
            before.append(waiting(trainer, folder / "waiting"))
            after.append(behind(trainer, writer, plain=plain))
            newest = checkpoint.complete(folder / "behind")[-1]
            files = [file.stat() for file in newest.iterdir()]
            size = sum(file.st_size for file in files)
            written = sum(file.st_size for file in files if file.st_ino not in linked)
            # Only of linked files: the inode of a file that was removed may be used again.
            linked = {p.stat().st_ino for p in folder.glob(f"behind/step-*/{checkpoint.FROZEN}")}
    return {
        "model": name,
        "method": method,
        "step_s": plain,
        "still_before_s": min(s for s, _ in before),
        "still_s": min(s for s, _ in after),
        "total_s": statistics.median(t for _, t in after),
        "mb": size / 1e6,
        "planned_mb": costs.checkpoint_bytes(trainer.config) / 1e6,
        "written_mb": written / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tiny,small")
    parser.add_argument("--methods", default="full_rank,relora")
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--rounds", type=int, default=4, help="checkpoints of either sort")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models.split(","):
        for method in args.methods.split(","):
            with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=args.folder) as folder:
                options = {"tokens": args.tokens, "rounds": args.rounds, "folder": Path(folder)}
                rows.append(measure(name, method=method, **options))
    show(rows, title="a checkpoint")
    machine = {"threads": args.threads, "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"rows": rows, **machine, "cpu": cpu()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
