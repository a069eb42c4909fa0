"""`python -m sweeps report`: the results of a sweep, for a reader who did not run it.

    output_dir/sweeps/<name>/report/  report.html, report.md, figures/, data.parquet,
                                      tables/*.csv and *.tex

Not for: reading records (`gather.py`), estimates (`stats.py`), layout (`document.py`).
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import notices
from experiments.disk.state import RunState
from experiments.disk.states import State
from experiments.errors import one_line
from experiments.report import (
    answers,
    blimp,
    gather,
    notebook,
    registered,
    responses,
    tradeoffs,
)
from experiments.report import comparisons as report_comparisons
from experiments.report import tables as report_tables
from experiments.report.data import Arm, Sweep, differing_texts
from experiments.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Notice,
    Picture,
    Section,
    Table,
    joined,
    number,
    plural,
    to_csv,
    to_html,
    to_markdown,
)
from experiments.report.latex import to_latex
from relora_core import atomic, shared
from relora_core.config import ConfigError, nearest
from relora_core.evals.paloma import longest_window
from relora_core.sources import comparable

PREVIOUS = "previous"
"""Given as reference: each arm is compared with the one before it."""
PRINTED = ("arms", "compare_", "registered", "marginal")
"""How the names of tables begin that are written as LaTeX, too."""
MOST_RUNS = 40
"""Unfinished runs that are listed one by one."""
MEANINGS = {
    State.FINISHED: "trained to their last step",
    State.DIVERGED: "their loss became infinite or NaN; they are in no mean",
    State.FAILED: "ended with an error or were killed; the same command goes on with them",
    State.CANCELLED: "ended on request",
    State.PRUNED: "ended early by a search, since others did better",
    State.LOST: "no heartbeat for long, and their scheduler does not know them",
    State.RUNNING: "at work when this was written",
    State.QUEUED: "wait for their turn",
    State.PLANNED: "planned and not begun",
    "unreadable": "their files are damaged",
}


def write(
    output_dir: Path | str,
    sweep: str,
    *,
    output: Path | None = None,
    arms: Sequence[str] = (),
    reference: str | None = None,
    x: str = "tokens",
    published: Path | None = None,
    comparisons: Path | None = None,
    states: Mapping[str, RunState] | None = None,
    beside: Sequence[str] = (),
    pdf: bool = False,
    with_notebook: bool = False,
) -> Path:
    """Write the report of a sweep as it is now, and return the path of its HTML page.

    `arms` are patterns of names of arms to show, all by default; `reference` names an arm, or is
    `previous`; `comparisons` is a file for `registered.read`; `states` and `beside` as for
    `gather`; `pdf`: figures as PDF, too; `with_notebook`: report.ipynb, too. ConfigError for a
    sweep, arm, run or file that does not exist.
    """
    named = registered.read(comparisons) if comparisons else []
    data = gather.gather(output_dir, sweep, states=states, beside=beside)
    # Of all arms, whichever are shown.
    named_section, named_answers = registered.section(data, named), answers.of_named(data, named)
    select_arms(data, arms)
    if reference == PREVIOUS:
        pairs = list(zip(data.arms[1:], data.arms, strict=False))
    else:
        pairs = report_comparisons.against(
            data, reference=report_comparisons.find_arm(data, reference)
        )
    folder = output or Path(output_dir) / "sweeps" / sweep / "report"
    pictures = draw(
        folder,
        lambda figures: figures.all_figures(
            data, folder / "figures", x=x, published=published, pairs=pairs, pdf=pdf
        ),
    )
    document = _document(data, pairs, pictures, named_section, named_answers)
    path = save(document, [data], folder=folder)
    if with_notebook:
        titles = {one.name: one.title for one in pictures if isinstance(one, Picture)}
        atomic.write_text(folder / "report.ipynb", notebook.make(data, titles, x=x))
    return path


def select_arms(sweep: Sweep, patterns: Sequence[str]) -> None:
    """Leave out arms whose names match no pattern; the others keep their colours."""
    names = [arm.name for arm in sweep.arms]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"--arms must match one of {joined(names, most=8)}, got {pattern!r}."
                f"{nearest(pattern, names)}"
            )
    if patterns:
        sweep.arms = [a for a in sweep.arms if any(fnmatch.fnmatch(a.name, p) for p in patterns)]


# the document -----------------------------------------------------------------------------------
def _document(
    sweep: Sweep,
    pairs: Sequence[tuple[Arm, Arm]],
    pictures: list[Block],
    named: list[Block],
    named_answers: list[Block],
) -> Document:
    made: dict[str, Callable[[], list[Block]]] = {
        "Answer": lambda: answers.answer(sweep, pairs, named_answers),
        "Results": lambda: [*report_tables.results(sweep), *responses.marginals(sweep)],
        "Named comparisons": lambda: named,
        "Figures": lambda: pictures,
        "Comparisons": lambda: report_comparisons.comparisons(sweep, pairs),
        "BLiMP": lambda: blimp.blimp(sweep, pairs),
        "Restarts": lambda: report_tables.restarts(sweep),
        "Cost": lambda: [*report_tables.cost(sweep), *tradeoffs.tradeoffs(sweep)],
        "Settings": lambda: _settings(sweep),
        "Runs": lambda: _runs(sweep),
        "Notes": lambda: _notes(sweep),
        "Statistics": lambda: report_comparisons.methods(sweep, pairs),
        "Code and environment": lambda: _environment(sweep),
        "Files": _files,
    }
    sections = [Section(title=title, blocks=_try_section(blocks)) for title, blocks in made.items()]
    return Document(
        title=f"Sweep {sweep.name}",
        lead=lead(sweep),
        sections=[section for section in sections if section.blocks],
    )


def _try_section(blocks: Callable[[], list[Block]]) -> list[Block]:
    """A section's blocks, or a notice if they cannot be made: the reader still gets the others."""
    try:
        return blocks()
    except Exception as error:
        return [Notice(f"This part could not be made ({one_line(error)}).")]


def lead(sweep: Sweep) -> list[Block]:
    """How far the sweep is, and what a reader must know first."""
    runs, counts = sweep.runs, sweep.counts
    done = counts.get(State.FINISHED, 0)
    rest = [f"{n} {state}" for state, n in counts.items() if state != State.FINISHED]
    steps = sorted({run.config.train.steps for run in runs if run.trained})
    many = " to ".join(f"{count:,}" for count in sorted({*steps[:1], *steps[-1:]}))
    hours = sum(run.cost.gpu_hours for run in runs)
    blocks: list[Block] = [f"Question: {sweep.question}"] if sweep.question else []
    blocks.append(
        f"{done} of {plural(len(runs), 'run')} finished"
        + (f" ({', '.join(rest)})" if rest else "")
        + f": {plural(len(sweep.arms), 'arm')}, {plural(len(sweep.seeds), 'seed')}, "
        + (f"{many} steps each, " if many else "")
        + f"{number(hours, digits=3)} device-hours of training so far. Written "
        f"{time.strftime('%Y-%m-%d %H:%M %Z')}."
    )
    return blocks + [Notice(line) for line in _cautions(sweep)]


def _cautions(sweep: Sweep) -> list[str]:
    """What a reader must know before comparing the numbers, one line each."""
    runs = sweep.runs
    finished = [len(arm.finished) for arm in sweep.arms]
    lines = []
    if not any(finished):
        lines.append(
            "No run has finished: there are no results yet, only what the runs say so far."
        )
    elif max(finished) == 1:
        lines.append(
            "No arm has more than one finished seed: nothing here says how much a result would "
            "change with another seed, so there are no intervals and no tests over seeds."
        )
    elif few := [arm.name for arm in sweep.arms if arm.trained and len(arm.finished) == 1]:
        lines.append(f"One finished seed only, and so no interval: {joined(few)}.")
    if any(finished) and (none := [arm.name for arm in sweep.arms if not arm.finished]):
        lines.append(f"No finished run, and so no result: {joined(none)}.")
    if diverged := sum(run.state == State.DIVERGED for run in runs):
        verb = "is" if diverged == 1 else "are"
        lines.append(
            f"{plural(diverged, 'run')} diverged and {verb} in no mean: the means are of the runs "
            "that survived, which flatters an arm that diverges."
        )
    if differing := differing_texts(sweep):
        lines.append(
            f"Arms differ in what they read ({', '.join(differing)}): losses and perplexities of "
            "different texts or vocabularies must not be compared, nor any score of an eval whose "
            "settings differ."
        )
    if foreign := [arm.name for arm in sweep.arms if not arm.trained]:
        lines.append(
            f"Not trained here, and with tokenizers of their own: {joined(foreign)}. Perplexities "
            "are per token and must not be compared across tokenizers; bits per byte may be. Each "
            "is one value without seeds, with which all seeds of an arm are compared."
        )
    windows = sorted({longest_window(run.config) for run in runs})
    if len(windows) > 1 and any(key.startswith("eval/paloma/") for r in runs for key in r.metrics):
        lines.append(
            f"Paloma's windows have {' and '.join(map(str, windows))} tokens. A longer one sees "
            "more context, which lowers bits per byte, too: for a model from elsewhere "
            "--max-length of `python -m experiments evaluate` sets it."
        )
    if len({run.config.train.steps for run in runs if run.trained}) > 1:
        lines.append(
            "Arms differ in their number of steps: their final numbers are not at one budget."
        )
    codes = {tuple(sorted({c for run in arm.runs for c in run.code})) for arm in sweep.arms}
    codes.discard(())
    if len({code for arm_codes in codes for code in arm_codes}) > 1:
        what = "arms" if len(codes) > 1 else "attempts"
        one, *others = (code for arm_codes in codes for code in arm_codes)
        ran = "ran" if all(comparable(one, code) for code in others) else "may have run"
        lines.append(
            f"Different {what} {ran} different code of relora_core (see Code and environment): a "
            "difference between them may be the code's."
        )
    return lines


def _notes(sweep: Sweep) -> list[Block]:
    """What planning and reading noted on settings and data."""
    runs, lines = sweep.runs, list[str]()
    if changed := [run for run in runs if run.changed]:
        keys = joined(sorted({key for run in changed for key in run.changed}))
        lines.append(
            f"{plural(len(changed), 'run')} went on with other {keys} than planned, on purpose "
            f"(--accept-changed): {joined([run.run_id for run in changed], most=5)}."
        )
    planned = [*notices.across([run.config for run in runs]), *sweep.notes]
    read = [f"data: {note}" for run in runs for note in run.notes]
    lines += dict.fromkeys(f"{n[:1].upper()}{n[1:]}." for n in [*planned, *read])
    return [Bullets(lines)] if lines else []


def _settings(sweep: Sweep) -> list[Block]:
    blocks: list[Block] = []
    if sweep.commands:
        blocks += ["Planned by:", Code("\n".join(sweep.commands))]
    varies = [
        [key, joined(map(setting_text, values), most=20)] for key, values in sweep.varies.items()
    ]
    if varies:
        blocks.append(
            Table(name="varies", title="What varies", columns=["setting", "values"], rows=varies)
        )
    else:
        blocks.append("Nothing varies: one setting, one seed.")
    fixed = [[key, setting_text(value)] for key, value in sweep.fixed.items()]
    blocks.append(
        Table(
            name="fixed",
            title=f"What does not vary ({plural(len(fixed), 'setting')})",
            columns=["setting", "value"],
            rows=fixed,
            folded=True,
        )
    )
    return blocks


def setting_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _runs(sweep: Sweep) -> list[Block]:
    counts = sweep.counts
    states = list(counts)
    rows = [
        [arm.name, *(str(sum(r.state == s for r in arm.runs) or "-") for s in states)]
        for arm in sweep.arms
    ]
    rows.append(["all", *(str(n) for n in counts.values())])
    meaning = "; ".join(f"{s}: {MEANINGS.get(s, 'as the run says')}" for s in states)
    blocks: list[Block] = [
        Table(
            name="states",
            title="What became of the runs",
            columns=["arm", *states],
            rows=rows,
            note=f"{meaning[0].upper()}{meaning[1:]}.",
        )
    ]
    rest = [
        run for run in sweep.runs if run.state not in (State.FINISHED, State.PLANNED, State.QUEUED)
    ]
    if rest:
        blocks.append(
            Bullets(
                [
                    f"{run.state} at step {run.step:,} of {run.config.train.steps:,}: "
                    f"`{run.name or run.run_id}`" + (f" ({run.reason})" if run.reason else "")
                    for run in rest[:MOST_RUNS]
                ]
                + ([f"and {len(rest) - MOST_RUNS} more"] if len(rest) > MOST_RUNS else [])
            )
        )
    if sweep.collapsed:
        blocks.append(Bullets(sweep.collapsed))
    blocks.append(report_tables.every_run(sweep))
    return blocks


def _environment(sweep: Sweep) -> list[Block]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for run in sweep.runs:
        for attempt in run.attempts:
            state = {True: "changed", False: "clean", None: "?"}[attempt.dirty]
            code = attempt.code_hash, attempt.commit[:12], state
            on = attempt.python, attempt.packages.get("torch"), attempt.hardware, attempt.host
            key = tuple(value or "?" for value in (*code, *on))
            groups.setdefault(key, []).append(run.run_id)
    if not groups:
        return []
    columns = ["code of relora_core", "commit", "checkout", "Python", "torch", "hardware", "host"]
    rows = [[*key, str(len(ids))] for key, ids in groups.items()]
    table = Table(name="environment", title="Attempts", columns=[*columns, "attempts"], rows=rows)
    packages = sorted(
        {f"{k} {v}" for r in sweep.runs for a in r.attempts for k, v in a.packages.items()}
    )
    return [table, f"Packages: {', '.join(packages)}." if packages else ""]


def _files() -> list[Block]:
    return [
        Bullets(
            [
                "`tables/*.csv`: every table here with unrounded numbers",
                "`tables/*.tex`: results and comparisons for LaTeX with booktabs and graphicx",
                "`figures/*.svg` and `*.png`: every figure; with `--pdf` also `*.pdf` for two "
                "columns of a paper (6.3 in) and, of few panels, `*_column.pdf` for one (3.03 in)",
                "`data.parquet`: each value of each metric of each run, a row each (sweep, run_id, "
                "arm_id, arm, seed, state, metric, step, tokens, gpu_hours, value)",
            ]
        )
    ]


# files ------------------------------------------------------------------------------------------
def draw(folder: Path, figures: Callable[[Any], Sequence[Any]]) -> list[Block]:
    """Figures as blocks, or a notice if they cannot be drawn. `figures` gets the catalogue."""
    try:
        # matplotlib takes half a second, and a report without it is better than none.
        import experiments.report.figures.catalogue as catalogue

        shared.make_folder(folder / "figures")
        made = figures(catalogue)
    except ConfigError:
        raise
    except Exception as error:
        return [Notice(f"The figures could not be drawn ({one_line(error)}).")]
    blocks: list[Block] = [
        Picture(name=f.name, title=f.title, caption=f.caption, svg=f.svg, png=f.png)
        for f in made
        if f.svg is not None and f.png is not None
    ]
    absent = [f"{figure.title}: {figure.missing}" for figure in made if figure.svg is None]
    return blocks + (["Not drawn:", Bullets(absent)] if absent else [])


def save(document: Document, sweeps: Sequence[Sweep], *, folder: Path) -> Path:
    """Write all files of a report, and remove tables of an earlier one; the path of its page."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output must be a folder, got the file {folder}")
    tables = folder / "tables"
    shared.make_folder(tables)
    if (folder / "report.html").exists():
        for old in [*tables.glob("*.csv"), *tables.glob("*.tex")]:
            old.unlink()
    for table in document.tables:
        atomic.write_text(tables / f"{table.name}.csv", to_csv(table))
        if table.name.startswith(PRINTED):
            label = f"{sweeps[-1].name}-{table.name}"
            atomic.write_text(tables / f"{table.name}.tex", to_latex(table, label=label))
    write_parquet(sweeps, folder / "data.parquet")
    atomic.write_text(folder / "report.md", to_markdown(document))
    atomic.write_text(folder / "report.html", to_html(document))
    return folder / "report.html"


def write_parquet(sweeps: Sequence[Sweep], path: Path) -> None:
    """Write every point of every curve as a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.string()) for name in ("sweep", "run_id", "arm_id", "arm")]
        + [("seed", pa.int64()), ("state", pa.string()), ("metric", pa.string())]
        + [("step", pa.int64()), ("tokens", pa.int64())]
        + [("gpu_hours", pa.float64()), ("value", pa.float64())]
    )
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, schema) as writer:
        for sweep in sweeps:
            for arm in sweep.arms:
                for batch in _batches(sweep, arm, schema):
                    writer.write_batch(batch)
    shared.share(temporary)
    temporary.replace(path)


def _batches(sweep: Sweep, arm: Arm, schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    for run in arm.runs:
        same = [sweep.name, run.run_id, arm.arm_id, arm.name, run.seed, run.state]
        rows = [(*same, name, *point) for name, points in run.curves.items() for point in points]
        if rows:
            columns = map(list, zip(*rows, strict=True))
            yield pa.record_batch(dict(zip(schema.names, columns, strict=True)), schema=schema)
