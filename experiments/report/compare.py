"""`python -m sweeps compare`: two sweeps, or one before and after a change, arm by arm.

    output_dir/sweeps/<first>/report/compare-<second>/   laid out as a report

Arms are matched by arm_id, or by name if their settings were changed. Not for: comparing arms of
one sweep, as its report does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.metrics import headline
from experiments.report import comparisons, data, gather, page, tables
from experiments.report.comparisons import Pair
from experiments.report.data import Sweep
from experiments.report.document import (
    Block,
    Bullets,
    Document,
    Notice,
    Section,
    Table,
    joined,
    plural,
)
from relora_core.config import ConfigError


@dataclass(kw_only=True, slots=True)
class Matched:
    """The arms of two sweeps that belong together."""

    pairs: list[Pair]
    """(arm of the second, arm of the first)."""
    by_name: list[str]
    """Names of pairs with different settings."""
    alone: list[list[str]]
    """Names of arms that only the first has, and of those that only the second has."""
    same_runs: list[str] = field(default_factory=list)
    """Names of arms of which both sweeps have a run."""
    notes: list[str] = field(default_factory=list)
    """On separate evaluations, as that those with other settings are left out."""


def write(first: tuple[Path, str], second: tuple[Path, str], *, output: Path | None = None) -> Path:
    """Write the comparison, second minus first, and return the path of its HTML page.

    Both are (output_dir, sweep).
    """
    if (first[0].resolve(), first[1]) == (second[0].resolve(), second[1]):
        raise ConfigError(f"SWEEP SWEEP must be two sweeps, got {first[1]!r} twice")
    one, two = (gather.gather(output_dir, name) for output_dir, name in (first, second))
    if one.name == two.name:
        one.name, two.name = f"{one.name} ({first[0]})", f"{two.name} ({second[0]})"
    matched = match(one, two)
    matched.notes = gather.drop_unlike_evaluations([*one.runs, *two.runs])
    if first[0].resolve() == second[0].resolve():
        matched.same_runs = [pair[0].name for pair in matched.pairs if _same_runs(pair)]
    folder = output or (first[0] / "sweeps" / first[1] / "report" / f"compare-{second[1]}")
    pictures = page.draw(
        folder, lambda figures: _figures(figures, matched, one.name, folder / "figures")
    )
    return page.save(_document(one, two, matched, pictures), [one, two], folder=folder)


def locate(output_dir: Path | str, word: str) -> tuple[Path, str]:
    """(output_dir, sweep) from a sweep's name or its folder's path, `DIR/sweeps/NAME`."""
    path = Path(word)
    if path.name != word and path.parent.name == "sweeps" and (path / "plan.json").exists():
        return path.parent.parent, path.name
    return Path(output_dir), word


def match(one: Sweep, two: Sweep) -> Matched:
    """Pair the arms of `two` with those of `one`: by arm_id, else by name."""
    ids = {arm.arm_id: arm for arm in one.arms}
    same = {arm.arm_id for arm in two.arms if arm.arm_id in ids}
    names = {arm.name: arm for arm in one.arms if arm.arm_id not in same}
    pairs: list[Pair] = []
    by_name: list[str] = []
    for arm in two.arms:
        if arm.arm_id in same:
            pairs.append((arm, ids[arm.arm_id]))
        elif arm.name in names:
            pairs.append((arm, names[arm.name]))
            by_name.append(arm.name)
    used = [{other.arm_id for _, other in pairs}, {arm.arm_id for arm, _ in pairs}]
    alone = [
        [arm.name for arm in sweep.arms if arm.arm_id not in taken]
        for sweep, taken in zip((one, two), used, strict=True)
    ]
    return Matched(pairs=pairs, by_name=by_name, alone=alone)


# the document -----------------------------------------------------------------------------------
def _document(one: Sweep, two: Sweep, matched: Matched, pictures: list[Block]) -> Document:
    differences = comparisons.difference_tables(headline(), matched.pairs, to=one.name)
    sections = [
        Section(title="Settings that differ", blocks=_settings(matched)),
        Section(title="Differences", blocks=list(differences)),
        Section(title="Figures", blocks=pictures),
        Section(title="Code", blocks=_code([one, two])),
    ]
    return Document(
        title=f"{two.name} against {one.name}",
        lead=_lead(one, two, matched),
        sections=[section for section in sections if section.blocks],
    )


def _lead(one: Sweep, two: Sweep, matched: Matched) -> list[Block]:
    common = sum(len(_common(pair)) for pair in matched.pairs)
    blocks: list[Block] = [
        f"{plural(len(matched.pairs), 'common arm')} with {plural(common, 'pair')} of finished "
        "runs at the same seed. Differences are the second sweep minus the first."
    ]
    for sweep in (one, two):
        counts = ", ".join(f"{n} {state}" for state, n in sweep.counts.items())
        blocks.append(f"{sweep.name}: {plural(len(sweep.runs), 'run')} ({counts}).")
    if not matched.pairs:
        blocks.append(Notice("The sweeps have no arm in common: there is nothing to compare."))
    elif not common:
        blocks.append(
            Notice("No seed of a common arm has finished in both: no difference is of pairs.")
        )
    if matched.same_runs:
        blocks.append(
            Notice(
                f"Both sweeps have runs of {joined(matched.same_runs)} in common: there a run is "
                "compared with itself."
            )
        )
    differing = [arm.name for arm, other in matched.pairs if data.reads_other(arm, other)]
    if differing:
        blocks.append(
            Notice(
                f"Runs of {joined(differing)} read other texts or tokens in each sweep: their "
                "losses and perplexities must not be compared."
            )
        )
    longer = [
        arm.name for arm, other in matched.pairs if data.other_context(arm, other, training=True)
    ]
    if longer:
        blocks.append(
            Notice(
                f"Runs of {joined(longer)} differ in data.seq_len in each sweep: their losses, and "
                "perplexities in windows of other lengths, must not be compared."
            )
        )
    evals = [key for arm, other in matched.pairs for key in data.scored_otherwise(arm, other)]
    if evals:
        blocks.append(
            Notice(
                f"The sweeps differ in {joined(dict.fromkeys(evals))}: scores of an eval whose "
                "settings differ must not be compared."
            )
        )
    blocks += [Notice(f"{note[:1].upper()}{note[1:]}.") for note in matched.notes]
    blocks += tables.other_losses([*one.runs, *two.runs])
    blocks += tables.noisy_losses(matched.pairs)
    for sweep, names in zip((one, two), matched.alone, strict=True):
        if names:
            blocks.append(f"Only in {sweep.name}: {joined(names)}.")
    return blocks


def _same_runs(pair: Pair) -> set[str]:
    return {r.run_id for r in pair[0].runs} & {r.run_id for r in pair[1].runs}


def _common(pair: Pair) -> set[int]:
    return {r.seed for r in pair[0].finished} & {r.seed for r in pair[1].finished}


def _settings(matched: Matched) -> list[Block]:
    rows = []
    for arm, other in matched.pairs:
        new, old = (data.settings(a.runs[0].config) for a in (arm, other))
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                values = map(page.setting_text, (old.get(key), new.get(key)))
                rows.append([arm.name, key, *values])
    if not rows:
        return []
    columns = ["arm", "setting", "first", "second"]
    table = Table(name="settings", title="Settings that differ", columns=columns, rows=rows)
    names = joined(matched.by_name)
    return [f"Matched by name, with other settings: {names}.", table] if names else [table]


def _code(sweeps: Sequence[Sweep]) -> list[Block]:
    lines = []
    for sweep in sweeps:
        codes = sorted({code for run in sweep.runs for code in run.code})
        lines.append(f"{sweep.name}: relora_core {joined(codes) or 'not recorded'}")
    return [Bullets(lines)]


def _figures(figures: Any, matched: Matched, first: str, folder: Path) -> Sequence[Any]:
    """The forest plot; every reference has the name of the first sweep."""
    from experiments.report.figures import canvas  # matplotlib, see page.draw

    pairs = [(arm, replace(other, name=first, arm_id=first)) for arm, other in matched.pairs]
    draw = partial(figures.differences, pairs)
    return [canvas.produce("differences", title="Differences", draw=draw, folder=folder)]
