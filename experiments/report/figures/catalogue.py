"""All figures of a sweep, drawn as <folder>/<name>.svg and .png; and learning curves.

Other figures are in `arms.py` and `paper.py`. Not for: style (`canvas.py`), nor the text beside a
figure (`page.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from experiments.metrics import LOSS
from experiments.report import data
from experiments.report.data import Arm, Sweep
from experiments.report.figures import arms, canvas, fronts, response
from experiments.report.figures import paper as figures_paper
from experiments.report.figures.canvas import Drawing, Figure, NoData
from experiments.report.figures.curves import Panel, Progress, progress, restart_ticks
from experiments.report.figures.published import Published, load, note
from experiments.report.tradeoffs import has_tradeoffs
from relora_core.evals.blimp import ACCURACY
from relora_core.evals.paloma import PAPER_PERPLEXITY, PERPLEXITY

DYNAMICS = {
    "weights_rank": ("Proportional effective rank of weights", "weights", "per"),
    "updates_rank": ("Proportional effective rank of updates", "updates", "per"),
    "weights_condition": ("Condition number of weights", "weights", "condition_number"),
    "updates_condition": ("Condition number of updates", "updates", "condition_number"),
}
"""Name -> title, group and measure of the paper's Figures 3 to 6."""


def all_figures(
    sweep: Sweep,
    folder: Path,
    *,
    x: str,
    published: Path | str | None,
    pairs: Sequence[tuple[Arm, Arm]],
    pdf: bool = False,
) -> list[Figure]:
    """Draw every figure that the sweep has data for; `missing` says why others were not drawn.

    `x` is `steps`, `tokens` or `gpu_hours`; `published` a file of the paper's curves; `pairs` are
    (arm, reference); `pdf`: as PDF, too. ConfigError for another axis or a bad file.
    """
    wanted = catalogue(sweep, x=x, published=published, pairs=pairs)
    for pattern in ("response_*", "marginal[._]*", "fronts[._]*"):
        for stale in Path(folder).glob(pattern):
            # Of axes that the plan had, or arms that were shown.
            if stale.stem.removesuffix("_column") not in wanted:
                stale.unlink()
    return [
        canvas.produce(name, title=title, draw=draw, folder=Path(folder), pdf=pdf)
        for name, (title, draw) in wanted.items()
    ]


def catalogue(
    sweep: Sweep,
    *,
    x: str,
    published: Path | str | None,
    pairs: Sequence[tuple[Arm, Arm]],
) -> dict[str, tuple[str, Callable[[], Drawing]]]:
    """Name -> (title, function that draws it) of every figure; arguments as of `all_figures`."""
    axis = progress(sweep, x)
    models = {run.config.model.name for run in sweep.runs}
    paper = load(published, models=models) if published is not None else None
    dynamics = partial(figures_paper.dynamics, sweep, axis=axis, paper=paper)
    return {
        "learning_curves": (
            "Learning curves (paper's Figure 2)",
            partial(learning_curves, sweep, axis=axis, paper=paper),
        ),
        **response.drawings(sweep),
        "arms": ("Final numbers by arm", partial(arms.arms_summary, sweep)),
        "differences": (
            "Differences on common seeds",
            partial(arms.differences, pairs),
        ),
        **(
            {"fronts": ("What arms reach for what they take", partial(fronts.fronts, sweep))}
            if has_tradeoffs(sweep)
            else {}
        ),
        "blimp_phenomena": ("BLiMP by phenomenon", partial(arms.blimp_phenomena, sweep)),
        **{
            name: (
                f"{title} (paper's Figure {number})",
                partial(dynamics, group=group, measure=measure),
            )
            for number, (name, (title, group, measure)) in enumerate(DYNAMICS.items(), start=3)
        },
        "schedules": (
            "Learning rates as used (paper's Figure 8)",
            partial(figures_paper.schedules, sweep),
        ),
        "restarts": ("What restarts do", partial(figures_paper.restarts, sweep)),
    }


# learning curves --------------------------------------------------------------------------------
def learning_curves(sweep: Sweep, *, axis: Progress, paper: Published | None = None) -> Drawing:
    """Loss, the second half of it, perplexity and BLiMP against progress."""
    perplexity = PAPER_PERPLEXITY if paper else PERPLEXITY
    drawn, others = canvas.few(_with_curves(sweep))
    metrics = [
        m for m in (LOSS, perplexity, ACCURACY) if any(canvas.has(arm, m.key) for arm in drawn)
    ]
    if not metrics:
        raise NoData("no run has logged a loss or an eval")
    floor = data.floor(sweep) if LOSS in metrics else None
    shown = [(metric, 0.0) for metric in metrics]
    if LOSS in metrics:
        ends = [p for arm in drawn for r in arm.runs for p in r.curves.get(LOSS.key, ())[-1:]]
        shown.insert(1, (LOSS, max(map(axis.of, ends)) / 2))
    figure = Canvas(figsize=(9.2, 3.1 * ((len(shown) + 1) // 2)))
    restarts, laid = False, []
    for index, (metric, start) in enumerate(shown):
        ax = figure.add_subplot((len(shown) + 1) // 2, 2, index + 1)
        panel = Panel(ax=ax, axis=axis, scale=metric.scale, start=start)
        for arm in drawn:
            panel.arm(arm, metric.key)
        if floor and metric is LOSS:
            panel.level(floor.entropy, text="entropy of the data", inside=not start)
            panel.level(floor.unigram, text="unigram entropy", inside=not start)
        if metric.chance is not None:
            panel.level(metric.chance, text="chance")
        if paper:
            laid.append(paper.lay(panel, metric.key))
        panel.finish(ylabel=metric.label, title="second half" if start else "")
        restarts |= restart_ticks(ax, drawn, axis=axis) if not start else False
    extra = [canvas.RESTART] if restarts else []
    notes = note(laid) if paper else ""
    canvas.legend(figure, drawn, extra=[*extra, *(paper.legend(laid) if paper else [])])
    return Drawing(canvas=figure, caption=f"{canvas.bands(drawn)}{others}{notes}".strip())


def _with_curves(sweep: Sweep) -> list[Arm]:
    keys = [m.key for m in (LOSS, PERPLEXITY, PAPER_PERPLEXITY, ACCURACY)]
    return [arm for arm in sweep.arms if any(canvas.has(arm, key) for key in keys)]
