"""What the files of conf/ set, as plain values. Reads no config of a user's own folder.

Not for: names of options (`typos.py`), and how Hydra composes them (`schema.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from experiments.environment import CONF


@functools.cache
def values_of(group: str, name: str) -> Mapping[str, Any]:
    """Dotted key -> value in an option of conf/; empty for a user's own option, not in conf/."""
    path = CONF / group / f"{name}.yaml"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    prefix = "" if "@package _global_" in text else f"{group}."
    return {f"{prefix}{key}": value for key, value in _flat(yaml.safe_load(text) or {})}


@functools.cache
def is_common(group: str, key: str) -> bool:
    """Whether all options of a group in conf/ set a key to one value."""
    files = (CONF / group).glob("*.yaml")
    return len({repr(values_of(group, file.stem).get(key)) for file in files}) == 1


def _flat(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{rest}", deep) for rest, deep in _flat(value))
        else:
            yield key, value
