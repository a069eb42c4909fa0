"""What a GPU can do at most, by its name: arithmetic and memory. Imports no torch."""

from __future__ import annotations

import re
from typing import NamedTuple


class Device(NamedTuple):
    """Peaks of one GPU as its maker states them: dense matrices, float32 sums, boost clock."""

    bf16: float
    """FLOP/s with bf16 factors; a multiply-add counts two."""
    tf32: float | None
    """FLOP/s with float32 factors cut to TF32; None: not looked up."""
    fp32: float | None
    """FLOP/s of float32 without tensor cores; None: not looked up."""
    memory: float
    """Bytes/s from and to the GPU's memory."""


A100 = Device(312e12, 156e12, 19.5e12, 1555e9)
DEVICES = {
    "A100 SXM4 80GB": A100._replace(memory=2039e9),
    "A100 80GB PCIe": A100._replace(memory=1935e9),
    "A100": A100,
    "A40": Device(149.7e12, 74.8e12, 37.4e12, 696e9),
    "H100 PCIe": Device(756e12, 378e12, 51e12, 2000e9),
    "H100 NVL": Device(835e12, 417e12, 60e12, 3900e9),
    "H100": Device(989e12, 494e12, 67e12, 3350e9),
    "H200 NVL": Device(835e12, 417e12, 60e12, 4800e9),
    "H200": Device(989e12, 494e12, 67e12, 4800e9),
    "GH200 480GB": Device(989e12, 494e12, 67e12, 4000e9),
    "B200": Device(2250e12, None, None, 8000e9),
    "L40S": Device(362e12, 183e12, 91.6e12, 864e9),
    "L40": Device(181e12, 90.5e12, 90.5e12, 864e9),
    "L4": Device(121e12, 60e12, 30.3e12, 300e9),
    "RTX 3090": Device(71e12, 35.6e12, 35.6e12, 936e9),
    "RTX 4090": Device(165e12, 82.6e12, 82.6e12, 1008e9),
}
"""Part of a GPU's name, in whole words -> its peaks. The first that fits counts. From NVIDIA's data
sheets (of the RTX cards: white papers of GA102 and AD102); figures for sparse matrices halved."""
OTHERS = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b")
"""In the name of a GPU that is slower or faster than the one whose name it has, or a part of it."""


def find_device(name: str) -> Device | None:
    """The peaks of a GPU by the name that its driver gives it; None where they are not known."""
    if OTHERS.search(name):
        return None
    words = name.replace("-", " ")  # `NVIDIA A100-SXM4-80GB`, `NVIDIA A100 80GB PCIe`
    return next((d for part, d in DEVICES.items() if re.search(rf"\b{part}\b", words)), None)
