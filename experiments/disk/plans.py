"""Stored plans, read: what a sweep consists of, and where MLflow shows each of its runs.

The only reader of plan.json. Not for: planning, or a plan's configs (`sweeps/planning/plan.py`).
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.addresses import located
from experiments.disk import frozen
from experiments.disk.output_dir import plan_folder, run_at
from experiments.disk.run_dir import RunDir
from experiments.environment import CONF
from experiments.identity import arm_id
from experiments.json_files import Damaged, fits, names_folder, parse
from experiments.labels import spell
from relora_core.config import ConfigError, EvaluatedConfig


def read_plan(path: Path) -> dict[str, Any]:
    """The content of a plan.json as this version writes it; Damaged if it cannot be trusted.

    Cells of earlier versions are given the axes that they lack.
    """
    try:
        raw = parse(path.read_bytes())
        if not isinstance(raw.get("cells"), list):
            raise ValueError("it has no list of cells")
        for cell in raw["cells"]:
            _check_cell(cell)
            cell.setdefault("axes", axes_of_older(cell["name"]))
        for key in ("commands", "collapsed", "notes"):
            if not fits(list[str], raw.get(key, [])):
                raise ValueError(f"{key} is no list of text")
        commands = raw.setdefault("commands", [])
        typed = raw.setdefault("overrides", [overrides_of(command) for command in commands])
        if not fits(list[list[str]], typed) or len(typed) != len(commands):
            raise ValueError("overrides are no lists of text, one a command")
        for one in raw.setdefault("tuned", {}).values():
            if not fits(dict[str, Any], one):
                raise ValueError("tuned has no settings of arms")
        if not fits(dict[str, str], raw.setdefault("same_arms", {})):
            raise ValueError("same_arms are no names of arms")
        return raw
    except ValueError as error:
        raise Damaged(
            f"{path} must be a plan as this version writes it ({error}); move it away to plan anew"
        ) from None


def _check_cell(cell: Any) -> None:
    if not isinstance(cell, dict):
        raise ValueError("a cell is no object")
    for key in ("run_id", "arm_id", "name"):
        if not isinstance(cell.get(key), str):
            raise ValueError(f"a cell has no {key}")
    run_id = cell["run_id"]
    if not names_folder(run_id):
        raise ValueError(f"run_id must name a folder, got {run_id!r:.60}")
    if not fits(dict[str, str], cell.get("axes", {})):
        raise ValueError(f"{run_id} has no axes of text")
    config = cell.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
        raise ValueError(f"{run_id} has no config")
    if not fits(int, config["train"].get("steps")) or not fits(int, config.get("seed", 0)):
        raise ValueError(f"{run_id} has no number of steps, or no seed")


@dataclass(kw_only=True, slots=True)
class PlannedRun:
    """A run as its plan, or if it has none its own config, describes it."""

    dir: RunDir
    name: str
    axes: dict[str, str]
    """Its values of the axes of the plan, as on a command line: `{"relora.r": "8"}`."""
    arm: str
    """The name without the seed."""
    arm_id: str
    seed: int | None
    steps: int
    experiment: str
    """Name of the experiment in conf/."""
    config: dict[str, Any]
    """As in the file: thousands of RunConfigs take seconds. Empty if it cannot be read."""
    sweep: str | None = None
    """The sweep it is listed under."""
    sweeps: list[str] = field(default_factory=list)
    """Every sweep that has planned it."""

    @property
    def run_id(self) -> str:
        return self.dir.run_id

    def place(self) -> Place:
        """Where MLflow shows it; ConfigError if the stored config does not tell."""
        output_dir = self.dir.output_dir
        try:
            tracking, uri = self.config["tracking"], self.config["tracking"]["uri"]
            return Place(
                tracked=tracking["enabled"],
                uri=uri and located(uri, frozen.typed_in(self.config["output_dir"], output_dir)),
                experiment=tracking["experiment"]
                or self.config["sweep"]["name"]
                or self.config["experiment"],
            )
        except (KeyError, TypeError):
            path = plan_folder(output_dir, name=self.sweep or "") / "plan.json"
            raise ConfigError(f"{path} must be a plan as this version writes it") from None


@dataclass(kw_only=True, slots=True)
class Place:
    """Where MLflow shows a run."""

    tracked: bool
    uri: str | None
    """None: the store in the output folder."""
    experiment: str
    """Name of the MLflow experiment."""


@dataclass(kw_only=True, slots=True)
class SweepRecord:
    """A sweep as its stored plan has it."""

    name: str
    runs: list[PlannedRun]
    commands: list[str] = field(default_factory=list)
    """Command lines that planned the runs, oldest first."""
    overrides: list[list[str]] = field(default_factory=list)
    """Of each command, as typed: `["relora.r=4,8", "seed=0,1"]`."""
    collapsed: list[str] = field(default_factory=list)
    """Why there are fewer runs than points, one line each."""
    notes: list[str] = field(default_factory=list)
    """Notes on settings and data, one line each."""
    same_arms: dict[str, str] = field(default_factory=dict)
    """Arm without runs of its own -> the one that computes the same and has them."""
    created: float = 0.0
    """Seconds since the epoch."""

    @property
    def arms(self) -> dict[str, list[PlannedRun]]:
        """arm_id -> its runs, in the order of the plan."""
        arms: dict[str, list[PlannedRun]] = {}
        for run in self.runs:
            arms.setdefault(run.arm_id, []).append(run)
        return arms


def sweep_names(output_dir: Path | str) -> list[str]:
    """Names of the stored plans."""
    paths = plan_folder(output_dir, name="").glob("*/plan.json")
    return sorted(path.parent.name for path in paths)


def read_sweeps(
    output_dir: Path | str, names: Sequence[str] | None = None
) -> dict[str, SweepRecord]:
    """Name -> sweep, for every stored plan, or for those of `names` that have one."""
    stored = sweep_names(output_dir)
    return {name: read_sweep(output_dir, name) for name in stored if names is None or name in names}


def read_sweep(output_dir: Path | str, name: str) -> SweepRecord:
    raw = read_plan(plan_folder(output_dir, name=name) / "plan.json")
    return SweepRecord(
        name=name,
        runs=[_planned(cell, output_dir=output_dir, sweep=name) for cell in raw["cells"]],
        commands=raw["commands"],
        overrides=raw["overrides"],
        collapsed=raw.get("collapsed", []),
        notes=raw.get("notes", []),
        same_arms=raw["same_arms"],
        created=raw.get("created", 0.0),
    )


def _planned(cell: Mapping[str, Any], *, output_dir: Path | str, sweep: str) -> PlannedRun:
    config, axes = cell["config"], cell["axes"]
    experiment = str(config.get("experiment", sweep))
    setting = spell({key: value for key, value in axes.items() if key != "seed"})
    return PlannedRun(
        dir=run_at(output_dir, cell["run_id"]),
        name=cell["name"],
        axes=axes,
        arm=setting.removeprefix("arm=") or experiment,
        arm_id=cell["arm_id"],
        seed=config.get("seed"),
        steps=config["train"]["steps"],
        experiment=experiment,
        config=config,
        sweep=sweep,
    )


def single_run(run: RunDir) -> PlannedRun:
    """A run without a plan; if its config cannot be read, its id stands for its arm."""
    name = run.run_id
    bare = PlannedRun(
        dir=run,
        name=name,
        axes={},
        arm=name,
        arm_id=name,
        seed=None,
        steps=0,
        experiment="",
        config={},
    )
    try:
        config = run.config()
    except (OSError, ValueError, TypeError):
        return bare
    arm = arm_id(config)
    return replace(
        bare,
        arm=config.model.name if isinstance(config, EvaluatedConfig) else arm,
        arm_id=arm,
        seed=config.seed,
        steps=config.train.steps,
        experiment=config.experiment,
        config=asdict(config),
    )


# plans of earlier versions ----------------------------------------------------------------------
AXIS = re.compile(r"(?:^| )([A-Za-z_][\w.]*)=")


def axes_of_older(name: str) -> dict[str, str]:
    """`model=tiny relora.r=8` -> pairs, for plans that store only names; values may have spaces."""
    starts = list(AXIS.finditer(name))
    ends = [*(match.start() for match in starts[1:]), len(name)]
    return {m.group(1): name[m.end() : end] for m, end in zip(starts, ends, strict=False)}


def overrides_of(command: str) -> list[str]:
    """The overrides in a command line, as typed; none if a shell could not parse it."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    return [w for w in words if w.startswith("~") or ("=" in w and not w.startswith("-"))]


# questions --------------------------------------------------------------------------------------
def question(
    sweep: str, overrides: Iterable[Sequence[str]], experiments: Iterable[str]
) -> str | None:
    """The question at the head of the sweep's file in conf/, else of the experiments' files."""
    typed = [re.match(r"\+*sweep=([\w-]+)", word) for words in overrides for word in words]
    chosen = [match[1] for match in typed if match]
    for folder, names in (("sweep", [sweep, *chosen]), ("experiment", experiments)):
        files = [CONF / folder / f"{name}.yaml" for name in dict.fromkeys(names)]
        if text := " ".join(filter(None, map(_question, files))):
            return text
    return None


def _question(path: Path) -> str | None:
    """The comment after `Question:`, up to the next heading such as `Command:`."""
    lines: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        lines = path.read_text(encoding="utf-8").splitlines()
    parts: list[str] = []
    for line in lines:
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text.startswith("Question:"):
            parts = [text.removeprefix("Question:").strip()]
        elif parts and line.startswith("#") and not re.match(r"[A-Z]\w*:", text):
            parts.append(text)
        elif parts:
            break
    return " ".join(parts) or None
