"""A search with arms: each is tuned alone, as often as the others, and its edges are named."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats as scipy_stats
from studies import DECADES, LR, begin_arms, finish, finish_all, taker

from experiments import scheduler
from experiments.disk.output_dir import jobs_folder, place_of_study, study_folder
from experiments.run.stopping import StopFlag
from relora_core.config import ConfigError, RuntimeConfig
from sweeps import job, snapshot
from sweeps.__main__ import main
from sweeps.local import slots
from sweeps.local.launcher import LocalLauncher
from sweeps.search import arms, process, processes, response, response_files, results, samplers
from sweeps.search.config import Objective, check_arms, normalise
from sweeps.search.space import Choice, Float, Int
from sweeps.search.study import Study
from sweeps.slurm.submission import Submission
from sweeps.worker import FAILED, FINISHED
from tests import warm
from tests.recipes import NANO, ROOT
from tests.sweeps.records import end_run


@pytest.fixture
def begun(spec, tmp_path):
    """`begun(lora=spec, ...)`: the folder of a search with these arms."""

    return lambda **specs: begin_arms(tmp_path / "out", specs)


@pytest.fixture
def grid(spec):
    """A spec that tries train.lr=1e-4, 1e-3, 1e-2 and 1e-1."""
    search = {"n_trials": 4, "sampler": DECADES}
    return lambda **changes: spec(space={"train.lr": LR}, **(search | changes))


def counts(folder):
    return [len(study.trials()) for study in arms.open_studies(folder)]


def test_processes_have_gpus_if_one_arm_needs_them(begun, spec, make, monkeypatch):
    def base(device):
        return {"": make(runtime=RuntimeConfig(device=device))}

    got = []
    monkeypatch.setattr(slots, "_installed_gpus", lambda: ["0", "1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(snapshot, "freeze", lambda folder, **_: folder)
    monkeypatch.setattr(processes, "search_local", lambda _, slots, **__: got.append(slots) or 0)
    folder = begun(a=spec(bases=base("cpu")), b=spec(bases=base("auto")))
    begin = partial(processes.start_processes, LocalLauncher(), folder, left=4)
    begin(config=base("cpu")[""], console=Console())
    assert (got[0].gpus, got[0].parallel) == (["0", "1"], 2)


# taking turns -----------------------------------------------------------------------------------
def test_arms_are_tried_equally_often_at_every_moment(begun, grid):
    folder = begun(a=grid(), b=grid(), c=grid())
    seen = []
    while True:
        studies = process.in_turn(arms.open_studies(folder), taker())
        trial = next((t for s in studies if (t := s.take(taker()))), None)
        if trial is None:
            break
        finish(trial)
        seen.append(counts(folder))
    assert all(max(now) - min(now) <= 1 for now in seen)
    assert seen[-1] == [4, 4, 4]


def test_a_process_goes_on_with_its_own_trial_first(begun, grid):
    a, b = arms.open_studies(begun(a=grid(), b=grid()))
    mine, other = taker(job="7_1"), taker(job="7_2")
    trial = a.take(mine)
    a.take(other)
    assert [s.arm for s in process.in_turn([b, a], mine)] == ["a", "b"]
    assert [s.arm for s in process.in_turn([a, b], taker(job="7_3"))] == ["b", "a"]
    assert a.take(mine).number == trial.number


def test_a_job_of_slurm_takes_a_trial_of_the_arm_that_has_fewest(
    begun, nano, slurm, monkeypatch, tmp_path, spec
):
    base = nano(
        train={"steps": 4}, output_dir=str(tmp_path / "out"), tracking={"enabled": False}, eval={}
    )
    base.eval.paloma.enabled = base.eval.blimp.enabled = False
    base.sweep.name = "s"
    one = {"space": {"train.lr": LR}, "bases": {"": base}, "n_trials": 2}
    folder = begun(a=spec(**one), b=spec(**one))
    first = arms.open_studies(folder)[0]
    finish(first.take(taker()))
    slurm.add("12_0", name="s.0123abcd", state="RUNNING")
    monkeypatch.setattr(scheduler, "_job", "s.0123abcd/12_0")
    submission = Submission(
        submission="0123abcd", name="s.0123abcd", tasks=[["sweeps/s/study"]] * 3, kind="search"
    )
    place = jobs_folder(tmp_path / "out", name="s") / submission.submission
    submission.write(place)
    work = job.read(place / "submission.json", index=0)
    assert job.run(work) == FINISHED
    assert counts(folder) == [1, 1]
    [run] = arms.open_studies(folder)[1].trials()[0].user_attrs["run_ids"]
    record = json.loads((tmp_path / "out" / "runs" / run / "trial.json").read_text())
    assert (record["study"], record["arm"]) == ("s", "b")


def test_an_arm_that_gives_up_leaves_the_others_to_go_on(begun, grid, monkeypatch):
    folder = begun(a=grid(max_failures=1), b=grid())
    broken = arms.open_studies(folder)[0]
    trial = broken.take(taker())
    trial.fail("boom")

    def run_trial(trial, **_):
        finish(trial)
        return False

    monkeypatch.setattr(process, "run_trial", run_trial)
    monkeypatch.setattr(process, "has_changed", lambda study: False)
    assert process.work(folder, stop=StopFlag()) == FAILED
    assert counts(folder) == [1, 4]


# on disk ----------------------------------------------------------------------------------------
def test_the_path_of_a_study_says_what_made_it(tmp_path):
    for name, arm in [("s", None), ("arms", None), ("s", "study"), ("study", "arms"), ("s", "a")]:
        folder = study_folder(tmp_path, name=name, arm=arm)
        assert tuple(place_of_study(folder)) == (tmp_path, name, arm)


def test_arms_of_an_earlier_command_stay(begun, grid):
    folder = begun(a=grid(), b=grid())
    begun(c=grid(), a=grid())
    assert [study.arm for study in arms.open_studies(folder)] == ["a", "b", "c"]


def test_a_search_keeps_its_kind(begun, grid, tmp_path):
    begun(a=grid())
    Study.open(study_folder(tmp_path / "out", name="t"), create=grid())
    with pytest.raises(ConfigError, match=r"^search.arms must not be empty in search s"):
        arms.check_begun(study_folder(tmp_path / "out", name="s"), arms=False)
    with pytest.raises(ConfigError, match=r"^search.arms must be empty in search t"):
        arms.check_begun(study_folder(tmp_path / "out", name="t"), arms=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"arms": ["../x"]}', '{"arms": 3}'])
def test_damaged_arms_are_one_line(begun, grid, text):
    folder = begun(a=grid())
    (folder / "arms.json").write_text(text)
    with pytest.raises(ConfigError, match=r"arms.json must be arms as this version writes them"):
        arms.open_studies(folder)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"../x": []}, "names of at most 60 letters"),
        ({"a": "method=lora"}, r"search.arms.a must be overrides"),
        ({"a": [{"method": "lora"}]}, r"search.arms.a must be overrides"),
        ([], "search.arms must be {key: value, ...}"),
    ],
)
def test_arms_that_are_none_are_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        check_arms(given)


# grids of rates ---------------------------------------------------------------------------------
ends = st.floats(-8, 2).flatmap(lambda low: st.tuples(st.just(low), st.floats(low + 0.5, 4)))


@given(ends, st.floats(0, 2), st.floats(0, 2), st.integers(2, 6))
@example((0.5, 1.1668037900411394), 0.0, 0.0, 6)
def test_the_grid_of_a_wider_interval_holds_that_of_the_narrow_one(pair, below, above, n):
    low, high = pair
    narrow = Float(low=10**low, high=10**high, log=True)
    wide = Float(low=10 ** (low - below), high=10 ** (high + above), log=True)
    rates = samplers.lattice(narrow, per_decade=n)
    assert set(rates) <= set(samplers.lattice(wide, per_decade=n))
    assert all(narrow.low <= rate <= narrow.high for rate in rates)
    steps = [b / a for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([10 ** (1 / n)] * len(steps), rel=0.01)
    assert abs(len(rates) - n * (high - low)) <= 1.1  # three digits may be outside an end


def test_whole_numbers_are_listed_once():
    assert samplers.lattice(Int(low=1, high=10, log=True), per_decade=6) == [1, 2, 3, 5, 7, 10]


def test_a_grid_tries_each_rate_once_and_a_wider_one_the_others(begun, grid, spec):
    folder = begun(a=grid())
    [study] = arms.open_studies(folder)
    finish_all(study)
    assert sorted(t.params["train.lr"] for t in study.trials()) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert study.left() == 0
    wider = Float(low=1e-6, high=1e-1, log=True)
    study = Study.open(
        study.folder, create=spec(space={"train.lr": wider}, n_trials=6, sampler=DECADES)
    )
    numbers = finish_all(study)
    assert len(numbers) == 2
    assert {study.trials()[n].params["train.lr"] for n in (4, 5)} == {1e-5, 1e-6}


def test_a_finer_grid_in_the_same_study_tries_what_lies_between(begun, grid):
    folder = begun(a=grid())
    [study] = arms.open_studies(folder)
    finish_all(study)
    finer = grid(n_trials=20, sampler={"name": "grid", "per_decade": 2})
    study = Study.open(study.folder, create=finer)
    finish_all(study)
    values = [t.params["train.lr"] for t in study.trials() if t.state.name == "COMPLETE"]
    assert {3.16e-4, 3.16e-3, 3.16e-2} <= set(values)


@pytest.mark.parametrize("per_decade", [0, 1.5, "three", True])
def test_a_grid_of_no_whole_number_a_decade_is_refused(grid, per_decade):
    with pytest.raises(ConfigError, match=r"^search.sampler.per_decade must be an integer >= 1"):
        grid(sampler={"name": "grid", "per_decade": per_decade}).check()


def test_an_interval_without_a_value_of_the_grid_is_refused(spec):
    narrow = {"train.lr": Float(low=2e-3, high=3e-3, log=True)}
    with pytest.raises(ConfigError, match=r"^search.space.train.lr must hold one of 1 values"):
        spec(space=narrow, sampler=DECADES).check()


def test_other_samplers_have_no_such_option():
    search = normalise({"objectives": "train/loss", "sampler": {"name": "tpe", "per_decade": 3}})
    with pytest.raises(ConfigError, match="per_decade must be an option of tpe"):
        samplers.check_search(search, space={"train.lr": LR})


# edges and tables -------------------------------------------------------------------------------
def finished(study, losses):
    """All trials, with a list of losses by rate: one for each seed."""
    while trial := study.take(taker()):
        rate = trial.params["train.lr"]
        for seed, run, loss in zip(trial.seeds, trial.runs, losses[rate], strict=True):
            run.create(trial.config(seed))
            end_run(run, loss=loss, state="finished" if math.isfinite(loss) else "diverged")
        trial.finish()


def test_the_interval_of_a_perplexity_is_that_of_its_logarithm(tmp_path, grid):
    """Of two seeds far apart it would reach below 0 otherwise."""
    rows = [
        results.SeedRow(run_id="r", seed=i, state="finished", step=1, steps=1, values=[value])
        for i, value in enumerate([660.1, 335.9])
    ]
    trial = results.TrialRow(
        **dict.fromkeys(("reason", "learnt_from", "seconds")),
        number=0,
        state="complete",
        counted=True,
        feasible=True,
        values=[498.0],
        params={"train.lr": 0.01},
        runs=rows,
        step=2,
        steps=2,
    )
    found = results.Results(
        name="s",
        n_trials=1,
        counts={"complete": 1},
        trials=[trial],
        best=[],
        importances={},
        pruned_steps=0,
        saved_steps=0,
        notes=[],
        goals=[Objective(metric="eval/paloma/perplexity")],
    )
    arm = response.Arm(name="a", results=found, spec=grid(), finished=True)
    [row] = response.rows([arm])
    logs = [math.log(660.1), math.log(335.9)]
    mean, sem = sum(logs) / 2, scipy_stats.sem(logs)
    expected = [math.exp(end) for end in scipy_stats.t.interval(0.95, 1, mean, sem)]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((498.0, *expected))
    best = results._best(trial, goals=found.goals, output_dir=tmp_path)
    assert best.intervals["eval/paloma/perplexity"] == pytest.approx(expected)
    assert response_files.figure([arm]).canvas.axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ([1.0, 2.0, 3.0, 4.0], "lowest"),
        ([4.0, 3.0, 2.0, 1.0], "highest"),
        ([2.0, 1.0, 3.0, 4.0], None),
        ([3.0, 2.0, 1.0, math.inf], None),  # what diverged says that it is too much
    ],
)
def test_a_best_at_an_end_of_what_was_tried_is_said(begun, grid, losses, edge):
    folder = begun(a=grid())
    [study] = arms.open_studies(folder)
    finished(
        study, {rate: [one] for rate, one in zip((1e-4, 1e-3, 1e-2, 1e-1), losses, strict=True)}
    )
    [arm] = response.read(folder)
    assert [words.split(" is the ")[1].split(" of ")[0] for words in arm.edges] == (
        [edge] if edge else []
    )


def test_a_choice_of_two_or_of_words_has_no_edge(begun, spec):
    space = {
        "train.lr": Choice(values=[1e-3, 1e-2, 1e-1]),
        "relora.r": Choice(values=[2, 4]),
        "relora.merge": Choice(values=["scaled", "unscaled"]),
    }
    folder = begun(a=spec(space=space, n_trials=12, sampler="grid"))
    [study] = arms.open_studies(folder)
    while trial := study.take(taker()):
        finish(trial, loss=trial.params["train.lr"] + trial.params["relora.r"])
    [arm] = response.read(folder)
    assert [words.split("=")[0] for words in arm.edges] == ["train.lr"]


def test_the_response_has_each_trial_with_the_interval_over_its_seeds(begun, grid, capsys):
    folder = begun(a=grid(seeds=3), b=grid(seeds=3))
    losses = {1e-4: [3.0, 3.5, 3.1], 1e-3: [1.0, 1.2, 1.7], 1e-2: [2.0, 2.1, 2.2], 1e-1: [9, 9, 8]}
    for study in arms.open_studies(folder):
        finished(study, losses)
    out = folder.parents[2]
    assert main(["search", "s", "--output-dir", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "8 of 8 trials of 2 arms have ended" in shown
    rows = list(csv.DictReader(io.StringIO((folder / "response.csv").read_text())))
    assert [(row["arm"], float(row["train.lr"])) for row in rows].count(("b", 1e-3)) == 1
    for row in rows:
        values = losses[float(row["train.lr"])]
        mean, sem = sum(values) / 3, scipy_stats.sem(values)
        expected = scipy_stats.t.interval(0.95, 2, mean, sem)
        assert float(row["mean"]) == pytest.approx(mean)
        assert (float(row["low"]), float(row["high"])) == pytest.approx(expected)
    best = list(csv.DictReader(io.StringIO((folder / "arms.csv").read_text())))
    assert [(row["arm"], row["train.lr"], row["edges"]) for row in best] == [
        ("a", "0.001", ""),
        ("b", "0.001", ""),
    ]
    assert (folder / "plots" / "response.png").exists()
    assert (folder / "arms" / "b" / "best.yaml").exists()


def test_the_response_is_drawn_where_the_best_has_no_rate_of_its_own(begun, spec, make):
    methods = Choice(values=["full_rank", "relora"])
    bases = {f"method={method}": make(method=method) for method in methods.values}
    space = {"method": methods, "train.lr": LR}
    when = {"train.lr": "method=relora"}
    folder = begun(a=spec(space=space, groups=["method"], bases=bases, when=when, n_trials=6))
    [study] = arms.open_studies(folder)
    while trial := study.take(taker()):
        finish(trial, loss=2.0 if "train.lr" in trial.params else 1.0)
    [arm] = response.read(folder)
    assert arm.best.params == {"method": "full_rank"}
    assert len(response.rates(arm)) > 1
    assert response_files.write([arm], folder)[1] == []


def test_arms_that_were_not_tuned_alike_are_named(begun, grid, capsys):
    folder = begun(a=grid(), b=grid(n_trials=2))
    for study in arms.open_studies(folder):
        finish_all(study)
    assert main(["search", "s", "--output-dir", str(folder.parents[2])]) == 0
    shown = capsys.readouterr().out
    assert "arms are not tuned alike yet: a 4, b 2" in shown


def test_one_arm_is_shown_as_a_search_and_others_are_refused(begun, grid, capsys):
    folder = begun(a=grid(), b=grid())
    for study in arms.open_studies(folder):
        finish_all(study)
    out = ["--output-dir", str(folder.parents[2])]
    assert main(["search", "s", "--arm", "b", "--trial", "1", *out]) == 0
    assert "trial 1 of s: complete" in capsys.readouterr().out
    for words, says in [
        (["--arm", "bb"], "--arm must be one of the arms of s (a, b), got 'bb'."),
        (["--trial", "1"], "--trial needs --arm NAME"),
        (["--write-experiment", "x"], "--write-experiment needs --arm NAME"),
    ]:
        assert main(["search", "s", *words, *out]) == 2
        assert says in capsys.readouterr().err
    assert main(["search", "s", "--json", *out]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["arms"]) == {"a", "b"}
    assert main(["search", "s", "--rebuild", *out]) == 0


@pytest.mark.slow
def test_a_search_that_begins_counts_the_points_of_its_grid(tmp_path):
    """n_trials is a bound there: of twelve trials on two points none would be minus ten."""
    words = ["run.py", "-m", "hydra/sweeper=search", "train.lr=choice(1e-3,1e-2)", *NANO]
    grid = ["search.sampler.name=grid", "search.n_trials=12", "search.objectives=[train/loss]"]
    more = ["tracking=none", "eval=none", f"output_dir={tmp_path}"]
    done = warm.run([*words, *grid, *more], cwd=ROOT, figures=False)
    assert done.returncode == 0, done.stderr
    assert "0 of 2 trials have ended, 2 left" in " ".join(done.stdout.split())
