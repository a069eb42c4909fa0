"""Which runs a word names: what `python -m sweeps status` shows of them, or (part of) an id.

Not for: the state that a run is in (`state.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.disk.output_dir import all_runs, run_at
from experiments.disk.plans import read_plan
from experiments.disk.run_dir import RunDir
from experiments.identity import arm_name
from relora_core.config import ConfigError, nearest

JOB_ID = re.compile(r"\d+(_\d+)?")
"""Of a job, a task of an array, or all of an array."""


def find_run(output_dir: Path | str, *, word: str) -> RunDir:
    """The only run that `word` names; ConfigError where it is none or several.

    The whole id; the name, arm, job or sweep that `status` shows; the start of an id, or a part.
    """
    runs = {run.run_id: run for run in all_runs(output_dir)}
    if word in runs:
        return runs[word]
    hits = named(output_dir, word) or _of_sweep(output_dir, word)
    hits = hits or [id_ for id_ in runs if id_.startswith(word)]
    hits = hits or [id_ for id_ in runs if word in id_]
    if len(hits) == 1:
        return run_at(output_dir, hits[0])
    if hits:
        raise several(word, hits)
    hint = nearest(word, list(runs)) or f" `python -m sweeps status` lists all {len(runs)}."
    raise ConfigError(
        f"RUN must be the name, arm or job of a run, or (part of) its id, in {output_dir}, got "
        f"{word!r}.{hint}"
    )


def several(word: str, ids: Sequence[str]) -> ConfigError:
    """One line with the runs to choose from."""
    some = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
    return ConfigError(f"RUN must name one run, got {word!r} that {len(ids)} match: {some}")


def named(output_dir: Path | str, word: str) -> list[str]:
    """Ids of the runs that a word is the whole name of, or that are of that arm or job."""
    planned = list(_planned(output_dir))
    hits = [(sweep, cell) for sweep, cell in planned if word == cell["name"]]
    hits = hits or [
        (sweep, cell)
        for sweep, cell in planned
        if word in (arm_of(cell, sweep=sweep), cell["arm_id"])
    ]
    if len({cell["arm_id"] for _, cell in hits}) > 1:
        places = ", ".join(f"{cell['run_id']} of {sweep}" for sweep, cell in hits[:4])
        raise ConfigError(f"{word!r} names different runs ({places}): give their ids")
    if not hits and JOB_ID.fullmatch(word):
        jobs = {run.run_id: run.status().job_id or "" for run in all_runs(output_dir)}
        return [id_ for id_, job in jobs.items() if word in (job, job.partition("_")[0])]
    return list(dict.fromkeys(cell["run_id"] for _, cell in hits))


def arm_of(cell: Mapping[str, Any], *, sweep: str) -> str:
    """What a planned run's arm is called."""
    return arm_name(cell["name"]) or str(cell["config"].get("experiment", sweep))


def _planned(output_dir: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(sweep, cell) of every stored plan."""
    for path in sorted((Path(output_dir) / "sweeps").glob("*/plan.json")):
        for cell in read_plan(path)["cells"]:
            yield path.parent.name, cell


def _of_sweep(output_dir: Path | str, word: str) -> list[str]:
    return [cell["run_id"] for sweep, cell in _planned(output_dir) if sweep == word]
