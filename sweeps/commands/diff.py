"""`python -m sweeps diff RUN RUN`: what differs between two runs."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from experiments import json_files
from experiments.disk.output_dir import plan_folder
from experiments.disk.plans import read_sweeps
from experiments.disk.run_dir import RunDir
from experiments.disk.state import state_of
from experiments.environment import ROOT, frozen, git
from experiments.identity import arm_id, scientific
from experiments.metrics import columns
from relora_core.config import ConfigError, RunConfig, applies, walk
from sweeps import display, snapshot
from sweeps.commands import selection

HELP = "what two runs differ in: config, code, environment, results"
CODE = ("code_hash", "commit", "dirty", "tree_hash")
PER_ATTEMPT = ("pid", "started", "job_id", "start_step", "slurm.restarts")
"""Facts that differ between any two attempts."""
ABSENT = "-"
"""Value of a knob that does not apply."""
MOST_ROWS, MOST_NAMES = 16, 8
"""Rows of a section and file names that the table shows; --json has all of them."""

Facts = dict[str, Any]
Pairs = dict[str, tuple[Any, Any]]


@dataclass(kw_only=True, slots=True)
class Section:
    """The keys of one kind whose values differ, and the number of the others."""

    differ: Pairs
    equal: int


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs=2, metavar="RUN", help="name, arm or job, or part of a run_id")
    parser.add_argument("--json", action="store_true", help="every difference, for scripts")


def run(args: argparse.Namespace) -> int:
    one, two = (selection.one_run(args.output_dir, word).dir for word in args.run)
    sections = compare(one, two)
    files = changed_files(one, two, output_dir=args.output_dir)
    if args.json:
        json.dump(_as_json(one, two, sections, files=files), sys.stdout, indent=2, default=str)
        print()
    else:
        _show(one, two, sections, files=files)
    return 0


# comparing --------------------------------------------------------------------------------------
def compare(one: RunDir, two: RunDir) -> dict[str, Section]:
    """By section; `config` is what decides the numbers, `other config` how and where they come."""
    configs = _config(one), _config(two)
    identity = scientific(configs[0]).keys() | scientific(configs[1]).keys()
    values = [{key: value for key, _, value in walk(config)} for config in configs]
    science = [key for key in values[0] if key in identity and key != "seed"]
    attempts = [_newest_attempt(run) for run in (one, two)]
    facts = {key: v for key, v in _pairs(*attempts).items() if key not in PER_ATTEMPT}
    groups = {
        "config": _pairs(*map(_effects, configs), keys=science, absent=ABSENT),
        "seeds": _pairs(*values, keys=["seed"]),
        "other config": _pairs(*values, keys=[key for key in values[0] if key not in identity]),
        "code": {k: v for k, v in facts.items() if k in CODE},
        "environment": {k: v for k, v in facts.items() if k not in CODE},
        "results": _results(one, two),
    }
    return {name: _section(group) for name, group in groups.items()}


def _pairs(
    left: Facts, right: Facts, *, keys: Iterable[str] | None = None, absent: str | None = None
) -> Pairs:
    """Both values of each key, by default of all keys; `absent` for a missing one."""
    keys = (left | right) if keys is None else keys
    return {key: (left.get(key, absent), right.get(key, absent)) for key in keys}


def _section(pairs: Pairs) -> Section:
    differ = {key: (a, b) for key, (a, b) in pairs.items() if not _same(a, b)}
    return Section(differ=differ, equal=len(pairs) - len(differ))


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or a == b


def _config(run: RunDir) -> RunConfig:
    try:
        return run.config()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"RUN must have a config that this version reads, got {run.run_id} ({error})"
        ) from None


def _effects(config: RunConfig) -> Facts:
    """The values of its identity, also those left out of it because they mean "as before"."""
    before = {
        key: value
        for key, f, value in walk(config)
        if "as_before" in f.metadata and value == f.metadata["as_before"]
        if applies(f.metadata, config)
    }
    return scientific(config) | before


def _newest_attempt(run: RunDir) -> Facts:
    """Facts of the newest attempt, nested ones with dotted keys; empty before the first."""
    flat: Facts = {}
    for key, value in (run.attempt_records() or [{}])[-1].items():
        nested = isinstance(value, dict)
        flat |= {f"{key}.{k}": v for k, v in value.items()} if nested else {key: value}
    return flat


def _results(one: RunDir, two: RunDir) -> Pairs:
    """State and step, then the final metrics: the headline ones, evals, others."""
    a, b = state_of(one), state_of(two)
    left, right = ((run.result() or {}).get("metrics", {}) for run in (one, two))
    names = left.keys() | right.keys()
    main = [name for name in columns().values() if name in names]
    others = sorted(names, key=lambda name: (not name.startswith("eval/"), name))
    pairs: Pairs = {"state": (a.state, b.state), "step": (a.step, b.step)}
    return pairs | _pairs(left, right, keys=[*main, *others])


# code -------------------------------------------------------------------------------------------
def changed_files(one: RunDir, two: RunDir, *, output_dir: Path | str) -> list[str] | None:
    """Names of files that differ between the newest attempts' code; None: unknown."""
    facts = [_newest_attempt(run) for run in (one, two)]
    a, b = (_frozen_copy(fact, output_dir=output_dir) for fact in facts)
    if a and b:
        return snapshot.changed_files(a, b)
    before, after = (fact.get("commit") for fact in facts)
    left, right = (
        _patch(run, fact, output_dir=output_dir)
        for run, fact in zip((one, two), facts, strict=True)
    )
    if before is None or after is None or left is None or right is None:
        return None
    names = {n for n in left.keys() | right.keys() if left.get(n) != right.get(n)}
    if before != after:
        diff = ("diff", "--name-only", "-z", "--no-renames", "--relative")
        between = git(ROOT, *diff, before, after, "--")
        if between is None:
            return None
        names |= set(between.split("\0")) - {""}
    return sorted(names)


def _frozen_copy(facts: Facts, *, output_dir: Path | str) -> Path | None:
    copies = Path(output_dir).glob(f"sweeps/*/code/{facts.get('tree_hash')}")
    return next((path for path in sorted(copies) if frozen(path)), None)


def _patch(run: RunDir, facts: Facts, *, output_dir: Path | str) -> dict[str, str] | None:
    """File -> the patch from the commit to an attempt's code, as stored with a plan of the run.

    Empty if nothing was changed; None if no plan was made with the same code.
    """
    if facts.get("dirty") is False:
        return {}
    for name, sweep in read_sweeps(output_dir).items():
        folder = plan_folder(output_dir, name=name)
        try:
            code = json_files.read(folder / "code.json")
            text = (folder / "code.diff").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, json_files.Damaged):
            continue
        same_code = all(code.get(key) == facts.get(key) for key in ("commit", "code_hash"))
        if same_code and any(run.run_id == planned.run_id for planned in sweep.runs):
            return split_patch(text)
    return None


def split_patch(patch: str) -> dict[str, str]:
    """File -> its part of a git patch."""
    parts = re.split(r"^diff --git a/", patch, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].split(" b/")[-1].strip('"'): part for part in parts}


# showing ----------------------------------------------------------------------------------------
def _as_json(
    one: RunDir, two: RunDir, sections: dict[str, Section], *, files: list[str] | None
) -> dict[str, Any]:
    content: dict[str, Any] = {
        name: {
            "differ": {k: [_finite(a), _finite(b)] for k, (a, b) in section.differ.items()},
            "equal": section.equal,
        }
        for name, section in sections.items()
    }
    content["code"]["files"] = files
    deltas = {k: _delta(*v) for k, v in sections["results"].differ.items()}
    content["results"]["difference"] = {k: d for k, d in deltas.items() if d is not None}
    return {"runs": [one.run_id, two.run_id], "same_arm": _same_arm(one, two), **content}


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _delta(a: Any, b: Any) -> float | None:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b))
    return b - a if numbers and math.isfinite(b - a) else None


def _same_arm(one: RunDir, two: RunDir) -> bool:
    return arm_id(_config(one)) == arm_id(_config(two))


def _show(
    one: RunDir, two: RunDir, sections: dict[str, Section], *, files: list[str] | None
) -> None:
    console = display.make_console()
    line = partial(console.print, markup=False, highlight=False)
    for sign, run_dir in (("A", one), ("B", two)):
        line(f"{sign}  {run_dir.run_id}", soft_wrap=True)
    table = Table(box=None, header_style="bold")
    for name in ("", "A", "B"):
        table.add_column(name, overflow="fold")
    table.add_column("B - A", justify="right")
    shown = [name for name, section in sections.items() if section.differ]
    for name in shown:
        table.add_row(f"[bold]{name}[/]", f"[dim]{sections[name].equal} equal[/]")
        for cells in _rows(name, sections[name]):
            table.add_row(*(escape(cell) for cell in cells))
    if shown:
        console.print(table)
    if files != []:
        line(f"files that differ: {_file_names(files)}")
    if equal := [f"{name} ({s.equal})" for name, s in sections.items() if name not in shown]:
        line(f"equal: {', '.join(equal)}")
    if _same_arm(one, two):
        console.print("one arm" + ("" if one.run_id == two.run_id else ", two seeds"))


def _rows(name: str, section: Section) -> list[tuple[str, ...]]:
    """A row for each difference; knobs and metrics that only one run has are counted by group."""
    counted: Counter[tuple[str, bool]] = Counter()
    rows: list[tuple[str, ...]] = []
    for key, (a, b) in section.differ.items():
        if group := _one_sided(name, key, a, b):
            counted[group, a == (ABSENT if name == "config" else None)] += 1
            continue
        delta = _delta(a, b) if name == "results" else None
        rows.append((f"  {key}", _cell(a), _cell(b), "" if delta is None else f"{delta:+.4g}"))
    if len(rows) > MOST_ROWS:
        rows[MOST_ROWS:] = [(f"  ... and {len(rows) - MOST_ROWS} more (--json)", "", "", "")]
    for (group, in_b), number in counted.items():
        count = f"{number} here alone"
        rows.append((f"  {group}", *((ABSENT, count) if in_b else (count, ABSENT)), ""))
    return rows


def _one_sided(name: str, key: str, a: Any, b: Any) -> str | None:
    """The group of a knob or metric that only one run has; None if both have it."""
    if name == "config" and ABSENT in (a, b) and "." in key:
        return key.rsplit(".", 1)[0] + ".*"
    if name == "results" and None in (a, b) and key not in columns().values():
        return key.split("/")[0] + "/*"
    return None


def _cell(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _file_names(files: list[str] | None) -> str:
    if files is None:
        return "unknown: no frozen copy or patch of both"
    more = len(files) - MOST_NAMES
    return ", ".join(files[:MOST_NAMES]) + (f" and {more} more (--json)" if more > 0 else "")
