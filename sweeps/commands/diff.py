"""`python -m sweeps diff RUN RUN`: what two runs differ in, from their directories. Reads only."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from experiments import records
from experiments.environment import ROOT, frozen, git
from experiments.identity import arm_id, scientific
from experiments.run_dir import RunDir
from experiments.state import state_of
from relora_core.config import ConfigError, RunConfig, applies, walk
from sweeps import display, snapshot
from sweeps.commands import common
from sweeps.plan import plan_folder, stored_names

HELP = "what two runs differ in: config, code, environment, results"
CODE = ("code_hash", "commit", "dirty", "tree_hash")
OWN = ("pid", "started", "job_id", "start_step", "slurm.restarts")
"""Facts of an attempt that no two attempts share."""
ABSENT = "-"
MOST_ROWS, MOST_NAMES = 16, 8
"""Rows of a section and file names that the table shows; --json has all of them."""

Pairs = dict[str, tuple[Any, Any]]


@dataclass(kw_only=True, slots=True)
class Section:
    """The keys of one kind whose values differ, and how many do not."""

    differ: Pairs
    equal: int


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs=2, metavar="RUN", help="run_id, or any part that only it has")
    parser.add_argument("--json", action="store_true", help="every difference, for scripts")


def run(args: argparse.Namespace) -> int:
    one, two = (common.one_run(args.output_dir, word).dir for word in args.run)
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
    """`config` (what is computed), `seeds`, `other` (how and where), `code`, ... -> differences."""
    pairs = _config_pairs(_config(one), _config(two))
    left, right = (_newest_attempt(run) for run in (one, two))
    facts = {key: (left.get(key), right.get(key)) for key in left | right if key not in OWN}
    groups = {
        "config": {k: v for k, (science, *v) in pairs.items() if science and k != "seed"},
        "seeds": {"seed": pairs["seed"][1:]},
        "other config": {k: v for k, (science, *v) in pairs.items() if not science},
        "code": {k: v for k, v in facts.items() if k in CODE},
        "environment": {k: v for k, v in facts.items() if k not in CODE},
        "results": _results(one, two),
    }
    return {name: _section(group) for name, group in groups.items()}


def _section(pairs: Mapping[str, Any]) -> Section:
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


def _config_pairs(one: RunConfig, two: RunConfig) -> dict[str, tuple[bool, Any, Any]]:
    """Key -> (whether it is part of either's identity, value, value); ABSENT: without effect."""
    chosen, values = (scientific(one), scientific(two)), [{}, {}]
    for i, config in enumerate((one, two)):
        for key, f, value in walk(config):
            before = "as_before" in f.metadata and value == f.metadata["as_before"]
            counts = key in chosen[i] or (before and applies(f.metadata, config))
            values[i][key] = value if counts else ABSENT
    pairs = {}
    for (key, _, a), (_, _, b) in zip(walk(one), walk(two), strict=True):
        science = key in chosen[0] or key in chosen[1]
        pairs[key] = (True, values[0][key], values[1][key]) if science else (False, a, b)
    return pairs


def _newest_attempt(run: RunDir) -> dict[str, Any]:
    """What the newest attempt said, nested facts with dotted keys; empty before the first."""
    flat: dict[str, Any] = {}
    for key, value in (run.attempt_records() or [{}])[-1].items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{k}": v for k, v in inner.items()} or ({} if value == {} else {key: value})
    return flat


def _results(one: RunDir, two: RunDir) -> Pairs:
    """State and step, then the final metrics: those people look at first, evals, others."""
    states = [state_of(run) for run in (one, two)]
    metrics = [(run.result() or {}).get("metrics", {}) for run in (one, two)]
    names = metrics[0].keys() | metrics[1].keys()
    first = [name for name in display.METRICS.values() if name in names]
    others = sorted(names, key=lambda name: (not name.startswith("eval/"), name))
    pairs: Pairs = {k: (getattr(states[0], k), getattr(states[1], k)) for k in ("state", "step")}
    for name in dict.fromkeys([*first, *others]):
        pairs[name] = (metrics[0].get(name), metrics[1].get(name))
    return pairs


# code -------------------------------------------------------------------------------------------
@dataclass(kw_only=True, slots=True)
class Source:
    """The code of an attempt as far as it is at hand: a frozen copy, or a commit and a patch."""

    copy: Path | None
    commit: str | None
    patch: dict[str, str] | None
    """File -> its part of the patch; None: unknown."""


def changed_files(one: RunDir, two: RunDir, *, output_dir: Path | str) -> list[str] | None:
    """Names of the files that the newest attempts' code differs in; None where that is unknown."""
    a, b = (_source(run, output_dir=output_dir) for run in (one, two))
    if a.copy and b.copy:
        return snapshot.changed_files(a.copy, b.copy)
    if a.commit is None or b.commit is None or a.patch is None or b.patch is None:
        return None
    names = {n for n in a.patch.keys() | b.patch.keys() if a.patch.get(n) != b.patch.get(n)}
    if a.commit != b.commit:
        form = ("diff", "--name-only", "-z", "--no-renames", "--relative")
        between = git(ROOT, *form, a.commit, b.commit, "--")
        if between is None:
            return None
        names |= set(between.split("\0")) - {""}
    return sorted(names)


def _source(run: RunDir, *, output_dir: Path | str) -> Source:
    facts = _newest_attempt(run)
    copies = Path(output_dir).glob(f"sweeps/*/code/{facts.get('tree_hash')}")
    copy = next((path for path in sorted(copies) if frozen(path)), None)
    commit = facts.get("commit")
    patch = {} if facts.get("dirty") is False else _patch(run, facts, output_dir=output_dir)
    return Source(copy=copy, commit=commit, patch=patch)


def _patch(run: RunDir, facts: dict[str, Any], *, output_dir: Path | str) -> dict[str, str] | None:
    """The patch beside a plan of this run, if it was taken from the same code."""
    for name, runs in stored_names(output_dir).items():
        folder = plan_folder(output_dir, name=name)
        try:
            code = records.read(folder / "code.json")
            text = (folder / "code.diff").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, records.Damaged):
            continue
        alike = all(code.get(key) == facts.get(key) for key in ("commit", "code_hash"))
        if run.run_id in runs and alike:
            return by_file(text)
    return None


def by_file(patch: str) -> dict[str, str]:
    """File -> its part of a git patch."""
    parts = re.split(r"^diff --git a/", patch, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].split(" b/")[-1].strip('"'): part for part in parts}


# showing ----------------------------------------------------------------------------------------
def _as_json(
    one: RunDir, two: RunDir, sections: dict[str, Section], *, files: list[str] | None
) -> dict[str, Any]:
    told: dict[str, Any] = {
        name: {
            "differ": {k: [_finite(a), _finite(b)] for k, (a, b) in section.differ.items()},
            "equal": section.equal,
        }
        for name, section in sections.items()
    }
    told["code"]["files"] = files
    deltas = {k: _delta(*v) for k, v in sections["results"].differ.items()}
    told["results"]["difference"] = {k: d for k, d in deltas.items() if d is not None}
    return {"runs": [one.run_id, two.run_id], "same_arm": _same_arm(one, two), **told}


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
    for sign, run_dir in (("A", one), ("B", two)):
        console.print(f"{sign}  {run_dir.run_id}", markup=False, highlight=False, soft_wrap=True)
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
        console.print(f"files that differ: {_file_names(files)}", markup=False, highlight=False)
    if alike := [f"{name} ({s.equal})" for name, s in sections.items() if name not in shown]:
        console.print(f"equal: {', '.join(alike)}", markup=False, highlight=False)
    if _same_arm(one, two):
        console.print("one arm" + ("" if one.run_id == two.run_id else ", two seeds"))


def _rows(name: str, section: Section) -> list[tuple[str, ...]]:
    """A row for each difference; what only one run has is counted by group, not listed."""
    counted: dict[tuple[str, bool], int] = {}
    rows: list[tuple[str, ...]] = []
    for key, (a, b) in section.differ.items():
        if group := _one_sided(name, key, a, b):
            side = (group, a == (ABSENT if name == "config" else None))
            counted[side] = counted.get(side, 0) + 1
            continue
        delta = _delta(a, b) if name == "results" else None
        rows.append((f"  {key}", _cell(a), _cell(b), "" if delta is None else f"{delta:+.4g}"))
    if len(rows) > MOST_ROWS:
        rows[MOST_ROWS:] = [(f"  ... and {len(rows) - MOST_ROWS} more (--json)", "", "", "")]
    for (group, in_b), number in counted.items():
        told = f"{number} here alone"
        rows.append((f"  {group}", *((ABSENT, told) if in_b else (told, ABSENT)), ""))
    return rows


def _one_sided(name: str, key: str, a: Any, b: Any) -> str | None:
    """The group of a knob or metric that only one of the runs has."""
    if name == "config" and ABSENT in (a, b) and "." in key:
        return key.rsplit(".", 1)[0] + ".*"
    if name == "results" and None in (a, b) and key not in display.METRICS.values():
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
