"""A model from elsewhere beside a sweep's arms is one value: no seed of an arm is its pair."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from synthetic import a_config, a_sweep, record

from experiments.report import answers, blimp, comparisons, gather, page, redraw, registered
from experiments.report.data import Arm, RunData, Sweep
from experiments.report.document import Block, Table, to_csv
from experiments.report.figures import arms as figures
from relora_core.config import BlimpConfig, EvalConfig, EvaluatedConfig, ForeignConfig
from relora_core.evals.blimp import ACCURACY
from relora_core.evals.paloma import BITS_PER_BYTE

matplotlib.use("agg")
SCORES = (0.5, 0.6, 0.7)


def beside(output_dir: Path, seeds: tuple[int, ...]) -> Sweep:
    """An arm of these seeds, and a model that scores 0.8."""
    for run in a_sweep(output_dir, [a_config(seed=seed) for seed in seeds]):
        record(run)
    sweep = gather.gather(output_dir, "mine")
    foreign = ForeignConfig(source="x", architecture="x", parameters=1, start_id=0, fingerprint="x")
    own = sweep.runs[0].config
    config = EvaluatedConfig(
        experiment="x", method="x", model=own.model, train=own.train, data=own.data, foreign=foreign
    )
    run = RunData(run_id="x", arm_id="x", name="gpt2", seed=0, state="finished", config=config)
    sweep.arms.append(Arm(arm_id="x", name="gpt2", colour="#000000", runs=[run]))
    for one, score in zip(sweep.runs, (*SCORES, 0.8), strict=True):
        one.metrics = {ACCURACY.key: score, BITS_PER_BYTE.key: score}
        one.tables["blimp_paradigms"] = [
            {"uid": f"p{i}", "no_bos": score + shift, "pairs": 100}
            for i, shift in enumerate((-0.1, 0.1 * score, 0.1 - 0.1 * score))
        ]
    return sweep


@pytest.mark.parametrize(("pairs", "alike"), [(7, True), (9, False)])
def test_scores_of_other_sentences_are_not_compared(tmp_path: Path, pairs, alike) -> None:
    arm, model = (sweep := beside(tmp_path, (0, 1, 2))).arms
    for run, most in zip(sweep.runs, [7, 7, 7, pairs], strict=True):
        own = BlimpConfig(enabled=True, path="p", max_pairs=most, fingerprint="f")
        run.config = replace(run.config, eval=EvalConfig(blimp=own))
        run.metrics = {ACCURACY.key: run.metrics[ACCURACY.key]}
    said = str(answers.answer(sweep, [(arm, model)], []))
    assert ("gpt2 apart: difference" in said) == alike
    refused = "differ in eval.blimp.max_pairs: their BLiMP accuracy must not be compared"
    assert (refused in said) == (not alike)
    tests = table_of(blimp.blimp(sweep, [(arm, model)]), "blimp_no_bos_tests").data or []
    assert [refused == row["note"] for row in tests] == ([False] * len(tests) if alike else [True])


def test_it_is_shown_alone(tmp_path: Path) -> None:
    sweep = beside(tmp_path, (0, 1, 2))
    page.select_arms(sweep, ["gpt2"])
    text = str(page.lead(sweep))
    assert "1 arm, 0 seeds, 0 device-hours of training so far" in text


def table_of(blocks: Sequence[Block], name: str) -> Table:
    (table,) = (block for block in blocks if isinstance(block, Table) and block.name == name)
    return table


@pytest.mark.parametrize("seeds", [(0, 1, 2), (10, 11, 12), (2, 1, 0)])
def test_its_difference_to_an_arm_is_that_of_all_seeds(tmp_path: Path, seeds) -> None:
    sweep = beside(tmp_path, seeds)
    arm, model = sweep.arms
    (one,) = comparisons.compared([(arm, model)], ACCURACY)
    assert one.difference == pytest.approx(-0.2)
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with 2 degrees of freedom
    assert (one.low, one.high) == (pytest.approx(-0.2 - half), pytest.approx(-0.2 + half))
    (back,) = comparisons.compared([(model, arm)], ACCURACY)
    assert back.difference == pytest.approx(0.2)
    said = answers.sentence(arm, model, one, ACCURACY)
    assert "3 seeds against one value" in said
    named = registered.Registered(arm=arm.name, reference="gpt2", metric=ACCURACY)
    group = registered.Registered(
        arm=arm.name, reference="gpt2", metric=ACCURACY, group="g", paradigms=["p0"]
    )
    for outcome in registered.compare_all(sweep, [named, group]):
        assert (outcome.kind, outcome.difference) == ("one-sample", pytest.approx(-0.2))
    caption = figures.differences([(arm, model)]).caption
    assert "one value" in caption
    assert sweep.seeds == sorted(seeds)


def test_a_notebook_draws_that_difference(tmp_path: Path) -> None:
    sweep = beside(tmp_path, (10, 11, 12))
    arm, model = sweep.arms
    path = tmp_path / "compare.csv"
    blocks = comparisons.comparisons(sweep, [(arm, model)])
    path.write_text(to_csv(table_of(blocks, "compare_blimp_no_bos_accuracy")))
    look = {"label": "x", "scale": "linear", "better": "higher"}
    figure = redraw.draw_differences([path], {ACCURACY.key: look})
    _, span, dot = figure.axes[0].lines
    assert list(dot.get_xdata()) == [pytest.approx(-0.2)]
    assert list(span.get_xdata()) == [
        pytest.approx(-0.448414, abs=1e-6),
        pytest.approx(0.048414, abs=1e-6),
    ]


@pytest.mark.parametrize("seeds", [(0, 1, 2), (10, 11, 12)])
def test_blimps_tests_use_all_seeds(tmp_path: Path, seeds) -> None:
    sweep = beside(tmp_path, seeds)
    arm, model = sweep.arms
    blocks = blimp.blimp(sweep, [(arm, model)])
    data = table_of(blocks, "blimp_no_bos_tests").data or []
    rows = {f"{row['unit']} {row['name']}": row for row in data}
    means = [statistics.fmean((-0.1 + s, 1.1 * s, 0.1 + 0.9 * s)) for s in SCORES]
    gap = statistics.fmean(means) - statistics.fmean((0.7, 0.88, 0.82))
    for name in (
        "paradigm paired t",
        "seed one-sample t",
        "seed and paradigm t, seeds and paradigms crossed",
    ):
        assert rows[name]["difference"] == pytest.approx(gap)
    assert rows["seed one-sample t"]["n"] == 3
    assert "averaged over 3 seeds first" in rows["paradigm paired t"]["note"]
    assert not any("left out" in row["note"] for row in rows.values())


def test_windows_of_other_lengths_are_said(tmp_path: Path) -> None:
    sweep, said = beside(tmp_path, (0, 1, 2)), "Paloma's windows have 16 and 64 tokens"
    assert said not in str(page._cautions(sweep))
    model = sweep.arms[-1].runs[0]
    model.config = replace(model.config, data=replace(model.config.data, seq_len=64))
    assert said in str(page._cautions(sweep))
