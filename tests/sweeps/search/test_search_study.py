"""Studies: exactly n_trials whatever is killed, a trial per job, a journal that can be lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import time
from functools import partial

import optuna
import psutil
import pytest
from optuna.trial import TrialState
from studies import LR, contents, finish, finish_all, leave_runs, loss_of, taker

from experiments.disk.output_dir import study_folder
from experiments.identity import run_id
from relora_core import costs
from relora_core.config import ConfigError
from sweeps.search import launch, samplers
from sweeps.search.space import Choice, Float, Int
from sweeps.search.study import MAX_ADOPTIONS, Study, rebuild
from sweeps.search.trial import Worker

FORK = multiprocessing.get_context("fork")


# total ------------------------------------------------------------------------------------------
def test_there_are_n_trials_and_a_larger_total_goes_on(spec, folder):
    study = Study.open(folder, create=spec(n_trials=3))
    assert finish_all(study) == [0, 1, 2]
    assert (study.done(), study.counts()) == (True, {"COMPLETE": 3})
    assert Study.open(folder, create=spec(n_trials=3)).take(taker()) is None
    more = Study.open(folder, create=spec(n_trials=5))
    assert finish_all(more) == [3, 4]
    assert more.optuna.best_value == min(t.value for t in more.optuna.trials)


def test_a_grid_is_planned_as_done_where_some_of_its_points_do_not_apply(spec, folder, make):
    space = {
        "method": Choice(values=["full_rank", "relora"]),
        "relora.r": Choice(values=[2, 4]),
    }
    points = [({"method": method}, make(method=method)) for method in space["method"].values]
    bases = {f"method={choices['method']}": config for choices, config in points}
    grid = spec(space=space, groups=["method"], bases=bases, sampler="grid", n_trials=9)
    assert len(finish_all(Study.open(folder, create=grid), loss=1.0)) == 3
    draft = launch.Draft(search=grid.config, space=space, bases=points, follows=[{}, {}])
    part = launch._plan_part(draft, points, folder=folder, command="", notes=[])
    assert (part.left, part.n_trials) == (0, 3)


def test_a_trial_is_an_ordinary_run_of_its_point(spec, folder, make):
    study = Study.open(folder, create=spec(n_trials=1, seeds=[4, 7]))
    trial = study.take(taker())
    assert trial.run_ids == [run_id(trial.config(4)), run_id(trial.config(7))]
    config = trial.config(7)
    assert (config.seed, config.train.lr) == (7, trial.params["train.lr"])
    assert dataclasses.replace(config.train, lr=1.0) == dataclasses.replace(make().train, lr=1.0)


def test_a_failed_trial_counts(spec, folder):
    study = Study.open(folder, create=spec(n_trials=2))
    study.take(taker()).fail("boom")
    assert study.failures() == ["boom"]
    assert study.left() == 1
    assert len(finish_all(study)) == 1
    assert study.failures() == []
    assert study.counts() == {"FAIL": 1, "COMPLETE": 1}


def test_a_run_that_diverged_is_a_result(spec, folder):
    study = Study.open(folder, create=spec(n_trials=2))
    first = study.take(taker())
    assert finish(first, state="diverged").values == [math.inf]
    finish_all(study)
    assert study.counts() == {"COMPLETE": 2}
    assert study.optuna.best_trial.number == 1


def test_settings_to_start_from_come_first_and_once(spec, folder):
    good = [{"train.lr": 0.01}, {"train.lr": 0.02, "relora.r": 4}]
    study = Study.open(folder, create=spec(n_trials=4, enqueue=good))
    first, again = (
        study.take(taker("a")),
        Study.open(folder, create=spec(n_trials=4, enqueue=good)),
    )
    second = again.take(taker("b"))
    assert first.params["train.lr"] == 0.01
    assert second.params == {"train.lr": 0.02, "relora.r": 4}
    assert again.take(taker("c")).params["train.lr"] not in (0.01, 0.02)


@pytest.mark.slow
def test_the_same_search_from_the_same_seed_draws_the_same_points(spec, tmp_path):
    def points(name, **search):
        study = Study.open(study_folder(tmp_path / name, name="s"), create=spec(**search))
        numbers = finish_all(study)
        return [study.optuna.trials[number].params for number in numbers]

    for sampler in ("random", "tpe"):
        search = {"n_trials": 13, "sampler": sampler}
        one = points(f"{sampler}1", **search)
        assert one == points(f"{sampler}2", **search)
        assert one != points(f"{sampler}3", seed=1, **search)
        assert len({p["train.lr"] for p in one}) == 13


# points -----------------------------------------------------------------------------------------
def test_parameters_that_do_not_apply_are_absent(spec, folder, make):
    space = {
        "relora.r": Int(low=2, high=8),
        "relora.reset_frequency": Int(low=1, high=4),
        "galore.r": Int(low=2, high=8),
        "train.beta1": Float(low=0.1, high=0.9),
        "method": Choice(values=["full_rank", "lora", "relora", "galore"]),
    }
    bases = {f"method={m}": make(method=m) for m in space["method"].values}
    search = spec(
        space=space,
        groups=["method"],
        bases=bases,
        n_trials=40,
        when={"train.beta1": "method=lora"},
    )
    study = Study.open(folder, create=search)
    expected = {
        "full_rank": set(),
        "lora": {"relora.r", "train.beta1"},
        "relora": {"relora.r", "relora.reset_frequency"},
        "galore": {"galore.r"},
    }
    seen = set()
    for _ in range(40):
        trial = study.take(taker())
        method = trial.params["method"]
        assert set(trial.params) - {"method"} == expected[method]
        assert trial.config(0).method == method
        seen.add(method)
        trial.fail("enough")
    assert seen == set(expected)


def test_points_are_not_run_twice_while_there_are_others(spec, folder):
    space = {"relora.r": Choice(values=[2, 4, 6, 8])}
    study = Study.open(folder, create=spec(space=space, n_trials=4, seed=3))
    numbers = finish_all(study, loss=1.0)
    params = [study.optuna.trials[n].params["relora.r"] for n in numbers]
    assert sorted(params) == [2, 4, 6, 8]
    more = Study.open(folder, create=spec(space=space, n_trials=6, seed=3))
    assert len(finish_all(more, loss=1.0)) == 2  # a total is a total
    assert more.counts() == {"COMPLETE": 6}


def test_points_that_are_no_valid_run_are_drawn_again(spec, folder):
    space = {"relora.r": Int(low=2, high=32)}  # the smallest side is 8
    study = Study.open(folder, create=spec(space=space, n_trials=3, seed=1))
    numbers = finish_all(study, loss=1.0)
    assert len(numbers) == 3
    trials = study.optuna.trials
    assert all(trials[n].params["relora.r"] <= 8 for n in numbers)
    refused = [t for t in trials if "refused" in t.user_attrs]
    assert refused
    assert all(t.params["relora.r"] > 8 for t in refused if "must be" in t.user_attrs["reason"])
    assert study.failures() == []


def test_a_space_without_a_valid_point_comes_to_an_end(spec, folder):
    space = {"relora.r": Int(low=20, high=64)}
    study = Study.open(folder, create=spec(space=space, n_trials=2))
    assert study.take(taker()) is None
    assert study.done()
    assert study.counts() == {"FAIL": 2}


def test_a_constraint_on_cost_is_kept_without_training_and_the_sampler_hears_of_it(
    spec, folder, make
):
    bound = costs.parameters(make(r=4)).trainable
    search = spec(n_trials=6, constraints=[f"cost/trainable <= {bound}"], sampler="tpe")
    study = Study.open(folder, create=search)
    numbers = finish_all(study)
    trials = study.optuna.trials
    assert all(trials[n].params["relora.r"] <= 4 for n in numbers)
    refused = [t for t in trials if t.number not in numbers]
    assert refused
    assert all(t.state == TrialState.PRUNED and max(t.constraints.values()) > 0 for t in refused)
    assert all("run_ids" not in t.user_attrs for t in refused)


def test_the_best_is_the_best_that_keeps_a_logged_constraint(spec, folder):
    study = Study.open(folder, create=spec(n_trials=6, constraints=["train/loss >= 0.5"]))
    finish_all(study)
    losses = [t.value for t in study.optuna.trials]
    assert min(losses) < 0.5
    assert study.optuna.best_value == min(loss for loss in losses if loss >= 0.5)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "nsgaii", "nsgaiii"])
def test_every_sampler_serves_two_objectives_and_a_worst_value(spec, folder, make, sampler):
    bound = costs.parameters(make(r=6)).trainable
    options = {"name": sampler} | ({"n_startup_trials": 2} if sampler in ("tpe", "gp") else {})
    search = spec(
        n_trials=7,
        objectives=["train/loss", "cost/trainable"],
        sampler=options,
        constraints=[f"cost/trainable <= {bound}"],
    )
    study = Study.open(folder, create=search)
    first = study.take(taker())
    finish(first, state="diverged")
    finish_all(study)
    assert study.counts() == {"COMPLETE": 7}
    assert len(study.optuna.best_trials) >= 1
    assert study.optuna.trials[first.number].values[0] == math.inf
    assert any("refused" in t.user_attrs for t in study.optuna.trials) or sampler != "qmc"


# owners -----------------------------------------------------------------------------------------
def test_a_job_gets_its_own_trial_again_even_as_another_process(spec, folder):
    study = Study.open(folder, create=spec(n_trials=2))
    first, other = study.take(taker("7_1")), study.take(taker("7_2"))
    again = Study.open(folder).take(taker("7_1", pid=99))
    assert (again.number, again.params) == (first.number, first.params) != other.number
    assert again.worker.pid == 99
    assert again.belongs_to(taker("7_1"))
    assert not again.belongs_to(taker("7_2"))
    assert Study.open(folder).take(taker("7_3")) is None


def test_an_orphan_is_adopted_before_anything_new_begins(spec, folder):
    study = Study.open(folder, create=spec(n_trials=3))
    dead, living = study.take(taker("1")), study.take(taker("2"))
    adopted = study.take(taker("3"), has_ended=lambda worker: worker.job_id == "1")
    assert (adopted.number, adopted.params) == (dead.number, dead.params)
    assert not dead.belongs_to(taker("1"))
    fresh = study.take(taker("4"))
    assert fresh.number not in (dead.number, living.number)
    assert {t.number for t in study.running()} == {0, 1, 2}


def test_a_trial_whose_workers_all_vanish_fails_in_the_end(spec, folder):
    study = Study.open(folder, create=spec(n_trials=1))
    jobs = iter(range(1000))
    trial = study.take(taker(str(next(jobs))))
    for _ in range(MAX_ADOPTIONS):
        assert (
            study.take(taker(str(next(jobs))), has_ended=lambda worker: True).number == trial.number
        )
    assert study.take(taker("last"), has_ended=lambda worker: True) is None
    assert "vanished" in study.failures()[0]


def test_a_point_whose_process_died_while_drawing_it_is_drawn_to_its_end(spec, folder):
    search = spec(n_trials=1)
    study = Study.open(folder, create=search)
    half = study.optuna.ask()
    drawn = half.suggest_float("train.lr", LR.low, LR.high, log=True)
    trial = study.take(taker())
    assert (trial.number, trial.params["train.lr"]) == (half.number, drawn)
    assert "relora.r" in trial.params
    assert study.take(taker("other")) is None


@pytest.mark.parametrize("sampler", ["random", {"name": "tpe", "n_startup_trials": 2}])
@pytest.mark.parametrize("drawn", [0, 1])
def test_a_search_whose_process_dies_while_drawing_draws_the_same_points(
    spec, tmp_path, monkeypatch, sampler, drawn
):
    search = spec(n_trials=4, sampler=sampler)
    whole, killed = (Study.open(study_folder(tmp_path / n, name="s"), create=search) for n in "ab")
    finish_all(whole)
    suggest = samplers.suggest

    def die(trial, key, dimension):
        if len(trial.params) == drawn:
            raise KeyboardInterrupt
        return suggest(trial, key, dimension)

    while killed.left():
        monkeypatch.setattr(samplers, "suggest", die)
        with pytest.raises(KeyboardInterrupt):
            killed.take(taker())
        monkeypatch.setattr(samplers, "suggest", suggest)
        finish(killed.take(taker()))
    assert [t.params for t in killed.trials()] == [t.params for t in whole.trials()]


def test_what_ended_stays_as_it_is(spec, folder):
    study = Study.open(folder, create=spec(n_trials=1))
    trial = study.take(taker())
    finish(trial)
    before = contents(study)
    trial.fail("too late")
    trial.prune()
    trial.report(9, 9.0)
    assert contents(study) == before


# pruning ----------------------------------------------------------------------------------------
def test_a_bad_trial_is_pruned_across_processes_and_a_repeated_step_changes_nothing(spec, folder):
    pruner = {"name": "median", "n_startup_trials": 2}
    search = spec(n_trials=4, pruner=pruner)
    study = Study.open(folder, create=search)
    for loss in (1.0, 1.2):
        trial = study.take(taker())
        for step in range(3):
            trial.report(step, loss)
        finish(trial, loss=loss)
    bad = Study.open(folder).take(taker())
    bad.report(0, 5.0)
    bad.report(0, 0.0)
    assert bad.should_prune()
    bad.prune()
    frozen = study.optuna.trials[bad.number]
    assert (frozen.state, frozen.value) == (TrialState.PRUNED, 5.0)
    good = study.take(taker())
    good.report(0, 0.1)
    assert not good.should_prune()


@pytest.mark.parametrize("name", ["none", "asha", "hyperband", "percentile", "wilcoxon"])
def test_every_pruner_answers(spec, folder, name):
    pruner = {"name": name} | ({"percentile": 50} if name == "percentile" else {})
    study = Study.open(folder, create=spec(n_trials=3, pruner=pruner))
    while trial := study.take(taker()):
        for step in range(1, 5):
            trial.report(step, float(trial.number))
            assert trial.should_prune() in (True, False)
        finish(trial)
    assert study.done()


# the same search --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"objectives": "train/loss max"}, "search.objectives must stay ['train/loss min last']"),
        ({"seeds": 2}, "search.seeds must stay [0]"),
        ({"constraints": ["cost/trainable <= 5"]}, "search.constraints must stay []"),
    ],
)
def test_another_search_of_the_same_name_is_refused(spec, folder, changes, key):
    Study.open(folder, create=spec())
    before = (folder / "study.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        Study.open(folder, create=spec(**changes))
    assert key in str(caught.value)
    assert (folder / "study.json").read_bytes() == before


def test_another_fixed_setting_is_refused_and_another_place_is_not(spec, folder, make):
    Study.open(folder, create=spec())
    with pytest.raises(ConfigError, match=r"train.steps must stay 4 .* got 5"):
        Study.open(folder, create=spec(bases={"": make(steps=5)}))
    elsewhere = dataclasses.replace(make().runtime, threads=3)
    study = Study.open(folder, create=spec(bases={"": make(runtime=elsewhere)}))
    assert study.take(taker()).config(0).runtime.threads == 3


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            {"train.lr": 1.0},
            "search.enqueue[0]: train.lr must lie in tag(log, interval(0.0001, 0.1)",
        ),
        ({"train.lr": 1.0}, "nearest valid: 0.1"),
        ({"train.l": 0.01}, "Did you mean 'train.lr'"),
    ],
)
def test_a_setting_outside_the_space_is_refused_before_anything_is_written(
    spec, folder, entry, line
):
    with pytest.raises(ConfigError) as caught:
        Study.open(folder, create=spec(enqueue=[entry]))
    assert line in str(caught.value)
    assert not folder.exists()


# the journal ------------------------------------------------------------------------------------
@pytest.fixture
def mixed(spec, folder):
    """A study with trials in every state, at two seeds, and a setting still in the queue."""
    search = spec(n_trials=9, seeds=2, pruner="median", constraints=["train/loss <= 3"])
    study = Study.open(folder, create=search)
    for how in ("finish", "prune", "fail", "run", "finish"):
        trial = study.take(taker(f"job{how}{len(study.trials())}"))
        leave_runs(trial, loss=0.1 + trial.number)
        trial.report(1, 1 / 3)
        trial.report(2, 0.1 + trial.number)
        {"finish": trial.finish, "prune": trial.prune, "fail": partial(trial.fail, "x")}.get(
            how, trial.write_records
        )()
    return study


def test_a_rebuilt_study_is_equal_and_goes_on(mixed, folder):
    before = contents(mixed)
    assert {t["state"].name for t in before} == {"COMPLETE", "PRUNED", "FAIL", "RUNNING"}
    again = rebuild(folder)
    assert contents(again) == before
    assert contents(Study.open(folder)) == before
    assert again.take(taker("jobrun3")).number == 3
    assert again.left() == 4


@pytest.mark.parametrize("harm", ["gone", "empty", "truncated", "torn", "garbage", "swapped"])
def test_a_damaged_journal_is_noticed_set_aside_and_rebuilt(mixed, folder, harm, capsys):
    before, journal = contents(mixed), folder / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    if harm == "gone":
        journal.unlink()
    else:
        middle = len(lines) // 2
        journal.write_bytes(
            {
                "empty": b"",
                "truncated": b"".join(lines[:middle]),
                "torn": b"".join(lines[:middle]) + lines[middle][:9],
                "garbage": b"".join([*lines[:middle], b"\0\0{x\n", *lines[middle:]]),
                "swapped": b"".join([*lines[1:], lines[0]]),
            }[harm]
        )
    study = Study.open(folder)
    assert contents(study) == before
    assert "rebuilt with 5 trials" in capsys.readouterr().err
    assert len(list(folder.glob("journal.log.damaged-*"))) == (harm != "gone")
    assert contents(Study.open(folder)) == before
    assert capsys.readouterr().err == ""


def test_a_process_at_work_outlives_damage_and_another_ones_repair(mixed, folder):
    trial = mixed.take(taker("jobrun3"))
    with open(folder / "journal.log", "ab") as file:
        file.write(b"garbage\n")
    trial.report(7, 0.5)  # notices, and mends
    assert mixed.optuna.trials[3].intermediate_values[7] == 0.5
    rebuild(folder)
    trial.report(8, 0.25)
    trial.finish()
    frozen = Study.open(folder).optuna.trials[3]
    assert (frozen.state, frozen.intermediate_values[8]) == (TrialState.COMPLETE, 0.25)


def test_a_process_killed_before_it_wrote_its_record_is_made_good(mixed, folder):
    trial = mixed.take(taker("jobrun3"))
    mixed.tell(trial.number, state=TrialState.COMPLETE, values=[1.5])  # killed before its record
    before = contents(Study.open(folder))
    assert contents(rebuild(folder)) == before


def test_half_a_line_of_a_killed_process_harms_nobody(mixed, folder):
    before = contents(mixed)
    with open(folder / "journal.log", "ab") as file:
        file.write(b'{"op_code": 5, "wor')
    assert contents(Study.open(folder)) == before
    Study.open(folder).take(taker("new")).fail("x")
    assert len(contents(mixed)) == len(before) + 1
    assert not list(folder.glob("*damaged*"))


def test_a_deleted_study_does_not_come_back(mixed, folder, spec):
    for file in folder.iterdir():
        file.unlink()
    assert contents(Study.open(folder, create=spec())) == []


def test_a_run_that_two_studies_meet_serves_the_rebuilding_of_both(spec, tmp_path):
    space = {"relora.r": Choice(values=[2])}
    studies = []
    for name in ("one", "two"):
        folder = study_folder(tmp_path / "out", name=name)
        study = Study.open(folder, create=spec(space=space, n_trials=1))
        trial = study.take(taker())
        finish(trial, loss=1.0)
        studies.append((folder, trial.run_ids, contents(study)))
    assert studies[0][1] == studies[1][1]
    for folder, _, before in studies:
        assert contents(rebuild(folder)) == before


def test_a_database_serves_as_storage(spec, folder, tmp_path):
    search = spec(n_trials=3, storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    study = Study.open(folder, create=search)
    assert finish_all(study) == [0, 1, 2]
    assert not (folder / "journal.log").exists()
    assert Study.open(folder).counts() == {"COMPLETE": 3}


def test_a_database_named_from_a_folder_is_the_same_from_another(
    spec, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    study = Study.open(folder, create=spec(n_trials=2, storage="sqlite:///optuna.db"))
    right = f"sqlite:///{tmp_path}/optuna.db"
    assert study.config.storage == right
    assert finish_all(study) == [0, 1]
    again = spec(n_trials=3, storage="sqlite:///optuna.db")
    assert finish_all(Study.open(folder, create=again)) == [2]  # the same command goes on
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert Study.open(folder).counts() == {"COMPLETE": 3}
    with pytest.raises(ConfigError, match=f"search.storage must stay {right}"):
        Study.open(folder, create=again)
    assert [path.parent for path in tmp_path.rglob("optuna.db")] == [tmp_path]


@pytest.mark.parametrize("output_dir", ["out", None])
def test_a_database_as_an_earlier_version_wrote_it_goes_on_or_is_refused(
    spec, folder, make, tmp_path, monkeypatch, output_dir
):
    monkeypatch.chdir(tmp_path)
    typed = spec(n_trials=2, storage="sqlite:///optuna.db")
    study = Study.open(folder, create=typed)
    assert finish_all(study) == [0, 1]
    raw = json.loads((folder / "study.json").read_text())
    raw["config"]["storage"] = "sqlite:///optuna.db"
    raw["bases"][""]["output_dir"] = output_dir or str(tmp_path / "out")
    (folder / "study.json").write_text(json.dumps(raw))
    assert Study.open(folder).counts() == {"COMPLETE": 2}
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    if output_dir:  # it says where the command was given
        assert Study.open(folder).counts() == {"COMPLETE": 2}
    else:
        with pytest.raises(ConfigError, match=r"search.storage=sqlite:///optuna.db was written"):
            Study.open(folder)
    monkeypatch.chdir(tmp_path)
    assert Study.open(folder, create=typed).counts() == {"COMPLETE": 2}
    assert [path.parent for path in tmp_path.rglob("optuna.db")] == [tmp_path]


# many processes ---------------------------------------------------------------------------------
def is_dead(worker):
    """As a launcher would judge processes of this machine."""
    try:
        process = psutil.Process(worker.pid)
        same = abs(process.create_time() - worker.started) < 0.5
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def labour(folder, *, pause=0.0):
    """A process of the search, until there is no trial left."""
    study = Study.open(folder)
    own = Worker(host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time())
    while trial := study.take(own, has_ended=is_dead):
        with open(folder / "taken", "a") as file:
            print(trial.number, os.getpid(), file=file, flush=True)
        for step in range(3):
            trial.report(step, loss_of(trial.params) + step)
            time.sleep(pause)
        finish(trial)


def check(folder, *, n):
    """Exactly n trials, each COMPLETE with the value of its own point, and none twice."""
    study = Study.open(folder)
    assert study.counts() == {"COMPLETE": n}
    trials = study.trials()
    assert all(t.value == pytest.approx(loss_of(t.params)) for t in trials)
    assert len({json.dumps(t.params, sort_keys=True) for t in trials}) == n
    assert not list(folder.glob("*damaged*"))
    return study


@pytest.mark.slow
def test_processes_at_once_make_exactly_n_trials(spec, folder):
    Study.open(folder, create=spec(n_trials=24, sampler="tpe"))
    processes = [FORK.Process(target=labour, args=(folder,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    check(folder, n=24)
    taken = [line.split() for line in (folder / "taken").read_text().splitlines()]
    assert len(taken) == len({number for number, _ in taken}) == 24
    assert len({pid for _, pid in taken}) > 1


@pytest.mark.slow
def test_killed_processes_lose_and_double_nothing(spec, folder, monkeypatch):
    # on a slow machine one trial can meet more of the 60 kills than a search puts up with
    monkeypatch.setattr("sweeps.search.study.MAX_ADOPTIONS", 60)
    chance, kills = random.Random(0), 0
    Study.open(folder, create=spec(n_trials=60))
    processes, deadline = [], time.monotonic() + 240
    while not Study.open(folder).done():
        assert time.monotonic() < deadline
        for process in [p for p in processes if not p.is_alive()]:
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            processes.remove(process)
        while len(processes) < 6:
            process = FORK.Process(target=labour, args=(folder,), kwargs={"pause": 0.1})
            process.start()
            processes.append(process)
        time.sleep(chance.uniform(0, 0.08))
        if kills < 60:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(chance.choice(processes).pid, signal.SIGKILL)
                kills += 1
    for process in processes:
        process.join(60)
    study = check(folder, n=60)
    before = contents(study)
    adopted = sum(t["user_attrs"].get("adoptions", 0) for t in before)
    print(f"{kills} kills, {adopted} adoptions")
    assert adopted >= 5
    counted = [t["number"] for t in before if "refused" not in t["user_attrs"]]
    again = contents(rebuild(folder))
    assert [again[n] for n in counted] == [before[n] for n in counted]


def test_optuna_still_cannot_stop_a_grid_outside_its_own_loop():
    """Why a grid does not sample while trials are ended; if this fails, draws.py can be simpler."""
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [1]}))
    trial = study.ask()
    trial.suggest_categorical("x", [1])
    with pytest.raises(RuntimeError, match="stop"):
        study.tell(trial, 1.0)
