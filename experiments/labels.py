"""Short names of config keys, in names of arms and runs and on the command line."""

from __future__ import annotations

from collections.abc import Mapping

LABELS = {
    "sweep.arm": "arm",
    "experiment": "experiment",
    "model.name": "model",
    "relora.name": "relora",
    "data.kind": "data",
}
"""Key -> the word that names its choice on the command line."""
KEYS = {word: key for key, word in LABELS.items()}


def spell(axes: Mapping[str, str]) -> str:
    """`model=tiny relora.r=8`."""
    return " ".join(f"{key}={value}" for key, value in axes.items())
