"""A space that grows within its study: what it may grow by, and earlier trials in the wider space.

Optuna's storages refuse other choices for a parameter, and its samplers leave out a parameter that
trials drew from different distributions. So all trials get the distributions of the wider space.
Not for: writing them into a new journal (`study.py`).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from experiments.identity import scientific
from experiments.references import following
from relora_core.config import ConfigError, RunConfig, applies, get
from sweeps.search import samplers
from sweeps.search.space import (
    Choice,
    Dimension,
    Float,
    Int,
    base_key,
    condition,
    knobs,
    means,
    to_json,
    with_values,
)
from sweeps.search.trial import fill, is_begun

if TYPE_CHECKING:
    from sweeps.search.spec import Spec

_CMAES = ("cma:", "sepcma:", "cmawm:", "x_for_tell")
"""Prefixes of the attributes with the state of CMA-ES, which depends on the space's bounds."""


# what may grow ----------------------------------------------------------------------------------
def widen(before: Dimension, now: Dimension) -> Dimension | None:
    """`now` if it contains all of `before`, else None; old choices come first, as they were."""
    if isinstance(before, Choice) and isinstance(now, Choice):
        if not all(map(now.contains, before.values)):
            return None
        more = [value for value in now.values if not before.contains(value)]
        return Choice(values=[*before.values, *more])
    if isinstance(before, Choice) or isinstance(now, Choice) or type(before) is not type(now):
        return None
    return now if _covers(now, before) else None


def _covers(wide: Int | Float, narrow: Int | Float) -> bool:
    last = narrow.nearest(narrow.high)
    if wide.log != narrow.log or not (wide.low <= narrow.low and last <= wide.high):
        return False
    if wide.step is None or narrow.step is None:
        return wide.step is None
    return wide.contains(narrow.low) and wide.contains(narrow.low + narrow.step)


def allows_same(before: str | None, now: str | None, *, space: Mapping[str, Dimension]) -> bool:
    """Whether a key's condition allows what it did in `space`: it may have added newer choices."""
    if before is None or now is None:
        return before == now
    (needed, values), (other, more) = condition("", before), condition("", now)
    if needed != other or not set(values) <= set(more):
        return False
    dimension, added = space.get(needed), set(more) - set(values)
    if not isinstance(dimension, Choice):
        return not added
    return not any(means(text, value) for text in added for value in dimension.values)


def join(old: Spec, new: Spec) -> Spec:
    """`new` with its added keys as earlier trials had them: in its bases, or if the key is a group
    as the first option.

    `new` has all keys of `old`. ConfigError if such a value is not in the space of its key, or if
    a setting that is not searched has changed.
    """
    keys = [key for key in new.space if key not in old.space]
    groups = [key for key in keys if key in new.groups]
    carried = [key for key in (*old.added, *keys) if key not in new.groups]
    _check_values(old, new, keys=[key for key in keys if key not in groups])
    differing = None
    for options in itertools.product(*(new.space[group].finite() or [] for group in groups)):
        standing, bases, differing = dict(zip(groups, options, strict=True)), dict(new.bases), None
        for choices in combinations(old):
            before, key = old.bases[base_key(choices)], base_key({**choices, **standing})
            bases[key] = with_values(bases[key], {k: get(before, k) for k in carried})
            differing = differing or _difference(before, bases[key], besides=old.space)
            follows = old.follows.get(base_key(choices), {}), new.follows.get(key, {})
            differing = differing or _other_reference(*follows, searched=old.space)
        if differing is None:
            first = {
                g: Choice(values=_put_first(option, new.space[g])) for g, option in standing.items()
            }
            space, added = {**new.space, **first}, [*old.added, *keys]
            return replace(new, space=space, bases=bases, added=added)
    assert differing
    if groups:
        raise ConfigError(
            f"search.space.{groups[0]} must hold the option that trials ran with before, to join a "
            f"study that has begun, got {new.space[groups[0]].text()}; another sweep.name begins a "
            "new study"
        )
    key, before, now = differing
    raise ConfigError(
        f"{key} must stay {before} in a study that has begun, got {now}; another sweep.name begins "
        "a new study"
    )


def _check_values(old: Spec, new: Spec, *, keys: Sequence[str]) -> None:
    """ConfigError if an added key cannot have the value that earlier trials had."""
    for key, base in itertools.product(keys, old.bases.values()):
        value = get(base, key)
        if applies(knobs(base)[key], base) and not new.space[key].contains(value):
            raise ConfigError(
                f"search.space.{key} must hold {value!r}, with which trials ran before, to join a "
                f"study that has begun, got {new.space[key].text()}; another sweep.name begins a "
                "new study"
            )


def _difference(
    before: RunConfig, now: RunConfig, *, besides: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """The first setting at which they differ, and its two values."""
    one, two = _settings(before), _settings(now)
    for key in dict.fromkeys([*one, *two]):
        if one.get(key) != two.get(key) and key not in (*besides, "seed"):
            return key, one.get(key), two.get(key)
    return None


def _other_reference(
    before: Mapping[str, Any], now: Mapping[str, Any], *, searched: Collection[str]
) -> tuple[str, Any, Any] | None:
    """The first value that follows what was searched before in another way now, and both ways."""
    now = following(now, [*searched, "seed"])
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key) and key not in searched:
            return key, before.get(key, "as it was"), now.get(key, "a value of its own")
    return None


def _settings(config: RunConfig) -> dict[str, Any]:
    """What the run computes, and the knobs by which a part of that is set at each point."""
    keys = [k for k, meta in knobs(config).items() if "sets" in meta and applies(meta, config)]
    return scientific(config) | {key: get(config, key) for key in keys}


def combinations(spec: Spec) -> Iterator[dict[str, Any]]:
    """Each combination of the groups' options."""
    for options in itertools.product(*(spec.space[group].finite() or [] for group in spec.groups)):
        yield dict(zip(spec.groups, options, strict=True))


def _put_first(option: Any, dimension: Dimension) -> list[Any]:
    return [option, *(value for value in dimension.finite() or [] if value != option)]


# earlier trials ---------------------------------------------------------------------------------
def mark(spec: Spec) -> str:
    """Attribute of a journal that has all trials in the spec's space."""
    space = {key: to_json(dimension) for key, dimension in spec.space.items()}
    grid: Any = spec.config.seed if spec.config.sampler["name"] == "grid" else None
    if per_decade := spec.config.sampler.get("per_decade"):
        grid = [grid, per_decade]
    text = json.dumps([space, spec.added, grid], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fit(trials: Sequence[FrozenTrial], spec: Spec) -> list[FrozenTrial]:
    """The trials as if they were drawn from the spec's space; their values and numbers stay.

    A trial that fits already is returned as the same object.
    """
    distributions = {key: samplers.distribution(one) for key, one in spec.space.items()}
    return [_fit(trial, spec, distributions) for trial in trials]


def carry_over(trials: Sequence[FrozenTrial], spec: Spec) -> list[FrozenTrial]:
    """The trials for a new journal: `fit`, with the samplers' attributes for the spec's space."""
    fitted = fit(trials, spec)
    if any(one is not trial for one, trial in zip(fitted, trials, strict=True)):
        fitted = [_changed(t, system_attrs=_without_cmaes(t)) for t in fitted]
    points = samplers.grid_points(fitted, spec.config, space=spec.space)
    return [
        _changed(t, system_attrs=t.system_attrs | points[t.number]) if t.number in points else t
        for t in fitted
    ]


def _fit(
    trial: FrozenTrial, spec: Spec, distributions: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    stored = trial.params
    try:
        own = {key: samplers.decode(spec.space[key], value) for key, value in stored.items()}
    except (KeyError, StopIteration):
        raise ConfigError(
            f"search.space must hold what trial {trial.number} has drawn ({stored}), but "
            "study.json has been changed: put it back, or move the study away to begin anew"
        ) from None
    lacking = any(key not in own for key in spec.added)
    if own and lacking and (trial.state.is_finished() or is_begun(trial)):
        own = fill(spec, lambda key, config: own[key] if key in own else _before(key, spec, config))
        stored = {key: spec.stored(key, value) for key, value in own.items()}
    present = {key: distributions[key] for key in stored}
    if present == trial.distributions and stored.keys() == trial.params.keys():
        return trial
    attrs = trial.user_attrs | ({"params": own} if "params" in trial.user_attrs else {})
    return _changed(trial, params=stored, distributions=present, user_attrs=attrs)


def _before(key: str, spec: Spec, config: RunConfig) -> Any:
    """The value that a trial had of a key that was added later; `config` is the trial's so far."""
    return spec.space[key].finite()[0] if key in spec.groups else get(config, key)  # type: ignore[index]


def _without_cmaes(trial: FrozenTrial) -> dict[str, Any]:
    return {k: v for k, v in trial.system_attrs.items() if not k.startswith(_CMAES)}


def _changed(trial: FrozenTrial, **attributes: Any) -> FrozenTrial:
    """A copy with these attributes instead."""
    trial = copy.copy(trial)
    for name, value in attributes.items():
        setattr(trial, name, value)
    return trial
