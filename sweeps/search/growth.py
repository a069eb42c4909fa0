"""A space that grows within its study: what may join it, and earlier trials as it has them.

Optuna's storages refuse other choices for a parameter, and its samplers leave one out that trials
drew from different distributions. So all trials are given those of the wider space. Not for: the
journal that takes the place of the old one (`study.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from experiments.identity import scientific
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
    to_json,
    with_values,
)
from sweeps.search.trial import filled, is_begun

if TYPE_CHECKING:
    from sweeps.search.spec import Spec

_CMAES = ("cma:", "sepcma:", "cmawm:", "x_for_tell")
"""Prefixes of the attributes in which CMA-ES stores its state, which has the space's bounds."""


# what may join ----------------------------------------------------------------------------------
def widened(before: Dimension, now: Dimension) -> Dimension | None:
    """`now` if it contains all of `before`, else None; old choices stay first and as written."""
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


def only_newer(before: str | None, now: str | None, *, space: Mapping[str, Dimension]) -> bool:
    """Whether the condition `now` is `before` and, besides, choices that `space` lacked."""
    if before is None or now is None:
        return before == now
    (needed, words), (other, more) = condition("", before), condition("", now)
    dimension = space.get(needed)
    if needed != other or not set(words) <= set(more):
        return False
    old = map(str, dimension.values) if isinstance(dimension, Choice) else more
    return set(words) == set(more) or not (set(more) - set(words)) & set(old)


def joined(old: Spec, new: Spec) -> Spec:
    """`new`, which has all keys of `old`, where keys that have joined are in its bases as earlier
    trials ran with them: a searched group's option is then its first. ConfigError where they are
    not in the space, or where another setting has changed."""
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
        if differing is None:
            first = {
                g: Choice(values=_first(option, new.space[g])) for g, option in standing.items()
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
    """The first setting at which they differ, and what it is in each."""
    one, two = _settings(before), _settings(now)
    for key in dict.fromkeys([*one, *two]):
        if one.get(key) != two.get(key) and key not in (*besides, "seed"):
            return key, one.get(key), two.get(key)
    return None


def _settings(config: RunConfig) -> dict[str, Any]:
    """What the run computes, and what sets a part of that at each point."""
    setting = [k for k, meta in knobs(config).items() if "sets" in meta and applies(meta, config)]
    return scientific(config) | {key: get(config, key) for key in setting}


def combinations(spec: Spec) -> Iterator[dict[str, Any]]:
    """Each combination of the groups' options."""
    for options in itertools.product(*(spec.space[group].finite() or [] for group in spec.groups)):
        yield dict(zip(spec.groups, options, strict=True))


def _first(option: Any, dimension: Dimension) -> list[Any]:
    return [option, *(value for value in dimension.finite() or [] if value != option)]


# trials before ----------------------------------------------------------------------------------
def mark(spec: Spec) -> str:
    """Mark of a journal with all trials fitted to the spec's space."""
    space = {key: to_json(dimension) for key, dimension in spec.space.items()}
    grid: Any = spec.config.seed if spec.config.sampler["name"] == "grid" else None
    if per_decade := spec.config.sampler.get("per_decade"):
        grid = [grid, per_decade]
    text = json.dumps([space, spec.added, grid], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fitted(trials: Sequence[FrozenTrial], spec: Spec) -> list[FrozenTrial]:
    """The trials as if drawn from the space as it is now; those that are already are the same
    objects. Values and numbers stay."""
    distributions = {key: samplers.distribution(one) for key, one in spec.space.items()}
    return [_fitted(trial, spec, distributions) for trial in trials]


def moved(trials: Sequence[FrozenTrial], spec: Spec) -> list[FrozenTrial]:
    """`fitted`, and what samplers have noted of the trials right for the space as it is now."""
    fit = fitted(trials, spec)
    if any(one is not trial for one, trial in zip(fit, trials, strict=True)):
        fit = [_without(trial, _CMAES) for trial in fit]
    notes = samplers.visited(fit, spec.config, space=spec.space)
    return [_changed(t, system_attrs=notes[t.number]) if t.number in notes else t for t in fit]


def _fitted(
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
        own = filled(
            spec, lambda key, config: own[key] if key in own else _before(key, spec, config)
        )
        stored = {key: spec.stored(key, value) for key, value in own.items()}
    present = {key: distributions[key] for key in stored}
    if present == trial.distributions and stored.keys() == trial.params.keys():
        return trial
    attrs = {"params": own} if "params" in trial.user_attrs else {}
    return _changed(trial, params=stored, distributions=present, user_attrs=attrs)


def _before(key: str, spec: Spec, config: RunConfig) -> Any:
    """What a key that has joined since was; `config` is the trial's so far."""
    return spec.space[key].finite()[0] if key in spec.groups else get(config, key)  # type: ignore[index]


def _without(trial: FrozenTrial, beginnings: tuple[str, ...]) -> FrozenTrial:
    rest = {k: v for k, v in trial.system_attrs.items() if not k.startswith(beginnings)}
    if len(rest) == len(trial.system_attrs):
        return trial
    trial = _changed(trial)
    trial.system_attrs = rest
    return trial


def _changed(
    trial: FrozenTrial,
    *,
    params: Mapping[str, Any] | None = None,
    distributions: Mapping[str, BaseDistribution] | None = None,
    user_attrs: Mapping[str, Any] | None = None,
    system_attrs: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """A copy with other parameters, and with these attributes as well."""
    return FrozenTrial(
        number=trial.number,
        trial_id=trial.number,
        state=trial.state,
        value=None,
        values=trial.values,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params=dict(trial.params if params is None else params),
        distributions=dict(trial.distributions if distributions is None else distributions),
        user_attrs={**trial.user_attrs, **(user_attrs or {})},
        system_attrs={**trial.system_attrs, **(system_attrs or {})},
        intermediate_values=dict(trial.intermediate_values),
    )
