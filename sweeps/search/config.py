"""`search.*`, as in conf/search/*.yaml, checked. Imports no Optuna.

Not for: the grammar of the space, which is Hydra's (`hydra_plugins/` parses it).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from experiments.addresses import check_home, check_secret
from experiments.metrics import LOSS, goes_up
from relora_core.config import LARGEST_INT, ConfigError, nearest

DIRECTIONS = ("minimize", "maximize")
SHORT = {"min": "minimize", "max": "maximize"}
REDUCES = ("last", "best", "mean")
COSTS = ("cost/trainable", "cost/parameters", "cost/flops", "cost/gpu_hours")
"""Metrics that are computed, not logged."""
CONFIG_COSTS = COSTS[:-1]
"""Those that follow from the config alone."""
SAMPLERS = ("tpe", "random", "cmaes", "gp", "qmc", "grid", "nsgaii", "nsgaiii")
PRUNERS = ("none", "median", "asha", "hyperband", "percentile", "wilcoxon")


@dataclass(kw_only=True, slots=True)
class Objective:
    """One metric to minimise or maximise."""

    metric: str
    """As in events.jsonl, or one of COSTS."""
    direction: str = "minimize"
    reduce: str = "last"
    """Which of the logged values: `last`, `best`, or `mean` of the last k."""
    k: int = 1

    def text(self) -> str:
        """The short form: `eval/paloma/perplexity min last`."""
        mean = f" {self.k}" if self.reduce == "mean" else ""
        return f"{self.metric} {self.direction[:3]} {self.reduce}{mean}"

    @property
    def worst(self) -> float:
        """Value of a run that diverged."""
        return math.inf if self.direction == "minimize" else -math.inf


@dataclass(kw_only=True, slots=True)
class Constraint:
    """`metric <= bound` or `metric >= bound`, of the mean over a trial's seeds."""

    metric: str
    at_most: bool
    bound: float

    def excess(self, value: float) -> float:
        """How far `value` is beyond the bound; <= 0 if it is met."""
        return value - self.bound if self.at_most else self.bound - value

    def text(self) -> str:
        return f"{self.metric} {'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """`search.*`. As composed, `Any` fields may hold short forms; `normalise` writes them out."""

    n_trials: int = 20
    """In all: the same command again continues to it."""
    seeds: Any = 1
    """Seeds that a trial averages over: a list, or how many from the config's seed on."""
    objectives: Any = field(default_factory=list)
    """list[Objective]; short: `train/loss`, `eval/paloma/perplexity min last`,
    `train/loss min mean 5`. Without a direction it is minimised; an accuracy must have one. `mean`
    and `best` are of logged points, of train/loss therefore those of runtime.log_every_steps;
    `last` does not depend on it."""
    space: dict[str, str] = field(default_factory=dict)
    """Key -> values in Hydra's grammar: `tag(log, interval(1e-4, 1e-2))`, `choice(4, 8)`."""
    when: dict[str, str] = field(default_factory=dict)
    """Key of the space -> `KEY=VALUE[,VALUE]`, without which it is not searched. Knobs of a method
    or a kind of data need no such condition."""
    common: dict[str, Any] = field(default_factory=dict)
    """Key -> value that all runs have in common, like `experiment`; arms and the command line
    override it."""
    arms: Any = field(default_factory=dict)
    """Arm -> its overrides, like `hydra.sweeper.arms` of a sweep; an interval or a choice among
    them is searched in that arm. Each arm is tuned alone, in `n_trials` trials; `sweep.arm=a,b`
    selects some."""
    constraints: Any = field(default_factory=list)
    """list[str]: `cost/trainable <= 2e6`."""
    sampler: Any = "tpe"
    """Name, or {name, its options}; `{name: grid, per_decade: 3}` lists logarithmic intervals."""
    pruner: Any = "none"
    """Name, or {name, its options}."""
    prune_metric: str | None = None
    """Logged metric that pruners see; null: the first objective's, else train/loss."""
    seed: int = 0
    """The sampler's."""
    enqueue: Any = field(default_factory=list)
    """list of {key: value}: settings to try first; keys that one lacks are sampled."""
    learn_from: Any = field(default_factory=list)
    """list[str]: earlier sweeps; a new study begins with the results of their finished runs."""
    storage: str | None = None
    """URL of an Optuna database; null: a journal in the study's folder."""
    max_failures: int = 10
    """So many failed trials in a row end the search."""
    trials_per_job: int = 1
    """Most trials of one scheduler job: it takes another if the one before ended early."""


MOST_SEEDS = 10_000
CHANGEABLE = ("n_trials", "sampler", "pruner", "prune_metric", "enqueue", "max_failures")
CHANGEABLE += ("trials_per_job", "seed")
"""Keys that a later command of the same study may change."""


def normalise(values: Mapping[str, Any] | SearchConfig, *, seed: int = 0) -> SearchConfig:
    """The search with short forms written out, all checked; `seed` is the first of `seeds: N`."""
    if isinstance(values, SearchConfig):
        values = dataclasses.asdict(values)
    names = [f.name for f in fields(SearchConfig)]
    for key in values:
        _check_choice("search", key, names, what="a key of search")
    config = SearchConfig(**values)
    for key in ("n_trials", "max_failures", "trials_per_job"):
        _check_integer(f"search.{key}", getattr(config, key), at_least=1)
    _check_integer("search.seed", config.seed, at_least=0)
    config.seeds = _seeds(config.seeds, first=seed)
    config.objectives = _objectives(config.objectives)
    config.constraints = [parse_constraint(text).text() for text in _list(config.constraints)]
    config.sampler = _with_name("search.sampler", config.sampler, SAMPLERS)
    config.pruner = _with_name("search.pruner", config.pruner or "none", PRUNERS)
    if len(config.objectives) > 1 and config.pruner["name"] != "none":
        raise ConfigError(
            "search.pruner must be none with several objectives (a trial is not worse while it is "
            f"better in one), got {config.pruner['name']!r}"
        )
    first = config.objectives[0].metric
    config.prune_metric = config.prune_metric or (first if first not in COSTS else LOSS.key)
    for key in ("space", "when", "arms", "common"):
        _mapping(f"search.{key}", getattr(config, key))
    entries = _list(config.enqueue)
    config.enqueue = [_mapping(f"search.enqueue[{i}]", one) for i, one in enumerate(entries)]
    config.learn_from = list(dict.fromkeys(_list(config.learn_from)))
    for one in config.learn_from:
        if not isinstance(one, str):
            raise ConfigError(f"search.learn_from must be names of sweeps, got {one!r}")
    if config.storage is not None:
        check_secret("search.storage", str(config.storage))
        check_home("search.storage", str(config.storage))
        if "://" not in str(config.storage):
            raise ConfigError(
                f"search.storage must be the address of a database, got {str(config.storage)!r}; "
                f"nearest valid: sqlite:///{config.storage}"
            )
    return config


def check_arms(arms: Any) -> dict[str, list[str]]:
    """Arm -> overrides; ConfigError for names that are not for folders, or overrides of no list."""
    checked = {}
    for name, overrides in _mapping("search.arms", arms).items():
        if not re.fullmatch(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,59}", str(name)):
            raise ConfigError(
                "search.arms must have names of at most 60 letters, digits or . _ = -, got "
                f"{str(name)!r}"
            )
        checked[str(name)] = check_overrides(f"search.arms.{name}", overrides)
    return checked


def check_overrides(key: str, overrides: Any) -> list[str]:
    """The overrides of an arm; ConfigError for what is no list of texts."""
    texts = [] if overrides is None else overrides
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{key} must be overrides, like [method=lora, relora.r=8], got {overrides!r}"
        )
    return list(texts)


def constraints_of(config: SearchConfig) -> list[Constraint]:
    return [parse_constraint(text) for text in config.constraints]


def parse_constraint(text: str) -> Constraint:
    """`cost/trainable <= 2e6`; ConfigError for any other form."""
    match = re.fullmatch(r"\s*([\w./-]+)\s*(<=|>=)\s*(\S+)\s*", str(text))
    try:
        if match is None:
            raise ValueError
        metric, sign, bound = match[1], match[2], float(match[3])
        if not math.isfinite(bound):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"search.constraints must be like 'cost/trainable <= 2e6' (<= or >=), got {str(text)!r}"
        ) from None
    _check_metric("search.constraints", metric)
    return Constraint(metric=metric, at_most=sign == "<=", bound=bound)


def _objectives(given: Any) -> list[Objective]:
    if not _list(given):
        raise ConfigError(
            "search.objectives must name at least one metric, like 'eval/paloma/perplexity min "
            "last', got nothing"
        )
    objectives = [_objective(one) for one in _list(given)]
    names = [one.metric for one in objectives]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"search.objectives must be different metrics, got {twice[0]!r} twice")
    return objectives


def _objective(given: Any) -> Objective:
    values = _short_objective(given) if isinstance(given, str) else given
    if not isinstance(values, Mapping):
        raise ConfigError(f"search.objectives must be text or {{metric: ...}}, got {given!r}")
    for key in values:
        _check_choice("search.objectives", key, [f.name for f in fields(Objective)], what="a key")
    if "metric" not in values:
        raise ConfigError(f"search.objectives must name a metric, got {dict(values)!r}")
    values = {key: value for key, value in values.items() if value is not None}
    one = Objective(**values)
    if "direction" not in values and isinstance(one.metric, str) and goes_up(one.metric):
        raise ConfigError(
            f"search.objectives must say min or max of {one.metric}, of which more is better, got "
            f"{given!r}; nearest valid: '{one.metric} max {one.reduce}'"
        )
    for key in ("metric", "direction", "reduce"):
        if not isinstance(getattr(one, key), str):
            raise ConfigError(
                f"search.objectives must have text as {key}, got {getattr(one, key)!r}"
            )
    one.direction = direction(one.direction)
    _check_choice("search.objectives", one.direction, [*DIRECTIONS, *SHORT], what="a direction")
    _check_choice("search.objectives", one.reduce, REDUCES, what="a way to reduce")
    _check_integer("search.objectives k", one.k, at_least=1)
    _check_metric("search.objectives", one.metric)
    return one


def direction(text: str) -> str:
    """`minimize` or `maximize` for any spelling of it (MAX, Minimize); else the text itself."""
    lower = text.lower()
    return SHORT.get(lower, lower if lower in DIRECTIONS else text)


def _short_objective(text: str) -> dict[str, Any]:
    """`METRIC [min|max [last|best|mean [k]]]`."""
    parts = text.split()
    if not 1 <= len(parts) <= 4 or (len(parts) == 4 and not parts[3].isdigit()):
        raise ConfigError(
            f"search.objectives must be 'METRIC min|max last|best|mean [k]', got {text!r}"
        )
    keys = ("metric", "direction", "reduce", "k")
    values: dict[str, Any] = dict(zip(keys, parts, strict=False))
    return values | ({"k": int(parts[3])} if len(parts) == 4 else {})


def _check_metric(key: str, metric: str) -> None:
    if str(metric).startswith("cost/"):
        _check_choice(key, metric, COSTS, what="a cost")


def _seeds(given: Any, *, first: int) -> list[int]:
    if isinstance(given, int) and not isinstance(given, bool):
        _check_integer("search.seeds", given, at_least=1, at_most=MOST_SEEDS)
        return [first + i for i in range(given)]
    seeds = _list(given)
    for seed in seeds:
        _check_integer("search.seeds", seed, at_least=0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"search.seeds must be a number or different seeds, got {given!r}")
    return seeds


def _with_name(key: str, given: Any, choices: tuple[str, ...]) -> dict[str, Any]:
    values = dict(given) if isinstance(given, Mapping) else {"name": given}
    _check_choice(f"{key}.name", values.get("name"), choices, what="one")
    return {"name": values.pop("name"), **values}


def _mapping(key: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key} must be {{key: value, ...}}, got {given!r}")
    return dict(given)


def _list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given] if given else []


def _check_integer(key: str, value: Any, *, at_least: int, at_most: int = LARGEST_INT) -> None:
    if isinstance(value, int) and value > at_most:
        raise ConfigError(f"{key} must be <= {at_most}, got {value}; nearest valid: {at_most}")
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(
            f"{key} must be an integer >= {at_least}, got {value!r}; nearest valid: {at_least}"
        )


def _check_choice(key: str, value: Any, choices: Any, *, what: str) -> None:
    if value not in choices:
        raise ConfigError(
            f"{key} must be {what} of {', '.join(choices)}, got {value!r}.{nearest(value, choices)}"
        )
