"""Short names of config keys, in names of arms and runs and on the command line."""

from __future__ import annotations

from collections.abc import Mapping

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


def spell(axes: Mapping[str, str]) -> str:
    """`model=tiny relora.r=8`."""
    return " ".join(f"{key}={value}" for key, value in axes.items())
