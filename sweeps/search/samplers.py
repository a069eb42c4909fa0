"""Optuna's samplers and pruners by name, with checked options, and its form of dimensions."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from experiments.metrics import LOSS, goes_up
from relora_core.config import ConfigError, nearest
from sweeps.search.config import SearchConfig
from sweeps.search.space import Choice, Dimension, Float, Int

_PICKLED = {
    "cmaes": ("CMA", "SepCMA", "CMAwM"),
    "numpy": ("_reconstruct", "dtype", "ndarray", "scalar"),
}
"""Classes and functions in the state of cmaes's optimizers, by package."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _PICKLED.get(module.partition(".")[0], ()):
            raise ConfigError(
                f"a search's stored state must be of cmaes, got one that calls {module}.{name}; "
                "move the study away to search anew"
            )
        return super().find_class(module, name)


class CmaEsSampler(optuna.samplers.CmaEsSampler):
    """Optuna's would unpickle whatever a stranger has put into a trial."""

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        key = self._attr_key_optimizer
        for trial in reversed(completed_trials):
            stored = {k: v for k, v in trial.system_attrs.items() if k.startswith(key)}
            if stored:
                state = bytes.fromhex(self._concat_optimizer_attrs(stored))
                return _Unpickler(io.BytesIO(state)).load()
        return None


class GridSampler(optuna.samplers.GridSampler):
    """Optuna's gives trial n the n-th point, which a grid that grew or learnt may have tried."""

    def __init__(
        self,
        search_space: Mapping[str, Sequence[Any]],
        seed: int | None = None,
        *,
        per_decade: int | None = None,
    ) -> None:
        """`per_decade` is an option of `_grid`, which has made the search space."""
        super().__init__(search_space, seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number not in self._get_unvisited_grid_ids(study):
            trial = copy.copy(trial)
            trial.number = self._n_min_trials  # beyond the grid, it looks for a point that is left
        super().before_trial(study, trial)

    def ids(self, trial: FrozenTrial) -> list[int]:
        """The grid points with the trial's parameters; several if it lacks some."""
        return [id_ for id_ in range(self._n_min_trials) if self._is_at(id_, trial)]

    def knows(self, trial: FrozenTrial) -> bool:
        """Whether the grid point stored with the trial is of this grid and has its parameters."""
        attrs = trial.system_attrs
        same = self._same_search_space(attrs["search_space"])
        return same and self._is_at(attrs["grid_id"], trial)

    def _is_at(self, id_: int, trial: FrozenTrial) -> bool:
        point = dict(zip(self._param_names, self._all_grids[id_], strict=True))
        return all(self._grid_value_equal(point[k], value) for k, value in trial.params.items())


_SAMPLERS: dict[str, type[optuna.samplers.BaseSampler]] = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "cmaes": CmaEsSampler,
    "gp": optuna.samplers.GPSampler,
    "qmc": optuna.samplers.QMCSampler,
    "grid": GridSampler,
    "nsgaii": optuna.samplers.NSGAIISampler,
    "nsgaiii": optuna.samplers.NSGAIIISampler,
}
_PRUNERS: dict[str, type[optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "asha": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "wilcoxon": optuna.pruners.WilcoxonPruner,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "tpe": {"multivariate": True, "group": True},
    "qmc": {"warn_asynchronous_seeding": False, "warn_independent_sampling": False},
    "gp": {"warn_independent_sampling": False},
    "cmaes": {"warn_independent_sampling": False},
}
_NOT_TEXT = (
    "after_trial_strategy",
    "child_generation_strategy",
    "constraints_func",
    "crossover",
    "elite_population_selection_strategy",
    "gamma",
    "independent_sampler",
    "mutation",
    "reference_points",
    "search_space",
    "source_trials",
    "weights",
)
"""Options that take objects, or that the search sets itself."""
_SINGLE = ("cmaes",)
"""Samplers for one objective only."""
_PLAIN = (bool, int, float, str, type(None))


def distribution(dimension: Dimension) -> BaseDistribution:
    """The dimension as Optuna's."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution([encode(value) for value in dimension.values])
    if isinstance(dimension, Int):
        high = dimension.high - (dimension.high - dimension.low) % dimension.step
        return IntDistribution(dimension.low, high, log=dimension.log, step=dimension.step)
    finite = dimension.finite() if dimension.step is not None else None
    high = finite[-1] if finite else dimension.high
    with warnings.catch_warnings():  # it may find the last digit of `high` to be no multiple
        warnings.simplefilter("ignore", UserWarning)
        return FloatDistribution(dimension.low, high, log=dimension.log, step=dimension.step)


def suggest(trial: optuna.trial.Trial, key: str, dimension: Dimension) -> Any:
    """The trial's value at `key`, drawn now if it has none yet."""
    drawn = distribution(dimension)
    with warnings.catch_warnings():  # the last digit as in `distribution`; GP clips infinite values
        warnings.simplefilter("ignore", UserWarning)
        if key in trial.distributions:
            _skip(trial, key, drawn)
        value = trial._suggest(key, drawn)
    if isinstance(dimension, Float):
        return value if dimension.step is None else dimension.nearest(value)
    return int(value) if isinstance(dimension, Int) else decode(dimension, value)


def _skip(trial: optuna.trial.Trial, key: str, drawn: BaseDistribution) -> None:
    """Draw what the trial has of a point that a killed process began, for nothing: the rest is then
    what that process would have drawn."""
    if key in trial._fixed_params or drawn.single() or key in trial.relative_params:
        return
    trial.study.sampler.sample_independent(trial.study, trial._cached_frozen_trial, key, drawn)


def encode(value: Any) -> Any:
    """Lists are stored as text: Optuna keeps plain values only."""
    return value if isinstance(value, _PLAIN) else repr(value)


def decode(dimension: Dimension, stored: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(dimension, Choice):
        return next(
            v for v in dimension.values if encode(v) is stored or repr(encode(v)) == repr(stored)
        )
    return stored


def make_sampler(
    config: SearchConfig, *, space: Mapping[str, Dimension], draw: int
) -> optuna.samplers.BaseSampler:
    """The sampler for the draw of this number.

    Each draw has a seed of its own: processes that began alike would all draw the same.
    """
    name, options = config.sampler["name"], _options(config.sampler)
    own = (config.seed * 1_000_003 + draw) % 2**32
    if name == "grid":
        options["search_space"] = _grid(space, per_decade=options.get("per_decade"))
    if name == "qmc":
        options["independent_sampler"] = optuna.samplers.RandomSampler(seed=own)
    options["seed"] = config.seed if name in ("grid", "qmc") else own
    return _make("search.sampler", _SAMPLERS[name], options)


def grid_points(
    trials: Sequence[FrozenTrial], config: SearchConfig, *, space: Mapping[str, Dimension]
) -> dict[int, dict[str, Any]]:
    """Number of a trial -> attributes with its point of the grid; empty if all are right."""
    if config.sampler["name"] != "grid":
        return {}
    grid = make_sampler(config, space=space, draw=0)
    assert isinstance(grid, GridSampler)
    here = [t for t in trials if "grid_id" in t.system_attrs or "learnt" in t.user_attrs]
    if all(grid.knows(t) if "grid_id" in t.system_attrs else not grid.ids(t) for t in here):
        return {}
    attrs, taken = {}, set()
    for trial in sorted(here, key=lambda t: ("params" not in t.user_attrs, t.number)):
        if ids := grid.ids(trial):
            id_ = next((id_ for id_ in ids if id_ not in taken), ids[0])
            taken.add(id_)
            attrs[trial.number] = {"grid_id": id_, "search_space": grid._search_space}
    return attrs


def points_visited(
    trials: Sequence[FrozenTrial], config: SearchConfig, *, space: Mapping[str, Dimension]
) -> set[int]:
    """Ids of the points of the grid, as it is now, that trials have."""
    grid = make_sampler(config, space=space, draw=0)
    assert isinstance(grid, GridSampler)
    attrs = [t.system_attrs for t in trials if "grid_id" in t.system_attrs]
    return {one["grid_id"] for one in attrs if grid._same_search_space(one["search_space"])}


def make_pruner(config: SearchConfig) -> optuna.pruners.BasePruner:
    name = config.pruner["name"]
    return _make("search.pruner", _PRUNERS[name], _options(config.pruner))


def check_search(config: SearchConfig, *, space: Mapping[str, Dimension]) -> None:
    """ConfigError if the sampler or pruner cannot be made, or cannot do this search."""
    name = config.sampler["name"]
    _check_prune_metric(config)
    _check_options("search.sampler", config.sampler, _SAMPLERS[name], hidden=("seed",))
    _check_options("search.pruner", config.pruner, _PRUNERS[config.pruner["name"]])
    if name in _SINGLE and len(config.objectives) > 1:
        raise ConfigError(
            f"search.sampler must be tpe, gp, nsgaii or random with {len(config.objectives)} "
            f"objectives, got {name!r}"
        )
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise ConfigError(
            "search.sampler must be one whose packages are installed, got 'cmaes'; "
            "pip install cmaes"
        )
    make_sampler(config, space=space, draw=0)
    make_pruner(config)


def _check_prune_metric(config: SearchConfig) -> None:
    """ConfigError if pruners, which know the objective's direction alone, would prune the best."""
    goal, metric = config.objectives[0], str(config.prune_metric)
    known = metric == LOSS.key or metric.startswith("eval/")
    if config.pruner["name"] == "none" or metric == goal.metric or not known:
        return
    if goes_up(metric) != (goal.direction == "maximize"):
        raise ConfigError(
            f"search.prune_metric must be a metric to {goal.direction}, like the objective "
            f"{goal.metric}, got {metric!r}; null prunes by the objective"
        )


def n_trials(config: SearchConfig, *, space: Mapping[str, Dimension]) -> int:
    """How many trials the search will have: `config.n_trials`, of a grid at most all its points."""
    if config.sampler["name"] != "grid":
        return config.n_trials
    return min(config.n_trials, grid_size(config, space=space))


def grid_size(config: SearchConfig, *, space: Mapping[str, Dimension]) -> int:
    """How many points the full grid has."""
    grid = _grid(space, per_decade=config.sampler.get("per_decade"))
    return math.prod(map(len, grid.values()))


def _grid(space: Mapping[str, Dimension], *, per_decade: Any = None) -> dict[str, list[Any]]:
    """Values of each key; with `per_decade` a logarithmic interval has so many a decade."""
    if per_decade is not None and (type(per_decade) is not int or per_decade < 1):
        raise ConfigError(
            f"search.sampler.per_decade must be an integer >= 1, got {per_decade!r}; nearest "
            "valid: 3"
        )
    grid = {}
    for key, dimension in space.items():
        values = dimension.finite()
        if per_decade is not None and not isinstance(dimension, Choice) and dimension.log:
            values = lattice(dimension, per_decade=per_decade)
            if not values:
                raise ConfigError(
                    f"search.space.{key} must hold one of {per_decade} values a decade "
                    f"(search.sampler.per_decade), got {dimension.text()}"
                )
        if values is None:
            raise ConfigError(
                f"search.space.{key} must be a finite list for search.sampler=grid, got "
                f"{dimension.text()}; search.sampler.per_decade=3 lists tag(log, interval())"
            )
        grid[key] = [encode(value) for value in values]
    return grid


def lattice(dimension: Int | Float, *, per_decade: int) -> list[Any]:
    """The values 10 ** (k / per_decade), k an integer, to three digits, that lie in the interval.

    They do not depend on its ends: a wider interval has all of them, and arms share theirs.
    """
    low, high = dimension.low, dimension.high
    first = math.floor(math.log10(low) * per_decade)
    last = math.ceil(math.log10(high) * per_decade)
    values = [float(f"{10 ** (k / per_decade):.3g}") for k in range(first, last + 1)]
    if isinstance(dimension, Int):
        values = list(dict.fromkeys(map(round, values)))
    return [value for value in values if low <= value <= high]


def _options(named: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in named.items() if key != "name"}
    return _DEFAULTS.get(named["name"], {}) | given


def _check_options(
    key: str, named: Mapping[str, Any], cls: type, *, hidden: tuple[str, ...] = ()
) -> None:
    """ConfigError if `cls` has no such option, or needs another; the search sets `hidden` ones."""
    options = {
        p.name: p
        for p in inspect.signature(cls.__init__).parameters.values()
        if p.name not in ("self", *_NOT_TEXT, *hidden)
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    for option in named:
        if option != "name" and option not in options:
            listed = ", ".join(options) or "it has none"
            raise ConfigError(
                f"{key}.{option} must be an option of {named['name']} ({listed}), got "
                f"{named[option]!r}.{nearest(option, list(options))}"
            )
    for name, parameter in options.items():
        if parameter.default is parameter.empty and name not in named:
            raise ConfigError(f"{key}.{name} must be set for {named['name']}, got nothing")


def _make(key: str, cls: type, options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():  # `group` and some samplers call themselves experimental
        warnings.simplefilter("ignore")
        try:
            return cls(**options)
        except (TypeError, ValueError, AssertionError) as error:
            line = " ".join(str(error).split())
            raise ConfigError(f"{key} must be options that {cls.__name__} takes: {line}") from None
