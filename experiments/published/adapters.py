"""The adapted linears of a published checkpoint: W, A, B and the scale."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from experiments import json_files
from experiments.published.commits import Checkpoints
from relora_core.data.base import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    weight: Tensor
    """Base W (out, in), as stored."""
    a: Tensor
    """(r, in), float64."""
    b: Tensor
    """(out, r), float64."""
    scale: float
    """alpha / r, or tanh(s) where s is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    step: int
    commit: str
    reset_frequency: int
    adapters: dict[str, Adapter]
    """By qualified name."""


def read(checkpoints: Checkpoints, *, step: int) -> Snapshot:
    """The adapters at a step. DataError where the files are none of relora-pico's."""
    commit = checkpoints.commits[step]
    where = f"step {step} ({commit[:60]})"
    try:
        config = json_files.parse(checkpoints.file(step, "config.json"))
    except ValueError as error:
        raise DataError(f"{where}: config.json is damaged ({error})") from None
    relora = _relora(config, where=where)
    try:
        state = load(checkpoints.file(step, "model.safetensors"))
    except SafetensorError as error:
        why = " ".join(str(error).split())
        raise DataError(f"{where}: model.safetensors is damaged ({why})") from None
    suffix = ".A_lora.weight"
    names = [name.removesuffix(suffix) for name in state if name.endswith(suffix)]
    if not names:
        raise DataError(
            f"{where}: model.safetensors must hold unmerged adapters (*{suffix}), got none"
        )
    scale = relora["lora_alpha"] / relora["r"]
    adapters = {
        re.sub(r"^pico(_decoder)?\.", "", name): _adapter(state, name, scale=scale, where=where)
        for name in sorted(names, key=_in_order)
    }
    frequency = int(relora["reset_frequency"])
    return Snapshot(step=step, commit=commit, reset_frequency=frequency, adapters=adapters)


def _relora(config: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The section `relora` of config.json, with the three numbers that are needed."""
    relora = config.get("relora")
    if not isinstance(relora, dict):
        raise DataError(f"{where}: config.json must have a section relora, got {relora!r:.60}")
    for key in ("r", "lora_alpha", "reset_frequency"):
        value = relora.get(key)
        if not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise DataError(
                f"{where}: relora.{key} in config.json must be positive, got {value!r:.60}"
            )
    if relora["reset_frequency"] != int(relora["reset_frequency"]):
        raise DataError(
            f"{where}: relora.reset_frequency in config.json must be a whole number, got "
            f"{relora['reset_frequency']!r}"
        )
    return relora


def _in_order(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _adapter(state: dict[str, Tensor], name: str, *, scale: float, where: str) -> Adapter:
    wanted = {key: state.get(f"{name}.{key}.weight") for key in ("A_lora", "B_lora")}
    w, a, b = state.get(f"{name}.weight"), wanted["A_lora"], wanted["B_lora"]
    shapes = [None if t is None else tuple(t.shape) for t in (w, a, b)]
    if w is None or a is None or b is None or [w.dim(), a.dim(), b.dim()] != [2, 2, 2]:
        raise DataError(f"{where}: {name} must have W, A and B as matrices, got {shapes}")
    if w.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1] or not w.numel():
        raise DataError(f"{where}: {name} must have W of B A's shape, got W, A, B {shapes}")
    s = state.get(f"{name}.s")
    if not all(t.is_floating_point() for t in (w, a, b)):
        raise DataError(f"{where}: {name} must hold floating-point numbers")
    if not all(bool(t.isfinite().all()) for t in (w, a, b)):
        raise DataError(f"{where}: {name} holds values that are not finite")
    if s is not None:
        if s.numel() != 1:
            raise DataError(f"{where}: {name}.s must be one number, got {tuple(s.shape)}")
        scale = s.double().tanh().item()
    return Adapter(weight=w, a=a.to(torch.float64), b=b.to(torch.float64), scale=scale)
