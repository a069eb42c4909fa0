"""Metrics over the axes of a sweep: which lines there are, and what their numbers are means of."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import synthetic
from matplotlib import pyplot
from synthetic import a_config, a_sweep, record

from experiments.report import gather, notebook, page, redraw, responses
from experiments.report.data import Sweep
from experiments.report.figures import canvas, response
from experiments.report.responses import log_spaced
from experiments.stats import interval
from relora_core.config import RunConfig
from relora_core.evals.blimp import ACCURACY
from relora_core.evals.paloma import PERPLEXITY

matplotlib.use("agg")
SEEDS = (0, 1, 2)


def at(seed: int, **axes: Any) -> RunConfig:
    config = a_config(r=axes.get("r", 4), seed=seed, method=axes.get("method", "relora"))
    train = dataclasses.replace(config.train, lr=axes.get("lr", 1e-3))
    relora = dataclasses.replace(config.relora, prune_ratio=axes.get("prune", 0.9))
    model = dataclasses.replace(config.model, vocab_size=axes.get("vocab", 64))
    return dataclasses.replace(config, train=train, relora=relora, model=model)


def words(axes: Mapping[str, Any]) -> str:
    keys = {"r": "relora.r", "lr": "train.lr", "prune": "relora.prune_ratio", "arm": "arm"}
    keys["vocab"] = "model.vocab_size"
    return " ".join(f"{keys.get(key, key)}={value}" for key, value in axes.items())


def loss(config: RunConfig) -> float:
    """Additive in the axes, apart from a term of both."""
    r, lr = math.log2(config.relora.r), math.log10(config.train.lr)
    return 5 + 0.1 * r - 0.2 * lr + 0.03 * r * lr + 0.01 * config.seed**2


@pytest.fixture
def swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[dict[str, Any]]], Sweep]:
    """A sweep of these points, all seeds of which have finished."""

    def make(points: Sequence[dict[str, Any]], *, without: Sequence[int] = ()) -> Sweep:
        configs = [at(seed, **point) for point in points for seed in SEEDS]
        named = (f"{words(point)} seed={seed}" for point in points for seed in SEEDS)
        names: Iterator[str] = iter(list(named))
        monkeypatch.setattr(synthetic, "name_of", lambda config: next(names))
        for index, run in enumerate(a_sweep(tmp_path, configs)):
            if index not in without:
                record(run, loss=loss)
        return gather.gather(tmp_path, "mine")

    return make


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([4, 8, 16], True),
        ([1e-3, 3e-3, 1e-2], True),
        ([1, 2, 3], False),
        ([100, 200, 300, 400], False),
        ([0.0, 0.5, 1.0], False),
        ([0.0, 1.0, 100.0], False),
        ([0.001, 0.01], True),
        ([1, 2], False),
    ],
)
def test_an_axis_is_logarithmic_where_its_values_are(values: list[float], log: bool) -> None:
    assert log_spaced(values) is log


def test_lines_are_of_the_next_axis_and_arms_without_it_are_levels(
    swept: Callable[..., Sweep],
) -> None:
    points = [*grid(method=["relora"], r=[2, 4, 8]), {"method": "full_rank"}]
    sweep = swept(points)
    (axis,) = responses.numeric_axes(sweep)
    assert (axis.key, axis.values, axis.log) == ("relora.r", [2, 4, 8], True)
    (facet,) = responses.response(sweep, axis).facets
    assert [line.label for line in facet.lines] == ["method=relora"]
    assert list(facet.lines[0].cells) == [2, 4, 8]
    assert [arm.name for arm in facet.levels] == ["method=full_rank"]


def test_numbers_that_named_arms_differ_in_are_no_axes(swept: Callable[..., Sweep]) -> None:
    sweep = swept([{"arm": "low", "r": 2}, {"arm": "high", "r": 8}])
    for arm in sweep.arms:  # as a plan names them
        del arm.axes["relora.r"]
    assert responses.keys(sweep) == ["arm"]
    assert responses.numeric_axes(sweep) == []
    assert response.drawings(sweep) == {}


def test_a_grid_of_two_numbers_has_two_curves_and_a_map(swept: Callable[..., Sweep]) -> None:
    sweep = swept(grid(r=[2, 4, 8], lr=[1e-3, 1e-2]))
    assert list(response.drawings(sweep)) == [
        *("response_relora_r", "response_train_lr", "response_map")
    ]
    lines = [
        line.label
        for axis in responses.numeric_axes(sweep)
        for line in responses.response(sweep, axis).facets[0].lines
    ]
    assert lines == ["train.lr=0.001", "train.lr=0.01", "relora.r=2", "relora.r=4", "relora.r=8"]


def test_a_map_has_a_cell_of_text_for_each_finished_pair_alone(swept: Callable[..., Sweep]) -> None:
    sweep = swept(grid(r=[2, 4, 8], lr=[1e-3, 1e-2]), without=(0, 1, 2))
    figure = response.heat_map(sweep).canvas
    cells = [text.get_text() for text in figure.axes[1].texts]
    assert cells[0] == ""
    assert len(cells) == 6
    assert all("±" in cell for cell in cells[1:])
    (arm,) = (arm for arm in sweep.arms if arm.name == "relora.r=8 train.lr=0.01")
    one = interval(list(arm.values(PERPLEXITY.key).values()), scale="log")
    assert one.sd is not None
    assert cells[-1] == f"{one.mean:.1f}\n± {one.mean * one.sd:.2g}"


def test_means_over_other_axes_are_of_combinations_that_all_values_have(
    swept: Callable[..., Sweep],
) -> None:
    """A value that lacks a hard combination would look better for it."""
    points = grid(r=[2, 4], lr=[1e-3, 1e-2], prune=[0.5, 0.9])
    sweep = swept(points, without=(0, 1, 2))  # r=2, lr=0.001, prune=0.5 has not run
    axes = responses.marginal_axes(sweep)
    assert list(axes) == ["relora.r", "train.lr", "relora.prune_ratio"]
    made = responses.estimates(axes["relora.r"], metric=PERPLEXITY)
    rest = [
        (lr, prune) for lr in (1e-3, 1e-2) for prune in (0.5, 0.9) if (lr, prune) != (1e-3, 0.5)
    ]
    for r in (2, 4):
        logs = [
            statistics.fmean(loss(at(seed, r=r, lr=lr, prune=prune)) for lr, prune in rest)
            for seed in SEEDS
        ]
        wanted = interval([math.exp(value) for value in logs], scale="log")
        assert made[float(r)].mean == pytest.approx(wanted.mean)
        assert made[float(r)].high == pytest.approx(wanted.high)
    rows = responses.marginals(sweep)[0].data  # type: ignore[union-attr]
    row = next(r for r in rows if r["axis"] == "relora.r" and r["metric"] == PERPLEXITY.key)
    assert (row["value"], row["n"]) == (2.0, 3)
    assert row["mean"] == pytest.approx(made[2.0].mean)


def test_two_axes_have_no_means_over_others(swept: Callable[..., Sweep]) -> None:
    assert responses.marginals(swept(grid(r=[2, 4], lr=[1e-3, 1e-2]))) == []


def test_of_many_combinations_lines_are_means_over_numbers(swept: Callable[..., Sweep]) -> None:
    points = grid(r=[2, 4], lr=[1e-3, 1e-2], prune=[0.1, 0.3, 0.5, 0.7, 0.9])
    sweep = swept(points)
    axis = responses.numeric_axes(sweep)[0]
    made = responses.response(sweep, axis)
    assert made.averaged == ["relora.prune_ratio"]
    assert [line.label for line in made.facets[0].lines] == ["train.lr=0.001", "train.lr=0.01"]
    assert all(len(arms) == 5 for arms in made.facets[0].lines[0].cells.values())


def test_a_notebook_draws_the_means_of_the_report(swept: Callable[..., Sweep]) -> None:
    """Also where a combination has not finished at one dot, and a seed not at another."""
    pyplot.close("all")
    points = grid(r=[2, 4, 8], lr=[1e-3, 1e-2], prune=[0.1, 0.3, 0.5, 0.7, 0.9])
    sweep = swept(points, without=(0, 1, 2, 34))
    axis = responses.numeric_axes(sweep)[0]
    looks = {PERPLEXITY.key: {"label": "x", "scale": "log", "better": "lower"}}
    exec(notebook._response(sweep, "response_relora_r"), vars(redraw) | {"METRICS": looks})
    drawn = {bars.get_label(): bars.lines[0] for bars in pyplot.gcf().axes[0].containers}
    for line in responses.response(sweep, axis).facets[0].lines:
        made = responses.estimates(line.cells, metric=PERPLEXITY)
        assert list(drawn[line.label].get_xdata()) == [2, 4, 8]
        assert list(drawn[line.label].get_ydata()) == [made[place].mean for place in (2, 4, 8)]


def test_what_is_no_grid_is_not_averaged(swept: Callable[..., Sweep]) -> None:
    points = grid(r=[2, 4], lr=[1e-3, 1e-2], prune=[0.1, 0.3, 0.5, 0.7, 0.9])[:-3]
    sweep = swept(points)
    made = responses.response(sweep, responses.numeric_axes(sweep)[0])
    assert made.averaged == []
    lines = [line for facet in made.facets for line in facet.lines]
    assert all(len(arms) == 1 for line in lines for arms in line.cells.values())
    assert made.dots == 3  # settings that have r=2 alone


def test_the_answer_says_where_an_axis_is_best(swept: Callable[..., Sweep]) -> None:
    sweep = swept(grid(r=[2, 4, 8]))
    (line,) = responses.effects(sweep, PERPLEXITY)
    arms = {arm.name: list(arm.values(PERPLEXITY.key).values()) for arm in sweep.arms}
    best, worst = (interval(arms[f"relora.r={r}"], scale="log").mean for r in (2, 8))
    assert line.startswith("over relora.r=2, 4, 8, Paloma perplexity is lowest at 2, the smallest ")
    assert f"with {best:.1f} (95 % interval " in line
    assert line.endswith(f"and highest at 8 with {worst:.1f}")


# what must not be compared ----------------------------------------------------------------------
def test_an_axis_of_vocabularies_has_no_best_perplexity(swept: Callable[..., Sweep]) -> None:
    """But each of them has a best rank, and both have a best accuracy, which is of sentences."""
    sweep = swept(grid(r=[2, 4], vocab=[64, 128]))
    starts = [line.partition(" is ")[0] for line in responses.effects(sweep, PERPLEXITY)]
    over = "over relora.r=2, 4 at model.vocab_size"
    assert starts == [f"{over}={size}, Paloma perplexity" for size in (64, 128)]
    starts = [line.partition(",")[0] for line in responses.effects(sweep, ACCURACY)]
    assert starts == ["over relora.r=2", "over model.vocab_size=64"]


def test_figures_join_no_perplexities_of_different_vocabularies(
    swept: Callable[..., Sweep],
) -> None:
    sweep = swept(grid(r=[2, 4], vocab=[64, 128]))
    axis = responses.numeric_axes(sweep)[1]
    for line in responses.response(sweep, axis).facets[0].lines:
        assert list(responses.estimates(line.cells, metric=PERPLEXITY)) == [64]
        assert list(responses.estimates(line.cells, metric=ACCURACY)) == [64, 128]
    lines, cells = response.over(sweep, axis), response.heat_map(sweep)
    for drawing in (lines, cells):
        assert "their perplexities must not be compared" in drawing.caption
    words = [[text.get_text() for text in ax.texts] for ax in cells.canvas.axes]
    refused = [texts.count("not\ncompared") for texts in words]
    assert refused == [2, 2, 0, 0]  # loss and perplexity, not the accuracies


def test_a_first_value_without_a_number_leaves_the_others(swept: Callable[..., Sweep]) -> None:
    sweep = swept(grid(vocab=[64, 128]), without=(0, 1, 2))
    (axis,) = responses.numeric_axes(sweep)
    line = responses.response(sweep, axis).facets[0].lines[0]
    assert list(responses.estimates(line.cells, metric=PERPLEXITY)) == [128]


def test_means_over_other_axes_compare_no_vocabularies(swept: Callable[..., Sweep]) -> None:
    """Ranks they compare, since each has the same vocabularies."""
    sweep = swept(grid(r=[2, 4], lr=[1e-3, 1e-2], vocab=[64, 128]))
    axes = responses.marginal_axes(sweep)
    made = {key: responses.estimates(axes[key], metric=PERPLEXITY) for key in axes}
    assert [len(made[key]) for key in ("relora.r", "train.lr", "model.vocab_size")] == [2, 2, 1]
    assert len(responses.estimates(axes["model.vocab_size"], metric=ACCURACY)) == 2
    (table,) = responses.marginals(sweep)
    assert "Some arms read other texts" in table.note  # type: ignore[union-attr]


def test_figures_of_an_axis_that_is_shown_no_more_are_removed(
    swept: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blank(name: str, *, title: str, folder: Path, **_: object) -> canvas.Figure:
        files = [folder / f"{name}.{kind}" for kind in ("svg", "png")]
        for file in files:
            file.touch()
        return canvas.Figure(name=name, title=title, svg=files[0], png=files[1])

    monkeypatch.setattr(canvas, "produce", blank)
    swept(grid(r=[2, 4], lr=[1e-3, 1e-2]))
    figures = page.write(tmp_path, "mine").parent / "figures"
    assert (figures / "response_map.png").exists()
    page.write(tmp_path, "mine", arms=["relora.r=2 *"])
    assert not (figures / "response_map.png").exists()
    assert (figures / "response_train_lr.svg").exists()


def test_a_dot_that_diverged_is_at_the_worse_end() -> None:
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    dots = [response.Dot(x=1, y=2.0), response.Dot(x=2, y=math.nan), response.Dot(x=3, y=9.0)]
    response.draw_dots(ax, dots, colour="k", ends=(1.0, 4.0), lost=1.0)
    marks = {
        line.get_marker(): line.get_ydata()[0] for line in ax.lines if len(line.get_xdata()) == 1
    }
    assert marks == {"o": 2.0, "x": 1.0, "^": 4.0}


def test_an_axis_leaves_out_what_is_far_off_but_not_the_median() -> None:
    low, high = response.limits([1.0, 1.1, 1.2, 900.0], better="lower")
    assert low < 1.0
    assert 1.2 < high < 10
    low, high = response.limits([0.1, 0.6, 0.7], better="higher")
    assert low < 0.1
    assert high > 0.7


def test_a_spread_that_is_rounding_is_shown_as_none() -> None:
    equal = interval([0.6083333333333333, 0.6083333333333334], scale="linear")
    assert equal.sd
    assert response._cell_text(equal, ACCURACY) == "60.8\n± 0"
