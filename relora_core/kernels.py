"""What a layer computes between its products, and backwards. Not for: what it means (`model`).

On a CPU in native code (`native`) where that can be built; torch's own operations take an attention
of head_dim 8 five times as long, and read and write what lies between them. Tests hold both against
float64 and plain autograd.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from relora_core import native
from relora_core.config import ConfigError, RunConfig
from relora_core.dropout import GOLDEN, KEEP_ALL, Dropout
from relora_core.native_check import LANES

LOG2E = math.log2(math.e)
"""exp2 of scores and logits in bits takes a third of the time of exp."""

HEAD_SIZES = (8, 16, 32, 64)
"""Columns of a head that native.cpp has code for."""


def is_native(*tensors: Tensor, types: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether native code can take these tensors, all of one type; no graph can hold it."""
    kind = tensors[0].dtype
    return (
        kind in types
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" and x.dtype == kind for x in tensors)
        and native.available()
    )


# attention --------------------------------------------------------------------------------------
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt D) v over earlier positions: (B, T, H, D), twice (B, T, KV, D).

    Query head h reads key head h // (H / KV). The result has v's type; on a CPU bf16 is computed
    in float32, as casts of scores cost what products in bf16 save.
    """
    if q.device.type == "cuda":
        return fused_attention(q, k, v)
    kind = v.dtype
    if q.device.type == "cpu" and kind == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()
    if q.shape[3] in HEAD_SIZES and is_native(q, k, v):
        y = _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous())
        return y.to(kind)  # type: ignore[union-attr]
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).to(kind)


FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""torch's kernels on a GPU that hold no T x T scores; the one left out takes GBs at T = 2048."""


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """As `causal_attention`, on a GPU; `mask` (B, 1, T, T) is added in the place of the causal one.

    RuntimeError where no kernel of `FUSED` takes these: `attention_names` says so before a run.
    """
    if not _takes_groups(q.dtype, masked=mask is not None):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped, causal = q.shape[1] != k.shape[1], mask is None
    with sdpa_kernel(FUSED):
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    return y.transpose(1, 2)


def _takes_groups(kind: torch.dtype, *, masked: bool = False) -> bool:
    """Whether a fused kernel reads a key head for several query heads: in 16 bits, without a mask.

    With `enable_gqa` in float32 torch 2.13 has none left but the one that writes all scores.
    """
    return kind in (torch.bfloat16, torch.float16) and not masked


def attention_names(config: RunConfig, *, device: torch.device) -> dict[str, str]:
    """Precision -> kernel that torch takes for the run's attention on this GPU; empty on a CPU.

    float32 is always among them: evals and the probe of restarts compute in it. ConfigError where
    every fused kernel refuses the shape.
    """
    if device.type != "cuda":
        return {}
    kinds = {"fp32": torch.float32}
    if config.train.precision == "bf16":
        kinds["bf16"] = torch.bfloat16
    return {name: _attention_name(config, kind, device=device) for name, kind in kinds.items()}


def _attention_name(config: RunConfig, kind: torch.dtype, *, device: torch.device) -> str:
    model = config.model
    size, n_kv = model.d_model // model.n_heads, model.n_kv_heads
    n_kv = n_kv if _takes_groups(kind) else model.n_heads
    q, k = (
        torch.empty(1, n, config.data.seq_len, size, dtype=kind, device=device, requires_grad=True)
        for n in (model.n_heads, n_kv)
    )
    with sdpa_kernel(FUSED):
        grouped = n_kv != model.n_heads
        choice = torch._fused_sdp_choice(  # type: ignore[attr-defined]
            q, k, k, is_causal=True, enable_gqa=grouped
        )
    chosen = SDPBackend(choice)
    if chosen not in FUSED:
        raise ConfigError(
            f"model.d_model / model.n_heads must be a head that a fused attention kernel of this "
            f"GPU takes, got {size} columns in {kind}; a multiple of 8, at most 128, fits all"
        )
    return chosen.name.removesuffix("_ATTENTION").lower()


class _Attention(torch.autograd.Function):
    """Saves the log of each row's sum; the backward pass makes the probabilities anew."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length, heads, size = q.shape
        ctx.sizes = batch, length, heads, k.shape[2], size
        out, sums = torch.empty_like(q), q.new_empty(batch, heads, length)
        missing = native.call("attention", q, k, v, out, sums, *ctx.sizes)
        assert not missing, f"native.cpp has no code for heads of {size} columns"
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, sums = ctx.saved_tensors
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        upstream = grads[0].contiguous()
        native.call("attention_back", q, k, v, out, sums, upstream, *gradients, *ctx.sizes)
        return gradients


def to_product_type(x: Tensor) -> Tensor:
    """x as autocast would hand it to a product: once, where several products read it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# between the products ---------------------------------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / rms(x) over the last dimension in float32, cast back, times weight."""
    if is_native(x, weight):
        return _RMSNorm.apply(x.contiguous(), weight, eps)  # type: ignore[return-value]
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).type_as(x) * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        native.call("rms_norm", x, weight, out, inverse, inverse.numel(), x.shape[-1], eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        gradients = torch.empty_like(x), torch.empty_like(weight)
        upstream, sizes = grads[0].contiguous(), (inverse.numel(), x.shape[-1])
        native.call("rms_norm_back", x, weight, inverse, upstream, *gradients, *sizes)
        return *gradients, None


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) of x (B, T, heads, D) turned by table (T, D / 2, 2), cosine and sine.

    In float32; cast back but for bf16 on a CPU, where attention takes float32.
    """
    if is_native(table) and x.dtype in (torch.float32, torch.bfloat16):
        return _Rotate.apply(x.float().contiguous(), table)  # type: ignore[return-value]
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()
    if torch.compiler.is_compiling():  # no compiler fuses complex numbers
        (cos, sin), (one, two) = table.float()[:, None].unbind(-1), pairs.unbind(-1)
        turned = torch.stack((one * cos - two * sin, one * sin + two * cos), dim=-1).flatten(-2)
    else:
        rotation = torch.view_as_complex(table.float())[:, None]
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(-2)
    return turned if x.device.type == "cpu" and x.dtype == torch.bfloat16 else turned.type_as(x)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        out = torch.empty_like(x)
        native.call("rotate", x, table, out, *x.shape, 1.0)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        upstream = grads[0].contiguous()
        dx = torch.empty_like(upstream)
        native.call("rotate", upstream, table, dx, *dx.shape, -1.0)  # the inverse turns back
        return dx, None


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * value
    return _SwiGLU.apply(gate, value)  # type: ignore[return-value]


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs alone; plain autograd keeps silu(gate), too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.native = is_native(gate, value, types=(torch.float32, torch.bfloat16))
        if ctx.native:
            gate, value = gate.contiguous(), value.contiguous()
        ctx.save_for_backward(gate, value)
        if not ctx.native:
            return F.silu(gate).mul_(value)
        out = torch.empty_like(gate)
        native.call(f"swiglu_{native.kind(gate)}", gate, value, out, gate.numel())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        if not ctx.native:
            d_gate = torch.ops.aten.silu_backward(grads[0] * value, gate)
            return d_gate, F.silu(gate).mul_(grads[0])
        gradients = torch.empty_like(gate), torch.empty_like(value)
        upstream = grads[0].contiguous()
        name = f"swiglu_back_{native.kind(gate)}"
        native.call(name, gate, value, upstream, *gradients, gate.numel())
        return gradients


def adapted_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scale: float, dropout: Dropout | None
) -> Tensor:
    """W x + scale B A dropout(x) for a frozen W (out, in); A (r, in), B (out, r), x (..., in)."""
    fits = a.shape[1] % LANES == 0 == b.shape[0] % LANES
    kind = _Native if fits and is_native(a, b) and x.device.type == "cpu" else _Plain
    return kind.apply(x, weight, a, b, scale, dropout)  # type: ignore[return-value]


class _Native(torch.autograd.Function):
    """No gradient of W; the dropout is drawn again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: Dropout | None,
    ) -> Tensor:
        rows, weight = to_product_type(x.flatten(0, -2)), to_product_type(weight)
        rows, a, b = rows.contiguous(), a.contiguous(), b.contiguous()
        rank = -(-a.shape[0] // LANES) * LANES
        y, low = rows @ weight.T, a.new_empty(len(rows), rank)
        tokens = max(len(rows) // len(x), 1)
        draw = (0, KEEP_ALL, tokens, 1)
        if dropout:
            scale *= dropout.gain
            before = dropout.first * tokens * rows.shape[1] // 4  # numbers of earlier sequences
            seed = (dropout.seed + GOLDEN * before) % (1 << 64)
            draw = (seed, dropout.cut, tokens, dropout.stride)
        ctx.last = *rows.shape, y.shape[1], a.shape[0], scale, *draw
        native.call(f"adapt_{native.kind(y)}", rows, a, b, y, low, *ctx.last)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.type = x.dtype
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        g = grads[0].flatten(0, -2).to(rows.dtype).contiguous()
        dx = g @ weight if ctx.needs_input_grad[0] else None
        gradients = torch.empty_like(a), torch.empty_like(b)
        native.call(f"adapt_back_{native.kind(g)}", rows, a, b, low, g, dx, *gradients, *ctx.last)
        if dx is not None:
            dx = dx.unflatten(0, grads[0].shape[:-1]).to(ctx.type)
        return dx, None, *gradients, None, None


class _Plain(torch.autograd.Function):
    """No gradient of W; of the dropout, one byte an element is kept until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: Dropout | None,
    ) -> Tensor:
        ctx.type = x.dtype
        rows, weight, a, b = map(to_product_type, (x.flatten(0, -2), weight, a, b))
        with torch.autocast(x.device.type, enabled=False):
            mask = dropout.mask(x).view(rows.shape) if dropout else None
            ctx.scale = scale * dropout.gain if dropout else scale
            low = (rows if mask is None else rows * mask) @ a.T
            y = (rows @ weight.T).addmm_(low, b.T, alpha=ctx.scale)
        ctx.save_for_backward(rows, weight, a, b, low, mask)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low, mask = ctx.saved_tensors
        g = grads[0].flatten(0, -2).to(rows.dtype)
        d_b = (g.T @ low).mul_(ctx.scale)
        d_low = (g @ b).mul_(ctx.scale)
        d_a = d_low.T @ (rows if mask is None else rows * mask)
        if not ctx.needs_input_grad[0]:
            return None, None, d_a, d_b, None, None
        dx = g @ weight
        if mask is None:
            dx.addmm_(d_low, a)
        else:
            dx.add_((d_low @ a).mul_(mask))
        return dx.unflatten(0, grads[0].shape[:-1]).to(ctx.type), None, d_a, d_b, None, None
