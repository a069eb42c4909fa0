"""The space that a search draws from: dimensions, conditions, and configs at its points.

Not for: Hydra's grammar (`hydra_plugins`), nor sampling (`samplers.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from relora_core.config import (
    SCOPES,
    ConfigError,
    RunConfig,
    applies,
    get,
    nearest,
    scaled,
    walk,
)

MAX_FINITE = 10_000
"""Most values of a dimension that is listed in full."""


@dataclass(kw_only=True, slots=True)
class Choice:
    """One of several values, which have no order."""

    values: list[Any]

    def finite(self) -> list[Any] | None:
        """All values; None if there are too many or they are continuous."""
        return self.values

    def contains(self, value: Any) -> bool:
        return _plain(value) in map(_plain, self.values)

    def nearest(self, value: Any) -> Any:
        """The value that is closest to one outside; None if that is unclear."""
        return None

    def text(self) -> str:
        """As the user would write it."""
        return f"choice({', '.join(map(_spell, self.values))})"


@dataclass(kw_only=True, slots=True)
class Int:
    """low, low + step, ... <= high."""

    low: int
    high: int
    step: int = 1
    log: bool = False

    def finite(self) -> list[Any] | None:
        count = (self.high - self.low) // self.step + 1
        return list(range(self.low, self.high + 1, self.step)) if count <= MAX_FINITE else None

    def contains(self, value: Any) -> bool:
        is_integer = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0
        )
        return is_integer and self.low <= value <= self.high and (value - self.low) % self.step == 0

    def nearest(self, value: Any) -> Any:
        most = (self.high - self.low) // self.step
        inside = min(max(value, self.low), self.high)
        return self.low + self.step * min(round((inside - self.low) / self.step), most)

    def text(self) -> str:
        if self.step > 1:
            return f"range({self.low}, {self.high + 1}, {self.step})"
        interval = f"int(interval({self.low}, {self.high}))"
        return f"tag(log, {interval})" if self.log else interval


@dataclass(kw_only=True, slots=True)
class Float:
    """[low, high], or low, low + step, ... <= high."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def finite(self) -> list[Any] | None:
        if self.step is None or (self.high - self.low) / self.step >= MAX_FINITE:
            return None
        return [self._at(i) for i in range(self._steps + 1)]

    def contains(self, value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        inside = self.low <= value <= self.high
        return inside and (self.step is None or math.isclose(value, self.nearest(value)))

    def nearest(self, value: Any) -> Any:
        inside = min(max(value, self.low), self.high)
        if self.step is None:
            return inside
        return self._at(min(round((inside - self.low) / self.step), self._steps))

    def text(self) -> str:
        if self.step is not None:
            stop = _decimal(self._at(self._steps)) + _decimal(self.step)
            return f"range({', '.join(map(_number, (self.low, float(stop), self.step)))})"
        interval = f"interval({_number(self.low)}, {_number(self.high)})"
        return f"tag(log, {interval})" if self.log else interval

    def _at(self, index: int) -> float:
        """0.3 and not 0.30000000000000004, which would be another run."""
        return min(float(_decimal(self.low) + index * _decimal(self.step)), self.high)

    @property
    def _steps(self) -> int:
        assert self.step is not None
        return math.floor((self.high - self.low) / self.step + 1e-9)


Dimension = Choice | Int | Float


def _decimal(value: float | None) -> Decimal:
    """The number as it was written, not the nearest binary fraction."""
    return Decimal(repr(value))


def _number(value: float) -> str:
    """The shortest text that reads as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _plain(value: Any) -> str:
    """4 and 4.0 are one value, 1 and true are two."""
    is_integer = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if is_integer else value)


def _spell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# disk -------------------------------------------------------------------------------------------
def to_json(dimension: Dimension) -> dict[str, Any]:
    return {"kind": type(dimension).__name__.lower(), **dataclasses.asdict(dimension)}


def from_json(raw: Mapping[str, Any]) -> Dimension:
    kinds = {"choice": Choice, "int": Int, "float": Float}
    return kinds[raw["kind"]](**{key: value for key, value in raw.items() if key != "kind"})


# checks -----------------------------------------------------------------------------------------
def check_dimension(key: str, dimension: Dimension) -> None:
    """ConfigError if nothing can be drawn from the dimension of this key."""
    name = f"search.space.{key}"
    if isinstance(dimension, Choice):
        texts = [_plain(value) for value in dimension.values]
        if not texts:
            raise ConfigError(f"{name} must have at least one value, got choice()")
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ConfigError(f"{name} must have different values, got {twice[0]} twice")
        return
    low, high, step = dimension.low, dimension.high, dimension.step
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        swapped = f"; nearest valid: {high} to {low}" if low > high else ""
        raise ConfigError(f"{name} must have low < high, got {low} to {high}{swapped}")
    if dimension.log and low <= 0:
        raise ConfigError(
            f"{name} must have low > 0 on a log scale, got {low}; nearest valid: "
            f"{1 if isinstance(dimension, Int) else f'{high / 1e3:g}'}, or no tag(log, ...)"
        )
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"{name} must have a step in (0, {high - low:g}], got {step}")
    if dimension.log and step not in (None, 1):
        raise ConfigError(f"{name} must have no step on a log scale, got {step}")


def check_space(
    space: Mapping[str, Dimension],
    *,
    groups: Sequence[str],
    when: Mapping[str, str],
    config: RunConfig,
) -> None:
    """ConfigError at the first key that is neither a knob nor a group, has values of another type,
    or has a condition that cannot be judged."""
    if not space:
        raise ConfigError("search.space must have at least one key, got nothing")
    for key, dimension in space.items():
        check_dimension(key, dimension)
        if key in groups:
            if not isinstance(dimension, Choice):
                raise ConfigError(
                    f"search.space.{key} must be a choice() of options, got {dimension.text()}"
                )
            continue
        _check_key(key, config)
        _check_type(key, dimension)
    for key, text in when.items():
        if key not in space:
            raise ConfigError(
                f"search.when.{key} must be a key of search.space, got {key!r}."
                f"{nearest(key, list(space))}"
            )
        needed, _ = condition(key, text)
        if needed not in space and needed not in knobs(config):
            raise ConfigError(
                f"search.when.{key} must ask for a key of search.space or a knob, got {needed!r}."
                f"{nearest(needed, [*space, *knobs(config)])}"
            )
    ordered(space, groups=groups, when=when)


def knobs(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> metadata of every knob."""
    return {key: f.metadata for key, f, _ in walk(config)}


def _check_key(key: str, config: RunConfig) -> None:
    all_knobs = knobs(config)
    if key not in all_knobs:
        raise ConfigError(
            f"search.space.{key} must be a knob or a group, got {key!r}."
            f"{nearest(key, list(all_knobs))}"
        )
    if key == "seed":
        raise ConfigError("search.space.seed must not be searched; search.seeds are averaged over")
    if not all_knobs[key].get("scientific", True) and "sets" not in all_knobs[key]:
        raise ConfigError(
            f"search.space.{key} must be a knob that changes what is computed, got {key!r}"
        )


def _check_type(key: str, dimension: Dimension) -> None:
    types = _types(key)
    if isinstance(dimension, Float) and float not in types and not {list, str} & types:
        raise ConfigError(
            f"search.space.{key} must give integers, got {dimension.text()}; nearest valid: "
            f"int({dimension.text()})"
        )
    values = dimension.values if isinstance(dimension, Choice) else [dimension.low]
    for value in values:
        convert(key, value, name=f"search.space.{key}")


def convert(key: str, value: Any, *, name: str) -> Any:
    """`value` in the knob's type: 1 as a float is 1.0, or one setting would have two run_ids."""
    types = _types(key)
    if float in types and type(value) in (int, float):
        return float(value) + 0.0  # -0.0 is 0.0
    if type(value) in types or (value is None and type(None) in types):
        return value
    if int in types and type(value) is float and value.is_integer():
        return int(value)
    names = ", ".join(sorted("null" if t is type(None) else t.__name__ for t in types))
    raise ConfigError(f"{name} must be {names}, got {value!r}")


@cache
def _types(key: str) -> frozenset[type]:
    kind: Any = RunConfig
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    union = get_origin(kind) in (Union, UnionType)
    return frozenset(get_origin(k) or k for k in (get_args(kind) if union else [kind]))


# conditions -------------------------------------------------------------------------------------
def condition(key: str, text: str) -> tuple[str, list[str]]:
    """`method=relora,lora` -> the key that the condition depends on, and the values it may have."""
    needed, sign, values = str(text).partition("=")
    allowed = [value.strip() for value in values.split(",")]
    if not sign or not needed.strip() or not all(allowed):
        raise ConfigError(
            f"search.when.{key} must be KEY=VALUE[,VALUE], like method=relora,lora, got {text!r}"
        )
    return needed.strip(), allowed


def means(text: str, value: Any) -> bool:
    """Whether a condition's text is this value; a number may be written in any way."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(text) == value
    return _spell(value) == text


def ordered(
    space: Mapping[str, Dimension], *, groups: Sequence[str], when: Mapping[str, str]
) -> list[str]:
    """Keys in the order to draw them: groups, then knobs that other knobs depend on, then the rest.

    A key comes after the one that its condition depends on. ConfigError if conditions are circular.
    """
    early = [key for _, key, _ in SCOPES]
    left = sorted(space, key=lambda key: (key not in groups, key not in early))
    done: list[str] = []
    while left:
        ready = [key for key in left if _needs(key, space, when) in (None, *done)]
        if not ready:
            circle = ", ".join(f"{key}: {when[key]}" for key in left)
            raise ConfigError(f"search.when must not go in circles, got {circle}")
        done.append(ready[0])
        left.remove(ready[0])
    return done


def _needs(key: str, space: Mapping[str, Dimension], when: Mapping[str, str]) -> str | None:
    needed = condition(key, when[key])[0] if key in when else None
    return needed if needed in space else None


def is_active(
    key: str,
    *,
    params: Mapping[str, Any],
    space: Mapping[str, Dimension],
    when: Mapping[str, str],
    config: RunConfig,
    group: bool,
) -> bool:
    """Whether `key` is to be drawn after `params`; `config` has them set."""
    if key in when:
        needed, allowed = condition(key, when[key])
        if needed in space and needed not in params:
            return False
        value = params[needed] if needed in space else get(config, needed)
        if not any(means(text, value) for text in allowed):
            return False
    return group or applies(knobs(config)[key], config)


# a point ----------------------------------------------------------------------------------------
def base_key(choices: Mapping[str, Any]) -> str:
    """`method=relora,model=tiny`, sorted by group; empty without groups."""
    return ",".join(f"{group}={choices[group]}" for group in sorted(choices))


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy with values set at dotted keys, in the types of their knobs; not validated."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), convert(key, value, name=key))
    return scaled(config, alpha_given="relora.alpha" in values)


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(section, path[0]), path[1:], value)
    return dataclasses.replace(section, **{path[0]: value})
