"""Random draws that depend on seed, step and name alone, and so need no state of their own."""

from __future__ import annotations

import hashlib

import torch


def named_seed(seed: int, step: int, name: str) -> int:
    """63 bits of these arguments: every rank and every resumed run gets the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def named_generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that begins at `named_seed`."""
    return torch.Generator().manual_seed(named_seed(seed, step, name))
