"""Dropout of the adapters' inputs, the same on any device and for any division of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEEP_ALL = 1 << 16
"""Above every value of 16 bits."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """A layer's dropout in one pass of a step, the same however the step's batch is divided.

    Whether an entry is kept depends on `seed`, the sequence's place in the batch and the entry's
    place in the sequence, not on device, kernels, accumulation or processes.
    """

    share: float
    """Of entries, dropped."""
    seed: int
    """Of the step and the layer."""
    first: int = 0
    """Place of the pass's first sequence in the batch of all processes."""
    stride: int = 1
    """From one sequence of the pass to its next in that batch."""

    @property
    def cut(self) -> int:
        """An entry whose 16 bits are below it is kept: at most 1 / 131072 from the share asked."""
        return min(max(round((1 - self.share) * KEEP_ALL), 1), KEEP_ALL - 1)

    @property
    def gain(self) -> float:
        """Factor of the kept entries, so that the mean stays."""
        return KEEP_ALL / self.cut

    def mask(self, x: Tensor) -> Tensor:
        """Of x's shape (sequences, ..., columns) in uint8: 1 where an entry is kept, else 0.

        16 bits per entry, from a generator that can start anywhere: native.cpp draws the same.
        """
        each = x[0].numel()
        words = -(-each // 4)
        index = torch.arange(1, words + 1, device=x.device).repeat(len(x), 1)
        index += words * (self.first + self.stride * torch.arange(len(x), device=x.device)[:, None])
        bits = _split_mix(index, seed=self.seed).view(torch.int16)[:, :each]
        keep = (bits ^ -(1 << 15)) < self.cut - (1 << 15)  # without a sign they would be < cut
        return keep.view(torch.uint8).reshape(x.shape)


def mask_in_graph(x: Tensor, *, share: float, numbers: Tensor, stride: int) -> Tensor:
    """As `Dropout.mask`, bool, of x (sequences, ..., columns) and plain operations on each entry.

    `numbers` holds the seed and the place of the first sequence, int64: a graph that held them as
    Python numbers would be compiled again in each pass.
    """
    each, device = x[0].numel(), x.device
    place = torch.arange(each, device=device)
    row = torch.arange(len(x), device=device)[:, None]
    index = place // 4 + 1 + -(-each // 4) * (numbers[1] + stride * row)
    z = index * _signed(GOLDEN) + numbers[0]
    for shift, factor in STEPS:
        z = (z ^ ((z >> shift) & ((1 << 64 - shift) - 1))) * _signed(factor)
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    bits = (z >> place % 4 * 16) & 0xFFFF
    return (bits < Dropout(share, seed=0).cut).view(x.shape)


GOLDEN = 0x9E3779B97F4A7C15
STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Of SplitMix64: shift and factor."""


def _split_mix(index: Tensor, *, seed: int) -> Tensor:
    """The numbers of SplitMix64 (Steele et al. 2014) at `index`, int64, which is overwritten."""
    z = index.mul_(_signed(GOLDEN)).add_(_signed(seed))
    for shift, factor in STEPS:
        z ^= (z >> shift).bitwise_and_((1 << 64 - shift) - 1)  # no sign to the right
        z *= _signed(factor)
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def _signed(number: int) -> int:
    """The int64 of these 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
