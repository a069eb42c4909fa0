"""The head's loss without the full (tokens, vocabulary) logits, and the log-probs that evals need.

At d_model 96 and 50,304 ids the head is most of the work and nearly all of the memory. Logits are
made a block at a time, and everything that is done to a block is done while it is in the cache;
some rows' exponentials are kept until their sum over the vocabulary is known, then both gradients
are taken from them. `linear_cross_entropy` of torch 2.13 is not used: its scalar loss accumulates
in the input's type and is wrong in bfloat16 (8.00 where float64 says 10.85).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core import native
from relora_core.kernels import LOG2E, is_native

HEAD_BLOCK = {"cpu": (512, 1024), "cuda": (8192, 50304)}
"""Rows and columns of logits in work at a time: 2 MB stay in a core's cache; a GPU wants more."""

HEAD_BYTES = {"cpu": 104 << 20, "cuda": 2 << 30}
"""Exponentials kept at a time; fewer rows where the vocabulary is large."""

LOG_PROB_BLOCK = {"cpu": (1024, 512), "cuda": (8192, 50304)}
"""Rows and columns of logits in memory at a time without gradients."""


class _Exponentials:
    """exp(hidden @ weight.T) of some rows, in blocks of columns, each relative to a maximum so far.

    The products' inputs have the weight's type; maxima, exponentials and sums are float32.
    """

    def __init__(self, weight: Tensor, *, tokens: int, keep: bool) -> None:
        device, vocab, size = weight.device.type, len(weight), weight.element_size()
        rows, columns = HEAD_BLOCK.get(device, HEAD_BLOCK["cpu"])
        most = HEAD_BYTES.get(device, HEAD_BYTES["cpu"]) // (vocab * size)
        self.rows, self.columns = max(1, min(rows, most, tokens)), columns
        self.weights, self.keep = weight.split(columns), keep
        self.native = is_native(weight, types=(torch.float32, torch.bfloat16))
        self.buffer = _buffer(weight, self.rows * (vocab if keep else min(columns, vocab)))
        self.block = torch.empty(self.rows * min(columns, vocab), device=weight.device)

    def _place(self, index: int, rows: int) -> Tensor:
        """Buffer (rows, columns) of block `index`; without gradients all blocks share one."""
        width = len(self.weights[index])
        start = index * self.columns * rows if self.keep else 0
        return self.buffer[start : start + rows * width].view(rows, width)

    def fill(self, hidden: Tensor, targets: Tensor, *, mean: Tensor | None) -> Tensor:
        """Make the blocks of (rows, C), 0 at the targets; gives the log of their sums, (rows,).

        `mean` (rows, C) becomes the mean of the weight's rows under these exponentials: here the
        block is still in the cache.
        """
        bits = (hidden * LOG2E).to(self.buffer.dtype)
        self.largest = torch.empty(len(self.weights), len(hidden), 1, device=hidden.device)
        largest = torch.full_like(self.largest[0], -1e38)
        total = torch.zeros_like(largest)
        make = self._native if self.native else self._plain
        for index, weight in enumerate(self.weights):
            z = torch.mm(bits, weight.T, out=self._place(index, len(bits)))
            make(z, targets - index * self.columns, largest, total, mean)
            self.largest[index] = largest
            if mean is None:
                continue
            if z.dtype == torch.float32:
                mean.addmm_(z, weight)
            else:
                mean.add_(z @ weight)
        if mean is not None:
            mean.div_(total)
        return largest.add_(total.log2_()).div_(LOG2E)[:, 0]

    def _native(
        self, z: Tensor, own: Tensor, largest: Tensor, total: Tensor, mean: Tensor | None
    ) -> None:
        """As `_plain`, in one pass over z."""
        native.call(
            f"exponentials_{native.kind(z)}",
            *(z, *z.shape, own, largest, total),
            *(mean, 0 if mean is None else mean.shape[1]),
        )

    def _plain(
        self, logits: Tensor, own: Tensor, largest: Tensor, total: Tensor, mean: Tensor | None
    ) -> None:
        """Logits of a block, (rows, columns), become their exponentials relative to `largest`.

        0 where `own` (rows,) says. `largest` and the sums `total`, (rows, 1), go on, and as the
        former grows `total` and `mean` shrink.
        """
        z = logits
        if logits.dtype != torch.float32:
            z = self.block[: logits.numel()].view_as(logits).copy_(logits)
        place = own.clamp(0, z.shape[1] - 1)
        logit = z.gather(1, place[:, None]).masked_fill_((own == place)[:, None], -1e38)
        z.scatter_(1, place[:, None], logit)
        grown = torch.maximum(largest, z.amax(dim=1, keepdim=True))
        shrink = (largest - grown).exp2_()
        largest.copy_(grown)
        total.mul_(shrink).add_(z.sub_(grown).exp2_().sum(dim=1, keepdim=True))
        if z is not logits:
            logits.copy_(z)
        if mean is not None:
            mean.mul_(shrink)

    def add_gradient(
        self, hidden: Tensor, normaliser: Tensor, d_weight: Tensor, *, to: int
    ) -> None:
        """d_weight = to * d_weight + p.T @ hidden, `to` 0 or 1; p = 0 at the targets."""
        factors = (self.largest - normaliser[:, None] * LOG2E).exp2_()  # make probabilities
        for index, part in enumerate(d_weight.split(self.columns)):
            z = self._place(index, len(hidden))
            scaled = (hidden * factors[index]).to(z.dtype)
            if z.dtype == torch.float32:
                part.addmm_(z.T, scaled, beta=to)
            elif to:
                part.add_(z.T @ scaled)
            else:
                part.copy_(z.T @ scaled)


def _buffer(like: Tensor, size: int) -> Tensor:
    """Uninitialised; a CPU's is the same from call to call, as the system takes a fifth of the
    head's time to hand out 100 MB of fresh pages."""
    if like.device.type != "cpu":
        return like.new_empty(size)
    buffer: Tensor | None = getattr(_buffers, "last", None)
    if buffer is None or buffer.dtype != like.dtype or buffer.numel() < size:
        buffer = _buffers.last = like.new_empty(size)
    return buffer[:size]


_buffers = threading.local()


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T; both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, grad: bool) -> Tensor:
        device = hidden.device.type
        reduced = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            h, own = hidden.float(), weight[targets].float()
            w = weight.to(torch.get_autocast_dtype(device) if reduced else torch.float32)
            d_hidden = torch.zeros_like(h) if grad else None
            d_weight = None
            if grad and weight.requires_grad:
                d_weight = torch.empty_like(w, dtype=torch.float32)
            exponentials = _Exponentials(w, tokens=len(h), keep=d_weight is not None)
            # Against the target alone: no digit of its logit or of p - 1 is lost where p is near 1.
            rest = torch.empty(len(h), device=h.device)
            picked = (h * own).sum(dim=1)
            for start in range(0, len(h), exponentials.rows):
                part = slice(start, start + exponentials.rows)
                mean = None if d_hidden is None else d_hidden[part]
                rest[part] = exponentials.fill(h[part], targets[part], mean=mean)
                if d_weight is not None:
                    normaliser = torch.logaddexp(rest[part], picked[part])
                    exponentials.add_gradient(
                        h[part] / len(h), normaliser, d_weight, to=int(start > 0)
                    )
            odds = rest - picked
            if d_hidden is not None:
                share = odds.sigmoid()[:, None]  # of all but the target
                d_hidden.sub_(own).mul_(share / len(h))
                if d_weight is not None:
                    d_weight.index_add_(0, targets, h * (share / -len(h)))
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.types = hidden.dtype, weight.dtype
        return F.softplus(odds, threshold=80).double().mean().float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        # As large as the head; asking a GPU whether it is needed would cost more.
        if d_weight is not None and not (grads[0].is_cpu and grads[0] == 1):
            d_weight = d_weight * grads[0]
        d_weight = None if d_weight is None else d_weight.to(weight_type)
        return (d_hidden * grads[0]).to(hidden_type), d_weight, None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over N of -log softmax(hidden @ weight.T)[targets], in nats: a float32 scalar.

    hidden (N, C), weight (V, C), targets (N,) int64. Logits, softmax and gradients are float32;
    under autocast the matmuls take bf16 inputs (relative gradient error about 1e-4).
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(hidden, weight, targets, needs_grad)  # type: ignore[assignment]
    return loss


@torch.no_grad()
def target_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None = None
) -> Tensor:
    """log softmax(hidden @ weight.T)[rows, targets]: (N, C), (V, C), (M,), (M,) -> (M,) float32.

    `rows` may name a row of `hidden` several times; by default each has one target. A bf16 `weight`
    asks for matmuls in bf16; sums and exponentials are float32 or wider all the same.
    """
    normaliser = _log_normalisers(hidden, weight)
    own = hidden if rows is None else hidden[rows]
    picked = (own.float() * weight[targets].float()).sum(dim=1)
    return picked - (normaliser if rows is None else normaliser[rows])


def _log_normalisers(hidden: Tensor, weight: Tensor) -> Tensor:
    """log sum exp(hidden @ weight.T) over the vocabulary: (N,) float32.

    Blocks of logits are summed up while they are in the cache: no row of V logits ever exists.
    Without native code no pass looks for the largest logit: rows that overflow without, which a
    trained model hardly has, are computed again.
    """
    rows, columns = LOG_PROB_BLOCK.get(hidden.device.type, LOG_PROB_BLOCK["cpu"])
    out = torch.empty(hidden.shape[0], device=hidden.device)
    if is_native(weight, types=(torch.float32, torch.bfloat16)):
        with torch.autocast("cpu", enabled=False):
            exponentials = _Exponentials(weight, tokens=len(hidden), keep=False)
            no_target = torch.full((len(hidden),), -1)
            for start in range(0, len(hidden), exponentials.rows):
                part = slice(start, start + exponentials.rows)
                out[part] = exponentials.fill(hidden[part].float(), no_target[part], mean=None)
        return out
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], rows):
            own = hidden[start : start + rows].float() * LOG2E
            total = torch.zeros(len(own), dtype=torch.float64, device=own.device)
            for block in _logit_blocks(own, weight, columns=columns):
                total += block.exp2_().sum(dim=1)
            log_sums = total.log().float()
            wide = ~((total > 1e-30) & (total < math.inf))
            if wide.any():
                blocks = _logit_blocks(own[wide], weight, columns=columns)
                parts = [(block / LOG2E).logsumexp(dim=1) for block in blocks]
                log_sums[wide] = torch.stack(parts).logsumexp(dim=0)
            out[start : start + rows] = log_sums
    return out


def _logit_blocks(hidden: Tensor, weight: Tensor, *, columns: int) -> Iterator[Tensor]:
    hidden = hidden.to(weight.dtype)
    for first in range(0, weight.shape[0], columns):
        yield (hidden @ weight[first : first + columns].T).float()
