"""What is read of a sweep is what its runs recorded, whatever happened to them."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from synthetic import SECONDS, STEPS, TOKENS, a_config, a_sweep, arms, attempt, loss_of, record

from experiments.__main__ import show
from experiments.disk import plans
from experiments.disk.evaluations import settings_digest
from experiments.disk.event_log import EventLog
from experiments.disk.run_dir import RunDir
from experiments.report import blimp, data
from experiments.report.gather import gather
from experiments.run.runner import make_result
from experiments.run.single import print_result
from relora_core.config import (
    GRAMMAR_DOCUMENTS,
    GRAMMAR_PAIRS,
    BlimpConfig,
    ConfigError,
    DynamicsConfig,
    EvalConfig,
    PalomaConfig,
)
from relora_core.events import Event


def one_run(tmp_path: Path) -> RunDir:
    return a_sweep(tmp_path, [a_config()])[0]


def test_arms_are_settings_and_their_runs_seeds(tmp_path: Path) -> None:
    for run in a_sweep(tmp_path, arms(2, 4)):
        record(run)
    sweep = gather(tmp_path, "mine")
    names = [(arm.name, [run.seed for run in arm.runs]) for arm in sweep.arms]
    seeds = [0, 1, 2]
    assert names == [
        ("method=full_rank", seeds),
        ("method=relora relora.r=2", seeds),
        ("method=relora relora.r=4", seeds),
    ]
    assert sweep.counts == {"finished": 9}
    for arm in sweep.arms:
        values = arm.values("train/loss")
        assert values == {run.seed: pytest.approx(loss_of(run.config)) for run in arm.runs}


def test_what_varies_is_told_and_what_follows_from_the_method_is_not(tmp_path: Path) -> None:
    a_sweep(tmp_path, arms(2, 4))
    sweep = gather(tmp_path, "mine")
    assert sweep.varies == {
        "method": ["full_rank", "relora"],
        "relora.r": [2, 4],
        "seed": [0, 1, 2],
    }
    assert sweep.fixed["train.steps"] == STEPS
    assert sweep.fixed["relora.reset_frequency"] == 20
    assert not sweep.varies.keys() & sweep.fixed.keys()


def test_a_knob_that_is_left_out_of_the_identity_at_its_old_value_varies(tmp_path: Path) -> None:
    dynamics = DynamicsConfig(every_steps=10, what=["base"])
    other = dataclasses.replace(dynamics, what=["weight"])  # as before: not in the identity
    a_sweep(tmp_path, [a_config(dynamics=dynamics), a_config(dynamics=other)])
    assert "dynamics.what" in gather(tmp_path, "mine").varies


def test_a_wider_plan_changes_no_arms_colour(tmp_path: Path) -> None:
    a_sweep(tmp_path, arms(2))
    before = {arm.arm_id: arm.colour for arm in gather(tmp_path, "mine").arms}
    a_sweep(tmp_path, arms(2, 3, 4))
    after = {arm.arm_id: arm.colour for arm in gather(tmp_path, "mine").arms}
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after)


def test_arms_of_one_hue_differ_by_colour_and_neighbours_by_line_style(tmp_path: Path) -> None:
    a_sweep(tmp_path, [a_config(r=r) for r in range(1, 12)])
    arms = gather(tmp_path, "mine").arms
    assert len({arm.colour for arm in arms}) == len(arms) == 11
    assert all(one.style != other.style for one, other in pairwise(arms))


def test_a_curve_has_every_axis(tmp_path: Path) -> None:
    record(one_run(tmp_path), world=4)
    (run,) = gather(tmp_path, "mine").runs
    points = run.curves["train/loss"]
    assert [p.step for p in points] == [10, 20, 30, 40]
    assert [p.tokens for p in points] == [TOKENS * p.step for p in points]
    hours = [4 * SECONDS * p.step / 3600 for p in points]
    assert [p.gpu_hours for p in points] == pytest.approx(hours)
    assert [p.gpu_hours for p in run.curves["eval/paloma/perplexity"]] == pytest.approx(hours)
    assert run.cost.gpu_hours == pytest.approx(hours[-1])
    assert (run.cost.tokens, run.restarts) == (TOKENS * STEPS, [20, 40])


def test_what_a_kill_took_back_is_in_no_curve_and_in_the_cost(tmp_path: Path) -> None:
    run = one_run(tmp_path)
    attempt(run, 1, start=0, stop=30, loss=9.0)  # killed; its checkpoint is of step 20
    attempt(run, 2, start=20, stop=40, loss=1.0)
    expected = [e for e in run.events() if "train/loss" in e["metrics"]]
    (gathered,) = gather(tmp_path, "mine").runs
    points = [(p.step, p.value) for p in gathered.curves["train/loss"]]
    assert points == [(e["step"], e["metrics"]["train/loss"]) for e in expected]
    assert [step for step, _ in points] == [10, 20, 30, 40]
    assert gathered.restarts == [20, 40]
    assert gathered.cost.gpu_hours == pytest.approx(SECONDS * 40 / 3600)
    assert gathered.cost.all_hours == pytest.approx((30 + 20) * 100 / 3600)


def test_processes_of_each_attempt_count_for_its_steps(tmp_path: Path) -> None:
    run = one_run(tmp_path)
    attempt(run, 1, start=0, stop=20, loss=1.0, world=1)
    attempt(run, 2, start=20, stop=40, loss=1.0, world=4)
    (gathered,) = gather(tmp_path, "mine").runs
    assert gathered.cost.gpu_hours == pytest.approx((20 + 4 * 20) * SECONDS / 3600)


@pytest.mark.parametrize("cut", [1, 7, 40, 150])
def test_a_line_that_is_being_written_is_left_out(tmp_path: Path, cut: int) -> None:
    run = one_run(tmp_path)
    attempt(run, 1, start=0, stop=40, loss=1.0)
    content = run.events_path.read_bytes()
    run.events_path.write_bytes(content[:-cut])
    (gathered,) = gather(tmp_path, "mine").runs
    assert gathered.state != "unreadable"
    assert [p.step for p in gathered.curves["train/loss"]] == [10, 20, 30, 40]
    assert gathered.tables["blimp_paradigms"]  # the newest whole one


def test_a_table_that_a_kill_tore_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    run = one_run(tmp_path)
    attempt(run, 1, start=0, stop=40, loss=1.0)
    lines = run.events_path.read_text().splitlines(keepends=True)
    torn = lines[-1][: lines[-1].index("}") + 1]
    run.events_path.write_text("".join([*lines[:-1], torn + "\n"]))
    (gathered,) = gather(tmp_path, "mine").runs
    assert len(gathered.tables["blimp_paradigms"]) == 6


def test_runs_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    runs = a_sweep(tmp_path, arms(2, seeds=range(4)))
    states = ["finished", "diverged", "failed", "cancelled"]
    for run, state in zip(runs, states, strict=False):
        record(run, state=state)
    runs[5].status_path.write_text("{")
    (tmp_path / "runs" / runs[6].run_id / "config.json").unlink()
    sweep = gather(tmp_path, "mine")
    counts = dict.fromkeys(states, 1) | {"planned": 3, "failed": 2}
    assert sweep.counts == counts
    assert "damaged" in str(sweep.arms[1].runs[1].reason)


def test_only_finished_runs_have_values_and_diverged_ones_are_seen_to_be_lost(
    tmp_path: Path,
) -> None:
    runs = a_sweep(tmp_path, [a_config(seed=seed) for seed in range(4)])
    for run, state in zip(runs, ["finished", "diverged", "failed"], strict=False):
        record(run, state=state)
    (arm,) = gather(tmp_path, "mine").arms
    values = arm.values("train/loss")
    assert values[0] == pytest.approx(loss_of(runs[0].config()))
    assert math.isnan(values[1])
    assert set(values) == {0, 1}
    assert arm.values("nobody/measured") == {}


def diverged_between_evals(tmp_path: Path) -> RunDir:
    run = one_run(tmp_path)
    record(run, state="diverged")
    kept = [e for e in run.raw_events() if e["kind"] not in ("eval", "table") or e["step"] < STEPS]
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in kept))
    run.write_result(make_result(run, state="diverged", attempt=1, seconds=1.0))
    return run


def test_what_a_run_measured_before_it_diverged_is_no_final_number(tmp_path: Path) -> None:
    diverged_between_evals(tmp_path)
    (gathered,) = gather(tmp_path, "mine").runs
    assert math.isnan(gathered.metrics["train/loss"])
    assert gathered.curves["eval/paloma/perplexity"][-1].step < STEPS
    assert "eval/paloma/perplexity" not in gathered.metrics


def test_a_diverged_runs_numbers_are_the_reports_wherever_they_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = diverged_between_evals(tmp_path)
    (gathered,) = gather(tmp_path, "mine").runs
    assert show(run)["metrics"] == pytest.approx(gathered.metrics, nan_ok=True)
    print_result(run)
    printed = capsys.readouterr().out
    assert f"diverged at step {STEPS}\n" in printed
    assert "train/loss" in printed
    assert "perplexity" not in printed


def test_an_evaluation_apart_from_training_is_part_of_the_run(tmp_path: Path) -> None:
    run = one_run(tmp_path)
    record(run)
    for step, value in ((20, 0.5), (STEPS, 0.75)):
        content = {"name": "later", "section": "blimp", "step": step, "digest": "d"}
        content |= {"metrics": {"later/blimp/no_bos/accuracy": value}, "finished": 1.0}
        content |= {"tables": {"blimp_paradigms": [{"uid": "a"}]}}
        (run.evals / "later").mkdir(parents=True, exist_ok=True)
        path = run.evals / "later" / f"step-{step:08d}-blimp.json"
        path.write_text(json.dumps(content))
    (gathered,) = gather(tmp_path, "mine").runs
    points = gathered.curves["later/blimp/no_bos/accuracy"]
    assert [(p.step, p.tokens) for p in points] == [(20, 20 * TOKENS), (STEPS, STEPS * TOKENS)]
    assert points[0].gpu_hours == pytest.approx(SECONDS * 20 / 3600)
    assert gathered.metrics["later/blimp/no_bos/accuracy"] == 0.75
    assert gathered.tables["later/blimp_paradigms"] == [{"uid": "a"}]
    assert len(gathered.tables["blimp_paradigms"]) == 6


def test_an_evaluation_under_the_plain_name_is_the_runs_own(tmp_path: Path) -> None:
    """As of BLiMP, where a run was trained without it: its tests need the table of paradigms."""
    run = one_run(tmp_path)
    record(run)
    kept = [e for e in run.raw_events() if "eval/paloma/perplexity" not in e["metrics"]]
    kept = [e for e in kept if e["kind"] != "table"]
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in kept))
    run.write_result({"state": "finished", "step": STEPS, "metrics": {"train/loss": 3.0}})
    for step, uid in ((20, "early"), (STEPS, "last")):
        content = {"name": "eval", "section": "blimp", "step": step, "digest": "d"}
        content |= {"metrics": {"eval/blimp/no_bos/accuracy": 0.5}, "finished": 1.0}
        content |= {"tables": {"blimp_paradigms": [{"uid": uid, "no_bos": 0.5}]}}
        (run.evals / "eval").mkdir(parents=True, exist_ok=True)
        (run.evals / "eval" / f"step-{step:08d}-blimp.json").write_text(json.dumps(content))
    sweep = gather(tmp_path, "mine")
    assert sweep.arms[0].values("eval/blimp/no_bos/accuracy") == {0: 0.5}
    assert blimp.paradigms(sweep.arms[0], "no_bos") == {0: {"last": 0.5}}


def test_a_curve_has_each_step_once_and_in_order(tmp_path: Path) -> None:
    """Also where checkpoints in between, and the last one, were evaluated again."""
    run = one_run(tmp_path)
    record(run)
    for step in (15, STEPS):
        content = {"name": "eval", "section": "paloma", "step": step, "digest": "d"}
        content |= {"metrics": {"eval/paloma/perplexity": 7.0}, "tables": {}, "finished": 1.0}
        (run.evals / "eval").mkdir(parents=True, exist_ok=True)
        (run.evals / "eval" / f"step-{step:08d}-paloma.json").write_text(json.dumps(content))
    (gathered,) = gather(tmp_path, "mine").runs
    points = {p.step: p.value for p in gathered.curves["eval/paloma/perplexity"]}
    assert list(points) == [10, 15, 20, 30, 40]
    assert len(gathered.curves["eval/paloma/perplexity"]) == 5
    assert points[15] == 7.0
    assert points[STEPS] == gathered.metrics["eval/paloma/perplexity"]


def test_evaluations_with_other_settings_make_no_mean(tmp_path: Path) -> None:
    """As where a later seed was evaluated without the limit of the first."""
    runs = a_sweep(tmp_path, [a_config(seed=seed) for seed in (0, 1)])
    for run, digest in zip(runs, ("d", "e"), strict=True):
        record(run)
        for name, own in (("later", digest), ("alike", "d")):
            metrics = {f"{name}/blimp/no_bos/accuracy": 0.5}
            content = {"name": name, "section": "blimp", "step": STEPS, "digest": own}
            content |= {"metrics": metrics, "tables": {}, "finished": 1.0}
            (run.evals / name).mkdir(parents=True)
            (run.evals / name / f"step-{STEPS:08d}-blimp.json").write_text(json.dumps(content))
    sweep = gather(tmp_path, "mine")
    for run in sweep.runs:
        assert "alike/blimp/no_bos/accuracy" in run.metrics
        assert not any(key.startswith("later/") for key in (*run.metrics, *run.curves))
    [note] = sweep.notes
    assert "evaluations of blimp under the name later had other settings in some runs" in note


def test_evaluations_by_different_code_are_noted(tmp_path: Path) -> None:
    """As where the evals were changed between two seeds."""
    runs = a_sweep(tmp_path, [a_config(seed=seed) for seed in (0, 1)])
    for run, code in zip(runs, ("d1:a", "d1:b"), strict=True):
        record(run)
        for name, own in (("later", code), ("alike", "d1:a")):
            metrics = {f"{name}/blimp/no_bos/accuracy": 0.5}
            content = {"name": name, "section": "blimp", "step": STEPS, "digest": "d"}
            content |= {"metrics": metrics, "tables": {}, "finished": 1.0, "code_hash": own}
            (run.evals / name).mkdir(parents=True)
            (run.evals / name / f"step-{STEPS:08d}-blimp.json").write_text(json.dumps(content))
    sweep = gather(tmp_path, "mine")
    assert all("later/blimp/no_bos/accuracy" in run.metrics for run in sweep.runs)
    [note] = sweep.notes
    assert "evaluations of blimp under the name later were made by code of relora_core" in note


@pytest.mark.parametrize("alike", [True, False])
def test_a_later_evaluation_stands_beside_those_of_training_if_alike(
    tmp_path: Path, alike: bool
) -> None:
    """As where one arm trained with a limit, and another was evaluated later at a limit."""
    own = EvalConfig(blimp=BlimpConfig(enabled=True, path="p", max_pairs=10, fingerprint="f"))
    with_evals, without = a_sweep(tmp_path, [a_config(eval=own), a_config(r=8)])
    record(with_evals)
    without.write_result({"state": "finished", "step": STEPS, "metrics": {"train/loss": 3.0}})
    without.update_status(state="finished", step=STEPS)
    later = dataclasses.replace(own.blimp, path="q", max_pairs=10 if alike else 99)
    content = {"name": "eval", "section": "blimp", "step": STEPS, "finished": 1.0}
    content |= {"digest": settings_digest(EvalConfig(blimp=later), "blimp")}
    content |= {"metrics": {"eval/blimp/no_bos/accuracy": 0.5}}
    content |= {"tables": {"blimp_paradigms": [{"uid": "x", "no_bos": 0.5}]}}
    (without.evals / "eval").mkdir(parents=True)
    (without.evals / "eval" / f"step-{STEPS:08d}-blimp.json").write_text(json.dumps(content))
    sweep = gather(tmp_path, "mine")
    first, second = sweep.arms
    assert first.values("eval/blimp/no_bos/accuracy")
    assert blimp.paradigms(first, "no_bos")
    assert bool(second.values("eval/blimp/no_bos/accuracy")) == alike
    assert bool(blimp.paradigms(second, "no_bos")) == alike
    assert ["name eval had other settings" in note for note in sweep.notes] == [True] * (not alike)


def test_evaluations_of_the_same_grammar_texts_are_alike() -> None:
    """A limit that the grammar does not reach is none, and without a path there is no split."""

    def digest(section: str, **settings: Any) -> str:
        own = {"paloma": PalomaConfig, "blimp": BlimpConfig}[section](enabled=True, **settings)
        return settings_digest(EvalConfig(**{section: own}), section)

    few, all_, more = (digest("paloma", max_documents=n) for n in (3, None, GRAMMAR_DOCUMENTS))
    assert few != all_ == more == digest("paloma", split="test")
    assert digest("paloma") == "5ed81cf5783b6c54"  # as it is in folders of earlier versions
    few, all_, more = (digest("blimp", max_pairs=n) for n in (3, None, GRAMMAR_PAIRS))
    assert few != all_ == more
    assert digest("blimp", path="p", max_pairs=GRAMMAR_PAIRS) != digest("blimp", path="p")
    assert digest("paloma", path="p", split="test") != digest("paloma", path="p")


def test_reading_changes_nothing(tmp_path: Path) -> None:
    for run in a_sweep(tmp_path, arms(2)):
        record(run)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    gather(tmp_path, "mine")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_sweep_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    a_sweep(tmp_path, [a_config()])
    with pytest.raises(ConfigError, match="Did you mean 'mine'") as error:
        gather(tmp_path, "mien")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": []}', '{"cells": [{"run_id": 1}]}'])
def test_a_damaged_plan_is_one_line(tmp_path: Path, text: str) -> None:
    a_sweep(tmp_path, [a_config()])
    (tmp_path / "sweeps" / "mine" / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json must be a plan"):
        gather(tmp_path, "mine")


def test_the_question_is_of_the_sweeps_file_else_of_the_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, text in (("sweep", "who is best?"), ("experiment", "is it so?")):
        (tmp_path / folder).mkdir()
        head = f"# @package _global_\n# Question: {text[:5]}\n#   {text[5:]}\n# Command: x\n"
        (tmp_path / folder / "mine.yaml").write_text(head)
    monkeypatch.setattr(plans, "CONF", tmp_path)
    assert plans.question("other", [["sweep=mine"]], ["mine"]) == "who i s best?"
    assert plans.question("other", [[]], ["mine", "mine"]) == "is it  so?".replace("  ", " ")
    assert plans.question("other", [], ["nobody's"]) is None


def test_the_question_is_that_of_the_experiments_file() -> None:
    assert plans.question("other", [], ["demo"]) == (
        "does a small decoder learn our grammar with ReLoRA, and what do restarts do to its loss?"
    )
    assert plans.question("other", [], ["nobody wrote this"]) is None


def test_a_question_may_take_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\n# Question: is it\n#           so?\n# Command: run\nseed: 1\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(plans, "CONF", tmp_path)
    assert plans.question("other", [], ["mine", "mine"]) == "is it so?"


def test_floors_are_told_of_the_grammar_alone(tmp_path: Path) -> None:
    a_sweep(tmp_path, [a_config()])
    floor = data.floor(gather(tmp_path, "mine"))
    assert floor is not None
    assert 0 < floor.entropy < floor.unigram < math.log(10_000)


def test_load_of_the_machine_is_no_curve(tmp_path: Path) -> None:
    run = one_run(tmp_path)
    log = EventLog(run, 1)
    log.emit(Event(kind="system", step=1, metrics={"system/cpu": 1.0}))
    log.close()
    assert gather(tmp_path, "mine").runs[0].curves == {}
