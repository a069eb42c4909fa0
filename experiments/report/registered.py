"""Comparisons that a file names, for a study before its runs, and their table in a report.

    comparisons:
      - {arm: corrected, reference: lora, metric: eval/paloma/perplexity, question: do restarts pay}
      - {arm: corrected, reference: lora, metric: eval/blimp/no_bos/accuracy, paradigms: mastered}
    paradigms:
      mastered: [passive_1, irregular_past_participle_verbs]

Holm's adjustment is over all of them, whatever their metrics. Not for: comparing every arm with a
reference (`comparisons.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.metrics import headline
from experiments.report import blimp
from experiments.report.comparisons import (
    Pair,
    compare_values,
    comparison_cells,
    comparison_row,
    find_arm,
)
from experiments.report.data import Arm, Sweep
from experiments.report.document import Block, Table, joined, plural
from experiments.stats import Comparison, holm
from relora_core.config import ConfigError, nearest
from relora_core.evals.blimp import ACCURACY, ACCURACY_EOS
from relora_core.events import Metric

OPTION = "--comparisons"
NEEDED = ("arm", "reference", "metric")
OPTIONAL = ("paradigms", "question")
VARIANTS = {ACCURACY.key: "no_bos", ACCURACY_EOS.key: "eos_prefix"}
"""BLiMP's metrics -> the column of a run's table of paradigms."""


@dataclass(kw_only=True, slots=True)
class Registered:
    """One comparison: arm minus reference, of perplexities the ratio."""

    arm: str
    reference: str
    metric: Metric
    group: str = ""
    """Name of the set of paradigms over which BLiMP's accuracy is averaged; empty: all of them."""
    paradigms: list[str] = field(default_factory=list)
    question: str = ""

    @property
    def metric_title(self) -> str:
        return f"{self.metric.title}, {self.group}" if self.group else self.metric.title


def read(path: Path) -> list[Registered]:
    """The comparisons of a file, in its order; ConfigError that names line and key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{OPTION} must be a YAML file, got {path}: {line}") from error
    if not isinstance(content, dict) or not isinstance(content.get("comparisons"), list):
        raise ConfigError(f"{OPTION} must have a list called comparisons, which {path} has not")
    _check_keys(content, ("comparisons",), ("paradigms",), where=str(path))
    groups = content.get("paradigms") or {}
    if not isinstance(groups, dict) or not all(_are_names(names) for names in groups.values()):
        raise ConfigError(f"paradigms in {path} must be names, each with a list of paradigms")
    return [
        _parse(line, groups, where=f"comparison {number} of {path}")
        for number, line in enumerate(content["comparisons"], 1)
    ]


def _parse(line: Any, groups: Mapping[str, list[str]], *, where: str) -> Registered:
    if not isinstance(line, dict):
        raise ConfigError(f"{where} must have the keys {joined(NEEDED)}, got {line!r}")
    _check_keys(line, NEEDED, OPTIONAL, where=where)
    line = {key: str(value) for key, value in line.items()}
    metrics = {metric.key: metric for metric in headline()}
    if (key := line["metric"]) not in metrics:
        raise ConfigError(
            f"metric of {where} must be one of {joined(list(metrics))}, got {key!r}."
            f"{nearest(key, list(metrics))}"
        )
    group = line.get("paradigms", "")
    if group and key not in VARIANTS:
        raise ConfigError(f"paradigms of {where} need a metric of BLiMP, got metric {key!r}")
    if group and group not in groups:
        names = list(groups)
        raise ConfigError(
            f"paradigms of {where} must name a list of the file's paradigms "
            f"({joined(names) or 'it has none'}), got {group!r}.{nearest(group, names)}"
        )
    return Registered(
        arm=line["arm"],
        reference=line["reference"],
        metric=metrics[key],
        group=group,
        paradigms=list(groups.get(group, [])),
        question=line.get("question", ""),
    )


def _check_keys(
    line: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str], *, where: str
) -> None:
    for key in line:
        if key not in (allowed := (*needed, *optional)):
            raise ConfigError(
                f"keys of {where} must be among {joined(allowed)}, got {key!r}."
                f"{nearest(str(key), allowed)}"
            )
    if missing := [key for key in needed if key not in line]:
        raise ConfigError(f"{where} must have {joined(missing)}, too")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


# of a sweep -------------------------------------------------------------------------------------
def arms_of(sweep: Sweep, comparisons: Sequence[Registered]) -> list[Pair]:
    """The arms of each comparison; ConfigError for one that the sweep does not have."""
    return [
        (_arm(sweep, one.arm, key="arm"), _arm(sweep, one.reference, key="reference"))
        for one in comparisons
    ]


def _arm(sweep: Sweep, name: str, *, key: str) -> Arm:
    # The table shows the file's name: `lora` must not stand for `relora`.
    arm = find_arm(sweep, name, option=f"{key} in {OPTION}", whole=True)
    assert arm is not None  # it has a name
    return arm


def compare_all(sweep: Sweep, comparisons: Sequence[Registered]) -> list[Comparison]:
    """A test of each comparison, adjusted by Holm over all of them.

    Also over those that cannot be tested, as where runs diverged or must not be compared: the
    family was named before.
    """
    for one in comparisons:
        _check_paradigms(sweep, one)
    outcomes = [
        compare_values(_values(pair[0], one), _values(pair[1], one), pair, one.metric)
        for one, pair in zip(comparisons, arms_of(sweep, comparisons), strict=True)
    ]
    family = holm([1.0 if outcome.p is None else outcome.p for outcome in outcomes])
    for outcome, p in zip(outcomes, family, strict=True):
        outcome.p_holm = None if outcome.p is None else p
    return outcomes


def _check_paradigms(sweep: Sweep, one: Registered) -> None:
    """ConfigError for a paradigm that no run has, where some run has paradigms."""
    if not one.paradigms:
        return
    runs = [
        run for arm in sweep.arms for run in blimp.paradigms(arm, VARIANTS[one.metric.key]).values()
    ]
    known = sorted(set().union(*runs))
    for name in one.paradigms if known else ():
        if name not in known:
            raise ConfigError(
                f"paradigms in {OPTION} must be names of paradigms that runs were scored on, got "
                f"{name!r} in {one.group}.{nearest(name, known)}"
            )


def _values(arm: Arm, one: Registered) -> dict[int, float]:
    """Seed -> value, nan of a diverged run; one that lacks one of the paradigms has none."""
    if not one.group:
        return arm.values(one.metric.key)
    values: dict[int, float] = {}
    for seed, accuracies in blimp.paradigms(arm, VARIANTS[one.metric.key]).items():
        if accuracies.keys() >= set(one.paradigms):
            values[seed] = statistics.fmean(accuracies[name] for name in one.paradigms)
    return arm.with_lost(values)


def section(sweep: Sweep, comparisons: Sequence[Registered]) -> list[Block]:
    """A table of the comparisons, in the file's order; empty without any."""
    if not comparisons:
        return []
    outcomes = compare_all(sweep, comparisons)
    rows, data = [], []
    for one, c in zip(comparisons, outcomes, strict=True):
        what = [one.question, one.arm, one.reference, one.metric_title]
        rows.append([*what, *comparison_cells(one.metric, c)])
        data.append(
            {"question": one.question, "arm": one.arm, "reference": one.reference}
            | {"paradigms": " ".join(one.paradigms), **comparison_row(one.metric, c)}
        )
    untested = sum(c.p is None for c in outcomes)
    late = f" {plural(untested, 'comparison')} could not be tested." if untested else ""
    groups = {one.group: one.paradigms for one in comparisons if one.group}
    text = (
        f"{plural(len(comparisons), 'comparison')} that a file names. Arm minus reference; of "
        "perplexities the ratio, of BLiMP percentage points. p (Holm) is adjusted for all of "
        "them, whether or not they could be tested."
    )
    sets = "".join(f" {name}: {joined(list(names))}." for name, names in groups.items())
    table = Table(
        name="registered",
        title="Arm against reference",
        columns=[
            *("question", "arm", "reference", "metric", "seeds", "difference or ratio [95 %]"),
            *("p", "p (Holm)", "seeds needed", "note"),
        ],
        rows=rows,
        data=data,
    )
    return [text + late + sets, table]
