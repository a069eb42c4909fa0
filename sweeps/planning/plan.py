"""RunConfigs -> a Plan: the runs of a sweep, named and without duplicates.

Stored as output_dir/sweeps/<name>/plan.json, with every cell that a command of this name planned.
Not for: what still has to run (`slurm/survey.py`, `launch.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import json_files, notices
from experiments.disk import flock, frozen
from experiments.disk.output_dir import plan_folder
from experiments.disk.plans import overrides_of, read_plan
from experiments.identity import (
    config_from_json,
    essential,
    ids,
    left_out,
    overruled,
    scientific,
)
from experiments.labels import LABELS, spell, text_of
from relora_core import atomic, shared
from relora_core.config import (
    EVALS,
    ConfigError,
    RunConfig,
    get,
    runs_eval,
    validate,
    walk,
)
from sweeps.planning import unnamed
from sweeps.planning.grid import Point, axes, check_name, sweep_name

FIRST = ("sweep.arm", "experiment", "method", "model.name", "relora.name", "data.kind", "data.path")
LAST = ("seed", "model.vocab_size")
"""Keys that `cell_axes` tries first and last; those of LAST often follow from others."""
LONGEST_VALUE = 80
"""Of a name, in characters: a list of a hundred entries would fill the screen."""


@dataclass(kw_only=True, slots=True)
class Cell:
    """One run of a plan."""

    run_id: str
    arm_id: str
    name: str
    """Made of its axes: `model=tiny relora.r=8`; without axes the experiment's name."""
    config: RunConfig
    axes: dict[str, str] = field(default_factory=dict)
    """What distinguishes it from the plan's other runs: `{"model": "tiny", "relora.r": "8"}`."""


@dataclass(kw_only=True, slots=True)
class Plan:
    """The runs of one sweep, without duplicates."""

    name: str
    cells: list[Cell]
    points: int
    """Points of the grid, duplicates included."""
    collapsed: list[str] = field(default_factory=list)
    """Why there are fewer runs than points, one line each."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of settings and data, one line each."""
    commands: list[str] = field(default_factory=list)
    """Command lines that planned these cells, oldest first."""
    overrides: list[list[str]] = field(default_factory=list)
    """Of each command, as typed: `["relora.r=4,8", "seed=0,1"]`."""
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arm -> settings that it has from a search, and their source (`provenance.Tuned.record`)."""
    same_arms: dict[str, str] = field(default_factory=dict)
    """`sweep.arm` without runs of its own -> the one that computes the same and has them."""
    created: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    @property
    def is_tracked(self) -> bool:
        """Whether MLflow is to show any of its runs."""
        return any(cell.config.tracking.enabled for cell in self.cells)


def make_plan(
    points: Sequence[tuple[Point, RunConfig]],
    *,
    name: str | None = None,
    command: str = "",
    valid: bool = False,
    begun: Callable[[str], bool] = lambda run_id: False,
) -> Plan:
    """Validate every point (unless they are `valid`), remove duplicates, name the sweep and runs.

    Configs of several ids may compute the same (`identity.essential`). One of them is planned: the
    one whose run has `begun`, else the first by arm_id, whatever the order of the grid. Runs that
    differ in their seed alone have one arm_id, even if they have begun under several.

    Raises ConfigError at the first bad point; touches no disk.
    """
    if not points:
        raise ConfigError("the sweep must have at least one point, got an empty axis")
    for _, config in [] if valid else points:
        validate(config)
    name = _plan_name(points, name)
    by_ids: dict[tuple[str, str], list[RunConfig]] = {}
    for _, config in points:
        named = dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, name=name))
        by_ids.setdefault(ids(named), []).append(named)
    same: dict[str, dict[tuple[str, str], list[RunConfig]]] = {}
    for pair, configs in by_ids.items():
        same.setdefault(repr(essential(configs[0])), {})[pair] = configs
    cells, same_arms = [], {}
    for one in same.values():
        run_id, arm_id = min(one, key=lambda pair: (not begun(pair[0]), pair[1]))
        cells.append(Cell(run_id=run_id, arm_id=arm_id, name="", config=one[run_id, arm_id][0]))
        kept = cells[-1].config.sweep.arm
        others = [config.sweep.arm for configs in one.values() for config in configs]
        same_arms |= {arm: kept for arm in others if arm and kept and arm != kept}
    same_arms = _without_runs(same_arms | _join_arms([], cells), cells)
    _rename(cells)
    return Plan(
        name=name,
        cells=cells,
        points=len(points),
        collapsed=_explain_collapse(
            [[c for configs in one.values() for c in configs] for one in same.values()],
            points=len(points),
            same_arms=same_arms,
        ),
        commands=[command] if command else [],
        overrides=[overrides_of(command)] if command else [],
        same_arms=same_arms,
    )


def _without_runs(same_arms: Mapping[str, str], cells: Sequence[Cell]) -> dict[str, str]:
    """Those of `same_arms` that no cell is of, each with the arm of cells that it ends at."""
    arms = {cell.config.sweep.arm for cell in cells}
    ends = {}
    for arm, same in same_arms.items():
        passed = {arm}
        while same not in arms and same in same_arms and same not in passed:
            passed.add(same)
            same = same_arms[same]
        if arm not in arms and same in arms:
            ends[arm] = same
    return ends


def _join_arms(old: Sequence[Cell], new: Sequence[Cell]) -> dict[str, str]:
    """Give runs that differ in their seed alone one arm_id, the oldest's, and one `sweep.arm`, the
    newest command's; the names that this replaces -> that one."""
    cells_of: dict[str, list[Cell]] = {}
    for cell in [*old, *new]:
        setting = {key: value for key, value in essential(cell.config).items() if key != "seed"}
        cells_of.setdefault(repr(setting), []).append(cell)
    is_new, same_arms = set(map(id, new)), {}
    for cells in cells_of.values():
        newest_first = sorted(cells, key=lambda cell: id(cell) not in is_new)
        names = [arm for cell in newest_first if (arm := cell.config.sweep.arm)]
        for cell in cells:
            cell.arm_id = cells[0].arm_id
            if names and cell.config.sweep.arm != names[0]:
                sweep = dataclasses.replace(cell.config.sweep, arm=names[0])
                cell.config = dataclasses.replace(cell.config, sweep=sweep)
        same_arms |= {name: names[0] for name in names if name != names[0]}
    return same_arms


def _plan_name(points: Sequence[tuple[Point, RunConfig]], name: str | None) -> str:
    folders = sorted({config.output_dir for _, config in points})
    if len(folders) > 1:  # equal runs in two folders would be one cell
        raise ConfigError(f"output_dir must be one folder per command, got {', '.join(folders)}")
    given = {config.sweep.name for _, config in points}
    if name is None and len(given) > 1:
        raise ConfigError(
            f"sweep.name must be one name per command, got {', '.join(sorted(map(str, given)))}"
        )
    name = name or points[0][1].sweep.name
    if name:
        return check_name(name)
    return sweep_name([point for point, _ in points], experiment=points[0][1].experiment)


# names ------------------------------------------------------------------------------------------
def cell_axes(configs: Sequence[RunConfig]) -> list[dict[str, str]]:
    """For each config the fewest keys that make all of them distinct, with their values as text.

    Keys are tried in a readable order (arm, experiment, method, model, data, then as declared). One
    that tells no more of them apart, such as a width beside the model's name, is left out.
    """
    rows = [_settings(config) for config in configs]
    keys = _distinguishing_keys(rows)
    return [{LABELS.get(k, k): _short(row[k]) for k in keys if k in row} for row in rows]


def comparison_notes(configs: Sequence[RunConfig]) -> list[str]:
    """Notes on runs that are to be compared with each other, one line each."""
    rows = [_settings(config) for config in configs]
    hidden = unnamed.notes(configs, rows, named=_distinguishing_keys(rows), spell=_spell)
    return [*notices.across(configs), *hidden]


def _distinguishing_keys(rows: list[dict[str, Any]]) -> list[str]:
    """The fewest keys that make all rows distinct."""
    prefixes: list[tuple[Any, ...]] = [() for _ in rows]
    chosen = []
    for key in _in_order(rows):
        finer = [(*seen, _hashable(row, key)) for seen, row in zip(prefixes, rows, strict=True)]
        if len(set(finer)) > len(set(prefixes)):
            prefixes = finer
            chosen.append(key)
    return chosen


def _settings(config: RunConfig) -> dict[str, Any]:
    """The scientific settings, and the labels that stand for many of them."""
    labels = {key: get(config, key) for key in ("experiment", "model.name")}
    if config.sweep.arm:
        labels["sweep.arm"] = config.sweep.arm
    if config.method == "relora":
        labels["relora.name"] = config.relora.name
    for section in ("data", *(f"eval.{name}" for name in EVALS)):
        key = f"{section}.path"
        if get(config, key) and get(config, f"{section}.fingerprint"):
            labels[key] = get(config, key)
    return labels | scientific(config)


def _in_order(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    digests = [key for key in keys if key.endswith(".fingerprint")]
    ends = {*FIRST, *LAST, *digests}
    middle = [key for key in keys if key not in ends]
    middle.sort(key=lambda key: key.startswith("model."))  # the model's name says most of them
    return [*FIRST, *middle, *LAST, *digests]


def _hashable(row: dict[str, Any], key: str) -> str | None:
    """The value as text; None if the key does not apply."""
    return repr(row[key]) if key in row else None


def _spell(key: str, value: Any) -> str:
    return f"{LABELS.get(key, key)}={_short(value)}"


def _short(value: Any) -> str:
    """A value as text; a long one is cut in the middle, and a digest makes it unique."""
    text = text_of(value)
    if len(text) <= LONGEST_VALUE:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{text[:30]}...{text[-20:]}({digest})"


def _rename(cells: list[Cell], configs: Sequence[RunConfig] | None = None) -> None:
    configs = configs or [cell.config for cell in cells]
    for cell, row in zip(cells, cell_axes(configs), strict=True):
        cell.name, cell.axes = spell(row) or cell.config.experiment, row


def _with_typed_paths(cells: list[Cell], *, new: Sequence[Cell]) -> list[RunConfig]:
    """The cells' configs; if `new` ones have relative paths, so have those of earlier commands."""
    if all(cell.config.data == frozen.absolute(cell.config).data for cell in new):
        return [cell.config for cell in cells]
    new_ids = {cell.run_id for cell in new}
    return [c.config if c.run_id in new_ids else frozen.from_here(c.config) for c in cells]


# collapse ---------------------------------------------------------------------------------------
def _explain_collapse(
    groups: list[list[RunConfig]], *, points: int, same_arms: Mapping[str, str]
) -> list[str]:
    """Lines on why there are fewer runs than points; each group became one run."""
    reasons: dict[str, list[str]] = {}
    for configs in groups:
        for key, reason in _why_equal(configs):
            keys = reasons.setdefault(reason, [])
            if key not in keys:
                keys.append(key)
    if len(groups) == points:
        return []
    sentences = [_sentence(keys, reason, same_arms) for reason, keys in reasons.items()]
    return [f"{points} points -> {len(groups)} runs: {text}" for text in sentences]


def _why_equal(configs: list[RunConfig]) -> Iterator[tuple[str, str]]:
    """(key, reason) of each knob that differs between configs of one identity."""
    if len(configs) < 2:
        return
    first, differs = configs[0], False
    for key, f, _ in walk(first):
        if len({repr(get(config, key)) for config in configs}) == 1:
            continue
        differs = True
        meta = f.metadata
        section = key.rsplit(".", 1)[0]
        if not meta.get("scientific", True):
            yield key, "not what is computed"
        elif reason := overruled(meta, first):
            yield key, reason
        elif key.startswith("eval.") and not runs_eval(first, key.split(".")[1]):
            on = next((c for c in configs if get(c, f"{section}.enabled")), first)
            yield key, f"with {left_out(key.split('.')[1], on)}"
        else:
            yield key, "same"
    if not differs:
        yield "", "twice"


def _sentence(keys: list[str], reason: str, same_arms: Mapping[str, str]) -> str:
    if keys == ["sweep.arm"] and same_arms:
        equal = ", ".join(f"{arm} = {same}" for arm, same in same_arms.items())
        return f"of equal arms one runs ({equal})"
    if reason == "twice":
        return "the same setting is there more than once"
    if reason == "same":
        return f"values of {', '.join(keys)} mean the same"
    does = "does" if len(keys) == 1 else "do"
    verb = {"to": "apply", "with": "apply", "not": "change"}[reason.split()[0]]
    if verb == "change":
        return f"{', '.join(keys)} {does} not change what is computed"
    return f"{', '.join(keys)} {does} not {verb} {reason}"


# disk -------------------------------------------------------------------------------------------
def command(name: str, *words: str, output_dir: Path | str) -> str:
    """The shell command that does this below `output_dir`, quoted, to be printed."""
    folder = Path(output_dir).absolute()
    option = [] if folder == Path("outputs").absolute() else ["--output-dir", str(folder)]
    return shlex.join(["python", "-m", "sweeps", name, *words, *option])


def store(plan: Plan, *, output_dir: Path | str) -> Plan:
    """Extend the stored plan of this name by `plan`; return `plan` with the names stored there.

    Cells of earlier commands stay in the file and are not returned: a command runs its own points.
    """
    folder = plan_folder(output_dir, name=plan.name)
    shared.make_folder(folder)
    with _only_writer(folder):
        for path in atomic.torn(folder):
            path.unlink(missing_ok=True)
        cells = {cell.run_id: cell for cell in plan.cells}
        merged = dataclasses.replace(plan, cells=list(cells.values()))
        if (folder / "plan.json").exists():
            old = load(folder / "plan.json")
            named, notes = _labels(plan.cells), _lasting_notes(old, plan)
            same_arms = old.same_arms | _join_arms(old.cells, plan.cells) | plan.same_arms
            old_ids = {cell.run_id for cell in old.cells}
            new = [cell for cell in plan.cells if cell.run_id not in old_ids]
            both = zip(old.commands + plan.commands, old.overrides + plan.overrides, strict=True)
            typed = dict(both)
            merged = dataclasses.replace(
                plan,
                cells=[cells.get(cell.run_id, cell) for cell in old.cells] + new,
                commands=list(typed),
                overrides=list(typed.values()),
                tuned=old.tuned | plan.tuned,
                created=old.created,
            )
            merged.same_arms = _without_runs(same_arms, merged.cells)
            notes += comparison_notes([cell.config for cell in merged.cells])
            merged.notes = list(dict.fromkeys(notes))
            if _labels(merged.cells) != named:  # else make_plan has named them
                _rename(merged.cells, _with_typed_paths(merged.cells, new=plan.cells))
        for cell in plan.cells:
            cell.config = frozen.absolute(cell.config)
        atomic.write_json(folder / "plan.json", dataclasses.asdict(merged))
    return dataclasses.replace(plan, cells=list(cells.values()))


def _labels(cells: Sequence[Cell]) -> list[tuple[str, str | None]]:
    return [(cell.run_id, cell.config.sweep.arm) for cell in cells]


def _lasting_notes(old: Plan, new: Plan) -> list[str]:
    """The notes of both plans that compare no runs; `store` makes the others anew, of all runs."""
    runs = [[cell.config for cell in plan.cells] for plan in (old, new)]
    outdated = {note for configs in runs for note in comparison_notes(configs)}
    return [note for note in old.notes + new.notes if note not in outdated]


def other_settings(plan: Plan, points: Sequence[Point], *, output_dir: Path | str) -> list[str]:
    """A line if a stored plan of the same automatic name has runs with other fixed settings.

    More values of the axes and more seeds are not meant: these make a wider grid.
    """
    path = plan_folder(output_dir, name=plan.name) / "plan.json"
    if not path.exists():
        return []
    before, now = load(path).cells, plan.cells
    old, new = (_values([cell.config for cell in cells]) for cells in (before, now))
    varied = axes(points)
    named = {key for point in points for key in point}
    differing = []
    for key, values in new.items():
        if not old.get(key) or values & old[key] or _follows(key, varied, named=named):
            continue
        data = key.endswith(".fingerprint")
        key = key.replace("fingerprint", "path") if data else key
        one, two = (_short(get(cells[0].config, key)) for cells in (before, now))
        if one == two and not data:  # its meaning follows from an axis, as that of a scale from r
            continue
        differing.append(f"{key}={one} (now {two})" if one != two else f"other data at {key}={one}")
    if not differing:
        return []
    some = ", ".join(differing[:3])
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return [
        f"sweep {plan.name} has runs of earlier commands with {some}{more}, and these join them: "
        "sweep.name=NAME keeps them apart"
    ]


def _values(configs: Sequence[RunConfig]) -> dict[str, set[str]]:
    """Key -> its values, of keys that change the numbers, without the seed and the vocabulary."""
    values_of: dict[str, set[str]] = {}
    for config in configs:
        for key, value in essential(config).items():
            values_of.setdefault(key, set()).add(repr(value))
    for key in ("seed", "model.vocab_size"):
        values_of.pop(key, None)
    key = "schedule.total_steps"  # in `essential` it follows from train.steps
    values_of[key] = {repr(get(config, key)) for config in configs}
    return values_of


def _follows(key: str, varied: Sequence[str], *, named: Collection[str]) -> bool:
    """Whether the key's values may come from an axis."""
    if {"experiment", "sweep.arm"} & {*varied} and key not in named:
        return True
    by_scale = key == "relora.alpha" and "relora.scale" in named
    return by_scale or any(key == axis or key.startswith(f"{axis}.") for axis in varied)


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait for other commands that extend the plan in this folder."""
    with shared.open_file(folder / ".lock", "w") as file:
        flock.lock(file)
        yield


def load(path: Path) -> Plan:
    """A stored plan; ConfigError if the file is not one."""
    try:
        raw = read_plan(path)
        check_name(raw["name"])
        cells = [
            Cell(**{**cell, "config": _config(cell, output_dir=path.absolute().parents[2])})
            for cell in raw["cells"]
        ]
        return Plan(**{**json_files.read_fields(Plan, raw | {"cells": []}), "cells": cells})
    except json_files.Damaged:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} must be a plan as this version writes it ({error}); move it away to plan anew"
        ) from None


def _config(cell: dict[str, Any], *, output_dir: Path) -> RunConfig:
    return frozen.read(config_from_json(json.dumps(cell["config"])), output_dir=output_dir)
