"""Decoders of our shape that others would train: Hugging Face's, and one as nanoGPT is written."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora_core.config import ModelConfig


def build_llama(model: ModelConfig, *, attention: str) -> Any:
    """LlamaForCausalLM, freshly drawn; `attention` is transformers' name of it."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds, which others need not wait

    shape: Any = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=model.max_seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=attention,  # type: ignore[reportCallIssue]
    )
    return LlamaForCausalLM(shape)


class SimpleBlock(nn.Module):
    """x + Attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        d, self.heads, self.kv_heads = model.d_model, model.n_heads, model.n_kv_heads
        self.head = d // model.n_heads
        self.qkv = nn.Linear(d, d + 2 * self.kv_heads * self.head, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, 2 * model.d_ff, bias=False)
        self.down = nn.Linear(model.d_ff, d, bias=False)
        self.norm_1 = nn.RMSNorm(d, eps=model.norm_eps)
        self.norm_2 = nn.RMSNorm(d, eps=model.norm_eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, heads, T, D), its halves turned by angles (T, D / 2)."""
        one, two = x.float().chunk(2, dim=-1)
        return torch.cat((one * cos - two * sin, one * sin + two * cos), dim=-1).type_as(x)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        sizes = [n * self.head for n in (self.heads, self.kv_heads, self.kv_heads)]
        parts = self.qkv(self.norm_1(x)).split(sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in parts)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class SimpleDecoder(nn.Module):
    """Pre-norm blocks, all logits at once, torch's cross-entropy; forward gives the mean in nats.

    As many weights and products as `relora_core.model.Decoder` has.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(SimpleBlock(model) for _ in range(model.n_layers))
        self.norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        self.head = nn.Linear(model.d_model, model.vocab_size, bias=False)
        size = model.d_model // model.n_heads
        frequency = model.rope_theta ** -(torch.arange(0, size, 2) / size)
        angle = torch.outer(torch.arange(model.max_seq_len), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids and labels (B, T)."""
        x, length = self.embedding(ids), ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())
