"""A grid's points as the user wrote them: which axes vary, and what the sweep is called.

Not for: naming runs (`plan.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from experiments.labels import key_of
from relora_core.config import ConfigError

Point = dict[str, str]
"""Override key -> value, both as text; one cell of the product of the axes."""

NAME_LIMIT = 60
_UNSAFE = re.compile(r"[^A-Za-z0-9._=-]+")


def points_from(cells: Iterable[Sequence[str]]) -> list[Point]:
    """`["model=tiny", "+x=1"]` -> `{"model": "tiny", "x": "1"}`, for each cell."""
    return [{key_of(text): text.partition("=")[2] for text in cell} for cell in cells]


def axes(points: Sequence[Point]) -> list[str]:
    """Keys that take more than one value, in the order in which they were written."""
    keys = dict.fromkeys(key for point in points for key in point)
    return [key for key in keys if len({point.get(key) for point in points}) > 1]


def safe_name(text: str) -> str:
    """A folder name of at most 60 letters, digits and `._=-`; a digest makes a cut name unique."""
    name = _UNSAFE.sub("-", text).strip("-.")
    if name and len(text) <= NAME_LIMIT:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: NAME_LIMIT - 9]}-{digest}".lstrip("-")


def sweep_name(points: Sequence[Point], *, experiment: str) -> str:
    """The keys that vary (`model-relora.r`); the experiment's name if none does."""
    return safe_name("-".join(axes(points)) or experiment)


def check_name(name: str) -> str:
    """The user's own name of a sweep; ConfigError if it cannot be a folder's name."""
    if name and safe_name(name) == name:
        return name
    raise ConfigError(
        f"sweep.name must be 1 to {NAME_LIMIT} letters, digits or . _ = -, got {name!r}; "
        f"nearest valid: {safe_name(name)}"
    )
