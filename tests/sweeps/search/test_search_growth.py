"""A study's space grows: trials so far stay, whoever is at work or killed, and nothing shrinks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState
from studies import LR, contents, finish, finish_all, taker

from relora_core.config import ConfigError
from sweeps.search import growth, journal, samplers
from sweeps.search.space import Choice, Float, Int
from sweeps.search.study import Spec, Study, rebuild

FORK = multiprocessing.get_context("fork")
WIDE = Float(low=1e-5, high=1.0, log=True)
NARROW = {"train.lr": LR, "relora.r": Choice(values=[4, 8])}
WIDER = {"train.lr": WIDE, "relora.r": Choice(values=[2, 8, 4, 6])}
R248 = Choice(values=[2, 4, 8])


def ends(study):
    """Number -> (state, values, stored parameters) of what is over."""
    trials = study.optuna.get_trials(deepcopy=False)
    return {t.number: (t.state, t.values, t.params) for t in trials if t.state.is_finished()}


def spaces(study):
    """All the distributions of each key, over trials."""
    trials = study.optuna.get_trials(deepcopy=False)
    return {
        key: {distribution_to_json(t.distributions[key]) for t in trials if key in t.distributions}
        for key in study.spec.space
    }


def is_of(study, space):
    """Whether study.json and every trial in the journal have this space."""
    same = {k: {distribution_to_json(samplers.distribution(d))} for k, d in space.items()}
    return study.spec.space == space and spaces(study) == same


# what grows -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("before", "now", "grows"),
    [
        (LR, WIDE, True),
        (LR, LR, True),
        (WIDE, LR, False),
        (LR, Float(low=1e-5, high=1e-2, log=True), False),
        (LR, Float(low=1e-5, high=1.0), False),
        (Int(low=2, high=8), Int(low=1, high=8), True),
        (Int(low=2, high=8), Float(low=1.0, high=9.0), False),
        (Int(low=2, high=8), Choice(values=[*range(2, 9)]), False),
        (Int(low=8, high=56, step=8), Int(low=8, high=64, step=8), True),
        (Int(low=8, high=56, step=8), Int(low=4, high=64, step=4), True),
        (Int(low=8, high=56, step=8), Int(low=0, high=60, step=6), False),
        (Int(low=8, high=56, step=8), Int(low=4, high=68, step=8), False),
        (Int(low=8, high=60, step=8), Int(low=8, high=56, step=8), True),  # 60 was never drawn
        (Float(low=0.1, high=0.3, step=0.1), Float(low=0.0, high=0.5, step=0.1), True),
        (Float(low=0.1, high=0.3, step=0.1), Float(low=0.0, high=0.5, step=0.05), True),
        (Float(low=0.1, high=0.3, step=0.1), Float(low=0.0, high=0.6, step=0.2), False),
        (Float(low=0.1, high=0.3, step=0.1), Float(low=0.0, high=1.0), True),
        (Float(low=0.0, high=1.0), Float(low=0.0, high=1.0, step=0.25), False),
        (Choice(values=[4, 8]), Choice(values=[8, 16.0, 4.0]), True),
        (Choice(values=[4, 8]), Choice(values=[4, 16]), False),
        (Choice(values=[1, None]), Choice(values=[True, None]), False),
        (Choice(values=[["a"], []]), Choice(values=[[], ["a"], ["b"]]), True),
    ],
)
def test_a_dimension_grows_where_it_keeps_all_it_had(before, now, grows):
    wider = growth.widen(before, now)
    assert (wider is not None) == grows
    if isinstance(before, Choice) and isinstance(wider, Choice):  # as Optuna has stored them
        assert repr(wider.values[: len(before.values)]) == repr(before.values)
        assert len(wider.values) == len(now.values)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("random", "qmc", "nsgaii")]


@pytest.mark.parametrize("sampler", ["tpe", *SLOWER])
def test_trials_stay_and_new_ones_come_from_all_of_the_wider_space(spec, folder, sampler):
    search = {"sampler": sampler, "enqueue": [{"train.lr": 1e-3, "relora.r": 8}]}
    study = Study.open(folder, create=spec(space=NARROW, n_trials=4, **search))
    finish_all(study)
    before = ends(study)
    wide = Study.open(folder, create=spec(space=WIDER, n_trials=12, **search))
    assert ends(wide) == before
    assert is_of(wide, {"train.lr": WIDE, "relora.r": Choice(values=[4, 8, 2, 6])})
    finish_all(wide)
    assert wide.counts() == {"COMPLETE": 12}
    drawn = [t.params for t in wide.trials()[4:]]
    assert not all(LR.contains(params["train.lr"]) for params in drawn)
    assert {params["relora.r"] for params in drawn} & {2, 6}
    assert [t.value for t in wide.trials()][:4] == [values[0] for _, values, _ in before.values()]
    queued = [t for t in wide.trials() if "fixed_params" in t.system_attrs]
    assert len(queued) == 1
    again = contents(wide)  # the same command, in the old order too, changes nothing more
    inode = (folder / "journal.log").stat().st_ino
    assert contents(Study.open(folder, create=spec(space=WIDER, n_trials=12, **search))) == again
    assert contents(Study.open(folder)) == again
    assert (folder / "journal.log").stat().st_ino == inode
    counted = [t["number"] for t in again if "refused" not in t["user_attrs"]]
    made = contents(rebuild(folder))  # from records, most of them of the narrower space
    assert [made[n] for n in counted] == [again[n] for n in counted]


def test_what_follows_a_searched_key_stays_as_it_was(spec, folder):
    def following(texts, **space):
        return replace(spec(space={"train.lr": LR, **space}), follows={"": texts})

    texts = {"train.eps": "${divide:${train.lr},1000}"}
    Study.open(folder, create=following(texts))
    for other in ({}, {"train.eps": "${divide:${train.lr},500}"}, {**texts, "relora.r": "${seed}"}):
        with pytest.raises(ConfigError, match=r"^(train.eps|relora.r) must stay .* has begun, got"):
            Study.open(folder, create=following(other))
    more = {**texts, "relora.alpha": "${relora.r}"}  # as it was while r did not vary
    wide = Study.open(folder, create=following(more, **{"relora.r": Int(low=4, high=16)}))
    assert wide.spec.follows == {"": more}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "cmaes", "nsgaiii"])
def test_samplers_with_a_model_of_the_space_go_beyond_what_it_was(spec, folder, sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    space = {"train.lr": LR, "relora.alpha": Float(low=1.0, high=2.0)}
    wider = {"train.lr": WIDE, "relora.alpha": Float(low=0.5, high=40.0)}
    finish_all(Study.open(folder, create=spec(space=space, n_trials=14, sampler=sampler)))
    study = Study.open(folder, create=spec(space=wider, n_trials=30, sampler=sampler))
    finish_all(study)
    drawn = [t.params for t in study.trials()[14:]]
    assert max(params["relora.alpha"] for params in drawn) > 2.0
    assert study.counts() == {"COMPLETE": 30}
    assert is_of(study, wider)


def test_cmaes_keeps_nothing_of_the_narrower_bounds(spec, folder):
    study = Study.open(folder, create=spec(space=NARROW, n_trials=1))
    asked = study.take(taker())
    storage, id_ = study.optuna._storage, study.frozen(asked.number)._trial_id
    for key in ("cma:optimizer:0", "cma:generation", "other"):
        storage.set_trial_system_attr(id_, key, "x")
    wide = Study.open(folder, create=spec(space=WIDER, n_trials=1))
    assert set(wide.frozen(asked.number).system_attrs) == {"other"}


def test_a_grid_that_grew_runs_the_new_points_only(spec, folder, make):
    space = {
        "method": Choice(values=["full_rank", "relora"]),
        "relora.r": Choice(values=[2, 4]),
        "relora.alpha": Float(low=1.0, high=2.0, step=1.0),
    }
    bases = {f"method={m}": make(method=m) for m in ("full_rank", "relora", "lora")}
    search = partial(spec, groups=["method"], bases=bases, n_trials=99, sampler="grid")
    study = Study.open(folder, create=search(space=space))
    assert len(finish_all(study, loss=1.0)) == 1 + 4
    drawn = len(contents(study))
    space["method"] = Choice(values=["lora", "relora", "full_rank"])
    space["relora.r"] = Choice(values=[8, 4, 2])
    wide = Study.open(folder, create=search(space=space))
    assert len(finish_all(wide, loss=1.0)) == 2 + 6  # r=8 of relora, and lora
    points = [t.user_attrs["params"] for t in wide.trials()]
    assert len({json.dumps(p, sort_keys=True) for p in points}) == len(points) == 1 + 12
    assert wide.done()
    assert len(contents(wide)) - drawn == 8 + 2  # full_rank at r=8 is as at r=2


def test_a_grid_with_another_seed_goes_on_where_it_was(spec, folder):
    space = {"relora.r": Choice(values=[2, 3, 4, 5, 6, 7, 8])}
    search = partial(spec, space=space, sampler="grid")
    finish_all(Study.open(folder, create=search(n_trials=3)), loss=1.0)
    study = Study.open(folder, create=search(n_trials=99, seed=5))
    assert len(finish_all(study, loss=1.0)) == 4
    assert sorted(t.params["relora.r"] for t in study.trials()) == [2, 3, 4, 5, 6, 7, 8]
    assert len(contents(study)) == 7  # none was drawn in vain


# what does not ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"train.lr": LR}, "search.space.relora.r must hold all of choice(4, 8) in a study that has"
         " begun, got nothing; another sweep.name begins a new study, and search.learn_from="),
        (NARROW | {"relora.r": Choice(values=[4])}, "got choice(4); another"),
        (NARROW | {"relora.r": Int(low=4, high=8)}, "got int(interval(4, 8))"),
        (NARROW | {"train.lr": Float(low=1e-3, high=1.0, log=True)}, "must hold all of tag(log, i"),
        (NARROW | {"train.lr": Float(low=1e-5, high=1.0)}, "search.space.train.lr must hold all"),
        (NARROW | {"train.beta1": Float(low=0.1, high=0.2)},
         "search.space.train.beta1 must hold 0.9, with which trials ran before, to join a study"),
    ],
)  # fmt: skip
def test_what_would_lose_a_trial_is_refused_in_one_line(spec, folder, space, says):
    finish_all(Study.open(folder, create=spec(space=NARROW, n_trials=1)))
    before = [(folder / name).read_bytes() for name in ("study.json", "journal.log")]
    with pytest.raises(ConfigError) as caught:
        Study.open(folder, create=spec(space=space, n_trials=1))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(folder / name).read_bytes() for name in ("study.json", "journal.log")] == before


def test_a_study_in_a_database_keeps_its_space(spec, folder, tmp_path):
    search = partial(spec, n_trials=1, storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    Study.open(folder, create=search(space=NARROW))
    Study.open(folder, create=search(space=dict(reversed(NARROW.items()))))
    with pytest.raises(ConfigError, match=r"search.space.train.lr must stay tag.* search.storage"):
        Study.open(folder, create=search(space=WIDER))


def test_a_condition_may_name_new_choices_and_no_old_ones(spec, folder, make):
    bases = {f"method={m}": make(method=m) for m in ("full_rank", "relora", "lora")}
    search = partial(spec, groups=["method"], bases=bases, n_trials=1)
    two = Choice(values=["full_rank", "relora"])
    three = Choice(values=["full_rank", "relora", "lora"])
    beta = {"train.beta1": Float(low=0.1, high=0.95)}
    when = "method=relora"
    Study.open(folder, create=search(space={"method": two, **beta}, when={"train.beta1": when}))
    wide = {"method": three, **beta}
    Study.open(folder, create=search(space=wide, when={"train.beta1": f"{when},lora"}))
    for other in (f"{when},lora,full_rank", "method=lora", "method=full_rank"):
        with pytest.raises(ConfigError, match=r"search.when.train.beta1 must stay method=relora"):
            Study.open(folder, create=search(space=wide, when={"train.beta1": other}))


# keys that join ---------------------------------------------------------------------------------
def test_a_key_joins_at_what_trials_ran_with_before(spec, folder):
    study = Study.open(folder, create=spec(space=NARROW, n_trials=4, seeds=2))
    finish_all(study)
    running = study.take(taker("1")) or Study.open(
        folder, create=spec(space=NARROW, n_trials=5, seeds=2)
    ).take(taker("1"))
    before = {t.number: t.user_attrs["run_ids"] for t in study.trials()}
    space = NARROW | {"train.beta1": Float(low=0.5, high=0.95)}  # 0.9 is the default
    wide = Study.open(folder, create=spec(space=space, n_trials=9, seeds=2, sampler="tpe"))
    assert is_of(wide, space)
    for trial in wide.trials():
        assert trial.params["train.beta1"] == trial.user_attrs["params"]["train.beta1"] == 0.9
    for handle in (running, *wide.running()):  # its worker knows it without the key
        assert handle.run_ids == before[handle.number]
    finish(running)
    assert wide.frozen(running.number).state == TrialState.COMPLETE
    finish_all(wide)
    drawn = [t.params["train.beta1"] for t in wide.trials()]
    assert drawn[:5] == [0.9] * 5
    assert len(set(drawn[5:])) == 4
    again = contents(wide)
    assert contents(Study.open(folder)) == again
    assert contents(rebuild(folder)) == again
    wider = space | {"train.beta1": Float(low=0.1, high=0.95)}  # and what joined grows
    last = Study.open(folder, create=spec(space=wider, n_trials=9, seeds=2))
    assert is_of(last, wider)
    assert [t.user_attrs["run_ids"] for t in last.trials()[:5]] == [*before.values()]


def test_a_key_joins_only_the_trials_that_it_applies_to(spec, folder, make):
    bases = {f"method={m}": make(method=m, r=6) for m in ("full_rank", "relora")}
    method = {"method": Choice(values=["full_rank", "relora"])}
    search = partial(spec, groups=["method"], bases=bases, sampler="grid", n_trials=99)
    finish_all(Study.open(folder, create=search(space=method)), loss=1.0)
    wide = Study.open(folder, create=search(space=method | {"relora.r": Choice(values=[4, 6])}))
    points = [{"method": "full_rank"}, {"method": "relora", "relora.r": 6}]
    assert sorted((t.user_attrs["params"] for t in wide.trials()), key=len) == points
    finish_all(wide, loss=1.0)
    assert wide.trials()[-1].user_attrs["params"] == {"method": "relora", "relora.r": 4}
    assert len(wide.trials()) == 3


def test_a_group_joins_where_an_option_is_what_trials_ran(spec, folder, make):
    study = Study.open(folder, create=spec(space=NARROW, n_trials=2, bases={"": make()}))
    finish_all(study)
    before = [t.user_attrs["run_ids"] for t in study.trials()]
    bases = {f"method={m}": make(method=m) for m in ("full_rank", "lora", "relora")}

    def search(*methods):
        space = NARROW | {"method": Choice(values=[*methods])}
        return spec(space=space, groups=["method"], bases=bases, n_trials=6)

    with pytest.raises(ConfigError, match=r"search.space.method must hold the option that trials"):
        Study.open(folder, create=search("full_rank", "lora"))
    wide = Study.open(folder, create=search("full_rank", "relora"))
    assert [t.user_attrs["params"]["method"] for t in wide.trials()] == ["relora"] * 2
    assert [wide._trial(t).run_ids for t in wide.trials()] == before
    again = search("full_rank", "relora")
    again.bases = {key: make(method=key[7:], steps=5) for key in bases}
    with pytest.raises(ConfigError, match=r"train.steps must stay 4 .* got 5"):
        Study.open(folder, create=again)


# meanwhile --------------------------------------------------------------------------------------
def test_a_worker_goes_on_with_its_trial_and_draws_from_the_wider_space(spec, folder):
    worker = Study.open(folder, create=spec(space={"relora.r": Choice(values=[4])}, n_trials=2))
    trial = worker.take(taker("1"))
    wider = {"relora.r": R248}
    Study.open(folder, create=spec(space=wider, n_trials=3))
    trial.report(1, 0.5)
    finish(trial, loss=1.0)
    assert len(finish_all(worker, loss=1.0)) == 2  # it has read of the new total, too
    assert {t.params["relora.r"] for t in worker.trials()} == {2, 4, 8}
    assert worker.trials()[0].intermediate_values == {1: 0.5}
    assert is_of(Study.open(folder), {"relora.r": Choice(values=[4, 2, 8])})


def test_a_worker_of_a_study_that_has_made_way_to_another_ends(spec, folder):
    worker = Study.open(folder, create=spec(n_trials=2))
    for file in folder.iterdir():
        file.unlink()
    Study.open(folder, create=spec(n_trials=2))
    with pytest.raises(ConfigError, match="another study by now"):
        worker.take(taker())


def test_settings_in_the_queue_and_half_drawn_points_stay(spec, folder):
    queue = [{"relora.r": 8}]
    study = Study.open(folder, create=spec(space=NARROW, n_trials=2, enqueue=queue))
    half = study.optuna.ask()
    half.suggest_categorical("relora.r", [4, 8])
    wide = Study.open(folder, create=spec(space=WIDER, n_trials=2, enqueue=queue))
    first = wide.take(taker("1"))
    assert (first.number, first.params["relora.r"]) == (half.number, 8)
    assert wide.take(taker("2")).number == half.number + 1
    assert is_of(wide, {"train.lr": WIDE, "relora.r": Choice(values=[4, 8, 2, 6])})


@pytest.mark.parametrize("at", ["write", "unchanged", "new", "replace", "after"])
def test_a_command_killed_in_growing_leaves_the_old_space_or_the_new(spec, folder, at):
    finish_all(Study.open(folder, create=spec(space=NARROW, n_trials=3)))
    before = ends(Study.open(folder))

    def killed(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    def grow():
        replace = Path.replace
        if at == "write":  # of study.json
            Spec.write = killed
        elif at == "unchanged":
            journal.unchanged = killed
        elif at == "new":  # half of the new journal is there
            Study._new_journal = lambda self, trials, attrs: (
                journal.journal_storage(self.journal_path.with_name("journal.new"))
                and (folder / "journal.new").write_text('{"op_c')
                and killed()
            )
        elif at == "replace":
            Path.replace = lambda p, q: killed() if p.name == "journal.new" else replace(p, q)
        else:
            Study._read_journal = lambda self: (
                killed() if json.loads(self.path.read_text())["space"]["relora.r"]["values"][2:]
                and not (folder / "journal.new").exists() else None
            )  # fmt: skip
        Study.open(folder, create=spec(space=WIDER, n_trials=5))

    process = FORK.Process(target=grow)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    study = Study.open(folder)
    grown = {"train.lr": WIDE, "relora.r": Choice(values=[4, 8, 2, 6])}
    assert is_of(study, NARROW if at == "write" else grown)
    assert ends(study) == before
    again = Study.open(folder, create=spec(space=WIDER, n_trials=5))
    assert len(finish_all(again)) == 2
    assert is_of(again, grown)


def labour(folder):
    study = Study.open(folder)
    while trial := study.take(taker(str(os.getpid()))):
        trial.report(1, 1.0)
        finish(trial, loss=1.0)


def test_workers_lose_and_double_nothing_while_the_space_grows(spec, folder):
    def search(n):  # a choice more each time
        space = {"train.lr": Float(low=1e-4, high=1e-2 * n, log=True)}
        space |= {"relora.r": Choice(values=[*range(2, 2 + n)])}
        return spec(space=space, n_trials=30)

    Study.open(folder, create=search(2))
    processes = [FORK.Process(target=labour, args=(folder,)) for _ in range(3)]
    for process in processes:
        process.start()
    for n in range(3, 8):
        Study.open(folder, create=search(n))
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3
    study = Study.open(folder)
    labour(folder)  # what a worker of before may have left
    assert study.counts() == {"COMPLETE": 30}
    assert all(t.intermediate_values == {1: 1.0} for t in study.trials())
    assert is_of(study, search(7).space)
    assert not list(folder.glob("*damaged*"))


def test_a_study_of_before_has_its_journal_made_anew_once(spec, folder, monkeypatch):
    study = Study.open(folder, create=spec(space=NARROW, n_trials=2))
    finish_all(study)
    lines = (folder / "journal.log").read_bytes().splitlines(keepends=True)
    older = [line for line in lines if b'"user_attr":{"space"' not in line]
    assert len(older) == len(lines) - 1
    (folder / "journal.log").write_bytes(b"".join(older))
    raw = json.loads((folder / "study.json").read_text())
    del raw["added"], raw["learnt"], raw["config"]["learn_from"]
    (folder / "study.json").write_text(json.dumps(raw))
    again = Study.open(folder)
    assert contents(again) == contents(study)
    inode = (folder / "journal.log").stat().st_ino
    assert contents(Study.open(folder)) == contents(study)
    assert (folder / "journal.log").stat().st_ino == inode


@pytest.mark.parametrize("space", [{"relora.r": Choice(values=[6, 7])}, {"train.lr": LR}])
def test_a_space_that_was_changed_by_hand_is_one_line(spec, folder, space):
    study = Study.open(folder, create=spec(space={"relora.r": R248}, n_trials=2))
    finish_all(study, loss=1.0)
    changed = study.spec
    changed.space = space
    changed.write(folder / "study.json")
    before = (folder / "journal.log").read_bytes()
    with pytest.raises(ConfigError, match=r"search.space must hold what trial 0 has drawn \("):
        Study.open(folder)
    assert (folder / "journal.log").read_bytes() == before
