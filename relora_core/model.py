"""The pico-decoder: a pre-norm Llama block with an untied head (Weiss et al. 2025, Table 6).

Parameter names, shapes, initialisation and the order of drawing are pico-decoder's, so that its
weights load here and give its logits. Not for: adapters (`methods/`) or the head's loss
(`loss.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relora_core.config import ModelConfig
from relora_core.graphs import Graphs
from relora_core.head import cce_loss, fused_head_loss
from relora_core.kernels import causal_attention, rms_norm, rotate, swiglu, to_product_type
from relora_core.loss import head_loss, target_log_probs


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times a weight (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class RoPE(nn.Module):
    """Rotates adjacent pairs (2i, 2i+1) by position * theta^(-2i/head_dim) (Su et al. 2021)."""

    table: Tensor

    def __init__(self, head_dim: int, *, max_seq_len: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angle = torch.outer(torch.arange(max_seq_len).float(), frequency)
        # Kept as real pairs: a complex buffer loses its imaginary part in module.to(dtype).
        table = torch.stack((angle.cos(), angle.sin()), dim=-1)  # (max_seq_len, head_dim / 2, 2)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, heads, head_dim), rotated in float32 and cast back."""
        return rotate(x, self.table[: x.shape[1]])


class Attention(nn.Module):
    """Causal attention, grouped key/value heads: query head h reads kv head h // (heads / kv)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.d_model // config.n_heads
        kv = self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.rope = RoPE(self.head_dim, max_seq_len=config.max_seq_len, theta=config.rope_theta)

    def forward(self, x: Tensor) -> Tensor:
        x = to_product_type(x)
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        y = causal_attention(self.rope(q), self.rope(k), v)
        return self.o_proj(y.flatten(-2))


class SwiGLU(nn.Module):
    """w_2(silu(w_0 x) * w_1 x) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w_2 = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = to_product_type(x)
        return self.w_2(swiglu(self.w_0(x), self.w_1(x)))


class Block(nn.Module):
    """h = x + Attention(norm(x)); h + SwiGLU(norm(h))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.swiglu = SwiGLU(config)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.swiglu_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x))
        return h + self.swiglu(self.swiglu_norm(h))


class Decoder(nn.Module):
    """The language model. Weights are drawn from the global generator, as `init_std` says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: it comes from the data")
        self.config = config
        self.embedding_proj = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.output_norm = RMSNorm(config.d_model, config.norm_eps)
        self.de_embedding_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.graphs: Graphs | None = None
        self.cce = False
        if config.init_std is not None:
            for weight in self.parameters():
                if weight.ndim == 2:  # not the norms'
                    nn.init.normal_(weight, std=config.init_std)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C) after the final norm, ready for the head."""
        if ids.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{ids.shape[1]} tokens exceed max_seq_len={self.config.max_seq_len}")
        x = self.embedding_proj(ids)
        if self.graphs is not None and self.training and torch.is_grad_enabled():
            return self.output_norm(self.graphs.run(self.layers, x))
        for block in self.layers:
            x = block(x)
        return self.output_norm(x)

    def logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, V) in float32, all at once: for tests and small inputs only."""
        return self.de_embedding_proj(self.hidden_states(ids)).float()

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def device(self) -> torch.device:
        return self.de_embedding_proj.weight.device

    @property
    def shares_prefixes(self) -> bool:
        return True

    def head(self, precision: str) -> Tensor:
        """The head's weight (V, C) for matmuls in `precision`, fp32 or bf16."""
        weight = self.de_embedding_proj.weight.detach()
        return weight.bfloat16() if precision == "bf16" else weight

    def log_probs(
        self, ids: Tensor, at: Tensor, targets: Tensor, *, precision: str = "fp32"
    ) -> Tensor:
        """As `evals.base.LanguageModel`: only positions that are asked for reach the head."""
        return target_log_probs(self.hidden_states(ids)[at], self.head(precision), targets)

    def forward(self, ids: Tensor, labels: Tensor, parts: int = 1) -> Tensor:
        """Mean cross-entropy in nats of labels (B, T) given ids (B, T), a float32 scalar.

        Over `parts`, the passes of a step, so that the loss of the step is their sum.
        """
        hidden, weight = self.hidden_states(ids).flatten(0, 1), self.de_embedding_proj.weight
        if self.cce and hidden.requires_grad:
            return cce_loss(hidden, weight, labels.flatten(), parts=parts)
        if self.graphs is not None and hidden.device.type == "cuda" and hidden.requires_grad:
            return fused_head_loss(hidden, weight, labels.flatten(), parts=parts)
        return head_loss(hidden, weight, labels.flatten()) / parts
