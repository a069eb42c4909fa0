"""The head's loss on a GPU: `loss.head_loss` in chunks of rows, with a compiled softmax.

An operator of torch, `relora::head_loss`, so that graphs may hold it. A logit in bf16 takes 12
bytes of memory traffic: the product writes 2, the softmax reads 2 for its sums (4, where a compiler
does not join the two), reads 2 and writes 2, and the products of the two gradients read 2 each.
`loss.py` takes 42 on a GPU. Not for: a CPU, whose cache holds smaller blocks (`loss.py`), nor
losses without gradients.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_core.config import ConfigError

CCE = "cut_cross_entropy"
"""Module of the package cut-cross-entropy: a user's own install, under Apple's licence."""
CHUNK_ROWS = 8192
"""Rows of logits in memory at a time: 0.8 GB at 50,304 ids in bf16."""


def fused_head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, parts: int = 1) -> Tensor:
    """As `loss.head_loss`, over `parts`: a step's passes add up to its mean, and no gradient has to
    be divided later. float32 scalar, for training alone: gradients are made in the forward pass."""
    half = torch.is_autocast_enabled(hidden.device.type)
    loss, _, _ = torch.ops.relora.head_loss(
        hidden, weight, targets, parts, half, hidden.requires_grad, weight.requires_grad
    )
    return loss


def choose(asked: str, *, device: torch.device, resumed: bool = False) -> str:
    """`chunked` or `cce`, as asked for. ConfigError where that is impossible; a resumed run goes on
    without, as a line on stderr says."""
    if asked == "chunked":
        return asked
    problem = None if device.type == "cuda" else "no GPU"
    if torch.are_deterministic_algorithms_enabled():
        problem = "runtime.deterministic=true"
    if importlib.util.find_spec(CCE) is None:
        problem = "not installed: pip install cut-cross-entropy, whose licence is Apple's own"
    if problem is None:
        return asked
    if not resumed:
        raise ConfigError(f"runtime.head must be chunked here ({problem}), got {asked!r}")
    print(
        f"warning: the last digits will differ without runtime.head=cce: {problem}", file=sys.stderr
    )
    return "chunked"


def cce_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, parts: int = 1) -> Tensor:
    """As `fused_head_loss`, in bf16, by cut-cross-entropy (Wijmans et al. 2025, arXiv 2411.09009).

    Of its ways the one for pretraining: compensated sums, and no gradient of the weight left out as
    too small. It reads the device once a pass.
    """
    half = (x.bfloat16() for x in (hidden, weight))
    with torch.autocast(hidden.device.type, enabled=False):
        loss = importlib.import_module(CCE).linear_cross_entropy(
            *half, targets, impl="cce_kahan_full_c"
        )
    return loss.float() / parts


@torch.library.custom_op("relora::head_loss", mutates_args=())
def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    parts: int,
    half: bool,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean cross-entropy / parts, its gradient by hidden (N, C), by weight (V, C)), all float32; a
    gradient that is not asked for is empty. With `half` products take bf16 and give float32.

    No sum depends on the order in which a GPU's threads get there.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        h, own = hidden.float(), weight[targets].float()
        w = weight.to(torch.bfloat16 if half else torch.float32)
        # The target's logit in float32: no digit is lost where its probability is near 1.
        picked = (h * own).sum(dim=1)
        odds = torch.empty_like(picked)
        d_hidden, d_weight = _gradients(hidden, weight, hidden_grad, weight_grad)
        share = 1 / (len(h) * parts)
        rows = -(-len(h) // -(-len(h) // CHUNK_ROWS))  # of equal chunks, for one compiled shape
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            z = h[part].to(w.dtype) @ w.T
            odds[part], total = _compiled()(z, targets[part])
            odds[part] -= picked[part]
            others = odds[part].sigmoid()[:, None] * share  # of the step: all ids but the target
            if hidden_grad:
                d_hidden[part] = _product(z, w).div_(total).sub_(own[part]).mul_(others)
            if weight_grad:
                z.scatter_(1, targets[part, None], -total.to(z.dtype))  # one entry of each row
                product = _product(z.T, (h[part] * (others / total)).to(w.dtype))
                d_weight = d_weight.add_(product) if start else product
        loss = F.softplus(odds, threshold=80).double().mean() / parts
    return loss.float(), d_hidden, d_weight


def _gradients(
    hidden: Tensor, weight: Tensor, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if hidden_grad else (0,), dtype=torch.float32),
        weight.new_empty(weight.shape if weight_grad else (0,), dtype=torch.float32),
    )


@head_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    parts: int,
    half: bool,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _gradients(hidden, weight, hidden_grad, weight_grad)
    return hidden.new_empty((), dtype=torch.float32), *gradients


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.types = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The pass over the weight's gradient is 12 C / N bytes per logit, a thousandth of the rest."""
    if loss is None:
        return (None,) * 7
    made = (g * loss if g.numel() else None for g in ctx.saved_tensors)
    d_hidden, d_weight = (g if g is None else g.to(t) for g, t in zip(made, ctx.types, strict=True))
    return d_hidden, d_weight, None, None, None, None, None


torch.library.register_autograd(
    "relora::head_loss", _scale_gradients, setup_context=_keep_gradients
)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and given in float32."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(exponentials_, fullgraph=True, dynamic=False)


def exponentials_(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """z (R, V), logits in nats, becomes their exponentials over the largest, 0 at the targets.

    Returns the log of the sum of the others' exponentials (R,) and their sum as they are in z,
    (R, 1). Without the target no digit of p - 1 is lost where p is near 1, and entries near 1 lose
    none that small probabilities would.
    """
    own = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    others = z.float().masked_fill(own, -1e38)
    largest = others.amax(dim=1, keepdim=True)
    total = (others - largest).exp().sum(dim=1, keepdim=True)
    z.copy_((others - largest).exp())
    return (largest + total.log())[:, 0], total
