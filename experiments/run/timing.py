"""`python -m experiments.run.timing FILE`: times steps of the config in FILE, in this process.

What came of it is in `result_of(FILE)`. Not for: what is to be timed, and where (`sweeps/`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import environment, json_files
from experiments.disk.output_dir import cache_dir
from experiments.errors import one_line
from experiments.identity import config_from_json
from experiments.scheduler import enter_job
from relora_core import atomic, shell
from relora_core.config import RunConfig


@dataclass(kw_only=True, slots=True)
class Result:
    """How long some steps of a config took, or why they could not be timed."""

    device: str = ""
    """Name of the GPU, or `cpu`."""
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    world: int = 1
    error: str | None = None
    """One line."""


def result_of(file: Path) -> Path:
    return file.with_suffix(".result.json")


def read_result(file: Path) -> Result | None:
    """What came of timing the config in `file`; None if nothing did so far."""
    try:
        return Result(**json_files.read_fields(Result, json_files.read(result_of(file))))
    except FileNotFoundError:
        return None


def write_result(file: Path, result: Result) -> None:
    """Unless there is one."""
    if not result_of(file).exists():
        atomic.write_json(result_of(file), dataclasses.asdict(result))


def measure(file: Path) -> Result:
    """Time the config in `file`; an error is part of the result."""
    try:
        config = config_from_json(file.read_text(encoding="utf-8"))
        environment.check_gpu(config)
        from relora_core.timing import time_steps  # torch

        timing = time_steps(
            config, folder=file.with_suffix(""), cache_dir=cache_dir(config.output_dir)
        )
        return Result(device=_device(config), **dataclasses.asdict(timing))
    except Exception as error:
        return Result(error=one_line(error))


def _device(config: RunConfig) -> str:
    gpus = [] if config.runtime.device == "cpu" else environment.gpus()
    return gpus[0] if gpus else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 timed, 1 not."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: python -m experiments.run.timing FILE", file=sys.stderr)
        return 1
    enter_job()
    file = Path(words[0])
    result = measure(file)
    if shell.take_group().rank == 0 or result.error:
        write_result(file, result)
    return int(result.error is not None)


if __name__ == "__main__":
    sys.exit(main())
