"""Values that refer to others: `${train.steps}`, `${divide:${train.lr},300}`.

Hydra resolves them when it composes a run. A search sets values on a composed config, so it keeps
the texts of those that follow what it varies. Not for: composing (`schema.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from relora_core.config import ConfigError, RunConfig

_NAME = re.compile(r"\$\{\s*([^\s{}:$]+?)\s*\}")
"""A reference to a key, as in `${train.lr}` or, from within its section, `${.lr}`."""
_MADE_NAME = re.compile(r"\$\{[^{}:]*\$\{")
"""One whose name depends on another value: `${train.${which}}`."""
_BY_NAME = re.compile(r"\$\{\s*oc\.(select|dict\.keys|dict\.values)\s*:")
"""OmegaConf's resolvers that take the name of a key."""


def register() -> None:
    """Make `${divide:...}` known to OmegaConf."""
    OmegaConf.register_new_resolver("divide", _divide, replace=True)


def _divide(number: Any, *divisors: Any) -> float:
    values = (number, *divisors)
    if not divisors or not all(map(_is_number, values)) or not all(divisors):
        got = ",".join(map(str, values))
        raise ValueError(f"${{divide:...}} must have numbers, the second on not 0, got {got}")
    for divisor in divisors:
        number /= divisor
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read(cfg: DictConfig) -> dict[str, Any]:
    """Dotted key -> what stands there, of the values of a composed config that refer to others."""
    texts = dict(_leaves(OmegaConf.to_container(cfg, resolve=False)))
    return {key: text for key, text in texts.items() if not key.startswith("search.")}


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif "${" in str(value):
            yield f"{prefix}{name}", value


def kept(written: Any, resolved: Any) -> Any:
    """`resolved`, but for values that refer to keys of a run: these as they are written.

    Axes, arms and what a search's arms have in common are read from a config that is not the run's.
    """
    if isinstance(written, dict):
        return {key: kept(value, resolved[key]) for key, value in written.items()}
    if isinstance(written, list):
        return [kept(one, other) for one, other in zip(written, resolved, strict=True)]
    names = _NAME.findall(str(written))
    of_runs = any(not name.startswith("hydra.") for name in names)
    return written if of_runs or _is_dynamic(str(written)) else resolved


def following(references: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Those of `references` that follow one of `keys`, themselves or through others."""
    found: dict[str, Any] = {}
    while more := {
        key: value
        for key, value in references.items()
        if key not in found and key not in keys and _refers(key, value, {*keys, *found})
    }:
        found |= more
    return found


def _refers(key: str, value: Any, keys: Collection[str]) -> bool:
    text = str(value)
    if _is_dynamic(text):
        return True
    return any(_absolute(name, key) in keys for name in _NAME.findall(text))


def _is_dynamic(text: str) -> bool:
    """Whether it may refer to any key: by a name that it makes, or in a resolver's argument."""
    return bool(_MADE_NAME.search(text) or _BY_NAME.search(text))


def _absolute(name: str, key: str) -> str:
    """`.lr` in `train.eps` is `train.lr`; each further dot is one section up."""
    name = re.sub(r"\[([^\]]+)\]", r".\1", name)
    bare = name.lstrip(".")
    up = len(name) - len(bare)
    return ".".join([*key.split(".")[:-up], bare]) if up else bare


def resolve(config: RunConfig, references: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, of references in a config that has all other values.

    ConfigError if one has none, as with a division by 0.
    """
    register()
    tree = OmegaConf.create(asdict(config))
    for key, value in references.items():
        OmegaConf.update(tree, key, value)
    values = {}
    for key in references:
        try:
            value = OmegaConf.select(tree, key, throw_on_missing=True)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]
            raise ConfigError(f"{key}: {reason}") from None
        values[key] = (
            OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        )
    return values
