"""search.learn_from: a new study begins with what finished runs of earlier sweeps came to."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
from optuna.trial import TrialState
from studies import LR, contents, finish, finish_all, spec_of, taker

from experiments.disk.output_dir import runs_folder, study_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from relora_core.config import ConfigError
from sweeps.__main__ import main
from sweeps.planning.plan import make_plan, store
from sweeps.search import learn, plots
from sweeps.search.space import Choice, Float
from sweeps.search.study import Study, rebuild
from tests.sweeps.records import end_run

SPACE = {"train.lr": LR, "relora.r": Choice(values=[4, 8])}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def spec(make):
    return partial(spec_of, make, space=SPACE)


@pytest.fixture
def sweep(make, out):
    """A sweep of these configs (`make`'s words, `lr` for train.lr) with `loss` each; their ids.
    Without a loss a run has not ended; `diverged` ends it so."""

    def go(name, *settings):
        configs, losses = [], []
        for words in settings:
            losses.append(words.pop("loss", None))
            lr, state = words.pop("lr", 0.01), words.pop("state", "finished")
            config = make(**words)
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=lr))
            run = RunDir(runs_folder(out) / run_id(config))
            run.create(config)
            if losses[-1] is not None and not run.ended():
                end_run(run, loss=losses[-1], state=state)
            configs.append(config)
        store(make_plan([({}, config) for config in configs], name=name), output_dir=out)
        return [run_id(config) for config in configs]

    return go


def learnt(spec, out, **search):
    """A new study of this spec, as its first command makes it, and what that says."""
    one = spec(**search)
    one.learnt, lines = learn.learn(one, output_dir=out)
    return Study.open(study_folder(out, name="s"), create=one), lines


def points(study):
    return [(t.user_attrs["params"], t.values) for t in study.learnt()]


def test_runs_of_the_searchs_points_are_its_first_trials_and_run_no_more(spec, sweep, out):
    ids = sweep("x", {"lr": 0.01, "r": 4, "loss": 2.0}, {"lr": 0.02, "r": 8, "loss": 1.5})
    study, lines = learnt(spec, out, learn_from="x", n_trials=2, sampler="tpe")
    assert lines == ["learnt from 2 of 2 runs of x"]
    assert points(study) == [
        ({"train.lr": 0.01, "relora.r": 4}, [2.0]),
        ({"train.lr": 0.02, "relora.r": 8}, [1.5]),
    ]
    for id_, frozen in zip(ids, study.learnt(), strict=True):
        assert frozen.state == TrialState.COMPLETE
        assert frozen.user_attrs["learnt"] == "x"
        assert frozen.user_attrs["run_ids"] == [id_]
        assert frozen.intermediate_values == {4: frozen.value}  # what pruners compare with
        assert not (runs_folder(out) / id_ / "trial.json").exists()
    assert (study.left(), study.counts()) == (2, {})
    assert len(finish_all(study, loss=3.0)) == 2
    assert study.counts() == {"COMPLETE": 2}
    assert study.optuna.best_value == 1.5
    before = contents(study)
    again = spec(learn_from="x", n_trials=2, sampler="tpe")  # the same command later
    assert contents(Study.open(study.folder, create=again)) == before
    assert contents(rebuild(study.folder)) == before
    (study.folder / "journal.log").unlink()
    assert contents(Study.open(study.folder)) == before


def test_a_point_that_was_learnt_is_drawn_in_vain(spec, sweep, out):
    space = {"relora.r": Choice(values=[2, 4, 8])}
    sweep("x", {"r": 4, "loss": 2.0, "lr": 1e-3}, {"r": 8, "loss": 2.0, "lr": 1e-3})
    base = spec().bases[""]
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, lr=1e-3))
    search = {"space": space, "bases": {"": base}, "learn_from": "x", "n_trials": 1}
    study, _ = learnt(spec, out, enqueue=[{"relora.r": 4}], **search)
    assert study.take(taker()).params == {"relora.r": 2}
    reasons = [t.user_attrs["reason"] for t in study.optuna.trials if "refused" in t.user_attrs]
    assert reasons[0] == "as trial 0"


def test_a_run_without_adapters_has_no_scale_and_is_not_learnt(spec, sweep, out):
    sweep("x", {"r": 0, "method": "lora", "loss": 3.0}, {"method": "lora", "loss": 2.0, "lr": 1e-3})
    base = dataclasses.replace(spec().bases[""], method="lora")
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, lr=1e-3))
    space = {"relora.scale": Float(low=1.0, high=10.0)}
    _, lines = learnt(spec, out, space=space, bases={"": base}, learn_from="x")
    assert lines[0] == "learnt from 1 of 2 runs of x: 1 differs in relora.r"


def test_a_grid_runs_the_points_that_it_has_not_learnt(spec, sweep, out):
    space = {"relora.r": Choice(values=[2, 4, 8]), "train.lr": Choice(values=[0.01, 0.02])}
    sweep("x", {"r": 4, "loss": 2.0}, {"r": 8, "loss": 2.0}, {"r": 6, "loss": 2.0})
    search = {"space": space, "learn_from": "x", "n_trials": 99, "sampler": "grid"}
    study, lines = learnt(spec, out, **search)
    assert lines == [
        "learnt from 2 of 3 runs of x: 1 lies outside the space of relora.r",
        "search.sampler=grid does not look at what was learnt (tpe and gp do): it counts for the "
        "best, and is not run again",
    ]
    assert len(finish_all(study, loss=1.0)) == 4
    assert len(contents(study)) == 2 + 4
    space["relora.r"] = Choice(values=[2, 4, 8, 6])  # nor does it learn more as it grows
    wide = Study.open(study.folder, create=spec(**search))
    assert len(finish_all(wide, loss=1.0)) == 2
    assert points(wide) == points(study)
    assert len(contents(wide)) == 2 + 6


def test_each_run_that_is_not_taken_has_its_reason(spec, sweep, out):
    sweep(
        "x",
        *({"lr": 0.01 * n, "loss": 2.0} for n in (1, 2)),
        *({"lr": 0.01 * n, "loss": 2.0, "steps": 6} for n in (1, 2, 3)),
        {"lr": 0.03, "loss": 2.0, "steps": 6, "method": "full_rank"},
        {"lr": 0.5, "loss": 2.0},
        {"lr": 0.5, "r": 6, "loss": 2.0},
        {"lr": 0.06},
        {"lr": 0.01, "loss": 2.0, "seed": 1},
    )
    sweep("y", {"lr": 0.02, "loss": 2.0}, {"lr": 0.07, "loss": 2.0})
    study, lines = learnt(spec, out, learn_from=["x", "y"], sampler="tpe")
    assert lines == [
        "learnt from 2 of 10 runs of x: 4 differ in train.steps, 2 lie outside the space "
        "of train.lr, 1 has not finished, 1 is of other seeds",
        "learnt from 1 of 2 runs of y: 1 is there already",
    ]
    assert [one["sweep"] for one in study.spec.learnt] == ["x", "x", "y"]


@pytest.mark.parametrize(
    ("runs", "names", "says"),
    [
        ([{"steps": 6, "loss": 1.0}] * 2 + [{"loss": None}], "x",
         "got x: of 2 runs 1 differs in train.steps, 1 has not finished (train.steps: 6 there, 4 "
         "here)"),
        ([{"loss": 1.0, "seed": 3}], "x", "of 1 runs 1 is of other seeds"),
        ([{"loss": 1.0}], "xx", "search.learn_from must be sweeps in "),
        ([{"loss": 1.0}], "xx", "got 'xx'. Did you mean 'x'?"),
    ],
)  # fmt: skip
def test_where_nothing_is_learnt_the_error_says_what_is_in_the_way(
    spec, sweep, out, runs, names, says
):
    sweep("x", *(dict(words) for words in runs))
    with pytest.raises(ConfigError) as caught:
        learn.learn(spec(learn_from=names), output_dir=out)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_point_has_the_mean_over_the_searchs_seeds_or_none(spec, sweep, out):
    sweep(
        "x",
        *({"lr": 0.01, "seed": seed, "loss": 1.0 + seed} for seed in (0, 1, 2)),
        {"lr": 0.02, "seed": 0, "loss": 1.0},
    )
    sweep("y", {"lr": 0.03, "seed": 0, "loss": 1.0})
    sweep("z", {"lr": 0.03, "seed": 1, "loss": 4.0})
    study, lines = learnt(spec, out, learn_from=["x", "y", "z"], seeds=2, sampler="tpe")
    assert lines == [
        "learnt from 2 of 4 runs of x (1 trial): 1 is of other seeds, 1 lacks a run at seed 1",
        "learnt from 1 of 1 runs of y",
        "learnt from 1 of 1 runs of z",
    ]
    assert [values for _, values in points(study)] == [[1.5], [2.5]]
    assert study.learnt()[0].user_attrs["by_seed"] == {"0": [1.0], "1": [2.0]}


def test_what_diverged_and_what_breaks_a_constraint_is_learnt_as_such(spec, sweep, out):
    sweep(
        "x",
        {"lr": 0.01, "loss": 2.0},
        {"lr": 0.02, "loss": 4.0},
        {"lr": 0.03, "loss": 1.0, "state": "diverged"},
    )
    study, _ = learnt(spec, out, learn_from="x", constraints=["train/loss <= 3"], sampler="tpe")
    assert [values for _, values in points(study)] == [[2.0], [4.0], [math.inf]]
    excess = [t.constraints["train/loss <= 3"] for t in study.learnt()]
    assert excess == [-1.0, 1.0, math.inf]
    assert study.optuna.best_trial.number == 0
    finish_all(study)
    assert contents(rebuild(study.folder)) == contents(study)


def test_a_metric_that_runs_did_not_log_is_named(spec, sweep, out):
    sweep("x", {"lr": 0.01, "loss": 2.0})
    with pytest.raises(ConfigError, match=r"of 1 runs 1 lacks eval/paloma/perplexity"):
        learnt(spec, out, learn_from="x", objectives=["train/loss", "eval/paloma/perplexity"])


def test_options_of_groups_and_other_words_for_the_same_run_are_recognised(spec, sweep, make, out):
    lr = make().train.lr
    sweep(
        "x",
        {"method": "full_rank", "loss": 2.0, "r": 2, "lr": lr},  # r does not apply
        {"method": "lora", "loss": 1.0, "r": 4, "lr": lr},
        {"method": "relora", "loss": 0.5, "r": 4, "lr": lr},
    )
    methods = ["full_rank", "lora"]
    bases = {f"method={m}": make(method=m) for m in methods}
    space = {"method": Choice(values=methods), "relora.r": Choice(values=[4.0, 8])}
    search = {"space": space, "groups": ["method"], "bases": bases, "n_trials": 1}
    study, lines = learnt(spec, out, learn_from="x", **search)
    assert points(study) == [
        ({"method": "full_rank"}, [2.0]),
        ({"method": "lora", "relora.r": 4.0}, [1.0]),
    ]
    assert lines[0] == "learnt from 2 of 3 runs of x: 1 differs in method"
    assert study._trial(study.learnt()[1]).run_ids == study.learnt()[1].user_attrs["run_ids"]


def test_a_diverged_seed_is_learnt_with_the_worst_value(spec, sweep, out):
    sweep("x", {"seed": 0, "loss": 1.0}, {"seed": 1, "loss": 1.0, "state": "diverged"})
    study, _ = learnt(spec, out, learn_from="x", seeds=2, pruner="wilcoxon")
    [frozen] = study.learnt()
    assert (frozen.values, frozen.intermediate_values) == ([math.inf], {0: 1.0, 1: math.inf})


def test_a_searched_scale_is_found_in_alpha(spec, sweep, make, out):
    def at(r, alpha):
        relora = dataclasses.replace(make(r=r).relora, alpha=alpha)
        return {"r": r, "relora": relora, "loss": 1.0, "lr": make().train.lr}

    sweep("x", at(4, 8.0), at(8, 8.0), at(8, 80.0))
    space = {"relora.r": Choice(values=[4, 8]), "relora.scale": Float(low=0.5, high=4.0)}
    study, lines = learnt(spec, out, space=space, learn_from="x")
    assert [params["relora.scale"] for params, _ in points(study)] == [2.0, 1.0]
    assert lines[0].endswith(": 1 lies outside the space of relora.scale")


def test_what_was_learnt_joins_a_space_that_grows_by_a_key(spec, sweep, out):
    sweep("x", {"lr": 0.01, "loss": 2.0})
    study, _ = learnt(spec, out, learn_from="x", n_trials=1)
    finish_all(study)
    wider = SPACE | {"train.beta1": Float(low=0.5, high=0.95)}
    wide = Study.open(study.folder, create=spec(space=wider, learn_from="x", n_trials=2))
    params = {"train.lr": 0.01, "relora.r": 4, "train.beta1": 0.9}
    assert points(wide) == [(params, [2.0])]
    finish_all(wide)
    assert contents(rebuild(wide.folder)) == contents(wide)


def test_a_command_killed_before_the_journal_is_there_learns_all_the_same(spec, sweep, out):
    sweep("x", *({"lr": 0.01 * n, "loss": 2.0} for n in (1, 2, 3)))
    study, _ = learnt(spec, out, learn_from="x")
    before = contents(study)
    for lines in (0, 3, 5):  # nothing, the study without a trial, some of the trials
        text = (study.folder / "journal.log").read_bytes().splitlines(keepends=True)
        (study.folder / "journal.log").write_bytes(b"".join(text[:lines]))
        assert contents(Study.open(study.folder)) == before


def test_a_database_learns_too(spec, sweep, out, tmp_path):
    sweep("x", {"lr": 0.01, "loss": 2.0})
    study, _ = learnt(spec, out, learn_from="x", storage=f"sqlite:///{tmp_path / 'o.db'}")
    assert points(Study.open(study.folder)) == [({"train.lr": 0.01, "relora.r": 4}, [2.0])]


def test_a_study_learns_when_it_begins_and_no_other_time(spec, sweep, out):
    sweep("x", {"lr": 0.01, "loss": 2.0})
    study = Study.open(study_folder(out, name="s"), create=spec())
    with pytest.raises(ConfigError, match=r"search.learn_from must stay \[\] in a study that has"):
        Study.open(study.folder, create=spec(learn_from="x"))


def test_what_was_learnt_is_shown_as_such(spec, sweep, out, capsys, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda study, **options: ([], []))
    (id_,) = sweep("x", {"lr": 0.01, "loss": 0.25})
    study, _ = learnt(spec, out, learn_from="x", n_trials=1)
    trial = study.take(taker())
    finish(trial, loss=2.0)
    assert main(["search", "s", "--output-dir", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "s: 1 of 1 trials: 1 complete; 1 learnt from x"
    assert lines[1] == "best: trial 0, train/loss 0.25 (1 seed, learnt from x)"
    table = {line.split()[1]: line.split() for line in lines if line.lstrip("* ")[:1] in "01"}
    row = next(line.split() for line in lines if " learnt  " in line)
    assert row[:3] == ["*", "0", "learnt"]
    assert row[-3:] == ["-", "1", "-"], table
    assert main(["search", "s", "--output-dir", str(out), "--trial", "0"]) == 0
    shown = capsys.readouterr().out
    assert "trial 0 of s: learnt (from x)" in shown
    assert id_ in shown
    text = (study.folder / "best.yaml").read_text()
    assert "trial 0 of search s (1 trials, 1 seed each), learnt from x" in text
