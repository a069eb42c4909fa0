"""Settings that a sweep takes from a search: what they are, where they came from, what to note.

Not for: reading a search (`sweeps/search/tuned.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.identity import essential
from relora_core.config import RunConfig, get
from relora_core.sources import code_hash, comparable

MOST = 3
"""Settings that a note lists."""
MEASURING = ("eval.", "dynamics.")
"""Beginnings of keys that do not change what is trained."""


@dataclass(kw_only=True, slots=True)
class Tuned:
    """What one arm takes."""

    search: str
    arm: str
    """Of the search."""
    trial: int
    """Its best there ..."""
    trials: int
    """... of so many."""
    values: dict[str, Any]
    """Key or group -> value: those that the command line does not set itself."""
    metric: str
    value: float
    """Of the metric, the mean over the seeds."""
    seeds: list[int]
    """That the search ran."""
    edges: list[str] = field(default_factory=list)
    """Where the best lies at an end of what was tried, in words."""
    searched: list[str]
    """All keys that the search tuned."""
    config: RunConfig
    """What the best trial ran."""
    borrowed: bool = False
    """Whether the sweep's arm has another name, and so other settings."""
    codes: list[str] = field(default_factory=list)
    """code_hash of what the search ran, each once."""

    def record(self) -> dict[str, Any]:
        """What plan.json keeps."""
        keys = ("search", "arm", "trial", "trials", "values", "metric", "value", "seeds", "edges")
        return {key: getattr(self, key) for key in keys}


def lines(tuned: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Each arm's settings and their source, of the records of a plan."""
    for arm, one in tuned.items():
        values = "  ".join(f"{key}={_text(value)}" for key, value in one["values"].items())
        source = one["search"] if one["arm"] == arm else f"{one['search']}, arm {one['arm']}"
        seeds = f"{len(one['seeds'])} seed" + "s" * (len(one["seeds"]) != 1)
        yield (
            f"{arm}: {values or 'nothing: all is set otherwise'} (trial {one['trial']} of "
            f"{one['trials']} in {source}, {one['metric']} {one['value']:.5g}, {seeds})"
        )


def notes(tuned: Mapping[str, Tuned], configs: Sequence[RunConfig]) -> list[str]:
    """Lines on a sweep that takes settings: from where, seeds that are not fresh, what differs."""
    if not tuned:
        return []
    names = ", ".join(dict.fromkeys(one.search for one in tuned.values()))
    s = "s" * (len(tuned) > 1)
    made = [f"settings of {len(tuned)} arm{s} are the best of search {names}: plan.json has them"]
    used = {seed for one in tuned.values() for seed in one.seeds}
    if stale := sorted(used & {config.seed for config in configs}):
        fresh = max(used) + 1
        made.append(
            f"seeds that have already chosen these settings in {names}: "
            f"{' '.join(map(str, stale))}; a "
            f"fair comparison has fresh ones, like 'seed=range({fresh},{fresh + 3})'"
        )
    if edges := [arm for arm, one in tuned.items() if one.edges]:
        made.append(f"the best lies at an edge of what {names} tried for {', '.join(edges)}")
    ran = [code for one in tuned.values() for code in one.codes]
    codes = [*ran, code_hash()] if ran else []
    made += different_code(codes, what=f"trials of {names} and this sweep")
    return [*made, *_differences(tuned, configs)]


def different_code(codes: Sequence[str], *, what: str) -> list[str]:
    """A note if these hashes of relora_core are not one; `what` ran the code."""
    if len({*codes}) < 2:
        return []
    ran = "ran" if all(comparable(one, codes[0]) for one in codes) else "may have run"
    return [f"{what} {ran} different code of relora_core: which is best may be the code's doing"]


def _differences(tuned: Mapping[str, Tuned], configs: Sequence[RunConfig]) -> Iterator[str]:
    """A line on other settings at which the search found its best."""
    apart: dict[str, tuple[Any, Any]] = {}
    for config in configs:
        one = tuned.get(config.sweep.arm or "")
        if one is None or one.borrowed:
            continue
        there, here = essential(one.config), essential(config)
        for key in there.keys() & here.keys():
            measuring = key.startswith(MEASURING)
            if there[key] == here[key] or key in (*one.searched, "seed") or measuring:
                continue
            shown = key.replace("fingerprint", "path")
            values = get(one.config, shown), get(config, shown)
            if shown == key and values[0] == values[1]:
                continue  # it follows from another key, as first_restart from reset_frequency
            apart.setdefault(shown, values)
    if apart:
        first = sorted(apart, key=lambda key: (not key.startswith(("train.", "model.")), key))
        some = ", ".join(f"{key}={_text(apart[key][0])} (here {_text(apart[key][1])})"
                         for key in first[:MOST])  # fmt: skip
        more = f" and {len(apart) - MOST} more" if len(apart) > MOST else ""
        yield f"the settings were chosen at {some}{more}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
