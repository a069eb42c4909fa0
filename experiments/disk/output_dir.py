"""The layout of an output folder: runs, sweeps, studies, caches.

Not for: the layout of one run's folder (`run_dir.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import json_files
from experiments.disk.run_dir import RunDir
from experiments.identity import essential, plain_keys
from relora_core import shared
from relora_core.config import ConfigError, RunConfig


def runs_folder(output_dir: Path | str) -> Path:
    return Path(output_dir) / "runs"


def run_at(output_dir: Path | str, run_id: str) -> RunDir:
    """The run with an id read from a file; ConfigError if its folder would lie elsewhere."""
    if not json_files.names_folder(run_id):
        raise ConfigError(
            f"a run_id must be the name of a folder in {output_dir}/runs, got {run_id!r}"
        )
    return RunDir(runs_folder(output_dir) / run_id)


def all_runs(output_dir: Path | str) -> list[RunDir]:
    """Every run in `output_dir`, in the order of ids."""
    folder = runs_folder(output_dir)
    return [RunDir(p.parent) for p in sorted(folder.glob("*/config.json"))]


def same_runs(
    configs: Sequence[RunConfig],
    *,
    output_dir: Path | str,
    among: Callable[[RunDir], bool] = lambda run: True,
) -> list[RunDir | None]:
    """For each config the first run in `output_dir` that computes the same numbers, if any.

    Most runs differ in a plain knob: their JSON rules them out, before a RunConfig is built.
    """
    seeds = {f"-s{config.seed}-" for config in configs}
    keys = {(c.method, c.data.kind): [k.split(".") for k in plain_keys(c)] for c in configs}
    plain = {_values(dataclasses.asdict(c), keys[c.method, c.data.kind]) for c in configs}
    by_config: dict[str, RunDir] = {}
    for run in all_runs(output_dir) if configs else ():
        if not any(seed in run.run_id for seed in seeds):
            continue
        with contextlib.suppress(OSError, ValueError, TypeError):  # another version's, or damaged
            raw = json_files.read(run.config_path)
            with contextlib.suppress(KeyError):  # an older run lacks a knob added since
                paths = keys.get((raw["method"], raw["data"]["kind"]))
                if paths is None or _values(raw, paths) not in plain:
                    continue
            if among(run):
                by_config.setdefault(repr(essential(run.config())), run)
    return [by_config.get(repr(essential(config))) for config in configs]


def _values(raw: dict[str, Any], keys: list[list[str]]) -> tuple[Any, ...]:
    return tuple(functools.reduce(lambda part, name: part[name], key, raw) for key in keys)


def cache_dir(output_dir: str | Path) -> Path:
    """The folder of tokenised text, which all runs share."""
    return Path(output_dir) / "cache"


def refuse_file(output_dir: str | Path) -> None:
    """ConfigError if a file lies where `output_dir`, or a folder above it, is to be."""
    folder = Path(output_dir)
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir must be a folder, got {folder} and {nearest} is a file")


def check_output_dir(output_dir: str | Path) -> None:
    """ConfigError unless files can be made in `output_dir`; leaves nothing behind."""
    folder = Path(output_dir)
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        shared.make_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 65536)
            probe.flush()
    except OSError as error:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()
        raise ConfigError(
            f"output_dir must be a folder that can be written to, got {str(output_dir)!r} "
            f"({shared.explain(error) or error.strerror})"
        ) from None


def plan_folder(output_dir: Path | str, *, name: str) -> Path:
    return Path(output_dir) / "sweeps" / name


def study_folder(output_dir: Path | str, *, name: str, arm: str | None = None) -> Path:
    """Of a search, or of one arm of it."""
    folder = plan_folder(output_dir, name=name) / "study"
    return folder if arm is None else folder / "arms" / arm


class StudyPlace(NamedTuple):
    """What the path of a study's folder says."""

    output_dir: Path
    name: str
    """Of the search."""
    arm: str | None


def place_of_study(folder: Path | str) -> StudyPlace:
    """The parts that `study_folder` made the path of."""
    folder = Path(folder).absolute()
    is_arm = folder.parent.name == "arms" and folder.parents[1].name == "study"
    top = folder.parents[1] if is_arm else folder
    return StudyPlace(top.parents[2], top.parent.name, folder.name if is_arm else None)


def jobs_folder(output_dir: Path | str, *, name: str) -> Path:
    return plan_folder(output_dir, name=name) / "jobs"


@contextlib.contextmanager
def refuse_unwritable(output_dir: Path) -> Iterator[None]:
    """Make `output_dir`, and turn an OSError inside the context into a ConfigError."""
    try:
        shared.make_folder(output_dir)
        yield
    except OSError as error:
        why = shared.explain(error)
        raise ConfigError(
            f"output_dir must be a folder with free space to write to, got {output_dir}: "
            f"{why or f'{error.strerror or error} ({error.filename or output_dir})'}"
        ) from None
