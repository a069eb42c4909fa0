"""The head's loss without the full (tokens, vocabulary) logits, and the log-probs that evals need.

At d_model 96 and 50,304 ids the head is most of the work and nearly all of the memory, so logits
are made for a few rows at a time, and the gradient of a chunk is taken while its logits are still
there. `torch.nn.functional.linear_cross_entropy` of torch 2.13 is not used: its scalar loss
accumulates in the input's type and is wrong in bfloat16 (8.00 where float64 says 10.85).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 128 * 50304, "cuda": 8192 * 50304}
"""Logits alive at a time: 26 MB stay near the CPU's caches; a GPU wants larger matmuls."""

LOG_PROB_BLOCK = {"cpu": (512, 1024), "cuda": (8192, 50304)}
"""Rows and columns of logits alive at a time where no gradient is wanted."""


def _chunk_rows(weight: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cpu"])
    return max(1, elements // weight.shape[0])


@contextlib.contextmanager
def _reduced_matmuls(enabled: bool) -> Iterator[None]:
    """bf16 (CPU) or TF32 (CUDA) products with float32 storage and sums, for the head alone."""
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T; both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, grad: bool) -> Tensor:
        reduced = torch.is_autocast_enabled(hidden.device.type)
        rows, total = _chunk_rows(weight), hidden.shape[0]
        w = weight.detach().float()
        d_hidden = torch.empty_like(hidden, dtype=torch.float32) if grad else None
        d_weight = torch.zeros_like(w) if grad and weight.requires_grad else None
        # float64: thousands of float32 terms would lose the last digits of the mean.
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False), _reduced_matmuls(reduced):
            for start in range(0, total, rows):
                h, y = hidden[start : start + rows].float(), targets[start : start + rows]
                logits = h @ w.T
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                picked = logits.gather(1, y[:, None])
                loss += (normaliser - picked).double().sum()
                if d_hidden is None:
                    continue
                error = logits.sub_(normaliser).exp_()  # softmax, in place of the logits
                error.scatter_add_(1, y[:, None], torch.full_like(picked, -1.0))
                error.div_(total)
                torch.mm(error, w, out=d_hidden[start : start + rows])
                if d_weight is not None:
                    d_weight.addmm_(error.T, h)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.types = hidden.dtype, weight.dtype
        return (loss / total).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        scale = grads[0]
        d_weight = None if d_weight is None else (d_weight * scale).to(weight_type)
        return (d_hidden * scale).to(hidden_type), d_weight, None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean over N of -log softmax(hidden @ weight.T)[targets], in nats: a float32 scalar.

    hidden (N, C), weight (V, C), targets (N,) int64. Logits, softmax and gradients are float32;
    under autocast the matmuls take bf16 inputs (relative gradient error about 1e-4).
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(hidden, weight, targets, needs_grad)  # type: ignore[assignment]
    return loss


@torch.no_grad()
def target_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[targets]: (N, C), (V, C), (N,) -> (N,) float32.

    Blocks of logits are reduced to their log-sum-exp while they are in the cache: no row of V
    logits ever exists, and on a CPU this is 2 to 3 times as fast as chunks of rows.
    """
    rows, columns = LOG_PROB_BLOCK.get(hidden.device.type, LOG_PROB_BLOCK["cpu"])
    out = torch.empty(hidden.shape[0], device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, hidden.shape[0], rows):
            h = hidden[start : start + rows].float()
            parts = []
            for first in range(0, weight.shape[0], columns):
                block = h @ weight[first : first + columns].float().T
                largest = block.amax(dim=1, keepdim=True)
                total = block.sub_(largest).exp_().sum(dim=1)
                parts.append(total.log_() + largest[:, 0])
            picked = (h * weight[targets[start : start + rows]].float()).sum(dim=1)
            out[start : start + rows] = picked - torch.stack(parts).logsumexp(dim=0)
    return out
