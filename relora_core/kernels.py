"""Attention and SwiGLU with backward passes of their own. Not for: what they mean (`model`).

torch's flash kernel multiplies tiles of a few rows by head_dim columns, which its BLAS does badly:
at head_dim 8 it takes three times as long as whole rows of scores. Tests hold every function here
against float64 and plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)
"""exp2 of scores and logits in bits takes a third of the time of exp."""

TILE_ELEMENTS = 128 * 12 * 512
"""Scores alive at a time, over all heads of some sequences: 3 MB stay in the caches."""

NARROW = 16
"""Heads of fewer columns gain nothing from bf16 products: casts of scores cost what they save."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt D) v over earlier positions: (B, T, H, D), twice (B, T, KV, D).

    Query head h reads head h // (H / KV) of k and v. Products take inputs of q's type, the softmax
    is float32.
    """
    if q.device.type == "cpu":
        if q.shape[3] < NARROW:
            return _Attention.apply(q.float(), k.float(), v.float()).type_as(q)  # type: ignore[union-attr]
        return _Attention.apply(q, k, v)  # type: ignore[return-value]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


class _Tiles:
    """Some rows of some sequences at a time, the query heads of a key head stacked; columns last.

    A tile of queries is (S * KV, D, H / KV * rows), keys and values are (S * KV, D, T): what is
    narrow comes first, so that every product writes long rows.
    """

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.length, heads, _ = q.shape
        self.kv, self.group = k.shape[2], heads // k.shape[2]
        row = heads * self.length
        # Few rows, as half of a tile's last square is masked, but as many as make products wide.
        self.sequences = min(self.batch, max(1, TILE_ELEMENTS // (32 * row)))
        self.rows = min(self.length, max(1, TILE_ELEMENTS // (self.sequences * row)))
        self.mask = torch.full((self.rows, self.rows), -math.inf).triu_(1)
        self.type = q.dtype

    def batches(self) -> Iterator[slice]:
        for start in range(0, self.batch, self.sequences):
            yield slice(start, start + self.sequences)

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.length, self.rows):
            yield start, min(start + self.rows, self.length)

    def buffer(self) -> Tensor:
        """Room for the scores of a tile: fresh pages for every tile would cost as much as they."""
        size = self.sequences * self.kv * self.group * self.rows * self.length
        return torch.empty(size, dtype=self.type)

    def keys(self, x: Tensor) -> Tensor:
        """(S, T, KV, D) -> (S * KV, D, T)."""
        return x.permute(0, 2, 3, 1).flatten(0, 1)

    def put_keys(self, x: Tensor, found: Tensor) -> None:
        """Inverse of `keys`."""
        x.copy_(found.unflatten(0, (-1, self.kv)).permute(0, 3, 1, 2))

    def queries(self, x: Tensor) -> Tensor:
        """(S, T, H, D) -> (S, KV, D, H / KV, T), a view."""
        return x.unflatten(2, (self.kv, self.group)).permute(0, 2, 4, 3, 1)

    def take(self, x: Tensor, start: int, end: int) -> Tensor:
        """Some rows of `queries`: a tile."""
        return x[..., start:end].flatten(0, 1).flatten(2)

    def put(self, x: Tensor, start: int, end: int, tile: Tensor) -> None:
        """Inverse of `take`."""
        rows = x[..., start:end]
        rows.copy_(tile.view(rows.shape))

    def product(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        """a^T b in float32: (N, D, n), (N, D, m) -> (N, n, m)."""
        shape = (a.shape[0], a.shape[2], b.shape[2])
        return torch.bmm(a.mT, b, out=out[: math.prod(shape)].view(shape)).float()

    def scores(self, q: Tensor, k: Tensor, *, out: Tensor) -> Tensor:
        """q^T k, -inf above the diagonal with which the tile ends."""
        z = self.product(q, k, out=out)
        rows = q.shape[2] // self.group
        z.unflatten(1, (self.group, rows))[..., -rows:].add_(self.mask[:rows, :rows])
        return z


class _Attention(torch.autograd.Function):
    """Saves the log-sum-exp of each row; the backward pass makes the probabilities anew."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return _Attention._forward(ctx, q, k, v)

    @staticmethod
    def _forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tiles, out = _Tiles(q, k), torch.empty_like(q)
        q = q * (LOG2E / math.sqrt(q.shape[3]))
        room = tiles.buffer()
        sums = []
        for some in tiles.batches():
            kt, vt = tiles.keys(k[some]).contiguous(), tiles.keys(v[some]).contiguous()
            queries, outputs = tiles.queries(q[some]), tiles.queries(out[some])
            for start, end in tiles.spans():
                z = tiles.scores(tiles.take(queries, start, end), kt[..., :end], out=room)
                largest = z.amax(dim=-1, keepdim=True)
                total = z.sub_(largest).exp2_().sum(dim=-1, keepdim=True)
                y = torch.bmm(vt[..., :end], z.to(tiles.type).mT)
                tiles.put(outputs, start, end, y.div_(total.mT))
                sums.append(total.log2_().add_(largest))
        ctx.save_for_backward(q, k, v, out, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, *sums = ctx.saved_tensors
        tiles, normalisers = _Tiles(q, k), iter(sums)
        delta = (grads[0].float() * out).sum(dim=-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        room, more = tiles.buffer(), tiles.buffer()
        for some in tiles.batches():
            kt, vt = tiles.keys(k[some]).contiguous(), tiles.keys(v[some]).contiguous()
            dkt, dvt = torch.zeros_like(kt, dtype=torch.float32), torch.zeros_like(vt).float()
            queries, upstream, deltas, dqueries = (
                tiles.queries(x[some]) for x in (q, grads[0], delta, dq)
            )
            for start, end in tiles.spans():
                qt, gt = tiles.take(queries, start, end), tiles.take(upstream, start, end)
                p = tiles.scores(qt, kt[..., :end], out=room).sub_(next(normalisers)).exp2_()
                dvt[..., :end] += torch.bmm(gt, p.to(tiles.type))
                dz = tiles.product(gt, vt[..., :end], out=more)
                dz = dz.sub_(tiles.take(deltas, start, end).mT).mul_(p).to(tiles.type)
                dkt[..., :end] += torch.bmm(qt, dz)
                tiles.put(dqueries, start, end, torch.bmm(kt[..., :end], dz.mT))
            tiles.put_keys(dk[some], dkt)
            tiles.put_keys(dv[some], dvt)
        return dq.mul_(q.shape[3] ** -0.5), dk.mul_(1 / LOG2E), dv


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs alone; plain autograd keeps silu(gate), too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        active = F.silu(gate)
        d_gate = torch.ops.aten.silu_backward(grads[0] * value, gate)
        return d_gate, active.mul_(grads[0])


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value."""
    return _SwiGLU.apply(gate, value)  # type: ignore[return-value]


def keep_mask(x: Tensor, dropout: float) -> tuple[Tensor, float]:
    """Of x's shape, 1 where dropout keeps an entry, else 0; and the share that it keeps.

    On a CPU torch's draws for dropout took an eighth of a step. 16 bits an entry from a faster
    generator, seeded by torch's, decide as well: the share is at most 1 / 131072 from 1 - dropout,
    and results are scaled by what it is.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - dropout), 1 - dropout
    cut = min(max(round((1 - dropout) * 2**16), 1), 2**16 - 1)
    generator = np.random.SFC64(int(torch.randint(2**62, ())))
    words = generator.random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
    return torch.from_numpy((words < cut).view(np.uint8)).view(x.shape), cut / 2**16


class _AdaptedLinear(torch.autograd.Function):
    """No gradient of W; of the dropout, one byte an element is kept until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float
    ) -> Tensor:
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.type = x.dtype
        with torch.autocast(device, enabled=False):
            rows, weight, a, b = (t.to(kind) for t in (x.flatten(0, -2), weight, a, b))
            kept, share = keep_mask(rows, dropout) if dropout else (None, 1.0)
            ctx.scale = scale / share
            low = (rows if kept is None else rows * kept) @ a.T
            y = (rows @ weight.T).addmm_(low, b.T, alpha=ctx.scale)
        ctx.save_for_backward(rows, weight, a, b, low, kept)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low, kept = ctx.saved_tensors
        g = grads[0].flatten(0, -2).to(rows.dtype)
        d_b = (g.T @ low).mul_(ctx.scale)
        d_low = (g @ b).mul_(ctx.scale)
        d_a = d_low.T @ (rows if kept is None else rows * kept)
        if not ctx.needs_input_grad[0]:
            return None, None, d_a, d_b, None, None
        dx = g @ weight
        if kept is None:
            dx.addmm_(d_low, a)
        else:
            dx.add_((d_low @ a).mul_(kept))
        return dx.unflatten(0, grads[0].shape[:-1]).to(ctx.type), None, d_a, d_b, None, None


def adapted_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """W x + scale B A dropout(x) for a frozen W (out, in); A (r, in), B (out, r), x (..., in)."""
    return _AdaptedLinear.apply(x, weight, a, b, scale, dropout)  # type: ignore[return-value]
