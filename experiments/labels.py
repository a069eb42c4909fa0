"""How names of arms and runs, and the command line, spell config keys and values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
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


PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
RESERVED = ("true", "false", "null", "inf", "nan", "yes", "no", "on", "off", "y", "n")
"""Texts that are others than they seem without quotes."""


def text_of(value: Any) -> str:
    """A value as names of runs and notes have it."""
    if isinstance(value, float):
        short = f"{value:.12g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def spell(axes: Mapping[str, str]) -> str:
    """`model=tiny relora.r=8`."""
    return " ".join(f"{key}={value}" for key, value in axes.items())


def key_of(override: str) -> str:
    """The key of an override as it was typed: `+train.lr=1` -> `train.lr`."""
    return override.partition("=")[0].lstrip("+~")


def typed(overrides: Iterable[str]) -> dict[str, str]:
    """Key -> value of overrides, both as they were typed."""
    return {key_of(text): text.partition("=")[2] for text in overrides}


def quoted(value: Any) -> str:
    """A value in the grammar of Hydra's overrides, on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, str):
        return value if is_plain(value) else _in_quotes(value)
    return json.dumps(value)


def _in_quotes(text: str) -> str:
    # Only backslashes that end up before a quote are special to Hydra.
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def is_plain(text: str) -> bool:
    return PLAIN.fullmatch(text) is not None and text.lower() not in RESERVED
