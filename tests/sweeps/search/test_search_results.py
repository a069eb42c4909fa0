"""Results of a search: the best, ways to run it again, and the artifacts."""

from __future__ import annotations

import csv
import functools
import json
import math
import shlex
import shutil
import types

import optuna
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from scipy import stats

from experiments import schema, typos
from experiments.disk.output_dir import runs_folder, study_folder
from experiments.disk.run_dir import RunDir
from experiments.identity import run_id
from experiments.run.complete import complete
from sweeps.__main__ import main
from sweeps.search import plots, recipe, results
from sweeps.search.config import Objective, SearchConfig, normalise
from sweeps.search.space import Choice, Float, base_key
from sweeps.search.spec import Spec
from sweeps.search.study import Study
from sweeps.search.trial import Worker
from tests.sweeps.records import end_run

SPACE = {
    "train.lr": FloatDistribution(1e-4, 1e-1, log=True),
    "relora.r": CategoricalDistribution([4, 8, 16]),
}
LOSS = Objective(metric="train/loss")
COST = Objective(metric="cost/trainable")


def trial(values=None, *, state="COMPLETE", lr=1e-2, r=4, excess=None, steps=(), **attrs):
    return create_trial(
        params={"train.lr": lr, "relora.r": r},
        distributions=SPACE,
        values=list(values) if values is not None and state == "COMPLETE" else None,
        state=TrialState[state],
        user_attrs=attrs,
        system_attrs={} if excess is None else {"constraints:c": excess},
        intermediate_values={step: 1.0 + 1 / step for step in steps},
    )


def study_of(trials, *, directions=("minimize",)):
    study = optuna.create_study(directions=list(directions))
    study.add_trials(trials)
    return study


def config_of(*goals, seeds=(0,), n_trials=20):
    return SearchConfig(objectives=list(goals) or [LOSS], seeds=list(seeds), n_trials=n_trials)


def collected(trials, *goals, **options):
    return results.read(opened(trials, *goals, name="s", output_dir="nowhere", **options))


def opened(trials, *goals, name, output_dir, **options):
    """What Study.open would give."""
    config = config_of(*goals, **options)
    study = study_of(trials, directions=[goal.direction for goal in config.objectives])
    return types.SimpleNamespace(optuna=study, config=config, name=name, output_dir=output_dir)


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# the best ---------------------------------------------------------------------------------------
FINITE = st.floats(-5, 5)


@given(
    rows=st.lists(
        st.tuples(
            FINITE | st.just(math.inf),
            st.sampled_from(["COMPLETE", "PRUNED", "FAIL", "RUNNING"]),
            st.none() | st.integers(-1, 1),
        ),
        max_size=12,
    ),
    direction=st.sampled_from(["minimize", "maximize"]),
)
def test_the_best_is_the_best_complete_feasible_finite_trial(rows, direction):
    goal = Objective(metric="train/loss", direction=direction)
    trials = [trial([v], state=state, excess=excess) for v, state, excess in rows]
    summary = collected(trials, goal)
    allowed = [
        v for v, state, excess in rows if state == "COMPLETE" and (excess or 0) <= 0 and v < 9
    ]
    if not allowed:
        assert summary.best == []
    else:
        want = min(allowed) if direction == "minimize" else max(allowed)
        assert [b.values["train/loss"] for b in summary.best] == [want]


@pytest.mark.slow
@given(
    points=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=14),
    directions=st.lists(st.sampled_from(["minimize", "maximize"]), min_size=2, max_size=3),
)
def test_the_front_is_optunas_and_that_of_brute_force(points, directions):
    points = [point[: len(directions)] for point in points]
    goals = [Objective(metric=f"m/{i}", direction=d) for i, d in enumerate(directions)]
    summary = collected([trial(point) for point in points], *goals)
    front = {best.number for best in summary.best}
    signs = [1 if d == "minimize" else -1 for d in directions]
    costs = [[s * v for s, v in zip(signs, point, strict=True)] for point in points]
    beaten = {
        i
        for i, mine in enumerate(costs)
        for other in costs
        if all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine
    }
    assert front == set(range(len(points))) - beaten
    study = study_of([trial(point) for point in points], directions=directions)
    assert front == {t.number for t in study.best_trials}


def test_an_infeasible_trial_neither_wins_nor_dominates():
    summary = collected([trial([1, 1], excess=0.5), trial([2, 2], excess=-1)], LOSS, COST)
    assert [best.number for best in summary.best] == [1]


# a run again ------------------------------------------------------------------------------------
SETTINGS = [
    [],
    ["model=small", "train.lr=0.0031622776601683794", "relora.r=8", "seed=3"],
    ["method=full_rank", "train.lr=1e-05", "data.seq_len=32"],
    ["relora=as_coded", "relora.target_modules=[v_proj,o_proj]", "relora.full_rank_modules=[q]"],
    ["method=galore", "galore.r=2", "eval=none", "dynamics=weights", "train.grad_clip=1.0"],
    ["experiment=laptop", "method=lora", "relora.rank_schedule=[]", "dynamics=paper"],
    ["model=nano", "model.n_layers=3", "model.vocab_size=600", "eval.paloma.enabled=false"],
    ["experiment=audit_10m", "train.lr=0.01"],
    ["experiment=audit_10m", "train.lr=0.01", "train.eps=4e-7"],
    ["relora.rank_schedule=[[100,8],[150,4]]", "output_dir=it's here", "schedule.min_ratio=0.0"],
]


@functools.cache
def completed(*settings):
    return complete(schema.compose([_hydra(text) for text in settings]))


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_the_printed_command_is_the_same_run(settings):
    config = completed(*settings)
    words = shlex.split(recipe.command(config))
    assert words[:2] == ["python", "run.py"]
    again = complete(schema.compose(words[2:]))
    assert run_id(again) == run_id(config)
    assert again.output_dir == config.output_dir


def _hydra(text):
    key, _, value = text.partition("=")
    return f"{key}={recipe.quoted(value)}" if key == "output_dir" else text


@pytest.mark.parametrize("settings", SETTINGS[:-1], ids=" ".join)
def test_the_experiment_file_is_the_same_run(settings, tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    shutil.copytree(typos.CONF, conf)
    config = completed(*settings)
    text = recipe.experiment_yaml(config, name="found", question="which?", source=["here"])
    (conf / "experiment" / "found.yaml").write_text(text)
    monkeypatch.setattr(typos, "CONF", conf)
    again = complete(schema.compose(["experiment=found"]))
    assert run_id(again) == run_id(config)
    assert again.experiment == "found"
    assert text.startswith("# @package _global_\n# Question: ")
    assert "# Command:  python run.py experiment=found" in text


def test_the_experiment_file_says_only_what_differs_from_its_base():
    config = complete(schema.compose(["train.lr=0.02", "relora.r=8"]))
    text = recipe.experiment_yaml(config, name="found", question="which?", source=[])
    printed = [line for line in text.splitlines() if not line.startswith("#")]
    assert printed == [
        *("defaults:", "  - demo", "  - _self_", "experiment: found"),
        *("relora:", "  r: 8", "train:", "  lr: 0.02"),
    ]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12))
def test_hydra_reads_quoted_text_as_it_was(text):
    override = OverridesParser.create().parse_override(f"data.split={recipe.quoted(text)}")
    value = override.value()
    assert (value.text if hasattr(value, "text") else value) == text


# studies on disk --------------------------------------------------------------------------------
@pytest.fixture
def place(tmp_path, monkeypatch):
    """(output_dir, put): `put(trials, *goals)` makes them the study `lr` there."""
    folder = tmp_path / "sweeps" / "lr" / "study"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text("{}")

    def put(trials, *goals, **options):
        study = opened(trials, *goals, name="lr", output_dir=tmp_path, **options)
        monkeypatch.setattr(Study, "open", classmethod(lambda cls, folder: study))
        return folder

    return tmp_path, put


@pytest.fixture
def no_plots(monkeypatch):
    """They take seconds."""
    monkeypatch.setattr(plots, "draw", lambda study, **options: ([], []))


def a_run(output_dir, *overrides, step=200, state="finished"):
    """A run as its worker leaves it; its id."""
    config = complete(schema.compose([*overrides, f"output_dir={output_dir}"]))
    run = RunDir(runs_folder(output_dir) / run_id(config))
    run.create(config)
    if state in ("finished", "diverged"):
        run.write_result({"state": state, "metrics": {}, "step": step})
    run.update_status(state=state, step=step, steps=config.train.steps)
    return run.run_id


def search(output_dir, *words):
    return main(["search", "lr", "--output-dir", str(output_dir), *words])


def test_the_best_can_be_run_again_from_the_artifacts(place, capsys, no_plots):
    out, put = place
    seeds = [a_run(out, "train.lr=0.02", f"seed={seed}") for seed in (0, 1)]
    folder = put(
        [
            trial([1.5], lr=0.02, run_ids=seeds, by_seed={"0": [1.0], "1": [2.0]}),
            trial([2.5], lr=0.05, run_ids=[a_run(out, "train.lr=0.05")]),
        ],
        seeds=(0, 1),
    )
    assert search(out) == 0
    printed = capsys.readouterr().out
    best = json.loads((folder / "best.json").read_text())["best"][0]
    assert best["number"] == 0
    assert best["seeds"] == [0, 1]
    assert best["intervals"]["train/loss"] == pytest.approx(
        list(stats.t.interval(0.95, 1, 1.5, 0.5))
    )
    assert best["command"] in printed
    assert run_id(complete(schema.compose(shlex.split(best["command"])[2:]))) == seeds[0]
    assert "lr: 0.02" in (folder / "best.yaml").read_text()
    stock = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert stock == {
        "name": "optuna",
        "best_params": {"train.lr": 0.02, "relora.r": 4},
        "best_value": 1.5,
    }
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [float(row["train/loss"]) for row in rows] == [1.5, 2.5]
    assert rows[0]["run_ids"].split() == seeds


def test_pruning_counts_the_steps_that_were_spared(place, capsys):
    out, put = place
    put(
        [
            trial([1.5], run_ids=[a_run(out, "train.lr=0.02")]),
            trial(
                state="PRUNED",
                run_ids=[a_run(out, "train.lr=0.05", step=30, state="cancelled")],
                steps=(10, 20, 30),
            ),
        ],
        seeds=(0, 1),  # the pruned trial's second seed never began
    )
    assert search(out, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["pruned_steps"], answer["saved_steps"]) == (30, 370)


def test_a_study_whose_trials_all_failed_says_so_and_exits_with_1(place, capsys, no_plots):
    out, put = place
    put([trial(state="FAIL", reason="RuntimeError: boom") for _ in range(3)])
    assert search(out) == 1
    printed = capsys.readouterr()
    assert "all 3 trials of lr failed" in printed.err
    assert printed.out.count("RuntimeError: boom") == 1
    assert "trial 0, 1, 2" in printed.out


def test_one_failed_trial_among_others_is_no_failure(place):
    out, put = place
    put([trial(state="FAIL", reason="boom"), trial(state="RUNNING", worker={})])
    assert search(out, "--json") == 0


def test_points_that_were_refused_are_listed_and_do_not_count(place, capsys, no_plots):
    out, put = place
    refused = {"refused": True, "counted": False}
    put(
        [
            trial(state="PRUNED", excess=0.5, reason="too large", **refused),
            trial([1.0], excess=-0.5),
        ],
        n_trials=1,
    )
    assert search(out) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 trials: 1 complete" in printed
    assert "refused: trial 0: too large" in printed
    assert "best: trial 1" in printed


def test_an_empty_study_says_that_nothing_is_finished(place, capsys):
    out, put = place
    folder = put([])
    assert search(out) == 0
    assert "no trial is finished yet" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["study.json"]


def test_a_single_trial_leaves_out_what_it_cannot_show(place, capsys):
    out, put = place
    folder = put([trial([1.5], run_ids=[])])
    assert search(out) == 0
    printed = capsys.readouterr().out
    assert "no slice: 1 finished trials" in printed
    assert "no param-importances" in printed
    assert (folder / "plots" / "optimization-history.png").stat().st_size > 1000
    assert not (folder / "plots" / "slice.png").exists()


def test_no_infinity_reaches_the_json(place, capsys):
    out, put = place
    put([trial([math.inf]), trial([2.0])])
    assert search(out, "--json") == 0
    text = capsys.readouterr().out
    assert "Infinity" not in text
    assert [best["number"] for best in json.loads(text)["best"]] == [1]


def test_an_unknown_search_names_the_nearest(place, capsys):
    out, _ = place
    assert main(["search", "l", "--output-dir", str(out)]) == 2
    assert "Did you mean 'lr'?" in capsys.readouterr().err


def test_the_best_becomes_an_experiment_only_when_asked_for_and_once(place, tmp_path, capsys):
    out, put = place
    put([trial([1.5], run_ids=[a_run(out, "train.lr=0.02")])])
    file = tmp_path / "mine" / "good_lr.yaml"
    assert search(out, "--write-experiment", str(file)) == 0
    assert "experiment: good_lr" in file.read_text()
    assert search(out, "--write-experiment", str(file)) == 2
    assert "is there" in capsys.readouterr().err


def test_a_front_needs_a_trial_to_become_an_experiment(place, capsys, no_plots):
    out, put = place
    ids = [a_run(out, f"train.lr={lr}") for lr in (0.02, 0.05)]
    folder = put([trial([1, 2], run_ids=ids[:1]), trial([2, 1], run_ids=ids[1:])], LOSS, COST)
    assert search(out, "--write-experiment", "x") == 2
    assert "0, 1" in capsys.readouterr().err
    results.write_results(folder)
    assert "lr: 0.05" in (folder / "best-1.yaml").read_text()


def test_a_real_study_is_read_rebuilt_and_its_best_run_again(tmp_path, capsys):
    folder = study_folder(tmp_path, name="lr")
    spec = Spec(
        config=normalise({"n_trials": 4, "seeds": 2, "objectives": ["train/loss min last"]}),
        space={
            "train.lr": Float(low=1e-4, high=1e-1, log=True),
            "method": Choice(values=["full_rank", "relora"]),
        },
        groups=["method"],
        bases={
            base_key({"method": method}): complete(
                schema.compose([f"method={method}", f"output_dir={tmp_path}"])
            )
            for method in ("full_rank", "relora")
        },
    )
    study, losses = Study.open(folder, create=spec), {}
    while taken := study.take(Worker(host="here", pid=len(losses))):
        for seed in taken.seeds:
            config = taken.config(seed)
            run = RunDir(runs_folder(tmp_path) / run_id(config))
            losses[taken.number] = abs(math.log(config.train.lr) + 5)
            run.create(config)
            end_run(run, loss=losses[taken.number] + seed - 0.5, step=config.train.steps)
        taken.finish()
    best = min(losses, key=lambda number: losses[number])
    assert search(tmp_path, "--json", "--rebuild") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["counts"] == {"complete": 4}
    assert answer["best"][0]["number"] == best
    assert answer["best"][0]["values"]["train/loss"] == pytest.approx(losses[best])
    again = complete(schema.compose(shlex.split(answer["best"][0]["command"])[2:]))
    assert run_id(again) == answer["trials"][best]["runs"][0]["run_id"]


# plots ------------------------------------------------------------------------------------------
def many(values):
    return [
        trial(v, lr=10 ** -(1 + 2 * i / len(values)), r=[4, 8, 16][i % 3], steps=(1, 2, 3))
        for i, v in enumerate(values)
    ]


def names(folder):
    return {path.stem for path in (folder / "plots").glob("*.png")}


@pytest.mark.slow
def test_every_plot_of_one_objective_is_drawn(place):
    _, put = place
    folder = put([*many([[1 + i % 5] for i in range(10)]), trial([math.inf]), trial(state="FAIL")])
    written = results.write_results(folder)
    assert names(folder) == {
        *("optimization-history", "param-importances", "slice", "parallel-coordinate"),
        *("intermediate-values", "timeline"),
    }
    assert all(path.stat().st_size > 100 for path in written)
    assert {path.suffix for path in written} >= {".png", ".svg", ".json", ".csv"}


@pytest.mark.slow
def test_several_objectives_have_a_front_and_a_history_each(place):
    _, put = place
    folder = put(many([[i, (i - 3) ** 2] for i in range(8)]), LOSS, COST)
    results.write_results(folder)
    assert {"pareto-front", "optimization-history-train-loss", "slice-cost-trainable"} <= names(
        folder
    )


@pytest.mark.parametrize(("direction", "key"), [("minimize", "train.lr"), ("maximize", "relora.r")])
def test_importance_follows_what_sets_the_best_apart(direction, key):
    """The lowest losses are those of small rates, whatever r; the highest those of r=16."""
    rates = [10 ** -(1 + 3 * i / 60) for i in range(60)]
    settings = [(lr, [4, 8, 16][i % 3]) for i, lr in enumerate(rates)]
    trials = [trial([-30 if lr < 2.2e-4 else 10 * (r == 16)], lr=lr, r=r) for lr, r in settings]
    goal = Objective(metric="train/loss", direction=direction)
    assert collected(trials, goal).importances["train/loss"][key] > 0.5
