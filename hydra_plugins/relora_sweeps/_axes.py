"""Hydra's grammar of axes -> the points of a grid, the dimensions of a search.

Not for: composing configs of points (`_compose.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from experiments import typos
from relora_core.config import ConfigError, nearest
from sweeps.search.space import Choice, Dimension, Float, Int

MOST_POINTS = 100_000
"""Points of a grid, and values of an axis: more are a mistake, and would take forever."""


def parse(texts: list[str], *, loader: ConfigLoader) -> list[Override]:
    """Overrides parsed by Hydra; ConfigError if one cannot be parsed."""
    try:
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(texts)
    except HydraException as error:
        raise ConfigError(typos.diagnose(texts, error)) from None
    for override in overrides:
        count_values(override)
    return overrides


def as_list(text: str) -> str:
    """`search.learn_from=a,b` as a list of two sweeps: for Hydra it is a choice between them."""
    key, sign, names = text.partition("=")
    plain = sign and key == "search.learn_from" and "," in names and names[0] not in "['\""
    return f"{key}=[{names}]" if plain else text


def lines_of(values: Mapping[str, Any], *, of: str) -> list[str]:
    """KEY=VALUE of each entry, as on the command line; ConfigError if a value is a section."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            name, inner = next(iter(value.items()), ("KEY", "VALUE"))
            is_list = isinstance(inner, list) or OmegaConf.is_list(inner)
            inner = ",".join(map(str, inner)) if is_list else inner
            raise ConfigError(
                f"{of}.{key} must be values, got a section; write {key}.{name}: {inner}"
            )
    return [f"{key}={_written(value)}" for key, value in values.items()]


def _written(value: Any) -> str:
    """The value of a file in Hydra's grammar, in which a nested reference has quotes."""
    if isinstance(value, str) and re.fullmatch(r"\$\{[^{}]*\$\{.*\}", value):
        return '"' + value.replace('"', '\\"') + '"'
    return "null" if value is None else str(value)


def count_values(override: Override) -> int:
    """How many values an axis has; ConfigError if it has none, or too many to list."""
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return 1
    value = override.value()
    if isinstance(value, RangeSweep):
        count = count_points(value)
    else:
        count = sum(1 for _ in override.sweep_iterator())
    if not 1 <= count <= MOST_POINTS:
        most = f"at most {MOST_POINTS} values" if count else "at least one value"
        raise ConfigError(f"{override.key_or_group} must have {most}, got {override.input_line!r}")
    return count


def count_points(sweep: RangeSweep) -> int:
    """How many points a range has; MOST_POINTS + 1 if it is infinite."""
    start, stop, step = (Decimal(str(n)) for n in (sweep.start, sweep.stop, sweep.step))
    if not step or not all(n.is_finite() for n in (start, stop, step)):
        return MOST_POINTS + 1
    return max(0, math.ceil((stop - start) / step))


def dimension(override: Override) -> Dimension:
    """A sweep in Hydra's grammar as a dimension of a search."""
    key, value = f"search.space.{override.key_or_group}", override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        assert low is not None
        assert high is not None
        if type(low) is int and type(high) is int:
            return Int(low=low, high=high, log=log)
        return Float(low=float(low), high=float(high), log=log)
    if isinstance(value, RangeSweep):
        values = list(override.sweep_iterator())  # without its stop; Hydra 1.4 applies casts here
        log = "log" in value.tags
        kind = Int if all(type(v) is int for v in values) else Float
        step = abs(value.step) if kind is Int else abs(float(value.step))
        return kind(low=min(values), high=max(values), step=step, log=log)  # type: ignore[arg-type]
    if override.is_sweep_override():
        values = override.sweep_iterator()
        return Choice(values=[v.text if isinstance(v, QuotedString) else v for v in values])
    raise ConfigError(
        f"{key} must be choice(), range() or interval(), got {value!r}; to fix it say "
        f"{override.key_or_group}={value} outside search.space"
    )


def expand(texts: list[str], *, loader: ConfigLoader) -> list[list[str]]:
    """The overrides of each point of the product; ConfigError if an axis cannot be listed."""
    overrides = parse(texts, loader=loader)
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.key_or_group} must be a list, choice() or range() in a grid, got "
                f"{override.input_line!r}; interval() is for a search"
            )
    counts = {one.get_key_element(): count_values(one) for one in overrides}  # the last one counts
    if (points := math.prod(counts.values())) > MOST_POINTS:
        raise ConfigError(f"a grid must have at most {MOST_POINTS} points, got {points}")
    return BasicSweeper.split_arguments(overrides, None)[0]


def expand_arms(
    params: list[str],
    *,
    arms: Mapping[str, list[str]],
    arguments: list[str],
    loader: ConfigLoader,
    tuned: Mapping[str, list[str]] | None = None,
) -> list[list[str]]:
    """The points of the arms that `sweep.arm` names, else of all arms; one of each arm in turn.

    So a sweep that is stopped halfway can compare all arms on the first seeds.
    """
    key = "sweep.arm"
    given = [text for text in params + arguments if text.lstrip("+").startswith(f"{key}=")]
    if not arms:
        return expand(params + arguments, loader=loader)
    names = list(arms)
    if given:
        overrides = parse([text.lstrip("+") for text in given], loader=loader)
        names = arms_taken(overrides, arms=arms, loader=loader)
        arguments = [text for text in arguments if text not in given]
        params = [text for text in params if text not in given]
    grids = []
    for name in names:
        more = (tuned or {}).get(name, [])
        grids.append(
            expand([*params, *arms[name], *more, *arguments, f"{key}={name}"], loader=loader)
        )
    return [cell for cells in zip_longest(*grids) for cell in cells if cell is not None]


def arms_taken(
    given: Sequence[Override], *, arms: Mapping[str, object], loader: ConfigLoader
) -> list[str]:
    """The arms that the values of `sweep.arm` name, else all; ConfigError for one that is none."""
    if not given:
        return list(arms)
    cells = expand([str(override.input_line) for override in given], loader=loader)
    names = [str(parse(cell, loader=loader)[-1].value()) for cell in cells]
    for name in names:
        if name not in arms:
            raise ConfigError(
                f"sweep.arm must be one of {', '.join(arms)}, got {name!r}."
                f"{nearest(name, list(arms))}"
            )
    return names
