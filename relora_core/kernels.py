"""Attention and SwiGLU with backward passes of their own. Not for: what they mean (`model`).

torch's flash kernel multiplies tiles of a few rows by head_dim columns, which its BLAS does badly:
at head_dim 8 it takes three times as long as whole rows of scores. Tests hold every function here
against float64 and plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)
"""exp2 of scores in bits takes a third of the time of exp."""

TILE_ELEMENTS = 128 * 12 * 512
"""Scores alive at a time, over all heads of a sequence: 3 MB stay in the caches."""

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
    """Rows of one sequence at a time, the query heads of a key head stacked; columns last.

    A tile of queries is (KV, D, H / KV * rows), keys and values are (KV, D, T): what is narrow
    comes first, so that every product writes long rows.
    """

    def __init__(self, q: Tensor, k: Tensor) -> None:
        _, self.length, heads, _ = q.shape
        self.kv, self.group = k.shape[2], heads // k.shape[2]
        self.rows = max(1, min(self.length, TILE_ELEMENTS // (heads * self.length)))
        self.mask = torch.full((self.rows, self.rows), -math.inf).triu_(1)
        self.type = q.dtype

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.length, self.rows):
            yield start, min(start + self.rows, self.length)

    def buffer(self) -> Tensor:
        """Room for the scores of a tile: fresh pages for every tile would cost as much as they."""
        return torch.empty(self.kv * self.group * self.rows * self.length, dtype=self.type)

    def take(self, x: Tensor, start: int, end: int) -> Tensor:
        """(T, H, D) -> (KV, D, H / KV * rows)."""
        return x[start:end].unflatten(1, (self.kv, -1)).permute(1, 3, 2, 0).flatten(2)

    def put(self, x: Tensor, start: int, end: int, tile: Tensor) -> None:
        """Inverse of `take`."""
        rows = tile.unflatten(2, (self.group, end - start)).permute(3, 0, 2, 1)
        x[start:end].unflatten(1, (self.kv, self.group)).copy_(rows)

    def product(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        """a^T b in float32: (KV, D, n), (KV, D, m) -> (KV, n, m)."""
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
        for qb, kb, vb, ob in zip(q, k, v, out, strict=True):
            kt, vt = kb.permute(1, 2, 0).contiguous(), vb.permute(1, 2, 0).contiguous()
            for start, end in tiles.spans():
                z = tiles.scores(tiles.take(qb, start, end), kt[..., :end], out=room)
                largest = z.amax(dim=-1, keepdim=True)
                total = z.sub_(largest).exp2_().sum(dim=-1, keepdim=True)
                y = torch.bmm(vt[..., :end], z.to(tiles.type).mT)
                tiles.put(ob, start, end, y.div_(total.mT))
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
        for b in range(q.shape[0]):
            kt, vt = k[b].permute(1, 2, 0).contiguous(), v[b].permute(1, 2, 0).contiguous()
            dkt, dvt = torch.zeros_like(kt, dtype=torch.float32), torch.zeros_like(vt).float()
            for start, end in tiles.spans():
                qt, gt = tiles.take(q[b], start, end), tiles.take(grads[0][b], start, end)
                p = tiles.scores(qt, kt[..., :end], out=room).sub_(next(normalisers)).exp2_()
                dvt[..., :end] += torch.bmm(gt, p.to(tiles.type))
                dz = tiles.product(gt, vt[..., :end], out=more)
                dz = dz.sub_(tiles.take(delta[b], start, end).mT).mul_(p).to(tiles.type)
                dkt[..., :end] += torch.bmm(qt, dz)
                tiles.put(dq[b], start, end, torch.bmm(kt[..., :end], dz.mT))
            dk[b], dv[b] = dkt.permute(2, 0, 1), dvt.permute(2, 0, 1)
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


class _AdaptedLinear(torch.autograd.Function):
    """No gradient of W; of the dropout, one byte an element is kept until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float
    ) -> Tensor:
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.type, ctx.scale = x.dtype, scale / (1 - dropout)
        with torch.autocast(device, enabled=False):
            rows, weight, a, b = (t.to(kind) for t in (x.flatten(0, -2), weight, a, b))
            kept = None
            if dropout:  # drawn as F.dropout draws: a seed means the same with either
                kept = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout)
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
