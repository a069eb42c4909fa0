"""A report begins with what its comparisons say, in sentences that agree with its tables."""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic import a_config, a_sweep, arms, loss_of, record

from experiments.report import comparisons, gather
from experiments.report import page as report
from experiments.report.answers import decimals, p_text, sentence
from experiments.report.data import Arm
from experiments.report.figures.arms import differences
from experiments.stats import Comparison
from relora_core.config import RunConfig
from relora_core.evals.blimp import ACCURACY
from relora_core.evals.paloma import PERPLEXITY


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *arguments: [])


def near(spread: float, *, gap: float = 0.0) -> Callable[[RunConfig], float]:
    """Losses `gap` above full rank's, with noise of each run."""

    def loss(config: RunConfig) -> float:
        noise = random.Random(f"{config.method}{config.relora.r}{config.seed}").gauss(0, spread)
        return 3.0 + noise + (gap if config.method == "relora" else 0.0)

    return loss


def written(
    output_dir: Path, configs: list[RunConfig], *, loss: Callable[[RunConfig], float] = loss_of
) -> str:
    for run in a_sweep(output_dir, configs):
        record(run, loss=loss)
    return (report.write(output_dir, "mine").parent / "report.md").read_text()


def answer(text: str) -> str:
    return text.partition("## Answer\n")[2].partition("\n## ")[0]


def test_the_answer_comes_first_then_results_and_the_settings_after_them(tmp_path: Path) -> None:
    titles = re.findall(r"^## (.*)", written(tmp_path, arms(2)), flags=re.MULTILINE)
    assert titles[:2] == ["Answer", "Results"]
    order = ["Results", "Comparisons", "Settings", "Runs", "Statistics", "Files"]
    assert [title for title in titles if title in order] == order


def test_a_gap_is_stated_with_interval_seeds_and_the_adjusted_p_of_the_table(
    tmp_path: Path,
) -> None:
    loss = near(0.01, gap=0.3)
    text = answer(written(tmp_path, arms(2, 4), loss=loss))
    (line,) = (x for x in text.splitlines() if x.startswith("- method=relora relora.r=2 ends"))
    with open(tmp_path / "sweeps/mine/report/tables/compare_paloma_perplexity.csv") as file:
        (row,) = (r for r in csv.DictReader(file) if r["arm"].endswith("r=2"))
    said = re.search(
        r"at ([\d.]+) times the perplexity of method=full_rank \(95 % interval ([\d.]+) to "
        r"([\d.]+), 3 seeds paired, (p [=<] [\d.]+) after Holm\)",
        line,
    )
    assert said
    for text_value, key in zip(said.groups()[:3], ("difference", "low", "high"), strict=True):
        digits = len(text_value.partition(".")[2])
        assert text_value == f"{float(row[key]):.{digits}f}"
    assert said[4] == p_text(float(row["p_holm"]))
    assert float(row["p_holm"]) > float(row["p"])


def test_arms_that_do_not_differ_cannot_be_told_apart(tmp_path: Path) -> None:
    text = answer(written(tmp_path, arms(2, seeds=range(5)), loss=near(0.05)))
    low, high = re.search(
        r"we cannot tell method=relora relora.r=2 and method=full_rank apart: ratio ([\d.]+) to "
        r"([\d.]+) \(95 % interval, 5 seeds paired, p = [\d.]+ after Holm\)",
        text,
    ).groups()  # type: ignore[union-attr]
    assert float(low) < 1 < float(high)
    assert "times the" not in text


def test_a_p_that_only_holm_lifts_is_said(tmp_path: Path) -> None:
    """Alone it would be a difference; of twelve comparisons it is none."""
    loss = near(0.02, gap=0.035)
    text = answer(written(tmp_path, arms(*range(1, 13), seeds=range(4)), loss=loss))
    lifted = re.findall(r"cannot tell .*p = (0\.0\d+) alone, p = ([\d.]+) after Holm", text)
    assert lifted
    assert all(float(alone) < 0.05 <= float(adjusted) for alone, adjusted in lifted)


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    text = answer(written(tmp_path, arms(2, seeds=[0])))
    ratio = math.exp(loss_of(a_config(r=2)) - loss_of(a_config(method="full_rank")))
    assert (
        f"ends at {ratio:.3f} times the perplexity of method=full_rank; one seed: no interv" in text
    )
    assert "95 %" not in text


def test_seeds_in_common_are_needed_for_pairs(tmp_path: Path) -> None:
    configs = [a_config(method="full_rank", seed=s) for s in (0, 1, 2)]
    configs += [a_config(r=2, seed=s) for s in (3, 4)]
    assert "2 and 3 seeds, unpaired" in answer(written(tmp_path, configs))


def test_what_diverged_is_named(tmp_path: Path) -> None:
    runs = a_sweep(tmp_path, arms(2, 4))
    for run in runs:
        one = run.config().method == "relora" and run.config().relora.r == 4
        record(run, state="diverged" if one or run is runs[3] else "finished")
    text = answer((report.write(tmp_path, "mine").parent / "report.md").read_text())
    assert "every run of method=relora relora.r=4 diverged" in text
    assert "of the survivors only: no finite value at seed 0" in text


def test_a_lost_seed_is_said_once_where_there_is_no_spread(tmp_path: Path) -> None:
    runs = a_sweep(tmp_path, arms(2))
    for run in runs:
        state = "diverged" if run is runs[0] else "finished"
        record(run, state=state, loss=lambda config: 3.0 + (config.method == "relora"))
    text = answer((report.write(tmp_path, "mine").parent / "report.md").read_text())
    assert "the same gap at every seed" in text
    assert text.count("survivors") == 1


def test_the_best_arm_is_named_unless_arms_read_other_texts(tmp_path: Path) -> None:
    text = answer(written(tmp_path, arms(2, 4)))
    assert "Lowest Paloma perplexity: method=full_rank, " in text
    assert "then method=relora relora.r=2, " in text


def test_nothing_is_answered_before_a_run_has_finished(tmp_path: Path) -> None:
    a_sweep(tmp_path, arms(2))
    text = (report.write(tmp_path, "mine").parent / "report.md").read_text()
    assert "## Answer" not in text
    assert "No run has finished" in text


def test_named_comparisons_are_answered_with_their_own_adjustment(tmp_path: Path) -> None:
    for run in a_sweep(tmp_path, arms(2, 4)):
        record(run, loss=near(0.01, gap=0.3))
    names = ["method=relora relora.r=2", "method=relora relora.r=4", "method=full_rank"]
    file = tmp_path / "pairs.yaml"
    line = "{arm: %s, reference: %s, metric: eval/paloma/perplexity, question: does it pay}"
    lines = [f"  - {line % (names[0], names[2])}", f"  - {line % (names[1], names[2])}"]
    file.write_text("\n".join(["comparisons:", *lines]))
    page = report.write(tmp_path, "mine", comparisons=file)
    text = answer((page.parent / "report.md").read_text())
    with open(page.parent / "tables" / "registered.csv") as table:
        adjusted = [float(row["p_holm"]) for row in csv.DictReader(table)]
    lines = re.findall(r"- does it pay: .* ends at .*, (p [=<] [\d.]+) after Holm", text)
    assert lines == [p_text(p) for p in adjusted]


@pytest.mark.parametrize(
    ("low", "middle", "high", "digits"),
    [
        (1.27, 1.30, 1.33, 2),
        (1.0921, 1.0942, 1.0963, 3),
        (1.004, 1.03, 1.06, 3),
    ],
)
def test_a_ratio_has_digits_enough_for_its_interval(
    low: float, middle: float, high: float, digits: int
) -> None:
    one = Comparison(kind="paired", scale="log", difference=middle, low=low, high=high, p=0.01)
    assert decimals(one, PERPLEXITY) == digits


def test_accuracies_are_compared_in_points(tmp_path: Path) -> None:
    one = Comparison(kind="paired", scale="linear", difference=-0.02, low=-0.03, high=-0.01)
    one.p, one.p_holm, one.n = 0.01, 0.02, 3
    arm, reference = (Arm(arm_id=name, name=name, colour="#000000") for name in "ab")
    assert sentence(arm, reference, one, ACCURACY) == (
        "a ends 2.0 points below b in BLiMP accuracy (95 % interval 1.0 to 3.0, 3 seeds paired, "
        "p = 0.020 after Holm)"
    )
    text = answer(written(tmp_path, arms(2), loss=near(0.002, gap=0.3)))
    assert re.search(r"- BLiMP accuracy: 1 of 1 comparison significant after Holm \(points\)", text)
    assert re.search(r"relora.r=2 -3\.\d", text)


def test_the_only_survivor_of_an_arm_is_called_that(tmp_path: Path) -> None:
    """In the best arm's line, along an axis and in a comparison."""

    def best_at_4(config: RunConfig) -> float:
        at_4 = config.method == "relora" and config.relora.r == 4
        return (2.0 if at_4 else 3.0) + 0.01 * config.seed

    for run in a_sweep(tmp_path, arms(2, 4, 8)):
        config = run.config()
        lost = best_at_4(config) < 2.5 and config.seed < 2
        record(run, state="diverged" if lost else "finished", loss=best_at_4)
    text = answer((report.write(tmp_path, "mine").parent / "report.md").read_text())
    assert text.count("1 of 3 seeds, 2 without a finite value: no interval") == 2
    assert "(one seed: no interval)" not in text
    assert "no finite value at seed 0, 1" in text


def test_perplexities_of_different_tokenizers_are_not_compared(tmp_path: Path) -> None:
    """Nor do they make an arm the best."""
    configs = arms(2)
    for config in configs:
        config.model.vocab_size = 320 if config.method == "relora" else 300
    text = answer(written(tmp_path, configs))
    assert "must not be compared" in text
    assert "times the perplexity" not in text
    assert "Lowest Paloma perplexity" not in text


def test_tables_and_figure_refuse_the_pairs_that_the_answer_refuses(tmp_path: Path) -> None:
    """In its words; what is not tested is not part of Holm's family."""
    configs = arms(2, 4)
    for config in configs:
        config.model.vocab_size = 320 if config.relora.r == 4 and config.method == "relora" else 300
    text = answer(written(tmp_path, configs))
    reason = "read other texts or tokens: their perplexities must not be compared"
    assert f"method=relora relora.r=4 and method=full_rank {reason}" in text
    with open(tmp_path / "sweeps/mine/report/tables/compare_paloma_perplexity.csv") as file:
        alike, refused = csv.DictReader(file)
    assert (refused["difference"], refused["p"], refused["note"]) == ("", "", reason)
    assert alike["p"] == alike["p_holm"] != ""
    pairs = comparisons.against(gather.gather(tmp_path, "mine"), reference=None)
    drawing = differences(pairs)
    assert reason in drawing.caption
    labels = [text.get_text() for ax in drawing.canvas.axes for text in ax.texts]
    assert labels == ["not compared"] * 2  # losses and perplexities; accuracies are of sentences


@pytest.mark.parametrize(
    ("lengths", "refused"), [((16, 32), {"losses", "perplexities"}), ((2048, 4096), {"losses"})]
)
def test_numbers_of_other_lengths_of_context_are_not_compared(
    tmp_path: Path, lengths: tuple[int, int], refused: set[str]
) -> None:
    """Windows have at most 2,048 tokens; BLiMP's sentences have no window."""
    configs = arms(2)
    for config in configs:
        config.model.max_seq_len = 4096
        config.data.seq_len = lengths[config.method == "relora"]
    for run in a_sweep(tmp_path, configs):
        record(run, loss=near(0.01, gap=0.3))
    folder = report.write(tmp_path, "mine").parent / "tables"
    said = {
        "compare_train_loss": "losses",
        "compare_paloma_perplexity": "perplexities",
        "compare_blimp_no_bos_accuracy": "accuracies",
    }
    for name, what in said.items():
        with open(folder / f"{name}.csv") as file:
            (row,) = csv.DictReader(file)
        reason = f"differ in data.seq_len: their {what} must not be compared"
        assert row["note"] == (reason if what in refused else "")
        assert (row["p"] == "") == (what in refused)
