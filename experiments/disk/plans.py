"""Stored plans: what a sweep consists of, and where each of its runs is shown in MLflow."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.addresses import experiment_name, located
from experiments.disk import frozen
from experiments.disk.output_dir import plan_folder, run_at
from experiments.disk.run_dir import RunDir
from experiments.identity import arm_id
from experiments.json_files import Damaged, fits, names_folder, parse
from relora_core.config import ConfigError


def read_plan(path: Path) -> dict[str, Any]:
    """plan.json as it is in the file; Damaged where it could mislead who looks for its runs."""
    try:
        raw = parse(path.read_bytes())
        if not isinstance(raw.get("cells"), list):
            raise ValueError("it has no list of cells")
        for cell in raw["cells"]:
            _check_cell(cell)
        for key in ("commands", "collapsed", "notes"):
            if not fits(list[str], raw.get(key, [])):
                raise ValueError(f"{key} is no list of text")
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
    config = cell.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("train"), dict):
        raise ValueError(f"{run_id} has no config")
    if not fits(int, config["train"].get("steps")) or not fits(int, config.get("seed", 0)):
        raise ValueError(f"{run_id} has no number of steps, or no seed")


@dataclass(kw_only=True, slots=True)
class Member:
    """A run, as a plan or its own config says where it is to be shown."""

    run: RunDir
    name: str
    arm_id: str
    seed: int | None
    experiment: str
    """The setting's name, of which conf/ knows the question."""
    tracked: bool
    uri: str | None
    """None: the store in the output folder."""
    shown_in: str
    """Name of the MLflow experiment."""


def read_plans(
    output_dir: Path | str, sweeps: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Sweep -> its stored plan as it is in the file: building thousands of configs takes seconds.

    Sweeps without a plan are skipped.
    """
    found = {}
    for path in sorted(plan_folder(output_dir, name="").glob("*/plan.json")):
        if sweeps is None or path.parent.name in sweeps:
            found[path.parent.name] = read_plan(path)
    return found


def _no_plan(path: Path) -> ConfigError:
    return ConfigError(f"{path} must be a plan as this version writes it")


def members_of(plan: Mapping[str, Any], output_dir: Path, *, sweep: str) -> list[Member]:
    try:
        return [_planned(cell, output_dir=output_dir) for cell in plan["cells"]]
    except (KeyError, TypeError):
        raise _no_plan(plan_folder(output_dir, name=sweep) / "plan.json") from None


def _planned(cell: Mapping[str, Any], *, output_dir: Path) -> Member:
    config = cell["config"]
    tracking, experiment = config["tracking"], config["experiment"]
    bases = frozen.typed_in(config["output_dir"], output_dir)
    return Member(
        run=run_at(output_dir, cell["run_id"]),
        name=cell["name"],
        arm_id=cell["arm_id"],
        seed=config["seed"],
        experiment=experiment,
        tracked=tracking["enabled"],
        uri=tracking["uri"] and located(tracking["uri"], bases),
        shown_in=tracking["experiment"] or config["sweep"]["name"] or experiment,
    )


def single_member(run: RunDir) -> Member | None:
    """A run without a plan; None where this version cannot read what it is."""
    try:
        config = run.config()
    except (OSError, ValueError, TypeError):
        return None
    return Member(
        run=run,
        name="",
        arm_id=arm_id(config),
        seed=config.seed,
        experiment=config.experiment,
        tracked=config.tracking.enabled,
        uri=config.tracking.uri,
        shown_in=experiment_name(config),
    )


CONF = Path(__file__).resolve().parents[2] / "conf"


def question(sweep: str, commands: Iterable[str], experiments: Iterable[str]) -> str | None:
    """From the head of the sweep's file in conf/, else of the experiments' files."""
    chosen = [w for c in commands for w in re.findall(r"(?<![\w.])sweep=([\w-]+)", c)]
    for folder, names in (("sweep", [sweep, *chosen]), ("experiment", experiments)):
        files = [CONF / folder / f"{name}.yaml" for name in dict.fromkeys(names)]
        if found := " ".join(filter(None, map(_question, files))):
            return found
    return None


def _question(path: Path) -> str | None:
    """The comment that begins with `Question:`, down to the next such word."""
    lines: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        lines = path.read_text(encoding="utf-8").splitlines()
    told: list[str] = []
    for line in lines:
        text = line.removeprefix("#").strip()
        if line.startswith("#") and text.startswith("Question:"):
            told = [text.removeprefix("Question:").strip()]
        elif told and line.startswith("#") and not re.match(r"[A-Z]\w*:", text):
            told.append(text)
        elif told:
            break
    return " ".join(told) or None


def stored_names(output_dir: Path | str) -> dict[str, dict[str, str]]:
    """Sweep name -> run_id -> run name, for every stored plan, without building the configs."""
    found = {}
    for path in sorted((Path(output_dir) / "sweeps").glob("*/plan.json")):
        cells = read_plan(path)["cells"]
        found[path.parent.name] = {cell["run_id"]: cell["name"] for cell in cells}
    return found
