"""The decoder and its loss as published code computes them: what `train_step.py` measures against.

The same function as `relora_core.model.Decoder`, computed plainly: full float32 logits,
cross-entropy over the transposed (B, V, T) view, an additive T x T mask, keys and values repeated
for every query head, LoRA as dropout and two products.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_core.config import ModelConfig


class PlainLinear(nn.Module):
    """W x, or W x + (alpha / r) B A dropout(x) with W frozen."""

    def __init__(self, out_features: int, in_features: int, *, r: int = 0, dropout: float) -> None:
        super().__init__()
        bound = in_features**-0.5
        drawn = torch.empty(out_features, in_features).uniform_(-bound, bound)
        self.weight = nn.Parameter(drawn, requires_grad=r == 0)
        self.dropout, self.scale = nn.Dropout(dropout), 32 / max(r, 1)
        self.lora_A = nn.Linear(in_features, r, bias=False) if r else None
        self.lora_B = nn.Linear(r, out_features, bias=False) if r else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.lora_B(self.lora_A(self.dropout(x))) * self.scale


class PlainNorm(nn.Module):
    """x / rms(x) times a weight."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotation_table(head_dim: int, length: int, *, theta: float) -> Tensor:
    """(length, head_dim / 2) complex rotations."""
    frequency = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(length).float(), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (B, T, heads, head_dim), adjacent pairs rotated."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[: x.shape[1], None]).flatten(3).type_as(x)


class PlainBlock(nn.Module):
    """h = x + Attention(norm(x)); h + SwiGLU(norm(h))."""

    def __init__(self, config: ModelConfig, *, r: int, dropout: float) -> None:
        super().__init__()
        d, hidden = config.d_model, config.d_ff
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        kv = d // config.n_heads * config.n_kv_heads
        shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
        shapes |= {"w_0": (hidden, d), "w_1": (hidden, d), "w_2": (d, hidden)}
        linears = {k: PlainLinear(*s, r=r, dropout=dropout) for k, s in shapes.items()}
        self.linears = nn.ModuleDict(linears)
        self.attention_norm = PlainNorm(d, eps=config.norm_eps)
        self.swiglu_norm = PlainNorm(d, eps=config.norm_eps)

    def attend(self, x: Tensor, *, mask: Tensor, table: Tensor) -> Tensor:
        heads = {name: self.linears[name](x) for name in "qkv"}
        q = rotate(heads["q"].unflatten(-1, (self.n_heads, -1)), table)
        k = rotate(heads["k"].unflatten(-1, (self.n_kv_heads, -1)), table)
        v = heads["v"].unflatten(-1, (self.n_kv_heads, -1))
        groups = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask
        y = scores.softmax(dim=-1) @ v
        return self.linears["o"](y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, *, mask: Tensor, table: Tensor) -> Tensor:
        h = x + self.attend(self.attention_norm(x), mask=mask, table=table)
        y = self.swiglu_norm(h)
        gate = F.silu(self.linears["w_0"](y)) * self.linears["w_1"](y)
        return h + self.linears["w_2"](gate)


class PlainDecoder(nn.Module):
    """forward(ids, labels) gives the mean cross-entropy in nats; r > 0 adds adapters."""

    table: Tensor

    def __init__(self, config: ModelConfig, *, r: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embedding_proj = nn.Embedding(config.vocab_size, config.d_model)
        blocks = (PlainBlock(config, r=r, dropout=dropout) for _ in range(config.n_layers))
        self.layers = nn.ModuleList(blocks)
        self.output_norm = PlainNorm(config.d_model, eps=config.norm_eps)
        self.de_embedding_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)
        head_dim = config.d_model // config.n_heads
        table = rotation_table(head_dim, config.max_seq_len, theta=config.rope_theta)
        self.register_buffer("table", table, persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -math.inf, device=ids.device).triu(diagonal=1)
        x = self.embedding_proj(ids)
        for block in self.layers:
            x = block(x, mask=mask, table=self.table)
        logits = self.de_embedding_proj(self.output_norm(x)).float()
        return F.cross_entropy(logits.transpose(1, 2), labels)
