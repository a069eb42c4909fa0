"""A sweep with arms that take their best from a search: which values; what is refused and noted."""

from __future__ import annotations

import json

import pytest
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from studies import DECADES, LR, begin_arms, finish, finish_all, taker

from experiments.disk.output_dir import all_runs, study_folder
from experiments.identity import run_id
from hydra_plugins.relora_sweeps.plugins import LocalLauncher
from relora_core.config import ConfigError
from relora_core.sources import code_hash
from sweeps.local.slots import ROOT
from sweeps.planning import provenance
from sweeps.planning.plan import load, make_plan, store
from sweeps.search import arms, results
from sweeps.search.space import Choice
from sweeps.search.study import Study
from sweeps.search.tuned import read_tuned
from tests import warm


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def search(spec, out):
    """`search(lora={...})`: a search with these arms, each with keywords of its spec."""
    usual = {"space": {"train.lr": LR}, "n_trials": 4, "sampler": DECADES, "seeds": 2}

    def go(**changes):
        return begin_arms(out, {arm: spec(**(usual | own)) for arm, own in changes.items()})

    return go


@pytest.fixture
def finished(search):
    """The same with all trials done; the best rate is 1e-2, and every first choice."""

    def go(**changes):
        folder = search(**changes)
        for study in arms.open_studies(folder):
            finish_all(study)
        return folder

    return go


# what is taken ----------------------------------------------------------------------------------
def test_an_arm_takes_the_best_of_the_arm_of_its_name(finished, out):
    finished(a={}, b={"space": {"train.lr": Choice(values=[1e-3, 3e-2, 0.5, 1.0])}})
    tuned = read_tuned(out, "s", {"a": "a", "b": "b", "c": "a"})
    assert {arm: one.values for arm, one in tuned.items()} == {
        "a": {"train.lr": 1e-2},
        "b": {"train.lr": 3e-2},
        "c": {"train.lr": 1e-2},
    }
    assert [tuned[arm].borrowed for arm in "abc"] == [False, False, True]
    assert tuned["a"].seeds == [0, 1]
    assert tuned["a"].config.train.lr == 1e-2


def test_a_search_that_cannot_give_is_refused_by_what_it_lacks(search, finished, out, spec):
    with pytest.raises(ConfigError, match=r"^sweep.from_search must be a search with arms .*none"):
        read_tuned(out, "s", {"a": "a"})
    Study.open(study_folder(out, name="plain"), create=spec())
    folder = search(a={}, b={})
    with pytest.raises(ConfigError, match=r"\(s\), got 'plain'"):
        read_tuned(out, "plain", {"a": "a"})
    with pytest.raises(ConfigError, match=r"but s has no c, d \(it has a, b\)"):
        read_tuned(out, "s", {"a": "a", "c": "c", "d": "d"})
    a, b = arms.open_studies(folder)
    finish_all(a)
    with pytest.raises(ConfigError, match=r"but s has trials left \(b 0 of 4\)"):
        read_tuned(out, "s", {"a": "a", "b": "b"})
    assert read_tuned(out, "s", {"a": "a"})  # b is not asked for
    running = b.take(taker(job="7_1"))
    finish_all(b)
    assert not b.left()
    with pytest.raises(ConfigError, match=r"but s has trials left \(b 3 of 4\)"):
        read_tuned(out, "s", {"a": "a", "b": "b"})
    finish(running)
    assert read_tuned(out, "s", {"a": "a", "b": "b"})


def test_arms_that_were_tuned_unequally_are_refused(finished, out):
    finished(a={}, b={"n_trials": 3})
    with pytest.raises(ConfigError, match=r"tuned all arms alike, but trials of s are a 4, b 3"):
        read_tuned(out, "s", {"a": "a", "b": "b"})


def test_an_arm_without_a_best_is_refused(search, out):
    folder = search(a={}, b={})
    a, b = arms.open_studies(folder)
    finish_all(a)
    while trial := b.take(taker()):
        trial.fail("boom")
    with pytest.raises(ConfigError, match=r"but s has none for b"):
        read_tuned(out, "s", {"a": "a", "b": "b"})


@pytest.mark.parametrize(("codes", "said"), [("a", False), ("ab", True)])
def test_trials_of_different_code_are_noted(finished, out, codes, said):
    folder = finished(a={}, b={})
    for number, run in enumerate(all_runs(out)):
        run.write_attempt(1, {"code_hash": f"d1:{codes[number % len(codes)]}"})
    for study in arms.open_studies(folder):
        noted = any(
            "ran different code of relora_core" in note for note in results.read(study).notes
        )
        assert noted == said


@pytest.mark.parametrize(("code", "said"), [(code_hash(), []), ("d1:0", ["ran"]), ("0", ["may"])])
def test_settings_that_other_code_has_found_are_noted(finished, out, code, said):
    finished(a={}, b={})
    for run in all_runs(out):
        run.write_attempt(1, {"code_hash": code})
    tuned = read_tuned(out, "s", {"a": "a", "b": "b"})
    notes = [note for note in provenance.notes(tuned, []) if "different code" in note]
    assert [note.removeprefix("trials of s and this sweep ").split()[0] for note in notes] == said


# the points of the sweep ------------------------------------------------------------------------
@pytest.fixture
def cells(loader, monkeypatch, out):
    """(overrides of each point by arm, the launcher) of a sweep with these arms and words."""

    def go(given, *words, params=None):
        taken = {}

        def run_sweep(points, *, tuned, **options):
            taken["tuned"], taken["points"] = tuned, [point for point, _ in points]
            return 0

        monkeypatch.setattr("sweeps.launch.run_sweep", run_sweep)
        words = [f"output_dir={out}", *words]
        config = loader.load_configuration("config", words, run_mode=RunMode.MULTIRUN)
        sweeper = Plugins.instance().instantiate_sweeper(
            config=config,
            hydra_context=HydraContext(config_loader=loader, callbacks=None),  # type: ignore[arg-type]
            task_function=lambda config: None,
        )
        sweeper.arms, sweeper.params = given, params or {}
        sweeper.sweep(words)
        return {cell["sweep.arm"]: cell for cell in taken["points"]}, taken["tuned"]

    return go


TWO = {"train.lr": LR, "relora.scale": Choice(values=[0.5])}


def test_the_search_overrides_a_line_and_the_command_line_the_search(finished, cells):
    finished(a={"space": TWO}, b={"space": TWO})
    lines = {"a": ["method=lora", "train.lr=5"], "b": ["method=lora"]}
    points, tuned = cells(lines, "sweep.from_search=s")
    for arm in "ab":
        assert (points[arm]["train.lr"], points[arm]["relora.scale"]) == ("0.01", "0.5")
        assert points[arm]["method"] == "lora"
    assert tuned["a"].values == {"train.lr": 1e-2, "relora.scale": 0.5}
    points, tuned = cells(lines, "sweep.from_search=s", "train.lr=0.3")
    assert {point["train.lr"] for point in points.values()} == {"0.3"}
    assert tuned["b"].values == {"relora.scale": 0.5}  # what the plan records is what was taken
    points, _ = cells(lines, "sweep.from_search=s", "relora.alpha=8")
    assert all("relora.scale" not in point for point in points.values())


def test_an_arm_may_take_from_another_or_take_nothing(finished, cells):
    finished(a={"space": TWO})
    lines = {
        "a": ["method=lora"],
        "same": ["method=lora", "relora.scale=4", "sweep.tuned_as=a"],
        "own": ["method=lora", "train.lr=7", "sweep.tuned_as=none"],
    }
    points, tuned = cells(lines, "sweep.from_search=s")
    assert (points["same"]["train.lr"], points["same"]["relora.scale"]) == ("0.01", "4")
    assert points["own"]["train.lr"] == "7"
    assert sorted(tuned) == ["a", "same"]
    assert not any("sweep.tuned_as" in point for point in points.values())
    points, tuned = cells(lines)
    assert tuned == {}
    assert "train.lr" not in points["same"]


def test_only_the_arms_that_are_taken_need_be_in_the_search(finished, cells):
    finished(a={})
    points, _ = cells({"a": [], "b": []}, "sweep.from_search=s", "sweep.arm=a")
    assert list(points) == ["a"]
    with pytest.raises(ConfigError, match="s has no b"):
        cells({"a": [], "b": []}, "sweep.from_search=s")
    axes = {"sweep.arm": "a"}  # of the sweep's file, as in conf/sweep/paper.yaml
    points, _ = cells({"a": [], "b": []}, "sweep.from_search=s", params=axes)
    assert list(points) == ["a"]
    with pytest.raises(ConfigError, match="s has no b"):
        cells({"a": [], "b": []}, "sweep.from_search=s", "sweep.arm=b", params=axes)


@pytest.mark.parametrize(
    ("lines", "word", "says"),
    [
        ({}, "sweep.from_search=s", "must be null for a sweep without arms"),
        ({"a": []}, "sweep.from_search=s,t", "must be one search"),
        ({"a": ["sweep.tuned_as=b"]}, "sweep.from_search=s", "s has no b"),
    ],
)
def test_a_source_that_is_none_is_refused(finished, cells, lines, word, says):
    finished(a={})
    with pytest.raises(ConfigError, match=says):
        cells(lines, word)


@pytest.mark.parametrize("overrides", ["method=lora", [{"method": "lora"}]])
def test_an_arm_that_is_no_list_of_overrides_is_refused(cells, overrides):
    with pytest.raises(ConfigError, match=r"^hydra.sweeper.arms.a must be overrides, like \["):
        cells({"a": overrides})


def test_a_point_cannot_name_a_search_or_its_place(cells, nano):
    """It is read before the points are composed, so all of these would run untuned."""
    with pytest.raises(ConfigError, match=r"must come from the command line or the top of the"):
        cells({"a": ["method=lora", "sweep.from_search=t"]})
    launcher = LocalLauncher()
    launcher.config = OmegaConf.create({"sweep": {"from_search": "s"}, "output_dir": "out"})
    elsewhere = nano(output_dir="elsewhere", sweep={"from_search": "s"})
    with pytest.raises(ConfigError, match=r"^output_dir must come from there, too"):
        launcher._check_search([elsewhere])


# what is noted ----------------------------------------------------------------------------------
def noted(out, make, *seeds, steps=4):
    """Notes on a sweep of arm a at these seeds."""
    tuned = read_tuned(out, "s", {"a": "a"})
    configs = [make(seed=seed, steps=steps) for seed in seeds]
    for config in configs:
        config.sweep.arm = "a"
        config.train.lr = 1e-2
    return provenance.notes(tuned, configs)


def test_seeds_that_chose_the_settings_are_named(finished, out, make):
    finished(a={"seeds": 3})
    notes = noted(out, make, 2, 3)
    assert any(
        note.startswith("seeds that have already chosen these settings in s: 2;") for note in notes
    )
    assert "seed=range(3,6)" in "".join(notes)
    assert len(noted(out, make, 3, 4)) == len(notes) - 1


def test_settings_at_which_the_search_was_made_are_noted_where_they_differ(finished, out, make):
    finished(a={})
    [note] = [note for note in noted(out, make, 7, steps=9) if "chosen at" in note]
    assert "train.steps=4 (here 9)" in note
    assert "None" not in note
    assert "train.lr" not in note
    assert not [note for note in noted(out, make, 7) if "chosen at" in note]


def test_a_plan_keeps_where_its_settings_came_from(finished, out, make):
    finished(a={})
    record = read_tuned(out, "s", {"a": "a"})["a"].record()
    plan = make_plan([({}, make())], name="t")
    plan.tuned = {"a": record}
    store(plan, output_dir=out)
    store(make_plan([({}, make(seed=1))], name="t"), output_dir=out)  # a later command
    path = out / "sweeps" / "t" / "plan.json"
    assert load(path).tuned == {"a": json.loads(json.dumps(record))}
    assert record["values"] == {"train.lr": 1e-2}
    [line] = provenance.lines(load(path).tuned)
    assert line.startswith("a: train.lr=0.01 (trial ")
    raw = json.loads(path.read_text())
    del raw["tuned"]  # as earlier versions wrote it
    path.write_text(json.dumps(raw))
    assert load(path).tuned == {}
    path.write_text(json.dumps(raw | {"tuned": {"a": 3}}))
    with pytest.raises(ConfigError, match="tuned has no settings of arms"):
        load(path)


def test_a_single_run_and_a_search_take_nothing(tmp_path):
    for words in (["sweep.from_search=s"], ["-m", "hydra/sweeper=search", "search=method_lr"]):
        done = warm.run([ROOT / "run.py", *words, "sweep.from_search=s"], cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "sweep.from_search must be null" in done.stderr
    assert list(tmp_path.iterdir()) == []


# in earnest -------------------------------------------------------------------------------------
SMALL = ["model=nano", "experiment=demo", "train.steps=6", "train.batch_size=2", "eval=none",
         "schedule.warmup_steps=1", "relora.restart_warmup_steps=0", "checkpoint.every_steps=50",
         "tracking=none"]  # fmt: skip


@pytest.mark.slow
def test_a_study_of_methods_from_search_to_report(tmp_path):
    """One command tunes all arms and goes on to more trials; the sweep runs each arm's best."""
    place = f"output_dir={tmp_path / 'out'}"
    arms_given = (
        "search.arms={full_rank: ['method=full_rank'], "
        "relora: ['relora=corrected', 'relora.reset_frequency=choice(2,3)']}"
    )
    tune = ["run.py", "-m", "hydra/sweeper=search", "search=family_lr", arms_given, place, *SMALL,
            "search.objectives=[train/loss]", "search.seeds=1", "sweep.name=tune"]  # fmt: skip
    tune += ["search.sampler={name: grid, per_decade: 1}", "sweep.arm=full_rank,relora"]
    fixed = "relora.reset_frequency=2"

    def done(*words):
        ended = warm.run([*words], cwd=ROOT, figures=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    done(*tune, fixed, "search.n_trials=1")
    take = ["run.py", "-m", "sweep=methods", place, *SMALL, "seed=5,6", fixed]
    take += ["sweep.from_search=tune", "sweep.arm=full_rank,relora", "experiment=demo"]
    done(*tune, fixed, "search.n_trials=2")
    assert "has its 2 trials for each of 2 arms" in done(*tune, fixed, "search.n_trials=2")
    shown = done("-m", "sweeps", "search", "tune", "--output-dir", str(tmp_path / "out"))
    assert "4 of 4 trials of 2 arms have ended" in shown
    best = {}
    for study in arms.open_studies(study_folder(tmp_path / "out", name="tune")):
        best[study.arm] = study.optuna.best_trial.params["train.lr"]
    before = {run.run_id for run in all_runs(tmp_path / "out")}
    assert "trial" in done(*take, "hydra.sweeper.plan_only=true")
    assert {run.run_id for run in all_runs(tmp_path / "out")} == before
    done(*take)
    plan = load(tmp_path / "out" / "sweeps" / "methods" / "plan.json")
    assert {cell.config.sweep.arm: cell.config.train.lr for cell in plan.cells} == best
    assert len(plan.cells) == 4
    for cell in plan.cells:
        typed = [f"train.lr={best[str(cell.config.sweep.arm)]!r}", f"seed={cell.config.seed}"]
        words = [w for w in take[2:] if not w.startswith(("sweep.", "seed="))]
        words += ["sweep.name=typed", f"sweep.arm={cell.config.sweep.arm}", *typed]
        assert cell.run_id == run_id(cell.config)
        assert f"arm={cell.config.sweep.arm}" in cell.name
        if cell.config.seed != 5:
            continue
        stdout = done("run.py", "-m", *words, "hydra.sweeper.plan_only=true")
        assert "done" in stdout  # the run that the user would have typed
