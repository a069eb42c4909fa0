"""Short names of config keys in names of arms and runs."""

from __future__ import annotations

LABELS = {
    "sweep.arm": "arm",
    "experiment": "experiment",
    "model.name": "model",
    "relora.name": "relora",
    "data.kind": "data",
}
"""Key -> the word that names its choice on the command line."""
