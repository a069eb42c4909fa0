"""The runs that an argument names: by a name that `status` shows, or by (part of) an id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from experiments.disk.output_dir import all_runs, run_at
from experiments.disk.plans import read_sweeps
from experiments.disk.run_dir import RunDir
from relora_core.config import ConfigError, nearest

JOB_ID = re.compile(r"\d+(_\d+)?")
"""The id of a job, of one task of an array, or of a whole array."""


def find_run(output_dir: Path | str, *, word: str) -> RunDir:
    """The one run that `word` names; ConfigError if it names none or several.

    Tried in this order: a full id; a name, arm, job or sweep that `status` shows; the start of an
    id; any part of an id.
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
    """The error if `word` names several runs."""
    some = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
    return ConfigError(f"RUN must name one run, got {word!r} that {len(ids)} match: {some}")


def named(output_dir: Path | str, word: str) -> list[str]:
    """Ids of the runs with exactly this name, else of this arm, else of this job."""
    planned = [run for sweep in read_sweeps(output_dir).values() for run in sweep.runs]
    hits = [run for run in planned if word == run.name]
    hits = hits or [run for run in planned if word in (run.arm, run.arm_id)]
    if len({run.arm_id for run in hits}) > 1:
        places = ", ".join(f"{run.run_id} of {run.sweep}" for run in hits[:4])
        raise ConfigError(f"{word!r} names different runs ({places}): give their ids")
    if not hits and JOB_ID.fullmatch(word):
        jobs = {run.run_id: run.status().job_id or "" for run in all_runs(output_dir)}
        return [id_ for id_, job in jobs.items() if word in (job, job.partition("_")[0])]
    return list(dict.fromkeys(run.run_id for run in hits))


def _of_sweep(output_dir: Path | str, word: str) -> list[str]:
    sweeps = read_sweeps(output_dir, [word])
    return [run.run_id for sweep in sweeps.values() for run in sweep.runs]
