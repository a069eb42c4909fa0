"""A report says what its runs found, and what it cannot say."""

from __future__ import annotations

import csv
import html.parser
import json
import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import STEPS, a_config, a_sweep, arms, attempt, loss_of, record

from experiments.disk.run_dir import RunDir
from experiments.report import compare, comparisons, document, gather, tables
from experiments.report import page as report
from experiments.report.document import Bullets, Code, Document, Notice, Section, Table
from experiments.stats import holm
from relora_core.config import BlimpConfig, ConfigError, EvalConfig, RunConfig, TrainConfig


@pytest.fixture(autouse=True)
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Leaves figures out, which take seconds (`test_figures.py` is about them); what draws them."""
    real = report.draw
    monkeypatch.setattr(report, "draw", lambda *arguments: [])
    return real


def finished(output_dir: Path, configs: Sequence[RunConfig], *, name: str = "mine") -> list[RunDir]:
    """A sweep whose runs have all finished."""
    runs = a_sweep(output_dir, configs, name=name)
    for run in runs:
        record(run)
    return runs


def table(page: Path, name: str) -> list[dict[str, str]]:
    with open(page.parent / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def text(page: Path) -> str:
    return (page.parent / "report.md").read_text()


# content ----------------------------------------------------------------------------------------
def test_the_tables_hold_the_numbers_of_the_runs(tmp_path: Path) -> None:
    finished(tmp_path, arms(2, 4))
    page = report.write(tmp_path, "mine")
    rows = {r["arm"]: r for r in table(page, "arms") if r["metric"] == "train/loss"}
    losses = [loss_of(a_config(r=2, seed=seed)) for seed in range(3)]
    row = rows["method=relora relora.r=2"]
    assert float(row["mean"]) == pytest.approx(statistics.fmean(losses))
    half = 4.302653 * statistics.stdev(losses) / math.sqrt(3)  # t(0.975, 2)
    assert float(row["high"]) - float(row["mean"]) == pytest.approx(half, rel=1e-5)
    compared = {r["arm"]: r for r in table(page, "compare_train_loss")}
    gap = [
        loss_of(a_config(r=2, seed=s)) - loss_of(a_config(method="full_rank", seed=s))
        for s in range(3)
    ]
    row = compared["method=relora relora.r=2"]
    assert float(row["difference"]) == pytest.approx(statistics.fmean(gap))
    assert row["reference"] == "method=full_rank"
    adjusted = holm([float(r["p"]) for r in compared.values()])
    assert [float(r["p_holm"]) for r in compared.values()] == adjusted
    assert f"{statistics.fmean(losses):.3f} [" in text(page)


def test_the_cost_has_speed_and_both_mfus_of_runs_that_have_them(tmp_path: Path) -> None:
    """Medians; runs on a CPU, and those of earlier versions, have none."""
    runs = a_sweep(tmp_path, arms(2, seeds=[0, 1, 2]))
    for run, mfu in zip(runs, [0.1, 0.2, 0.6, None, None, None], strict=True):
        more = {} if mfu is None else {"perf/mfu": mfu, "perf/mfu_6n": 2 * mfu}
        record(run, perf={"perf/tokens_per_s": 2000.0, **more})
    page = report.write(tmp_path, "mine")
    full, relora = table(page, "cost")
    assert (full["mfu"], full["mfu_6n"], full["tokens_per_s"]) == ("0.2", "0.4", "2000.0")
    assert (relora["mfu"], relora["mfu_6n"], relora["tokens_per_s"]) == ("", "", "2000.0")
    assert "| 2,000 | 20 % (40 %) |" in text(page)
    assert "| 2,000 | - |" in text(page)


def test_a_perplexity_has_its_geometric_mean(tmp_path: Path) -> None:
    finished(tmp_path, arms(2))
    rows = table(report.write(tmp_path, "mine"), "arms")
    (row,) = (r for r in rows if "full" in r["arm"] and r["metric"] == "eval/paloma/perplexity")
    losses = [loss_of(a_config(method="full_rank", seed=seed)) for seed in range(3)]
    assert float(row["mean"]) == pytest.approx(math.exp(statistics.fmean(losses)))


def test_every_run_is_counted_and_those_that_did_not_finish_are_named(tmp_path: Path) -> None:
    runs = a_sweep(tmp_path, arms(2))
    for run, state in zip(runs, ["finished", "finished", "diverged", "failed"], strict=False):
        record(run, state=state)
    shown = text(report.write(tmp_path, "mine"))
    assert "2 of 6 runs finished (2 planned, 1 diverged, 1 failed)" in shown
    assert "diverged at step 40 of 40: `method=full_rank seed=2`" in shown
    assert "flatters an arm that diverges" in shown
    assert "| all | 2 | 2 | 1 | 1 |" in shown


def test_means_are_of_finished_runs_alone(tmp_path: Path) -> None:
    runs = a_sweep(tmp_path, arms(seeds=range(4)))
    for run, state in zip(runs, ["finished", "finished", "diverged", "failed"], strict=True):
        record(run, state=state)
    row = table(report.write(tmp_path, "mine"), "arms")[0]
    assert (row["n"], row["left_out"], row["planned"]) == ("2", "1", "4")


def test_one_seed_has_no_interval_and_no_test(tmp_path: Path) -> None:
    finished(tmp_path, arms(2, seeds=[5]))
    page = report.write(tmp_path, "mine")
    assert all(row["low"] == row["high"] == "" for row in table(page, "arms"))
    assert all(row["p"] == "" for row in table(page, "compare_train_loss"))
    assert "No arm has more than one finished seed" in text(page)


def test_a_pair_without_a_test_hides_no_assumption_of_others(tmp_path: Path) -> None:
    for run in a_sweep(tmp_path, arms(2, 4)):
        config = run.config()
        lost = config.method == "relora" and config.relora.r == 2 and config.seed > 0
        record(run, state="failed" if lost else "finished")
    page = text(report.write(tmp_path, "mine"))
    assert "paired t, unit seed: assumes differences at common seeds independent" in page
    assert "assumes nothing" not in page


def test_arms_without_common_seeds_are_not_paired(tmp_path: Path) -> None:
    configs = [a_config(method="full_rank", seed=s) for s in (0, 1, 2)]
    configs += [a_config(r=2, seed=s) for s in (3, 4, 5)]
    finished(tmp_path, configs)
    (row,) = table(report.write(tmp_path, "mine"), "compare_train_loss")
    assert row["kind"] == "welch"


def test_different_code_is_said(tmp_path: Path) -> None:
    runs = finished(tmp_path, arms(2))
    assert "different code" not in text(report.write(tmp_path, "mine"))
    for run in runs[3:]:
        record(run, code="other")
    assert "different code of relora_core" in text(report.write(tmp_path, "mine"))


def test_losses_that_are_means_over_other_numbers_of_updates_are_named(tmp_path: Path) -> None:
    """Earlier versions took those since the last log; at the default those are the ten, too."""
    one, _ = finished(tmp_path, arms(4, seeds=(0,)))
    caution = f"The loss of {one.run_id} is a mean over the last 20 updates, as an earlier version"
    assert one.result()["loss_steps"] is None
    assert not tables.other_losses(gather.gather(tmp_path, "mine").runs)
    lines = one.events_path.read_text().splitlines(keepends=True)
    rest = [line for line in lines if '"kind": "train", "step": 30' not in line]
    assert len(rest) == len(lines) - 1
    one.events_path.write_text("".join(rest))
    assert caution in text(report.write(tmp_path, "mine"))
    one.write_result(one.result() | {"loss_steps": 10})
    assert not tables.other_losses(gather.gather(tmp_path, "mine").runs)


def test_arms_of_different_length_are_said(tmp_path: Path) -> None:
    longer = a_config(r=2, train=TrainConfig(steps=2 * STEPS, batch_size=4))
    finished(tmp_path, [a_config(r=2), longer])
    assert "not at one budget" in text(report.write(tmp_path, "mine"))


# the reference ----------------------------------------------------------------------------------
def test_the_reference_can_be_chosen_by_part_of_its_name(tmp_path: Path) -> None:
    finished(tmp_path, arms(2, 4))
    rows = table(report.write(tmp_path, "mine", reference="r=4"), "compare_train_loss")
    assert {row["reference"] for row in rows} == {"method=relora relora.r=4"}
    assert len(rows) == 2


def test_arms_can_be_left_out_and_each_compared_with_the_one_before(tmp_path: Path) -> None:
    finished(tmp_path, arms(2, 4, 8))
    page = report.write(tmp_path, "mine", arms=["*r=2", "*r=[48]"], reference="previous")
    names = [f"method=relora relora.r={r}" for r in (2, 4, 8)]
    rows = table(page, "compare_train_loss")
    assert [(r["arm"], r["reference"]) for r in rows] == [
        (names[1], names[0]),
        (names[2], names[1]),
    ]
    assert [r["arm"] for r in table(page, "arms") if r["metric"] == "train/loss"] == names
    with pytest.raises(ConfigError, match=r"--arms must match one of .*, got 'r=16'"):
        report.write(tmp_path, "mine", arms=["r=16"])


@pytest.mark.parametrize("word", ["relora", "ful_rank", ""])
def test_a_reference_that_is_not_one_arm_is_one_line(tmp_path: Path, word: str) -> None:
    a_sweep(tmp_path, arms(2, 4))
    with pytest.raises(ConfigError, match=r"--reference must name one arm") as error:
        report.write(tmp_path, "mine", reference=word)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweeps" / "mine" / "report").exists()


def test_each_arm_is_compared_with_the_full_rank_arm_of_its_model(tmp_path: Path) -> None:
    def config(*, method: str, steps: int) -> RunConfig:
        return a_config(method=method, train=TrainConfig(steps=steps, batch_size=4))

    a_sweep(
        tmp_path,
        [config(method=m, steps=s) for s in (20, 40) for m in ("full_rank", "relora")],
    )
    pairs = comparisons.against(gather.gather(tmp_path, "mine"), reference=None)
    steps = [[a.runs[0].config.train.steps for a in pair] for pair in pairs]
    assert steps == [[20, 20], [40, 40]]


def test_the_reference_of_full_rank_arms_is_that_of_adamw(tmp_path: Path) -> None:
    """Muon's may share more with the others: here the weight decay."""
    adamw = TrainConfig(steps=20, batch_size=4, weight_decay=0.1)
    muon = TrainConfig(steps=20, batch_size=4, optimizer="muon")
    low = TrainConfig(steps=20, batch_size=4)
    trains = {"full_rank": [muon, adamw], "relora": [low]}
    a_sweep(tmp_path, [a_config(method=m, train=t) for m, ts in trains.items() for t in ts])
    pairs = comparisons.against(gather.gather(tmp_path, "mine"), reference=None)
    references = [reference.runs[0].config.train for _, reference in pairs]
    assert len(pairs) == 2  # Muon's arm is one of those compared
    assert {train.optimizer for train in references} == {"adamw"}


# odd sweeps -------------------------------------------------------------------------------------
def nothing(runs: list[Any]) -> None:
    pass


def torn(runs: list[Any]) -> None:
    for run in runs:
        attempt(run, 1, start=0, stop=30, loss=2.0)
        run.events_path.write_bytes(run.events_path.read_bytes()[:-30])


def infinite(runs: list[Any]) -> None:
    for run in runs:
        record(run, loss=lambda config: math.inf)


def not_a_number(runs: list[Any]) -> None:
    for run in runs:
        record(run, loss=lambda config: math.nan if config.seed else 1.0)


def equal(runs: list[Any]) -> None:
    for run in runs:
        record(run, loss=lambda config: 2.0)


def mixed(runs: list[Any]) -> None:
    for run in runs:
        record(run)
    for run in runs[::2]:
        result = run.result()
        result["metrics"] = {"train/loss": 2.0, "another/metric": 1.0}
        run.write_result(result)


def damaged(runs: list[Any]) -> None:
    rng = random.Random(0)
    for run in runs:
        record(run)
        for path in (run.events_path, run.result_path, run.status_path):
            content = bytearray(path.read_bytes())
            for _ in range(20):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(bytes(content))


def bare(runs: list[Any]) -> None:
    for run in runs:
        record(run)
        run.events_path.write_text('{"kind": "train"}\n[]\n3\n{"kind": "eval", "step": 1}\n')


ODD = [nothing, torn, infinite, not_a_number, equal, mixed, damaged, bare]


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_an_odd_sweep_has_a_whole_report(
    tmp_path: Path, make: Callable[[list[Any]], None], seeds: list[int]
) -> None:
    make(a_sweep(tmp_path, arms(2, seeds=seeds)))
    page = report.write(tmp_path, "mine")
    shown = text(page)
    assert "could not be made" not in shown
    assert f"of {2 * len(seeds)} runs finished" in shown
    assert not re.search(r"\bnan\b|\[[^\]]*inf", shown)  # an infinite interval is none


def test_a_section_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_sweep(tmp_path, arms(2))
    monkeypatch.setattr(tables, "cost", lambda sweep: 1 / 0)
    shown = text(report.write(tmp_path, "mine"))
    assert "could not be made (ZeroDivisionError" in shown
    assert "## Runs" in shown


def test_figures_that_fail_leave_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Callable[..., Any]
) -> None:
    from experiments.report.figures import catalogue

    monkeypatch.setattr(report, "draw", draw)
    a_sweep(tmp_path, arms(2))
    monkeypatch.setattr(catalogue, "all_figures", lambda *a, **k: 1 / 0)
    assert "figures could not be drawn (ZeroDivisionError" in text(report.write(tmp_path, "mine"))


# files ------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_page_and_markdown_show_the_same_and_every_figure_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Callable[..., Any]
) -> None:
    monkeypatch.setattr(report, "draw", draw)
    finished(tmp_path, arms(2))
    page = report.write(tmp_path, "mine")
    content, shown = page.read_text(), text(page)
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", shown)
    assert links
    assert all((page.parent / link).exists() for link in links)
    assert content.count("<figure>") == len(links) == content.count("data:image/svg+xml;base64,")
    assert not re.search(r'(src|href)="(?!data:|#)', content)
    headings = re.findall(r"^## (.*)", shown, flags=re.MULTILINE)
    assert headings == re.findall(r"<h2[^>]*>(.*?)</h2>", content)


def test_the_data_are_there_point_by_point(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    runs = finished(tmp_path, arms(2))
    rows = pq.read_table(report.write(tmp_path, "mine").parent / "data.parquet").to_pylist()
    values = {(r["run_id"], r["metric"], r["step"]): r["value"] for r in rows}
    wanted = {
        (run.run_id, key, e["step"]): v
        for run in runs
        for e in run.events()
        for key, v in e["metrics"].items()
    }
    assert values == wanted


def test_a_report_that_is_written_again_keeps_no_old_table(tmp_path: Path) -> None:
    runs = finished(tmp_path, arms(2))
    page = report.write(tmp_path, "mine")
    assert table(page, "compare_train_loss")
    for run in runs:
        run.result_path.unlink()
    report.write(tmp_path, "mine")
    assert not (page.parent / "tables" / "compare_train_loss.csv").exists()


def test_an_output_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    a_sweep(tmp_path, arms(2))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output must be a folder"):
        report.write(tmp_path, "mine", output=tmp_path / "file")


# layout -----------------------------------------------------------------------------------------
class Cells(html.parser.HTMLParser):
    """Texts of a page's cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def test_odd_text_survives_every_layout() -> None:
    odd = 'a | b <script>alert("1")</script> & c, "d"'
    cells = Table(name="t", title="T", columns=["x", "y"], rows=[[odd, "1.5"]])
    blocks = [odd, Code(odd), Notice(odd), Bullets([odd]), cells]
    made = Document(title=odd, lead=[], sections=[Section(title="S", blocks=blocks)])
    page = document.to_html(made)
    assert "<script" not in page
    assert Cells(page).rows == [["x", "y"], [odd, "1.5"]]
    lines = [x for x in document.to_markdown(made).splitlines() if x.startswith("| a")]
    assert [len(re.split(r"(?<!\\)\|", line)) for line in lines] == [4]
    assert list(csv.reader(document.to_csv(cells).splitlines())) == [["x", "y"], [odd, "1.5"]]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.00012345, "0.0001234"),
        (1.23456, "1.235"),
        (99999.6, "100,000"),
        (-12345.6, "-12,346"),
        (1.5e12, "1.50e+12"),
        (None, "-"),
    ],
)
def test_numbers_keep_four_digits(value: float | None, shown: str) -> None:
    assert document.number(value) == shown


# two sweeps -------------------------------------------------------------------------------------
def two(tmp_path: Path, *, shift: float = 0.5) -> tuple[tuple[Path, str], tuple[Path, str]]:
    """The same plan in two output folders, the second with another loss."""
    places = (tmp_path / "before", "mine"), (tmp_path / "after", "mine")
    for (folder, name), extra in zip(places, (0.0, shift), strict=True):
        for run in a_sweep(folder, arms(2), name=name):
            noise = random.Random(run.run_id + name + str(extra)).gauss(0, 0.01)
            record(run, loss=lambda c, extra=extra, noise=noise: loss_of(c) + extra + noise)
    return places


def test_two_sweeps_are_compared_arm_by_arm_on_common_seeds(tmp_path: Path) -> None:
    page = compare.write(*two(tmp_path))
    rows = table(page, "compare_train_loss")
    assert {row["arm"] for row in rows} == {"method=full_rank", "method=relora relora.r=2"}
    for row in rows:
        assert (row["kind"], row["n"]) == ("paired", "3")
        assert float(row["low"]) < 0.5 < float(row["high"])
        assert float(row["difference"]) == pytest.approx(0.5, abs=0.03)
    assert "6 pairs of finished runs" in text(page)


def test_arms_whose_settings_were_changed_are_matched_by_name(tmp_path: Path) -> None:
    longer = TrainConfig(steps=STEPS, batch_size=4, lr=0.1)
    changed: dict[str, Any] = {"train": longer}
    for name, changes in (("one", {}), ("two", changed)):
        finished(tmp_path, [a_config(r=r, **changes) for r in (2, 3)], name=name)
    page = compare.write((tmp_path, "one"), (tmp_path, "two"))
    rows = table(page, "settings")
    assert [(r["setting"], r["first"], r["second"]) for r in rows] == [
        ("train.lr", "0.0003", "0.1")
    ] * 2
    assert "Matched by name" in text(page)


def test_runs_that_both_sweeps_have_are_said_to_be_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        finished(tmp_path, arms(2), name=name)
    assert "compared with itself" in text(compare.write((tmp_path, "one"), (tmp_path, "two")))


def test_runs_of_an_arm_at_other_seeds_are_others(tmp_path: Path) -> None:
    for name, seeds in (("one", (0, 1)), ("two", (2, 3))):
        finished(tmp_path, arms(2, seeds=seeds), name=name)
    page = compare.write((tmp_path, "one"), (tmp_path, "two"))
    assert "compared with itself" not in text(page)
    assert "no difference is of pairs" in text(page)
    assert {row["kind"] for row in table(page, "compare_train_loss")} == {"welch"}


def test_what_each_sweep_has_for_all_its_runs_may_differ_between_the_two(tmp_path: Path) -> None:
    model = replace(a_config().model, vocab_size=72)
    blimp = BlimpConfig(enabled=True, path="p", max_pairs=7, fingerprint="f")
    one: dict[str, Any] = {"eval": EvalConfig(blimp=blimp)}
    two: dict[str, Any] = {"eval": EvalConfig(blimp=replace(blimp, max_pairs=9)), "model": model}
    for name, changes in (("one", one), ("two", two)):
        finished(tmp_path, [a_config(r=r, **changes) for r in (2, 3)], name=name)
    page = text(compare.write((tmp_path, "one"), (tmp_path, "two")))
    assert "r=3 read other texts or tokens in each sweep: their losses and perplexities" in page
    assert "The sweeps differ in eval.blimp.max_pairs: scores of an eval whose" in page


NOISY: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dropout": ({"dropout": 0.1}, {}, "with dropout (relora.dropout) in method=relora relora.r=2:"),
    "nested": ({"nested_rank": True}, {}, "random rank (relora.nested_rank) in method=relora rel"),
    "restarts": ({"dropout": 0.1}, {"method": "lora", "dropout": 0.1}, "in method=relora rel"),
    "the same": ({"dropout": 0.1}, {"dropout": 0.1}, ""),
    "no effect": ({}, {"method": "full_rank", "dropout": 0.1, "nested_rank": True}, ""),
}


@pytest.mark.parametrize("case", NOISY)
def test_losses_that_training_draws_something_for_are_said_to_be(tmp_path: Path, case: str) -> None:
    """In a report, and where two sweeps differ in it."""
    one, two, said = NOISY[case]
    configs = []
    for r, knobs in enumerate((one, two), start=2):
        changes: dict[str, Any] = dict(knobs)
        config = a_config(r=r, method=changes.pop("method", "relora"))
        config.relora = replace(config.relora, **changes)
        configs.append(config)
    finished(tmp_path, configs)
    page = text(report.write(tmp_path, "mine"))
    assert ("Training loss is measured as arms train" in page) == bool(said)
    assert said in page


def test_a_change_of_dropout_between_two_sweeps_is_said(tmp_path: Path) -> None:
    for name, dropout in (("one", 0.0), ("two", 0.1), ("three", 0.1)):
        config = a_config()
        config.relora = replace(config.relora, dropout=dropout, alpha=8 * len(name))
        finished(tmp_path, [config], name=name)
    page = text(compare.write((tmp_path, "one"), (tmp_path, "two")))
    assert "with dropout (relora.dropout) in method=relora relora.r=4: a difference" in page
    page = text(compare.write((tmp_path, "two"), (tmp_path, "three")))
    assert "Training loss is measured" not in page


def test_sweeps_with_rows_of_other_lengths_are_said_to_differ(tmp_path: Path) -> None:
    data = replace(a_config().data, seq_len=32)
    changed: dict[str, Any] = {"data": data}
    for name, changes in (("one", {}), ("two", changed)):
        configs = [a_config(seed=seed, **changes) for seed in (0, 1)]
        finished(tmp_path, configs, name=name)
    page = compare.write((tmp_path, "one"), (tmp_path, "two"))
    assert "relora.r=4 differ in data.seq_len in each sweep: their losses, and perpl" in text(page)
    for name, what in (("train_loss", "losses"), ("paloma_perplexity", "perplexities")):
        (row,) = table(page, f"compare_{name}")
        assert (row["difference"], row["p"]) == ("", "")
        assert row["note"] == f"differ in data.seq_len: their {what} must not be compared"


@pytest.mark.parametrize("alike", [True, False])
def test_separate_evaluations_of_two_sweeps_are_compared_if_alike(
    tmp_path: Path, alike: bool
) -> None:
    places = two(tmp_path)
    for (folder, _), digest in zip(places, ("d", "d" if alike else "e"), strict=True):
        for run in map(RunDir, (folder / "runs").iterdir()):
            content = {"name": "eval", "section": "blimp", "step": STEPS, "digest": digest}
            content |= {"metrics": {"eval/blimp/no_bos/accuracy": 0.5}, "tables": {}}
            path = run.evals / "eval" / f"step-{STEPS:08d}-blimp.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content | {"finished": 1.0}))
    page = compare.write(*places)
    compared = (page.parent / "tables" / "compare_blimp_no_bos_accuracy.csv").exists()
    assert compared == alike
    assert ("under the name eval had other settings" in text(page)) != alike


def test_sweeps_without_common_arms_have_nothing_to_compare(tmp_path: Path) -> None:
    for name, r in (("one", 2), ("two", 3)):
        finished(tmp_path, [a_config(r=r)], name=name)
    assert "no arm in common" in text(compare.write((tmp_path, "one"), (tmp_path, "two")))


def test_a_sweep_is_not_compared_with_itself(tmp_path: Path) -> None:
    a_sweep(tmp_path, arms(2))
    with pytest.raises(ConfigError, match="must be two sweeps"):
        compare.write((tmp_path, "mine"), (tmp_path, "mine"))


@pytest.mark.slow
def test_the_report_needs_neither_torch_nor_mlflow(tmp_path: Path) -> None:
    import subprocess
    import sys

    finished(tmp_path, arms(2))
    code = (
        "import sys; from experiments.report import page as report\n"
        "report.draw = lambda *a: []\n"
        f"report.write({json.dumps(str(tmp_path))}, 'mine')\n"
        "print([m for m in ('torch', 'mlflow', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_results_and_comparisons_are_there_for_latex(tmp_path: Path) -> None:
    runs = finished(tmp_path, arms(2))
    folder = report.write(tmp_path, "mine").parent / "tables"
    assert r"method=relora relora.r=2 &" in (folder / "arms.tex").read_text()
    assert (
        r"\label{tab:mine-compare-paloma-perplexity}"
        in (folder / "compare_paloma_perplexity.tex").read_text()
    )
    for run in runs:
        run.result_path.unlink()
    report.write(tmp_path, "mine")
    assert not list(folder.glob("*.tex"))
