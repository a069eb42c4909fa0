"""Kinds of GPUs: as a scheduler is asked for them (`a100`), as their driver names them
(`NVIDIA A100-SXM4-80GB`), and how fast one is beside another."""

from __future__ import annotations

import re
from collections.abc import Iterable

from relora_core.devices import find_device

SLICE = re.compile(r"\d+g")
"""In the name of a slice (MIG) of a GPU: `MIG 1g.10gb`."""


def is_kind(kind: str, device: str) -> bool:
    """Whether a GPU of this name is of the kind: it has all of the kind's words."""
    asked, own = _words(kind), _words(device)
    joined = {
        "".join(own[i:j]) for i in range(len(own)) for j in range(i + 1, len(own) + 1)
    }  # `rtx4090`
    return all(word in joined for word in asked) and _is_slice(asked) == _is_slice(own)


def kinds_in(text: str) -> tuple[str, ...]:
    """Kinds that a constraint or a partition's name holds: `a100` of `gpu-a100`."""
    return tuple(word for word in _words(text) if find_device(word.upper()))


def peak_ratio(kind: str, device: str, *, precision: str) -> float | None:
    """Peak of the kind over that of a GPU of this name; None if one of them is not known."""
    ours, others = (_peak(name, precision=precision) for name in (kind, device))
    return ours / others if ours and others else None


def _peak(name: str, *, precision: str) -> float | None:
    if _is_slice(_words(name)):
        return None
    device = find_device(name) or find_device(name.replace("_", " ").upper())
    return device and getattr(device, precision, None)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _is_slice(words: Iterable[str]) -> bool:
    return any(SLICE.fullmatch(word) for word in words)
