"""search.learn_from: what a new study learns from finished runs of earlier sweeps.

A point of the space is learnt if the search would compute what an earlier run has, at each of its
seeds (`identity.essential`). It becomes one of the study's first trials, which is complete, is not
counted and is never run. study.json has these trials, so that they are learnt once. Not for: a
search that draws the point of an earlier run (any sweep uses a run that is there).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from experiments.disk.output_dir import plan_folder, run_at
from experiments.disk.plans import sweep_names
from experiments.disk.run_dir import RunDir
from experiments.identity import essential
from relora_core.config import ConfigError, RunConfig, get, nearest
from sweeps.planning.plan import load
from sweeps.search import growth, samplers
from sweeps.search.config import SearchConfig, constraints_of
from sweeps.search.objective import (
    Verdict,
    as_objective,
    curve,
    judge,
    run_value,
    seed_value,
)
from sweeps.search.space import base_key
from sweeps.search.trial import config_at, fill

if TYPE_CHECKING:
    from sweeps.search.spec import Spec

LEARNING = ("tpe", "gp")
"""Samplers that use all trials; others use their own generations, or none."""


@dataclass(kw_only=True, slots=True)
class Match:
    """A run of an earlier sweep, compared with the search."""

    source: str
    run: RunDir
    config: RunConfig | None = None
    """None if the run has not ended."""
    params: dict[str, Any] | None = None
    """Its point, if the search might have run it."""
    differing: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Key that is not searched -> value in the run, value in the search."""
    outside: list[str] = field(default_factory=list)
    """Searched keys with values outside the space; empty unless `differing` is."""
    reason: str = ""
    """Why it is not learnt, worded to follow a number of runs: `differ in train.steps`."""


def learn(spec: Spec, *, output_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of what is learnt, and a line for each sweep: how many runs, and why not the others.

    ConfigError if a name is no sweep, or if no run can be learnt from.
    """
    matches = [
        one
        for name in spec.config.learn_from
        for one in _matches(spec, name=name, output_dir=output_dir)
    ]
    records = _records(spec, matches)
    _name_differences(matches)
    if matches and not records:
        raise ConfigError(_nothing_learnt(spec, matches))
    lines = [
        _line(name, [one for one in matches if one.source == name])
        for name in spec.config.learn_from
    ]
    name = spec.config.sampler["name"]
    if records and name not in LEARNING:
        others = " and ".join(LEARNING)
        lines.append(
            f"search.sampler={name} does not look at what was learnt ({others} do): it counts for "
            "the best, and is not run again"
        )
    return records, lines


# which runs -------------------------------------------------------------------------------------
def _matches(spec: Spec, *, name: str, output_dir: Path) -> list[Match]:
    names = sweep_names(output_dir)
    if name not in names:
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ConfigError(
            f"search.learn_from must be sweeps in {output_dir} ({some or 'none yet'}), got "
            f"{name!r}.{nearest(name, names)}"
        )
    cells = load(plan_folder(output_dir, name=name) / "plan.json").cells
    if not cells:
        raise ConfigError(
            f"search.learn_from must be sweeps with runs, got {name!r}, which has none"
        )
    return [_match(spec, run_at(output_dir, cell.run_id), source=name) for cell in cells]


def _match(spec: Spec, run: RunDir, *, source: str) -> Match:
    if run.ended() is None:
        return Match(source=source, run=run, reason="have not finished")
    config = run.config()
    matches = (
        _compare(spec, choices, config, Match(source=source, run=run, config=config))
        for choices in growth.combinations(spec)
    )
    return min(matches, key=lambda match: len(match.differing))


def _compare(spec: Spec, choices: Mapping[str, Any], config: RunConfig, match: Match) -> Match:
    """Compare with the point that has these options of groups and the run's values; the match."""
    outside: list[str] = []

    def take(key: str, _: RunConfig) -> Any:
        if key in spec.groups:
            return choices[key]
        own = get(config, key)
        if key == "relora.scale" and own is None and config.relora.r:
            own = config.relora.alpha / config.relora.r
        if spec.space[key].contains(own):
            return spec.own(key, own)
        outside.append(key)
        return own

    try:
        params = fill(spec, take)
        ours = config_at(spec, params, seed=config.seed)
    except ConfigError:  # values that cannot be set in the search's own config
        ours, params = spec.bases[base_key(choices)], {}
    match.differing = _differing(config, ours)
    if not match.differing:
        if outside:
            match.outside = outside
        elif config.seed not in spec.config.seeds:
            match.reason = "are of other seeds"
        else:
            match.params = params
    return match


def _differing(run: RunConfig, ours: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Key -> both values, of what changes the numbers but for the seed.

    Without keys that only follow from another one (schedule.total_steps from train.steps).
    """
    one, two = essential(run), essential(ours)
    keys = [k for k in dict.fromkeys([*two, *one]) if one.get(k) != two.get(k) and k != "seed"]
    values = {key: (get(run, key), get(ours, key)) for key in keys}
    given = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    return given or values


def _name_differences(matches: Sequence[Match]) -> None:
    """Give runs that differ, or lie outside, a reason: of their keys the most frequent one."""
    often = Counter(key for one in matches for key in (*one.differing, *one.outside))
    for one in matches:
        if one.differing:
            one.reason = f"differ in {max(one.differing, key=often.__getitem__)}"
        elif one.outside:
            key = max(one.outside, key=often.__getitem__)
            one.reason = f"lie outside the space of {key}"


# what is learnt ---------------------------------------------------------------------------------
def _records(spec: Spec, matches: Sequence[Match]) -> list[dict[str, Any]]:
    """A record for each point that has all seeds of the search; other runs get their `reason`."""
    points: dict[str, dict[int, Match]] = {}
    for one in matches:
        if one.params is None or one.config is None:
            continue
        seeds = points.setdefault(repr(sorted(one.params.items())), {})
        if one.config.seed in seeds:
            one.reason = "are there already"
        seeds.setdefault(one.config.seed, one)
    records = []
    for seeds in points.values():
        missing = [str(seed) for seed in spec.config.seeds if seed not in seeds]
        of_point = [seeds[seed] for seed in spec.config.seeds if seed in seeds]
        if missing:
            _refuse(of_point, f"lack a run at seed {' '.join(missing)}")
            continue
        verdict = judge(spec.config, [one.run for one in of_point])
        if verdict.values is None:
            _refuse(of_point, f"lack {_lacking(spec.config, of_point)}")
            continue
        records.append(_record(spec.config, of_point, verdict))
    return records


def _refuse(matches: Sequence[Match], reason: str) -> None:
    for one in matches:
        one.reason = reason


def _lacking(search: SearchConfig, matches: Sequence[Match]) -> str:
    """The first metric of the search that one of the runs lacks."""
    goals = [*search.objectives, *map(as_objective, constraints_of(search))]
    return next(
        goal.metric for one in matches for goal in goals if run_value(goal, one.run) is None
    )


def _record(search: SearchConfig, matches: Sequence[Match], verdict: Verdict) -> dict[str, Any]:
    return {
        "sweep": matches[0].source,
        "params": matches[0].params,
        "values": verdict.values,
        "by_seed": verdict.by_seed,
        "constraints": verdict.constraints,
        "curve": _reports(search, matches),
        "run_ids": [one.run.run_id for one in matches],
        "ended": max(one.run.result_path.stat().st_mtime for one in matches),
    }


def _reports(search: SearchConfig, matches: Sequence[Match]) -> dict[str, float]:
    """What pruners would have got of the trial (`process.SearchSink`)."""
    if len(search.objectives) > 1:
        return {}
    if search.pruner["name"] == "wilcoxon":
        ends = [seed_value(search, one.run) for one in matches]
        return {str(index): end for index, end in enumerate(ends) if end is not None}
    first, metric = matches[0], search.prune_metric
    assert first.config is not None
    assert metric is not None  # normalise has set it
    points = curve(metric, first.run.events(), steps=first.config.train.steps)
    return {str(step): number for step, number in points.items()}


def to_trial(number: int, spec: Spec) -> FrozenTrial:
    """The record of this number as a trial."""
    record = spec.learnt[number]
    ended = datetime.fromtimestamp(record["ended"])
    trial = FrozenTrial(
        number=number,
        trial_id=number,
        state=TrialState.COMPLETE,
        value=None,
        values=record["values"],
        datetime_start=ended,
        datetime_complete=ended,
        params={key: spec.stored(key, value) for key, value in record["params"].items()},
        distributions={key: samplers.distribution(spec.space[key]) for key in record["params"]},
        user_attrs={
            "learnt": record["sweep"],
            "counted": False,
            **{key: record[key] for key in ("params", "run_ids", "by_seed")},
        },
        system_attrs={},
        intermediate_values={int(step): value for step, value in record["curve"].items()},
    )
    for text, excess in record["constraints"].items():
        trial.set_constraint(text, excess)
    return trial


# messages ---------------------------------------------------------------------------------------
def _line(name: str, matches: Sequence[Match]) -> str:
    taken = [one for one in matches if not one.reason]
    points = len({repr(one.params) for one in taken})
    trials = f" ({points} trial{'s' * (points > 1)})" if 0 < points < len(taken) else ""
    reasons = _reasons(matches)
    return f"learnt from {len(taken)} of {len(matches)} runs of {name}{trials}" + (
        f": {reasons}" if reasons else ""
    )


def _reasons(matches: Sequence[Match]) -> str:
    """`6 differ in train.steps, 1 lies outside the space of train.lr`."""
    counted = Counter(one.reason for one in matches if one.reason)
    return ", ".join(
        f"{n} {reason if n > 1 else _of_one(reason)}" for reason, n in counted.most_common()
    )


def _of_one(reason: str) -> str:
    verb, rest = reason.split(" ", 1)
    return f"{ {'have': 'has', 'are': 'is'}.get(verb, f'{verb}s') } {rest}"


def _nothing_learnt(spec: Spec, matches: Sequence[Match]) -> str:
    """The error if nothing is learnt; it names the key in which most runs differ."""
    often = Counter(key for one in matches for key in one.differing)
    hint = ""
    if often:
        key = often.most_common(1)[0][0]
        there, here = next(one.differing[key] for one in matches if key in one.differing)
        hint = f" ({key}: {there} there, {here} here)"
    sweeps = ", ".join(spec.config.learn_from)
    return (
        "search.learn_from must be sweeps with finished runs that differ from this search's in "
        f"what it searches alone, got {sweeps}: of {len(matches)} runs {_reasons(matches)}{hint}"
    )
