"""What a search is asked to do: short forms mean what they say, mistakes are one line each."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from relora_core.config import ConfigError
from sweeps.search import samplers
from sweeps.search.config import Objective, constraints_of, normalise, parse_constraint
from sweeps.search.launch import check_measured
from sweeps.search.space import Choice, Float, Int

LR = {"train.lr": Float(low=1e-4, high=1e-2, log=True)}
ACCURACY = "eval/blimp/no_bos/accuracy max"


def search(**changes):
    return normalise({"objectives": "train/loss", **changes})


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("train/loss", {"metric": "train/loss"}),
        ("a/b max", {"metric": "a/b", "direction": "maximize"}),
        ("a/b MAX", {"metric": "a/b", "direction": "Maximize"}),
        ("a/b minimize best", {"metric": "a/b", "reduce": "best"}),
        ("a/b min mean 5", {"metric": "a/b", "direction": "min", "reduce": "mean", "k": 5}),
    ],
)
def test_short_objectives_mean_the_same_as_long_ones(short, long):
    assert search(objectives=[short]).objectives == search(objectives=[long]).objectives
    assert search(objectives=short).objectives == search(objectives=[long]).objectives


def test_a_normalised_search_survives_json_and_is_its_own_normal_form():
    config = search(
        objectives=["train/loss min mean 3", "cost/trainable"],
        seeds=[3, 5],
        constraints=["cost/parameters<=2e6"],
        sampler={"name": "nsgaii", "population_size": 8},
        enqueue=[{"train.lr": 1e-3}],
    )
    again = normalise(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config == normalise(config)


def test_seeds_are_counted_from_the_configs_own():
    assert normalise({"objectives": "x", "seeds": 3}, seed=7).seeds == [7, 8, 9]
    assert normalise({"objectives": "x", "seeds": [4, 2]}, seed=7).seeds == [4, 2]


def test_a_constraint_is_met_on_its_side_of_the_bound():
    at_most, at_least = parse_constraint("a/b <= 2"), parse_constraint("a/b>=2")
    assert [at_most.excess(v) <= 0 for v in (1, 2, 3)] == [True, True, False]
    assert [at_least.excess(v) <= 0 for v in (1, 2, 3)] == [False, True, True]
    assert constraints_of(search(constraints=["a/b <= 2", "a/b>=2"])) == [at_most, at_least]


def test_the_worst_is_at_the_far_end():
    assert Objective(metric="x").worst == math.inf
    assert Objective(metric="x", direction="maximize").worst == -math.inf


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"n_trial": 3}, "n_trials"),
        ({"n_trials": 0}, "search.n_trials must be an integer >= 1, got 0"),
        ({"objectives": []}, "search.objectives must name at least one metric"),
        ({"objectives": "a/b mni"}, "got 'mni'. Did you mean 'min'"),
        ({"objectives": "a/b MNI"}, "got 'MNI'"),
        ({"objectives": "a/b min lst"}, "Did you mean 'last'"),
        ({"objectives": "a b c d e"}, "search.objectives"),
        ({"objectives": "cost/trainble"}, "Did you mean 'cost/trainable'"),
        ({"objectives": ["a", "a"]}, "twice"),
        ({"objectives": ["a", "b"], "pruner": "median"}, "search.pruner must be none"),
        ({"objectives": "eval/blimp/no_bos/accuracy"}, "'eval/blimp/no_bos/accuracy max last'"),
        ({"objectives": [{"metric": "my/accuracy"}]}, "must say min or max of my/accuracy"),
        ({"storage": "/tmp/x.db"}, "search.storage must be the address of a database, got"),
        ({"constraints": ["cost/trainable < 3"]}, "search.constraints must be like"),
        ({"constraints": ["cost/trainable <= x"]}, "search.constraints must be like"),
        ({"sampler": "tep"}, "Did you mean 'tpe'"),
        ({"pruner": {"nam": "median"}}, "search.pruner.name"),
        ({"seeds": [1, 1]}, "search.seeds"),
        ({"seeds": []}, "search.seeds"),
        ({"seeds": True}, "search.seeds"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_was_meant(changes, line):
    with pytest.raises(ConfigError) as caught:
        search(**changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objectives": "eval/palma/perplexity"}, r"objectives must be of .*Did you mean 'paloma'"),
        ({"objectives": "eval/paloma/perplexity"}, r"objectives must be what all .*enabled=false$"),
        ({"prune_metric": "eval/blimp/x"}, r"prune_metric must be what all runs measure, got 'ev"),
        ({"constraints": ["eval/blimp/x >= 0.6"]}, r"constraints must be what all runs measure"),
    ],
)
def test_a_metric_of_an_eval_that_no_run_has_is_refused_before_any_trial(spec, changes, line):
    with pytest.raises(ConfigError, match=rf"^search\.{line}"):
        check_measured(spec(**changes))
    check_measured(spec())


# samplers and pruners ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tpe", "random", "gp", "qmc", "grid", "nsgaii", "nsgaiii"])
def test_every_sampler_can_be_made(name):
    space = {"relora.r": Int(low=4, high=16)}
    samplers.check_search(search(sampler=name), space=space)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sampler": {"name": "tpe", "multivarate": True}}, "Did you mean 'multivariate'"),
        ({"sampler": {"name": "random", "seed": 3}}, "search.sampler.seed must be an option"),
        ({"pruner": {"name": "asha", "reduction": 3}}, "Did you mean 'reduction_factor'"),
        ({"pruner": {"name": "asha", "reduction_factor": 1}}, "search.pruner"),
        ({"pruner": "percentile"}, "search.pruner.percentile must be set"),
        ({"pruner": {"name": "none", "x": 1}}, "it has none"),
        ({"sampler": "grid"}, "search.space.train.lr must be a finite list"),
        ({"sampler": "cmaes", "objectives": ["a", "b"]}, "with 2 objectives"),
        (
            {"objectives": ACCURACY, "prune_metric": "train/loss", "pruner": "median"},
            "search.prune_metric must be a metric to maximize",
        ),
        (
            {"objectives": "train/loss", "prune_metric": ACCURACY.split()[0], "pruner": "asha"},
            "search.prune_metric must be a metric to minimize",
        ),
    ],
)
def test_what_a_sampler_or_pruner_does_not_take_is_refused(changes, line):
    with pytest.raises(ConfigError) as caught:
        samplers.check_search(search(**changes), space=LR)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"objectives": "eval/paloma/perplexity", "prune_metric": "train/loss"},
        {"objectives": ACCURACY, "prune_metric": "dynamics/some"},
        {"objectives": ACCURACY},
        {"objectives": ACCURACY, "prune_metric": "train/loss", "pruner": "none"},
    ],
)
def test_a_metric_that_prunes_the_worst_is_taken(changes):
    samplers.check_search(search(**{"sampler": "random", "pruner": "median", **changes}), space=LR)


def test_a_sampler_whose_package_is_missing_says_which(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install cmaes"):
        samplers.check_search(search(sampler="cmaes"), space=LR)


def test_lists_and_look_alikes_come_back_as_they_went_in():
    choice = Choice(values=[1, True, "1", None, [[100, 8]], [], 0.5])
    stored = [samplers.encode(value) for value in choice.values]
    back = [samplers.decode(choice, value) for value in json.loads(json.dumps(stored))]
    assert list(map(repr, back)) == list(map(repr, choice.values))
