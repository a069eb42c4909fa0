"""A report's BLiMP tables: phenomena, paradigms, tests."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from experiments.report.blimp_tests import BlimpTest, blimp_tests
from experiments.report.comparisons import Pair, between, names_of, p_value, title_end, unlike
from experiments.report.data import Arm, Sweep, fixed_side
from experiments.report.document import Block, Bullets, Table
from experiments.report.tables import mean_cell, mean_row, value_text
from relora_core.evals.blimp import ACCURACY

VARIANTS = ("no_bos", "eos_prefix")


def blimp(sweep: Sweep, pairs: Sequence[Pair]) -> list[Block]:
    """Accuracies by phenomenon, and every test of each pair with what it assumes."""
    blocks: list[Block] = [table for v in VARIANTS if (table := _phenomena(sweep, v))]
    assumed: dict[str, str] = {}
    tests = [table for v in VARIANTS if (table := _tests(pairs, v, assumed))]
    if tests:
        blocks.append(
            "Tests of overall accuracy (mean over paradigms) against the reference. They differ in "
            "what they take for an independent observation, and so in what their p means, which is "
            "two-sided unless it says otherwise, and not adjusted for the number of tests."
        )
        blocks += [*tests, Bullets([f"{name}: assumes {text}" for name, text in assumed.items()])]
    return blocks


def _phenomena(sweep: Sweep, variant: str) -> Table | None:
    prefix = f"eval/blimp/{variant}/"
    names = sorted(m for m in sweep.metrics() if m.startswith(prefix) and m != f"{prefix}accuracy")
    arms = [arm for arm in sweep.arms if arm.finished]
    if not names or not arms:
        return None
    rows, data = [], []
    for name in names:
        metric, cells = replace(ACCURACY, key=name), []
        text = partial(value_text, metric)
        for arm in arms:
            estimate = arm.estimate(metric)
            cells.append(mean_cell(estimate, text, expected=len(arm.finished)))
            data.append(mean_row(arm, metric, estimate) | {"phenomenon": name.removeprefix(prefix)})
        rows.append([name.removeprefix(prefix).replace("_", " "), *cells])
    return Table(
        name=f"blimp_{variant}_phenomena",
        title=f"Accuracy by phenomenon, {variant}, %",
        columns=["phenomenon", *(arm.name for arm in arms)],
        rows=rows,
        data=data,
        note="Mean over the phenomenon's paradigms [95 % interval over seeds]; chance is 50 %.",
        folded=variant != VARIANTS[0],
    )


def _tests(pairs: Sequence[Pair], variant: str, assumed: dict[str, str]) -> Table | None:
    against_what, one = title_end(pairs)
    heads = ["arm"] if one else ["arm", "reference"]
    rows, data = [], []
    for arm, reference in pairs:
        own, other = paradigms(arm, variant), paradigms(reference, variant)
        if not own or not other:
            continue
        names = names_of(arm, reference)
        shown = [names[head] for head in heads]
        if reason := unlike(arm, reference, ACCURACY):
            rows.append([*shown, *("-" * 5), reason])
            data.append(names | {"note": reason})
            continue
        fixed = fixed_side(arm, reference)
        for test in blimp_tests(own, other, pairs=_pairs_scored(arm), fixed=fixed):
            if test.p is not None or test.low is not None:  # else it assumes nothing
                assumed.setdefault(f"{test.name}, unit {test.unit}", test.assumes)
            rows.append(
                [
                    *shown,
                    *(_test_name(test), test.unit, f"{test.n:,}"),
                    between(ACCURACY, test.difference, test.low, test.high),
                    *(p_value(test.p), test.note),
                ]
            )
            data.append(names | asdict(test))
    if not rows:
        return None
    return Table(
        name=f"blimp_{variant}_tests",
        title=f"Tests of {variant}, difference{against_what}",
        columns=[
            *(*heads, "test", "unit", "units", "difference [95 %], points"),
            *("p", "note"),
        ],
        rows=rows,
        data=data,
        folded=variant != VARIANTS[0],
    )


def _test_name(test: BlimpTest) -> str:
    return f"{test.name}, one-sided: {test.side}" if test.side != "two-sided" else test.name


def paradigms(arm: Arm, variant: str) -> dict[int, dict[str, float]]:
    """Seed -> paradigm -> accuracy of the finished runs that have the table."""
    by_seed = {}
    for run in arm.finished:
        rows = run.tables.get("blimp_paradigms", [])
        if accuracies := {row["uid"]: row[variant] for row in rows if variant in row}:
            by_seed[run.seed] = accuracies
    return by_seed


def _pairs_scored(arm: Arm) -> int:
    rows = [row for run in arm.finished for row in run.tables.get("blimp_paradigms", [])]
    return max(1, round(statistics.fmean(row.get("pairs", 1000) for row in rows)))
