"""Short names of config keys, in names of arms and runs and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPTIONS = {
    "experiment": "experiment",
    "model": "model.name",
    "method": "method",
    "data": "data.kind",
    "relora": "relora.name",
}
"""Group of conf/ -> the key that names its option."""
KEYS = {"arm": "sweep.arm", **OPTIONS}
LABELS = {key: word for word, key in KEYS.items()}
"""Key -> its short name on the command line."""


def text_of(value: Any) -> str:
    """A value as the command line has it."""
    if isinstance(value, float):
        short = f"{value:.12g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def spell(axes: Mapping[str, str]) -> str:
    """`model=tiny relora.r=8`."""
    return " ".join(f"{key}={value}" for key, value in axes.items())
