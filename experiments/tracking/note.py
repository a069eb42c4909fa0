"""A sweep as text: the Markdown note on its MLflow run, and its table of arms.

Not for: getting them into MLflow (`sweeps.py`).
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.disk.states import State
from experiments.tracking.links import compare_link, links
from experiments.tracking.saved_views import MAIN, axis_keys

if TYPE_CHECKING:
    from experiments.stats import Interval
    from experiments.tracking.sweep_view import ArmView, SweepView

MAX_NOTE = 7500
"""Characters; MLflow's limit of a tag is 8000."""
GAP = " &nbsp; | "
"""Between cells, as the UI's tables have neither borders nor padding."""
WIDTH = 76
"""Characters of a line of code."""
MAX_COMMANDS, MAX_TROUBLES, MAX_COMPARED = 5, 5, 12


def sentence(view: SweepView) -> str:
    """The sweep in one line, which is all that the UI shows of an experiment's note."""
    question = f" {_plain(view.question)}" if view.question else ""
    return f"Sweep {view.name}:{question} {progress(view)}."


def progress(view: SweepView) -> str:
    """`4 of 6 runs finished, 1 running, 1 failed`."""
    counts = Counter(run.state.state for arm in view.arms for run in arm.runs)
    rest = [f"{n} {state}" for state, n in counts.items() if state is not State.FINISHED]
    return ", ".join([f"{counts[State.FINISHED]} of {counts.total()} runs finished", *rest])


def note(
    view: SweepView,
    *,
    experiment_id: str,
    output_dir: Path | str,
    summaries: Mapping[str, Mapping[str, Interval]],
    arm_runs: Sequence[str] = (),
) -> str:
    """Question, states of the runs, arms with intervals, links, commands; at most MAX_NOTE long.

    What matters comes first, as the UI folds all but the first lines. `summaries` is arm_id ->
    metric -> interval; `arm_runs` are ids of the arms' MLflow runs.
    """
    top = [_plain(view.question)] if view.question else []
    top.append(f"**{progress(view)}**, {_plural(len(view.arms), 'arm')}.")
    if troubles := _troubles(view):
        top.append(_plain(troubles))
    bottom = []
    if view.collapsed:
        bottom.append(_plain("\n".join(f"- {line}" for line in view.collapsed)))
    bottom.append("Open: " + ", ".join(_links(view, experiment_id, arm_runs)) + ".")
    if commands := view.commands[-MAX_COMMANDS:]:
        block = "\n".join(map(_wrapped, commands)).replace("```", "` ` `")
        bottom.append(f"```\n{block}\n```")
    folder = Path(output_dir).absolute()
    bottom.append(
        f"Records: `{folder}/runs`, plan: `{folder}/sweeps/{view.name}/plan.json`. All of this is "
        "rebuilt from them by `python -m sweeps sync`."
    )
    space = MAX_NOTE - sum(len(part) + 2 for part in (*top, *bottom))
    return "\n\n".join([*top, _table(view, summaries, space=space), *bottom])[:MAX_NOTE]


def _plain(text: str) -> str:
    """Escape HTML: text from runs must stay text wherever the note is shown."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _wrapped(command: str) -> str:
    """The command on several lines: MLflow's page would be as wide as a long one."""
    unbroken = re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: quoted[0].replace(" ", "\0"), command)
    lines = textwrap.wrap(unbroken, WIDTH, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\0", " ")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _troubles(view: SweepView) -> str:
    """A line for each of the first runs that did not end well."""
    bad = [run for arm in view.arms for run in arm.runs if run.state.state.bad]
    lines = [
        f"- {run.state.state}: `{run.name or run.run_id}`"
        + (f" ({run.state.reason[:200]})" if run.state.reason else "")
        for run in bad[:MAX_TROUBLES]
    ]
    if len(bad) > MAX_TROUBLES:
        lines.append(f"- and {len(bad) - MAX_TROUBLES} more")
    return "\n".join(lines)


def _links(view: SweepView, experiment_id: str, arm_runs: Sequence[str]) -> list[str]:
    pages = links(experiment_id, sweep=view.name)
    if 1 < len(arm_runs) <= MAX_COMPARED:
        pages["compare the arms"] = compare_link(experiment_id, runs=arm_runs)
    return [f"[{title}]({address})" for title, address in pages.items()]


def _table(view: SweepView, summaries: Mapping[str, Mapping[str, Interval]], *, space: int) -> str:
    shown = {
        title: metric
        for title, metric in MAIN.items()
        if any(metric in of_arm for of_arm in summaries.values())
    }
    lines = [
        "| arm | finished | " + " | ".join(shown) + " |" if shown else "| arm | finished |",
        "|---" * (2 + len(shown)) + "|",
    ]
    end = (
        "\n\nMean over the finished seeds, geometric for perplexities [95 % interval of the mean, "
        "Student's t]."
    )
    left = space - len(end) - 80 - sum(len(line) + 1 for line in lines)
    for number, arm in enumerate(view.arms):
        of_arm = summaries.get(arm.arm_id, {})
        cells = [cell(of_arm.get(metric)) for metric in shown.values()]
        name = _plain(arm.name.replace("|", "\\|"))
        line = "| " + GAP.join([name, f"{arm.finished}/{len(arm.runs)}", *cells]) + " |"
        left -= len(line) + 1
        if left < 0:
            more = len(view.arms) - number
            return "\n".join(lines) + f"\n\n{more} more arms are in `arms.csv` below." + end
        lines.append(line)
    return "\n".join(lines) + (end if shown else "")


def cell(interval: Interval | None) -> str:
    """`13.57 [13.12, 14.02]`; without the interval if there is only one value."""
    if interval is None:
        return ""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.4g}"
    return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


# the table as a file ----------------------------------------------------------------------------
def table(view: SweepView, summaries: Mapping[str, Mapping[str, Interval]]) -> list[dict[str, Any]]:
    """A row for each arm, all with the same columns."""
    axes = axis_keys(view.arms)
    metrics = [m for m in MAIN.values() if any(m in of_arm for of_arm in summaries.values())]
    return [_row(arm, axes, metrics, summaries.get(arm.arm_id, {})) for arm in view.arms]


def _row(
    arm: ArmView, axes: Sequence[str], metrics: Sequence[str], of_arm: Mapping[str, Interval]
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm.name, **{key: arm.axes.get(key) for key in axes}}
    row |= {"finished": arm.finished, "planned": len(arm.runs)}
    for metric in metrics:
        interval = of_arm.get(metric)
        for name, part in {"mean": "mean", "low": "ci_low", "high": "ci_high", "sd": "sd"}.items():
            value = getattr(interval, name, None)
            row[f"{metric}_{part}"] = value if value is None else significant(value)
    return {column.replace(".", "_"): value for column, value in row.items()}


def significant(value: float) -> float:
    """Rounded to 6 digits: MLflow prints every digit of a metric."""
    return float(f"{value:.6g}")


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
