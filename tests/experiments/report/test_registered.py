"""Comparisons that a file names: what they test, over what they adjust, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic import a_sweep, arms, record

from experiments.report import gather, page, redraw, registered
from experiments.stats import compare, holm
from relora_core.config import ConfigError

LOSS, PERPLEXITY, BLIMP = "train/loss", "eval/paloma/perplexity", "eval/blimp/no_bos/accuracy"
FULL, R2, R4 = "method=full_rank", "method=relora relora.r=2", "method=relora relora.r=4"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "draw", lambda *arguments: [])


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for run in a_sweep(tmp_path, arms(2, 4)):
        record(run)
    return tmp_path


@pytest.fixture
def write(tmp_path: Path):
    """Lines of YAML -> the file's path."""

    def write(*lines: str, paradigms: str = "{some: [binding_0, binding_2]}") -> Path:
        path = tmp_path / "comparisons.yaml"
        body = "".join(f"  - {{{line}}}\n" for line in lines)
        path.write_text(f"comparisons:\n{body}paradigms: {paradigms}\n")
        return path

    return write


def table_of(report: Path) -> list[dict[str, str]]:
    """The rows of a report's named comparisons."""
    return redraw.read_table(report.parent / "tables" / "registered.csv")


def test_each_line_is_tested_and_all_are_one_family(finished, write):
    path = write(
        f"arm: {R2}, reference: {FULL}, metric: {PERPLEXITY}, question: why",
        f"arm: {R4}, reference: {R2}, metric: {LOSS}",
        f"arm: {R4}, reference: {FULL}, metric: {BLIMP}",
    )
    report = page.write(finished, "mine", comparisons=path)
    rows = table_of(report)
    sweep = gather.gather(finished, "mine")
    full, two, four = sweep.arms
    tests = [
        compare(two.values(PERPLEXITY), full.values(PERPLEXITY), scale="log"),
        compare(four.values(LOSS), two.values(LOSS)),
        compare(four.values(BLIMP), full.values(BLIMP)),
    ]
    assert [float(row["difference"]) for row in rows] == [t.difference for t in tests]
    family = holm([1.0 if t.p is None else t.p for t in tests])
    assert [float(row["p_holm"] or 1.0) for row in rows] == family
    assert (rows[0]["question"], rows[1]["reference"]) == ("why", R2)
    text = (report.parent / "report.md").read_text()
    assert text.index("## Named comparisons") < text.index("## Comparisons\n")


def test_a_set_of_paradigms_stands_for_all_of_them(finished, write):
    path = write(f"arm: {R4}, reference: {FULL}, metric: {BLIMP}, paradigms: some")
    sweep = gather.gather(finished, "mine")
    (one,) = registered.read(path)
    assert one.paradigms == ["binding_0", "binding_2"]
    (comparison,) = registered.compare_all(sweep, [one])
    rows = [
        {row["uid"]: row["no_bos"] for row in run.tables["blimp_paradigms"]}
        for run in (sweep.arms[2].runs[1], sweep.arms[0].runs[1])
    ]
    means = [(row["binding_0"] + row["binding_2"]) / 2 for row in rows]
    values = registered._values(sweep.arms[2], one)
    assert values[1] == pytest.approx(means[0])
    assert comparison.n == 3
    for run in sweep.arms[2].runs:
        del run.tables["blimp_paradigms"][-1]
    (comparison,) = registered.compare_all(sweep, [one])
    assert comparison.difference is None  # rather than a mean over fewer


def test_a_paradigm_that_no_run_was_scored_on_is_refused(finished, write):
    line = f"arm: {R4}, reference: {FULL}, metric: {BLIMP}, paradigms: some"
    path = write(line, paradigms="{some: [bindin_0]}")
    with pytest.raises(ConfigError, match=r"got 'bindin_0' in some.*'binding_0'"):
        page.write(finished, "mine", comparisons=path)
    for run in (sweep := gather.gather(finished, "mine")).runs:
        run.tables.clear()  # before the runs: nothing is known yet
    (comparison,) = registered.compare_all(sweep, registered.read(path))
    assert comparison.difference is None


def test_the_family_is_what_was_named_whatever_could_be_tested(tmp_path, write):
    """Runs that diverge make no other comparison easier to pass."""
    lost = {(2, 1), (4, 0), (4, 1)}
    for run in a_sweep(tmp_path, arms(2, 4)):
        config = run.config()
        gone = config.method == "relora" and (config.relora.r, config.seed) in lost
        record(run, state="diverged" if gone else "finished")
    path = write(
        f"arm: {R2}, reference: {FULL}, metric: {BLIMP}",
        f"arm: {R2}, reference: {FULL}, metric: {BLIMP}, paradigms: some",
        f"arm: {R4}, reference: {FULL}, metric: {BLIMP}",
        f"arm: {R4}, reference: {R2}, metric: {LOSS}",
    )
    report = page.write(tmp_path, "mine", comparisons=path)
    rows = table_of(report)
    ps = [float(row["p"]) if row["p"] else 1.0 for row in rows]
    assert ps[2:] == [1.0, 1.0]
    assert [float(row["p_holm"]) for row in rows[:2]] == pytest.approx(holm(ps)[:2])
    assert [row["p_holm"] for row in rows[2:]] == ["", ""]
    assert [row["not_finite"] for row in rows[:3]] == ["1", "1", "0 1"]
    text = (report.parent / "report.md").read_text()
    named = text.partition("a file names:")[2].partition("\nCompared")[0]
    assert named.count("of the survivors only: no finite value at seed 1") == 2
    assert "one seed: no interval, of the survivors only: no finite value at seed 0, 1" in text


def test_perplexities_of_other_tokens_are_not_compared_because_a_file_names_them(tmp_path, write):
    configs = arms(2)
    for config in configs:
        config.model.vocab_size = 320 if config.method == "relora" else 300
    for run in a_sweep(tmp_path, configs):
        record(run)
    path = write(*(f"arm: {R2}, reference: {FULL}, metric: {m}" for m in (PERPLEXITY, LOSS, BLIMP)))
    text = (page.write(tmp_path, "mine", comparisons=path).parent / "report.md").read_text()
    named = text.partition("a file names:")[2].partition("\nCompared")[0]
    assert "read other texts or tokens: their perplexities must not be compared" in named
    assert "read other texts or tokens: their losses must not be compared" in named
    assert f"{R2} ends" in named  # BLiMP's accuracy is of sentences
    assert "training loss: " not in text.partition("\nCompared")[2].partition("## ")[0]


def test_arms_that_are_not_shown_are_compared_all_the_same(finished, write):
    path = write(f"arm: {R4}, reference: {R2}, metric: {LOSS}")
    report = page.write(finished, "mine", comparisons=path, arms=["*full*"])
    assert "## Named comparisons" in (report.parent / "report.md").read_text()


def test_an_arm_that_has_no_runs_of_its_own_is_compared_by_those_of_its_equal(finished, write):
    path = finished / "sweeps" / "mine" / "plan.json"
    plan = json.loads(path.read_text()) | {"same_arms": {"common": R4}}
    path.write_text(json.dumps(plan))
    lines = [f"arm: {name}, reference: {FULL}, metric: {LOSS}" for name in ("common", R4)]
    one, two = table_of(page.write(finished, "mine", comparisons=write(*lines)))
    assert (one["arm"], two["arm"]) == ("common", R4)
    assert one["difference"] == two["difference"] != ""


def test_comparisons_without_runs_are_said_to_be_untested(tmp_path, write):
    a_sweep(tmp_path, arms(2))
    path = write(f"arm: {R2}, reference: {FULL}, metric: {LOSS}")
    report = page.write(tmp_path, "mine", comparisons=path)
    assert "1 comparison could not be tested." in (report.parent / "report.md").read_text()


REFUSED = {
    f"arm: r=2, reference: {FULL}, metric: train/los": r"metric of comparison 1 .*train/loss",
    f"arm: {R2}, reference: {FULL}": "must have metric, too",
    f"arm: {R2}, referense: {FULL}, metric: {LOSS}": "got 'referense'.*reference",
    f"arm: {R2}, reference: {FULL}, metric: {LOSS}, paradigms: some": "need a metric of BLiMP",
    f"arm: {R2}, reference: {FULL}, metric: {BLIMP}, paradigms: sme": "got 'sme'.*some",
    f"arm: relora.r=3, reference: {FULL}, metric: {LOSS}": "arm in --comparisons must name one arm",
    f"arm: relora.r=2, reference: {FULL}, metric: {LOSS}": "arm in --comparisons must name one arm",
    f"arm: {R2}, reference: relora, metric: {LOSS}": "reference in --comparisons must name one arm",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(finished, write, line):
    with pytest.raises(ConfigError, match=REFUSED[line]):
        page.write(finished, "mine", comparisons=write(line))
    assert not (finished / "sweeps" / "mine" / "report").exists()


def test_a_name_stands_for_no_longer_one(tmp_path, write):
    """The table would say lora, of ReLoRA's numbers."""
    for run in a_sweep(tmp_path, arms(2)):
        record(run)
    path = write(f"arm: lora, reference: {FULL}, metric: {LOSS}")
    with pytest.raises(ConfigError, match=r"arm in --comparisons must name one arm.*'lora'"):
        page.write(tmp_path, "mine", comparisons=path)


@pytest.mark.parametrize("text", ["", "comparisons: 3", "- a", "comparisons: [1]", "a: [", "\x00"])
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "comparisons.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        registered.read(path)
    assert "\n" not in str(error.value)


def test_a_set_without_a_paradigm_is_refused(write):
    path = write(f"arm: a, reference: b, metric: {BLIMP}, paradigms: some", paradigms="{some: []}")
    with pytest.raises(ConfigError, match="each with a list"):
        registered.read(path)
