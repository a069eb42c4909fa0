"""JSON files of runs and sweeps, checked as they are read: disks fail, and people edit files.

Not for: what the files mean (`run_dir.py`, `sweeps/planning/plan.py`).
"""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from relora_core.config import ConfigError


class Damaged(ConfigError):
    """A file's content is not as it was written; the message is one line and names the file."""


def parse(text: str | bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else, however deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or Damaged."""
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error})") from None


def fits(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of this type; an integer also fits a float."""
    if kind is Any:
        return True
    if kind is float:
        return type(value) in (int, float)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return value in list(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(part, value) for part in parts)
    if origin is list:
        return type(value) is list and all(fits(parts[0], one) for one in value)
    if origin is dict:
        return type(value) is dict and all(fits(parts[1], one) for one in value.values())
    return value is None if kind in (None, NoneType) else type(value) is kind


@cache
def hints(cls: type) -> dict[str, Any]:
    """Field -> type. Cached: a sweep reads thousands of configs, mostly waiting for this."""
    return get_type_hints(cls)


def read_fields(cls: type, raw: dict[str, Any], *, where: str = "") -> dict[str, Any]:
    """The entries of `raw` that are fields of the dataclass; ValueError if one does not fit.

    `where` is put before the field's name in the message.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    fields = {key: value for key, value in raw.items() if key in names}
    for key, value in fields.items():
        if not fits(hints(cls)[key], value):
            raise ValueError(f"{where}{key} cannot be {value!r:.60}")
    return fields


def has_types(record: dict[str, Any], kinds: dict[str, Any], *, partial: bool = False) -> bool:
    """Whether the keys of `kinds` have these types. An absent key counts as null, or, if
    `partial`, as well typed."""
    names = [name for name in kinds if name in record or not partial]
    return all(fits(kinds[name], record.get(name)) for name in names)


def names_folder(name: Any) -> bool:
    """Whether it is the name of a folder, not a path that leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or len(name) > 200:
        return False
    return Path(name).name == name


READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged file of a run may raise."""
