"""What a launcher does, and the file that says which one a sweep was launched with."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from experiments import json_files
from relora_core import atomic
from relora_core.config import ConfigError, RunConfig
from sweeps.local.launcher import LocalLauncher
from sweeps.planning.budget import Estimate, Place
from sweeps.planning.plan import Plan
from sweeps.slurm.launcher import SlurmLauncher
from sweeps.slurm.options import SlurmOptions
from sweeps.timing import Timings


class Launcher(Protocol):
    """Where runs are run; `kind` and `options` are all that is needed to make it again."""

    kind: str

    @property
    def options(self) -> Any: ...

    def place(self, config: RunConfig) -> Place:
        """The processes, devices and time that a run gets."""
        ...

    def check(self, plan: Plan, *, estimates: Mapping[str, Estimate | None]) -> None:
        """ConfigError if it could not run the plan; writes nothing."""
        ...

    def launch(self, plan: Plan, *, output_dir: Path, console: Console) -> int:
        """Run, or queue, what is not done and not in flight; the exit code."""
        ...

    def time(self, work: Timings, *, name: str, output_dir: Path, console: Console) -> None:
        """Time these configs where their runs would run, and report each as it is done.

        `name` is the sweep's. KeyboardInterrupt after Ctrl-C, with nothing left at work.
        """
        ...

    def check_search(self, plan: Plan) -> None:
        """ConfigError if it could not run a search with runs like those of the plan."""
        ...


def store_launcher(launcher: Launcher, folder: Path) -> None:
    options = launcher.options
    values = dataclasses.asdict(options) if isinstance(options, SlurmOptions) else options
    python = values.get("python") or ""
    if "/" in python and Path(python).is_file():  # else a command with arguments, or one of PATH
        values |= {"python": shlex.quote(str(Path(python).absolute()))}
    atomic.write_json(folder / "launcher.json", {"kind": launcher.kind, "options": values})


def load_launcher(folder: Path) -> Launcher:
    """The launcher that the sweep in `folder` was launched with last; local if none is stored."""
    path = folder / "launcher.json"
    try:
        raw = json_files.read(path)
        options = raw["options"]
        if raw["kind"] == "slurm":
            if json_files.read_fields(SlurmOptions, options, where="options.") != options:
                raise ValueError("an option is not known")
            return SlurmLauncher(options=SlurmOptions(**options))
        if raw["kind"] != "local" or not json_files.fits(int | None, options.get("max_parallel")):
            raise ValueError("it names no launcher")
        return LocalLauncher(**options)
    except FileNotFoundError:
        return LocalLauncher()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} must be a launcher as this version writes it ({error}); the sweep's own "
            "command writes it again"
        ) from None
